"""What a terminal shows when a run is over or planned: numbers for people, and tables."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from rich.console import Console
from rich.table import Table

from fedpilot.comparison import Comparison, Line, Standing
from fedpilot.types import LeftOut

MIB = 2**20
MOST_CLIENTS = 60
"""Clients beyond which a table is cut."""


def size(num_bytes: float) -> str:
    """Bytes for people.

    >>> size(12), size(1536), size(230 * 2**20), size(3 * 2**30)
    ('12 B', '1.5 KiB', '230.0 MiB', '3.00 GiB')
    """
    if num_bytes < 2**10:
        return f"{num_bytes:.0f} B"
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / MIB:.1f} MiB" if num_bytes >= MIB else f"{num_bytes / 2**10:.1f} KiB"


def clock(seconds: float) -> str:
    """Seconds for people.

    >>> clock(9.31), clock(75), clock(3700)
    ('9.3 s', '1:15', '1:01:40')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def blocks(numbers: Iterable[int]) -> str:
    """Block numbers in short.

    >>> blocks([2, 3, 4, 7]), blocks([])
    ('2-4 7', 'head only')
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "head only"


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "client"), counted(3, "round")
    ('1 client', '3 rounds')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def why(client: LeftOut) -> str:
    """Why a client sits out, and what would do."""
    if client.needed_bytes is None:
        return client.reason
    return f"nothing fits its budget; {size(client.needed_bytes)} would do"


def console_for(*, stderr: bool = False) -> Console:
    """The terminal, or, in a file or a pipe, plain text wide enough for the tables."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=120)


def clients_table(lines: Sequence[Line], names: Sequence[str], tiers: Sequence[str], budgets: Sequence[int]) -> Table:
    """Who trained what: blocks and how often, predicted against measured peak, budget."""
    table = Table(title="Who trained what", title_justify="left")
    for header in ("client", "tier"):
        table.add_column(header)
    for header in ("budget", "predicted peak", "measured peak"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("blocks trained (rounds)")
    for client, name in list(enumerate(names))[:MOST_CLIENTS]:
        plans = _of_client(lines, "plans", client)
        uploads = _of_client(lines, "uploads", client)
        predicted = [cast(int, plan["peak_bytes"]) for plan in plans if plan["peak_bytes"] is not None]
        measured = [
            peak for upload in uploads if (peak := cast(Mapping[str, float], upload["metrics"]).get("peak_bytes"))
        ]
        table.add_row(
            name,
            tiers[client],
            size(budgets[client]),
            size(max(predicted)) if predicted else "-",
            size(max(measured)) if measured else "-",
            _what_it_trained(plans, lines, client),
        )
    if len(names) > MOST_CLIENTS:
        table.caption = f"and {len(names) - MOST_CLIENTS} more; all are in metrics.jsonl"
    return table


def _what_it_trained(plans: Sequence[Mapping[str, object]], lines: Sequence[Line], client: int) -> str:
    counts: Counter[str] = Counter()
    for plan in plans:
        trained = cast(Sequence[int], plan["trained"])
        ranks = cast(Mapping[str, object], plan["ranks"])
        of_trained = {str(ranks[key]) for key in ranks if int(key) in trained}
        recomputed = f" recomputing {blocks(again)}" if (again := cast(Sequence[int], plan["checkpointed"])) else ""
        rank = f" rank {next(iter(of_trained))}" if len(of_trained) == 1 else " mixed ranks" if of_trained else ""
        counts[blocks(trained) + rank + recomputed] += 1
    parts = [f"{what} (x{times})" for what, times in counts.most_common(4)]
    if len(counts) > 4:
        parts.append(f"{len(counts) - 4} other sets")
    out = _of_client(lines, "left_out", client)
    if out:
        needed = out[-1]["needed_bytes"]
        would_do = f"; {size(cast(int, needed))} would do" if needed is not None else f"; {out[-1]['reason']}"
        parts.append(f"left out (x{len(out)}){would_do}")
    if failed := _of_client(lines, "failures", client):
        parts.append(f"failed (x{len(failed)}): {failed[-1]['reason']}")
    return ", ".join(parts) or "never sampled"


def _of_client(lines: Sequence[Line], key: str, client: int) -> list[Mapping[str, object]]:
    entries = itertools.chain.from_iterable(cast(Sequence[Mapping[str, object]], line[key]) for line in lines)
    return [entry for entry in entries if entry["client_id"] == client]


def metrics_table(rows: Sequence[tuple[str, Standing]], metric: str, on: str = "test") -> Table:
    """The metric overall and by group, before and after, on the ``test`` or the ``validation`` set."""
    groups = sorted(name.partition("/")[2] for name in rows[0][1].metrics if name.startswith(f"{metric}/"))
    table = Table(title=f"{metric.capitalize()} on the {on} set", title_justify="left")
    table.add_column("")
    for header in ("rounds", "training time", "overall", *groups):
        table.add_column(header, justify="right", no_wrap=True)
    for label, stood in rows:
        values = [stood.metrics[name] for name in (metric, *(f"{metric}/{group}" for group in groups))]
        time_spent = clock(stood.seconds) if stood.round else "-"
        table.add_row(label, str(stood.round), time_spent, *(f"{value:.4f}" for value in values))
    return table


def comparison_rows(comparison: Comparison) -> list[tuple[str, Standing]]:
    """Rows for `metrics_table`."""
    rows = [
        ("before training", comparison.before),
        (comparison.method, comparison.after),
        (f"{comparison.baseline}, equal rounds", comparison.equal_rounds),
    ]
    if comparison.equal_time is not None:
        rows.append((f"{comparison.baseline}, equal time", comparison.equal_time))
    return rows


def verdict(comparison: Comparison) -> list[str]:
    """Who came out ahead, in sentences; the method's defeat is said as plainly as its victory."""
    before = comparison.lead(comparison.before)
    sentences = [
        f"{comparison.method} {'improved on' if before > 0 else 'did NOT improve on'} the untrained model: "
        f"{comparison.metric} {comparison.before.metrics[comparison.metric]:.4f} -> "
        f"{comparison.after.metrics[comparison.metric]:.4f}."
    ]
    if comparison.equal_time is None:
        return [*sentences, f"{comparison.baseline}: no client could take part, so it stayed where it started."]
    for what, stood in (("equal rounds", comparison.equal_rounds), ("equal training time", comparison.equal_time)):
        ahead = abs(comparison.lead(stood))
        of_rounds = f"({counted(comparison.after.round, 'round')} against {stood.round})"
        winner = comparison.winner(stood)
        sentences.append(
            f"At {what} {of_rounds}: a tie."
            if winner == "tie"
            else f"At {what} {of_rounds}: {winner} is ahead by {ahead:.4f} in {comparison.metric}."
        )
    return [
        *sentences,
        f"{counted(comparison.participants, 'client')} could take part in {comparison.baseline}. Training time is that "
        "of a federation of machines: each round lasts as long as its slowest client.",
    ]
