"""The plots of a report: what is drawn of a run, and in which words."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpilot.display import counted, size
from fedpilot.report import svg, words
from fedpilot.report.reading import MIXED, Group, Round, Run
from fedpilot.report.svg import Bar, Figure, Line, Table

FACT_NAMES = {"aggregation_error": "Aggregation error", "epsilon": "Privacy spent (epsilon)"}
FACT_SAYS = {
    "aggregation_error": "How far the server's update is from the clients' exact mean, relative to that mean.",
    "epsilon": "The largest epsilon that any client has spent until the round.",
}
MOST_BARS = 24
"""Budgets beyond which each tier has one bar."""
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))

# --- over rounds -----------------------------------------------------------------------------------------------------


def course(groups: Sequence[Group]) -> list[Figure]:
    """The metric over rounds, bytes and seconds; losses; bytes; what methods say of themselves."""
    metric = groups[0].first.goal.metric
    same = [group for group in groups if group.first.goal.metric == metric]
    figures: list[Figure | None] = [
        _over(
            groups, same, "metric", metric.capitalize(), _rounds, _metric(metric), "round", f"{_mean(metric)} by round."
        ),
        _over(
            *(groups, groups, "loss", "Training loss", _rounds, _train_loss, "round"),
            "Mean loss of the clients' local updates, weighted by their examples.",
        ),
    ]
    if metric != "loss":
        text = "Mean loss of the evaluated model."
        figures.append(
            _over(groups, groups, "eval-loss", "Loss of the evaluation", _rounds, _metric("loss"), "round", text)
        )
    top = max(sum(run.total_bytes()) for group in groups for run in group.runs)
    divisor, unit = next((entry for entry in UNITS if top >= entry[0]), UNITS[-1])
    figures += [
        _over(
            *(groups, same, "bytes", f"{metric.capitalize()} over bytes", _spent(_bytes, divisor), _metric(metric)),
            *(f"{unit} down and up", f"{_mean(metric)} by what was sent in both directions until then."),
        ),
        _seconds(groups, same, metric),
        _over(
            *(groups, groups, "sent", f"Bytes by round, {unit}", _rounds, _spent(_bytes, divisor), "round"),
            "Sent in both directions until the end of each round.",
            from_zero=True,
        ),
    ]
    for form in sorted({form for group in same for form in group.forms}):
        title, y_of = f"{metric.capitalize()}, {form}", _metric(f"{form}_{metric}")
        figures.append(
            _over(
                *(groups, same, f"form-{form}", title, _rounds, y_of, "round"),
                f"{metric.capitalize()} of a further form of what the same runs deploy, called {form}.",
            )
        )
    facts = sorted({name for group in groups for run in group.runs for name in _plain_facts(run)})
    for number, fact in enumerate(facts):
        title = FACT_NAMES.get(fact, fact.replace("_", " ").capitalize())
        text = FACT_SAYS.get(fact, f"{fact}, as the method records it after each round.")
        figures.append(
            _over(groups, groups, f"fact{number}", title, _rounds, _fact(fact), "round", text, from_zero=True)
        )
    return [figure for figure in figures if figure is not None]


Read = Callable[[Run], Mapping[int, float]]
"""Run -> round -> number; rounds that have none are not there."""


def _rounds(run: Run) -> Mapping[int, float]:
    return {line.round: line.round for line in run.rounds}


def _mean(metric: str) -> str:
    return f"{metric.capitalize()} of the evaluated model"


def _metric(name: str) -> Read:
    return lambda run: {line.round: line.metrics[name] for line in run.rounds if name in line.metrics}


def _plain_facts(run: Run) -> set[str]:
    return {name for line in run.rounds for name in line.facts if "/" not in name}


def _fact(name: str) -> Read:
    return lambda run: {line.round: line.facts[name] for line in run.rounds if name in line.facts}


def _train_loss(run: Run) -> Mapping[int, float]:
    return {line.round: line.train_loss for line in run.rounds if line.train_loss is not None}


def _bytes(line: Round) -> float:
    return line.bytes_down + line.bytes_up


def _spent(cost: Callable[[Round], float], divisor: float = 1) -> Read:
    def read(run: Run) -> Mapping[int, float]:
        total, result = 0.0, {}
        for line in run.rounds:
            total += cost(line)
            result[line.round] = total / divisor
        return result

    return read


def _seconds(groups: Sequence[Group], same: Sequence[Group], metric: str) -> Figure | None:
    """Over predicted seconds where all are known, else over measured ones."""
    predicted = all(words.predicted_seconds(run) is not None for group in groups for run in group.runs)
    predicted = predicted and any(line.predicted_s for group in groups for run in group.runs for line in run.rounds)

    def cost(line: Round) -> float:
        return (line.predicted_s or 0.0) if predicted else line.trained_s

    kind = "predicted" if predicted else "measured"
    more = "" if predicted else " Speeds (clients.flops_per_second) are not given, so nothing is predicted."
    text = f"{_mean(metric)} by {kind} seconds of training; a round lasts as long as its slowest client.{more}"
    title = f"{metric.capitalize()} over {kind} seconds"
    return _over(groups, same, "seconds", title, _spent(cost), _metric(metric), f"{kind} seconds", text)


def _over(
    groups: Sequence[Group],
    drawn: Sequence[Group],
    ident: str,
    title: str,
    x_of: Read,
    y_of: Read,
    x_name: str,
    description: str,
    *,
    from_zero: bool = False,
) -> Figure | None:
    """A line a group over the rounds that all its seeds have; ``None`` where there is nothing to draw."""
    series = []
    for index, group in enumerate(groups):
        if group not in drawn:
            continue
        xs, ys = [x_of(run) for run in group.runs], [y_of(run) for run in group.runs]
        common = sorted(set.intersection(*({*x} & {*y} for x, y in zip(xs, ys, strict=True))))
        means = [group.over_seeds(y[round] for y in ys) for round in common]
        places = [float(np.mean([x[round] for x in xs])) for round in common]
        known = [(place, mean) for place, mean in zip(places, means, strict=True) if mean is not None]
        if any(math.isfinite(mean.mean) for _, mean in known):
            line = Line(
                group.label,
                [place for place, _ in known],
                [mean.mean for _, mean in known],
                [mean.sd if math.isfinite(mean.sd) else 0.0 for _, mean in known] if len(group.runs) > 1 else (),
                index,
            )
            series.append(line)
    if not series:
        return None
    return svg.lines(
        *(f"c-{ident}", title, f"{description} {_in_words(series)}", series),
        x_name=x_name,
        show_x="{:.0f}".format if x_name == "round" else "{:.4g}".format,
        show_y="{:.4g}".format,
        from_zero=from_zero,
        whole=x_name == "round",
    )


def _in_words(series: Sequence[Line]) -> str:
    """First and last values: the plot for those who do not see it."""
    parts = []
    for line in series[:4]:
        known = [value for value in line.y if math.isfinite(value)]
        parts.append(f"{line.name} from {known[0]:.4g} to {known[-1]:.4g}")
    more = f"; {len(series) - 4} more" if len(series) > 4 else ""
    return f"{'; '.join(parts)}{more}."


# --- of one run -------------------------------------------------------------------------------------------------------


def _order(run: Run) -> list[int]:
    """Clients in their order, or by tier where there are too many to be named beside a map."""
    clients = list(range(len(run.clients)))
    if len(clients) <= svg.MOST_ROW_NAMES:
        return clients
    place = {tier: number for number, tier in enumerate(dict.fromkeys(client.tier for client in run.clients))}
    return sorted(clients, key=lambda client: place[run.clients[client].tier])


def blocks_map(ident: str, run: Run) -> Figure | None:
    """Clients by blocks: how often each was trained, with the scores behind it."""
    if not run.clients or not run.num_blocks:
        return None
    order, tally = _order(run), run.tally
    never = (tally.left_out > 0) & (tally.asked == 0)
    values = tally.trained.copy()
    values[never] = -1
    mean = tally.mean_value
    ranks = np.where(tally.rank_last > 0, tally.rank_last.astype(float), np.nan)
    further: list[tuple[str, NDArray[np.float64]]] = []
    if np.isfinite(mean).any():
        further = [("score, mean over rounds", mean[order]), ("score, last", tally.value_last[order])]
    if np.isfinite(ranks).any():
        further.append(("rank, last", ranks[order]))
    names = [run.clients[client].name for client in order]
    rows = [_client_row(run, client, mean[client]) for client in order]
    header = [
        *("client", "tier", "budget", "examples", "asked", "delivered", "left out"),
        *("predicted peak", "measured peak", "sent up", "blocks trained (rounds)", "mean score of blocks"),
    ]
    return svg.heat_map(
        f"{ident}-blocks",
        "Who trained which block, and how often",
        f"Rounds in which each of {counted(len(names), 'client')} was asked to train each of "
        f"{counted(run.num_blocks, 'block')}; {int(never.sum())} never fitted. Block 0 is next to the input.",
        values[order],
        names,
        [run.clients[client].tier for client in order],
        [str(block) for block in range(run.num_blocks)],
        unit="rounds",
        column_name="block",
        about=[_about(run, client) for client in order],
        further=further,
        table=Table(header, rows, [run.clients[client].tier for client in order]),
        note="Scores are the values that the allocation maximised within the budget."
        if np.isfinite(mean).any()
        else "This method gives blocks no scores.",
    )


def _about(run: Run, client: int) -> str:
    known, tally = run.clients[client], run.tally
    budget = "" if known.budget_bytes is None else f", {size(known.budget_bytes)}"
    out = f", left out {tally.left_out[client]} times" if tally.left_out[client] else ""
    return f"{known.tier}{budget}; asked in {counted(int(tally.asked[client]), 'round')}{out}"


def _client_row(run: Run, client: int, means: NDArray[np.float64]) -> list[str]:
    known, tally = run.clients[client], run.tally
    ranks = [int(rank) for rank in set(tally.rank_last[client].tolist()) if rank]
    rank = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 and ranks[0] != MIXED else ", mixed ranks"
    trained = runs_of([f"x{times}" if times else "" for times in tally.trained[client].tolist()])
    return [
        known.name,
        known.tier,
        "-" if known.budget_bytes is None else size(known.budget_bytes),
        "-" if known.num_examples is None else str(known.num_examples),
        *(str(int(count[client])) for count in (tally.asked, tally.delivered, tally.left_out)),
        *(size(int(peak[client])) if peak[client] else "-" for peak in (tally.predicted, tally.measured)),
        size(int(tally.bytes_up[client])),
        f"{trained}{rank}" if trained else "none",
        runs_of([f"{value:.3g}" if math.isfinite(value) else "" for value in means.tolist()]) or "-",
    ]


def runs_of(texts: Sequence[str]) -> str:
    """Neighbours that say the same in one word; empty texts are left out.

    >>> runs_of(["", "x2", "x2", "x5"])
    '1-2 x2, 3 x5'
    """
    parts, start = [], 0
    for place in range(1, len(texts) + 1):
        if place < len(texts) and texts[place] == texts[start]:
            continue
        if texts[start]:
            named = str(start) if place - start == 1 else f"{start}-{place - 1}"
            parts.append(f"{named} {texts[start]}")
        start = place
    return ", ".join(parts)


def budgets(ident: str, run: Run) -> Figure | None:
    """Budget, predicted and measured peak of each tier; tiers of many budgets by the fullest client."""
    bars: dict[tuple[str, int], list[int]] = {}
    for client, known in enumerate(run.clients):
        if known.budget_bytes is not None:
            bars.setdefault((known.tier, known.budget_bytes), []).append(client)
    if not bars:
        return None
    if len(bars) > MOST_BARS:
        bars = _fullest(bars, run)
    drawn, trained = [], 0
    for (tier, budget), clients in bars.items():
        predicted = max(int(run.tally.predicted[client]) for client in clients)
        measured = max(int(run.tally.measured[client]) for client in clients)
        trained += int(measured > 0)
        drawn.append(Bar(tier, budget, predicted or None, measured or None))
    sits = [bar.name for bar in drawn if bar.predicted is None]
    note = f"Nobody trained in {words.named(sits)}." if sits else ""
    if not trained and len(sits) < len(drawn):
        note = f"{note} Peaks were not measured in this run.".strip()
    return svg.budget_bars(
        f"{ident}-memory",
        "Memory: budget, predicted and measured peak",
        "The highest peak of any client of each tier, predicted before a round and measured in it, beside the budget.",
        drawn,
        size,
        note,
    )


def _fullest(bars: Mapping[tuple[str, int], list[int]], run: Run) -> dict[tuple[str, int], list[int]]:
    """Of each tier, the budget that is used most; where every client has a budget of its own."""

    def share(entry: tuple[tuple[str, int], list[int]]) -> float:
        (_, budget), clients = entry
        return max(int(run.tally.predicted[client]) for client in clients) / budget

    by_tier: dict[str, list[tuple[tuple[str, int], list[int]]]] = {}
    for entry in bars.items():
        by_tier.setdefault(entry[0][0], []).append(entry)
    return dict(max(entries, key=share) for entries in by_tier.values())


def coverage(ident: str, run: Run) -> Figure | None:
    """Which share of the sampled clients trained each block."""
    tally = run.tally
    sampled = int(tally.asked.sum() + tally.left_out.sum())
    if not run.num_blocks or not sampled:
        return None
    shares = (tally.trained.sum(axis=0) / sampled).tolist()
    clients = (tally.trained > 0).sum(axis=0).tolist()
    rows, said = [], []
    for block, share in enumerate(shares):
        rounds, gap = int(tally.block_rounds[block]), int(tally.block_gap[block])
        row = [str(block), f"{100 * share:.1f}%", str(clients[block]), f"{rounds} of {run.last_round}", str(gap)]
        rows.append(row)
        said.append(
            f"block {block}\ntrained by {row[1]} of the sampled clients\n"
            f"{row[2]} clients ever; in {row[3]} rounds\nlongest pause: {counted(gap, 'round')}"
        )
    header = ["block", "of sampled clients", "clients ever", "rounds with anybody", "longest pause, rounds"]
    return svg.columns(
        f"{ident}-coverage",
        "Coverage of blocks",
        "Share of all sampled clients, over all rounds, that were asked to train each block. "
        f"From {100 * min(shares):.0f}% to {100 * max(shares):.0f}%.",
        shares,
        said,
        Table(header, rows),
        x_name="block (0 is next to the input)",
    )


def split(ident: str, run: Run) -> Figure | None:
    """Clients by classes: how many examples; a domain is a client's name where the split is by domain."""
    if not run.class_names or any(client.counts is None for client in run.clients):
        return None
    order = _order(run)
    values = np.array([run.clients[client].counts for client in order], dtype=np.int64)
    tiers = [run.clients[client].tier for client in order]
    names = [run.clients[client].name for client in order]
    rows = [
        [name, tier, str(line.sum()), *map(str, line)] for name, tier, line in zip(names, tiers, values, strict=True)
    ]
    kind = run.section("partition")
    by = f", divided by column {kind.get('column')}" if kind.get("kind") == "column" else ""
    by = by or (f", divided by {kind['kind']}" if "kind" in kind else "")
    return svg.heat_map(
        f"{ident}-split",
        "Who has what data",
        f"Training examples of each client by class; {values.sum()} in all{by}.",
        values,
        names,
        tiers,
        list(run.class_names),
        unit="examples",
        column_name="class",
        about=[f"{tier}; {int(line.sum())} examples" for tier, line in zip(tiers, values, strict=True)],
        table=Table(["client", "tier", "all", *run.class_names], rows, tiers),
    )


def bytes_by_round(ident: str, run: Run) -> Figure | None:
    """Down and up in each round."""
    lines = [line for line in run.rounds if line.round]
    if not lines:
        return None
    top = max((max(line.bytes_down, line.bytes_up) for line in lines), default=0)
    divisor, unit = next((entry for entry in UNITS if top >= entry[0]), UNITS[-1])
    rounds = [float(line.round) for line in lines]
    series = [
        Line("down", rounds, [line.bytes_down / divisor for line in lines], (), 0),
        Line("up", rounds, [line.bytes_up / divisor for line in lines], (), 1),
    ]
    if any(line.bytes_base for line in lines):
        series.append(Line("of down: base", rounds, [(line.bytes_base or 0) / divisor for line in lines], (), 2))
    figure = svg.lines(
        f"{ident}-bytes",
        f"Bytes of each round, {unit}",
        f"Tensors sent to clients and received from them. {_in_words(series)}",
        series,
        x_name="round",
        show_x="{:.0f}".format,
        show_y="{:.4g}".format,
        from_zero=True,
    )
    return figure.with_legend([(f"key-line key-s{line.index}", line.name) for line in series])


def block_facts(ident: str, run: Run) -> Figure | None:
    """What the method says of each block, after the last round: its global scores."""
    last = next((line for line in reversed(run.rounds) if any("/" in name for name in line.facts)), None)
    if last is None:
        return None
    found: dict[str, dict[int, float]] = {}
    for name, value in last.facts.items():
        kind, _, block = name.partition("/")
        if block.isdigit():
            found.setdefault(kind, {})[int(block)] = value
    if not found:
        return None
    kind, scores = next(iter(found.items()))
    top = max(scores.values())
    if not top > 0:
        return None
    blocks = range(max(run.num_blocks, max(scores) + 1))
    shown = [f"{scores[block]:.4g}" if block in scores else "-" for block in blocks]
    said = [f"block {block}\n{kind}: {text}" for block, text in zip(blocks, shown, strict=True)]
    rows = [[str(block), text] for block, text in zip(blocks, shown, strict=True)]
    return svg.columns(
        f"{ident}-scores",
        f"Global {kind} of blocks",
        f"After round {last.round}, as shares of the largest, which is {top:.4g}: what the next allocation goes by.",
        [max(scores.get(block, 0.0), 0.0) / top for block in blocks],
        said,
        Table(["block", kind], rows),
        x_name="block (0 is next to the input)",
    )
