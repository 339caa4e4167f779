"""The headline of a report: five questions, answered in sentences from the record alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedpilot.display import blocks, clock, counted, size
from fedpilot.report.reading import Group, Round, Run

FALL = 0.02
"""Fall of an accuracy below its best that is worth a word."""
ROOM = 0.7
"""Share of a budget below which it is called unused."""
BIASED = 0.05
"""Relative aggregation error that is worth a word."""
RISE = 0.1
"""Rise of the evaluation's loss above its lowest, as a share of that, that is worth a word; of another metric, of its
range."""
MOST_NAMES = 6
"""Clients that a sentence lists."""
NOTHING = "Nothing in the record asks for a change."
MOST_METHODS = 3
"""Methods that an answer speaks of; all of them are in the tables."""


@dataclass(frozen=True)
class Answer:
    """A question of the headline.

    Attributes:
        question: As people ask it.
        sentences: The answer.
        tone: ``good``, ``bad`` or ``plain``.
    """

    question: str
    sentences: tuple[str, ...]
    tone: str = "plain"


def answers(groups: Sequence[Group], said: Sequence[str] = ()) -> list[Answer]:
    """The whole headline.

    Args:
        groups: The methods.
        said: `verdict` of a run with a baseline; empty for what the runs alone tell.
    """
    first = groups[:MOST_METHODS]
    rest = len(groups) - len(first)
    more = (f"{counted(rest, 'more method')} below.",) if rest else ()
    told = [who(first), cost(first)]
    who_, cost_ = (replace(answer, sentences=(*answer.sentences, *more)) for answer in told)
    return [worked(groups, said), who_, inside(groups), cost_, change(groups)]


def named(names: Sequence[str]) -> str:
    """Some of the names.

    >>> named(["a", "b"]), named(list("abcdefgh"))
    ('a, b', 'a, b, c, d, e, f and 2 more')
    """
    shown = ", ".join(names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"


def _value(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not a number"


def _sign(run: Run) -> float:
    return 1.0 if run.goal.higher_is_better else -1.0


# --- did it work ----------------------------------------------------------------------------------------------------


def verdict(comparison: Mapping[str, Any]) -> list[str]:
    """Who was ahead at equal rounds and at equal training time, by ``comparison.json``; empty where there is none."""
    sentences = []
    for kind, what in (("equal_rounds", "equal rounds"), ("equal_time", "equal training time")):
        stood = comparison.get(f"baseline_{kind}")
        if stood is None or not comparison.get("after"):
            continue
        metric, winner = comparison["metric"], comparison[f"winner_{kind}"]
        own, other = (end["metrics"].get(metric) for end in (comparison["after"], stood))
        if own is None or other is None:
            continue
        ahead = "a tie" if winner == "tie" else f"{winner} is ahead by {abs(own - other):.4f}"
        rounds = f"{comparison['after']['round']} rounds against {stood['round']}"
        sentences.append(
            f"At {what} ({rounds}), {comparison['method']} has {own:.4f} "
            f"and {comparison['baseline']} {other:.4f}: {ahead}."
        )
    if sentences:
        sentences.append("One seed says little about which method is better.")
    return sentences


def worked(groups: Sequence[Group], said: Sequence[str] = ()) -> Answer:
    """Better than the untrained model, and who is ahead."""
    sentences, good = [], True
    for group in groups:
        if all(not run.evaluated for run in group.runs):
            sentences.append(f"{group.label}: no round has been evaluated yet.")
            good = False
            continue
        known = [run for run in group.runs if run.evaluated]
        metric = known[0].goal.metric
        before = group.over_seeds(run.value(run.evaluated[0]) for run in known)
        after = group.over_seeds(run.value(run.evaluated[-1]) for run in known)
        assert before is not None, "a seed was evaluated"
        assert after is not None, "a seed was evaluated"
        gain = _sign(known[0]) * (after.mean - before.mean)
        better = gain > 0
        good = good and better if group is groups[0] or len(groups) > 2 else good
        spread = f" ± {after.sd:.4f} over {counted(after.n, 'seed')}" if after.n > 1 else ""
        stood = known[0].evaluated[-1].round
        if known[0].last_round == 0:
            sentences.append(f"{group.label} has not trained yet: {metric} {_value(before.mean)}.")
            good = False
            continue
        how = "improved on" if better else "did NOT improve on"
        sentences.append(
            f"{group.label} {how} the untrained model: {metric} {_value(before.mean)} before, "
            f"{_value(after.mean)}{spread} after {counted(stood, 'round')}{_unfinished(group)}."
        )
        if (tested := group.over_seeds((run.test or {}).get(metric) for run in known)) is not None:
            spread = f" ± {tested.sd:.4f}" if tested.n > 1 else ""
            sentences.append(f"On the test set, read once at its end: {metric} {_value(tested.mean)}{spread}.")
    if said:
        sentences += said
    elif (leader := _leader(groups)) is not None:
        sentences.append(leader)
    return Answer("Did it work?", tuple(sentences), "good" if good else "bad")


def _unfinished(group: Group) -> str:
    asked = max(run.asked_rounds for run in group.runs)
    short = [run for run in group.runs if run.last_round < run.asked_rounds]
    if not short:
        return ""
    if len(group.runs) == 1:
        return f" of {asked} that the recipe asks for"
    return (
        f"; {len(short)} of {counted(len(group.runs), 'run')} ended before the {asked} rounds that the recipe asks for"
    )


def _leader(groups: Sequence[Group]) -> str | None:
    scored = []
    at = min(run.last_round for group in groups for run in group.runs)
    for group in groups:
        mean = group.over_seeds(run.score(at) for run in group.runs)
        if mean is not None and math.isfinite(mean.mean):
            scored.append((group, mean))
    if len(scored) < 2 or len({group.first.goal for group, _ in scored}) > 1:
        return None
    scored.sort(key=lambda entry: -_sign(entry[0].first) * entry[1].mean)
    (best, top), (second, next_) = scored[:2]
    lead = abs(top.mean - next_.mean)
    where = f"Over the last evaluations up to round {at}, which all reached"
    if lead == 0:
        return f"{where}, {best.label} and {second.label} are level."
    text = f"{where}, {best.label} is ahead of {second.label} by {lead:.4f} in {best.first.goal.metric}"
    seeds = {run.seed for run in best.runs} & {run.seed for run in second.runs}
    if len(seeds) < 2:
        return f"{text}. One seed says little about which method is better."
    return f"{text} ({len(seeds)} seeds; a lead smaller than the spread over seeds is no lead)."


# --- who trained what -----------------------------------------------------------------------------------------------


def who(groups: Sequence[Group]) -> Answer:
    """Participation, blocks and the scores behind them."""
    sentences = []
    for group in groups:
        run, tally = group.first, group.first.tally
        if not len(run.clients):
            sentences.append(f"{group.label}: nobody was asked yet.")
            continue
        delivered = int((tally.delivered > 0).sum())
        sitting = int(((tally.left_out > 0) & (tally.asked == 0)).sum())
        text = f"{group.label}: {delivered} of {counted(len(run.clients), 'client')} trained"
        if sitting:
            text += f", {sitting} never fitted"
        if int((tally.asked + tally.left_out == 0).sum()):
            text += f", {int((tally.asked + tally.left_out == 0).sum())} were never sampled"
        share = tally.trained.sum(axis=0)
        if share.sum():
            most = [int(b) for b in np.flatnonzero(share == share.max())]
            least = [int(b) for b in np.flatnonzero(share == share.min())]
            text += (
                "; every block was trained equally often"
                if share.max() == share.min()
                else f"; most often block {blocks(most)}, least often block {blocks(least)}"
            )
        sentences.append(f"{text}. {_why(run)}")
    if any(len(group.runs) > 1 for group in groups):
        sentences.append("Of several seeds, this is the first one.")
    return Answer("Who trained what, and why?", tuple(sentences))


def _why(run: Run) -> str:
    tally = run.tally
    counted_values = tally.value_count.sum(axis=0)
    if not counted_values.any():
        return "The method gives blocks no scores: what fits decides."
    means = tally.value_sum.sum(axis=0) / np.maximum(counted_values, 1)
    known = np.flatnonzero(counted_values)
    highest, lowest = known[means[known].argmax()], known[means[known].argmin()]
    if means[highest] - means[lowest] <= 1e-9:
        return "All blocks had the same score: what fits decided."
    return (
        f"The score behind the choice was highest for block {highest} (mean {means[highest]:.3g}) "
        f"and lowest for block {lowest} ({means[lowest]:.3g})."
    )


# --- inside the budget ----------------------------------------------------------------------------------------------


def inside(groups: Sequence[Group]) -> Answer:
    """Predicted and measured peaks against budgets."""
    sentences, bad = [], False
    for group in groups:
        shares, over, exact, both = [], [], 0, 0
        for run in group.runs:
            for client, predicted, measured in zip(run.clients, run.tally.predicted, run.tally.measured, strict=True):
                if client.budget_bytes is None:
                    continue
                peak = max(int(predicted), int(measured))
                if peak:
                    shares.append(peak / client.budget_bytes)
                if peak > client.budget_bytes:
                    over.append(f"{client.name} by {size(peak - client.budget_bytes)}")
                if predicted and measured:
                    both += 1
                    exact += int(measured <= predicted)
        if not shares:
            sentences.append(f"{group.label}: no peak is recorded.")
            continue
        text = f"{group.label}: the highest peak is {100 * max(shares):.1f}% of its client's budget"
        text = f"{text}; OVER BUDGET: {named(over)}" if over else f"{text}; everyone stayed inside"
        said = "no peak was measured here; these are predictions"
        if both:
            clients = counted(both, "client")
            said = f"measured peaks were at most the predicted ones for {exact} of the {clients} with a measurement"
        sentences.append(f"{text}; {said}.")
        bad = bad or bool(over)
    return Answer("Did everyone stay inside the budget?", tuple(sentences), "bad" if bad else "good")


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(groups: Sequence[Group]) -> Answer:
    """Bytes, seconds, privacy."""
    sentences = []
    for group in groups:
        down = group.over_seeds(float(run.total_bytes()[0]) for run in group.runs)
        up = group.over_seeds(float(run.total_bytes()[1]) for run in group.runs)
        assert down is not None, "every run has a total"
        assert up is not None, "every run has a total"
        wall = sum(line.wall_s for run in group.runs for line in run.rounds) / len(group.runs)
        predicted = group.over_seeds(predicted_seconds(run) for run in group.runs)
        text = f"{group.label}: {size(down.mean)} down and {size(up.mean)} up"
        if predicted is not None and predicted.mean > 0:
            text += (
                f"; {clock(predicted.mean)} predicted on the clients' machines, a round as long as its slowest client"
            )
        else:
            trained = sum(line.trained_s for run in group.runs for line in run.rounds) / len(group.runs)
            text += f"; {clock(trained)} of training as measured here"
        text += f", a round as long as its slowest client; {clock(wall)} on this machine in all"
        if (epsilon := last_fact(group.first, "epsilon")) is not None:
            text += f"; privacy spent: epsilon {epsilon:.3g} at most by any client"
        sentences.append(f"{text}.")
    if any(len(group.runs) > 1 for group in groups):
        sentences.append("Costs are those of one run, as means over seeds.")
    return Answer("What did it cost?", tuple(sentences))


def predicted_seconds(run: Run) -> float | None:
    """Over all rounds; ``None`` where a speed is not known."""
    seconds = [line.predicted_s for line in run.rounds]
    return None if any(value is None for value in seconds) else sum(value for value in seconds if value is not None)


def last_fact(run: Run, name: str) -> float | None:
    """The last recorded value of a fact."""
    return next((line.facts[name] for line in reversed(run.rounds) if name in line.facts), None)


# --- what to change -------------------------------------------------------------------------------------------------


def change(groups: Sequence[Group]) -> Answer:
    """Rules, each of which reads one thing off the record; thresholds stand at the top of this file."""
    rules: tuple[Callable[[Run], str | None], ...] = (
        *(_nothing_learnt, _still_rising, _fell_back, _overconfident, _let_in, _never_trained),
        *(_over, _unused, _failed, _inexact),
    )
    found = [text for rule in rules if (text := rule(groups[0].first)) is not None]
    whose = (f"This is about {groups[0].label}.",) if len(groups) > 1 else ()
    return Answer("What to change?", (*whose, *(found or [NOTHING])))


def _nothing_learnt(run: Run) -> str | None:
    lines = run.evaluated
    if len(lines) < 2 or _sign(run) * (run.value(lines[-1]) - run.value(lines[0])) > 0:
        return None
    return (
        f"{run.goal.metric.capitalize()} is no better than before training: try another training.learning_rate, "
        "more rounds, or look at the loss curve whether it falls at all."
    )


def _still_rising(run: Run) -> str | None:
    lines = run.evaluated[1:]
    if len(lines) < 4 or _best(run, lines) is not lines[-1]:
        return None
    return f"The last round was the best so far: more than {run.last_round} rounds may gain more (run.rounds)."


def _fell_back(run: Run) -> str | None:
    lines = run.evaluated[1:]
    if len(lines) < 3 or (best := _best(run, lines)) is None:
        return None
    values = [run.value(line) for line in run.evaluated if math.isfinite(run.value(line))]
    fall = _sign(run) * (run.value(best) - run.value(lines[-1]))
    if fall <= (FALL if run.goal.metric.startswith("accuracy") else RISE * (max(values) - min(values))):
        return None
    return (
        f"{run.goal.metric.capitalize()} was best in round {best.round} ({_value(run.value(best))}) "
        f"and is worse by {fall:.4f} now: "
        "adapters/best is that round's; a smaller training.learning_rate or evaluation.patience would hold it."
    )


def _overconfident(run: Run) -> str | None:
    known = [line for line in run.rounds if math.isfinite(line.metrics.get("loss", math.nan))]
    losses = [(line.metrics["loss"], line.round) for line in known]
    if len(losses) < 4 or run.goal.metric.startswith("loss"):
        return None
    (lowest, round), (last, _) = min(losses), losses[-1]
    if not last > lowest * (1 + RISE):
        return None
    return (
        f"The loss of the evaluation was lowest in round {round} ({lowest:.4f}) and is {last:.4f} now: the model grows "
        "surer than it is right; fewer rounds or a smaller training.learning_rate would help."
    )


def _best(run: Run, lines: Sequence[Round]) -> Round | None:
    known = [line for line in lines if math.isfinite(run.value(line))]
    return max(known, key=lambda line: _sign(run) * run.value(line), default=None)


def _let_in(run: Run) -> str | None:
    needs: dict[tuple[str, int], list[int]] = {}
    without = 0
    for missed in run.left_out.values():
        for client in missed.clients:
            if run.tally.asked[client]:
                continue
            budget = run.clients[client].budget_bytes
            if client in missed.needed_bytes and budget is not None:
                needs.setdefault((run.clients[client].tier, budget), []).append(missed.needed_bytes[client])
            else:
                without += 1
    parts = [
        f"{max(needed) / 2**20:.1f} MiB instead of {size(budget)} would let all {len(needed)} of tier {tier} in"
        if len(needed) > 1
        else f"{needed[0] / 2**20:.1f} MiB instead of {size(budget)} would let the client of tier {tier} in"
        for (tier, budget), needed in sorted(needs.items(), key=lambda entry: max(entry[1]) - entry[0][1])
    ]
    if parts:
        return f"Clients that never fitted: {'; '.join(parts)}; a smaller batch or shorter examples lower that need."
    return f"{counted(without, 'client')} never took part, for the reasons below." if without else None


def _never_trained(run: Run) -> str | None:
    never = [int(block) for block in np.flatnonzero(run.tally.block_rounds == 0)]
    if not never or run.last_round == 0 or len(never) == run.num_blocks:
        return None
    return f"Nobody ever trained block {blocks(never)}: only clients with more memory, or another method, could."


def _over(run: Run) -> str | None:
    over = [
        client.name
        for client, peak in zip(run.clients, run.tally.measured, strict=True)
        if client.budget_bytes is not None and peak > client.budget_bytes
    ]
    if not over:
        return None
    return f"Over budget: {named(over)}. Raise clients.overhead_bytes, which every prediction adds."


def _unused(run: Run) -> str | None:
    peaks: dict[str, list[float]] = {}
    for client, predicted in zip(run.clients, run.tally.predicted, strict=True):
        if client.budget_bytes and predicted:
            peaks.setdefault(client.tier, []).append(int(predicted) / client.budget_bytes)
    idle = [f"{tier} ({100 * max(shares):.0f}%)" for tier, shares in peaks.items() if max(shares) < ROOM]
    if not idle:
        return None
    return f"Much memory is unused in tier {named(idle)}: a larger batch, rank or model would fit there."


def _failed(run: Run) -> str | None:
    times = sum(sum(missed.clients.values()) for missed in run.failures.values())
    if not times:
        return None
    reason = max(run.failures, key=lambda text: sum(run.failures[text].clients.values()))
    return f"{counted(times, 'task')} failed, most often because: {reason}"


def _inexact(run: Run) -> str | None:
    errors = [line.facts["aggregation_error"] for line in run.rounds if "aggregation_error" in line.facts]
    if not errors or (mean := sum(errors) / len(errors)) <= BIASED:
        return None
    return (
        f"The server's update is {100 * mean:.0f}% away from the clients' exact mean: fedex-lora, flora, ffa-lora and "
        "flexlora at full rank are exact."
    )
