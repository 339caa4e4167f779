"""Numbers of a comparison, read off the records of its runs; pure functions."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedpilot.comparison import Line
from fedpilot.stopping import Goal

Axis: TypeAlias = Literal["rounds", "bytes", "client_seconds"]
AXES: tuple[Axis, ...] = ("rounds", "bytes", "client_seconds")


@dataclass(frozen=True)
class Point:
    """Where a run stood at an evaluation.

    Attributes:
        round: The round.
        bytes: Down and up until then.
        client_seconds: Predicted: each round lasts as long as its slowest client; ``None`` where no speed is given.
        value: The metric.
    """

    round: int
    bytes: int
    client_seconds: float | None
    value: float

    def at(self, axis: Axis) -> float | None:
        """The place on an axis."""
        return {"rounds": self.round, "bytes": self.bytes, "client_seconds": self.client_seconds}[axis]


@dataclass(frozen=True)
class RunFigures:
    """One run in numbers; what it does not know yet, or cannot know, is ``None``.

    Attributes:
        round: The last recorded round.
        done: Whether that was the last one.
        score: Mean of the metric over the last evaluations; of a run that is done.
        test: The metric on the test set after the last round.
        rounds_to_target: First evaluated round that reaches the target.
        bytes_down: Sent to clients.
        bytes_up: Received from clients.
        peak_share: Largest predicted peak as a share of its client's budget.
        left_out_share: Sampled clients for which nothing fitted, as a share of all sampled.
        failures: Clients that were asked and did not deliver.
        client_seconds: Predicted, as in `Point`.
        wall_seconds: That the rounds took here.
        aggregation_error: Mean over rounds.
        points: The evaluations.
    """

    round: int
    done: bool
    score: float | None
    test: float | None
    rounds_to_target: int | None
    bytes_down: int
    bytes_up: int
    peak_share: float | None
    left_out_share: float | None
    failures: int
    client_seconds: float | None
    wall_seconds: float
    aggregation_error: float | None
    points: tuple[Point, ...] = field(repr=False)


NUMBERS = (
    *("score", "test", "rounds_to_target", "bytes_down", "bytes_up", "peak_share", "left_out_share", "failures"),
    *("client_seconds", "wall_seconds", "aggregation_error"),
)
"""Fields of `RunFigures` that are summed up over seeds."""


def run_figures(
    lines: Sequence[Line],
    goal: Goal,
    *,
    rounds: int,
    last: int,
    target: float | None = None,
    test: float | None = None,
) -> RunFigures:
    """A run's record in numbers.

    Args:
        lines: Its rounds, from 0.
        goal: The metric.
        rounds: The last round.
        last: Rounds at the end whose mean is the score.
        target: Of ``rounds_to_target``.
        test: The metric on the test set after the last round; ``None`` before that.
    """
    points = _points(lines, goal.metric)
    at = cast(int, lines[-1]["round"]) if lines else 0
    done = at >= rounds
    plans = [plan for line in lines for plan in _entries(line, "plans")]
    out = sum(len(_entries(line, "left_out")) for line in lines)
    peaks = [
        cast(int, plan["peak_bytes"]) / cast(int, plan["budget_bytes"])
        for plan in plans
        if plan["peak_bytes"] is not None
    ]
    errors = [
        error
        for line in lines
        if (error := cast(Mapping[str, float | None], line["facts"]).get("aggregation_error")) is not None
    ]
    return RunFigures(
        round=at,
        done=done,
        score=score(points, rounds, last) if done else None,
        test=test,
        rounds_to_target=None if target is None else _first(points, goal, target),
        bytes_down=sum(cast(int, line["bytes_down"]) for line in lines),
        bytes_up=sum(cast(int, line["bytes_up"]) for line in lines),
        peak_share=max(peaks, default=None),
        left_out_share=out / (out + len(plans)) if out + len(plans) else None,
        failures=sum(len(_entries(line, "failures")) for line in lines),
        client_seconds=_client_seconds(lines)[-1] if lines else None,
        wall_seconds=sum(cast(Mapping[str, float], line["seconds"]).get("total", 0.0) for line in lines),
        aggregation_error=statistics.fmean(errors) if errors else None,
        points=points,
    )


def forms(metrics: Iterable[Iterable[str]], metric: str) -> list[str]:
    """Further forms of a run's outcome, by prefix: ``newest_loss`` is of ``newest``.

    Args:
        metrics: The names that each round has on record.
        metric: The one that decides.
    """
    names = {name for of_round in metrics for name in of_round}
    return sorted(name.removesuffix(f"_{metric}") for name in names if name.endswith(f"_{metric}"))


def score(points: Sequence[Point], rounds: int, last: int) -> float:
    """Mean of the evaluations of the last rounds; NaN where there are none."""
    values = [point.value for point in points if point.round > max(rounds - last, 0)]
    return statistics.fmean(values) if values else math.nan


def _entries(line: Line, key: str) -> Sequence[Mapping[str, object]]:
    return cast(Sequence[Mapping[str, object]], line[key])


def _client_seconds(lines: Sequence[Line]) -> list[float | None]:
    """Predicted seconds until the end of each round; ``None`` from the first plan on that has none."""
    total: float | None = 0.0
    result: list[float | None] = []
    for line in lines:
        planned = [cast(float | None, plan["seconds"]) for plan in _entries(line, "plans")]
        known = [seconds for seconds in planned if seconds is not None]
        total = None if total is None or len(known) < len(planned) else total + max(known, default=0.0)
        result.append(total)
    return result


def _points(lines: Sequence[Line], metric: str) -> tuple[Point, ...]:
    points, num_bytes = [], 0
    for line, seconds in zip(lines, _client_seconds(lines), strict=True):
        num_bytes += cast(int, line["bytes_down"]) + cast(int, line["bytes_up"])
        metrics = cast(Mapping[str, float | None], line["metrics"])
        if metric in metrics:
            value = metrics[metric]
            points.append(Point(cast(int, line["round"]), num_bytes, seconds, math.nan if value is None else value))
    return tuple(points)


def _first(points: Sequence[Point], goal: Goal, target: float) -> int | None:
    sign = 1.0 if goal.higher_is_better else -1.0
    return next((point.round for point in points if sign * point.value >= sign * target), None)


# --- over seeds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """Mean and spread over seeds: the standard deviation of a sample, 0 for a single one."""

    mean: float
    sd: float
    n: int


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """Over the values that are known; ``None`` where none is.

    >>> mean_of([1.0, None, 3.0])
    Mean(mean=2.0, sd=1.4142135623730951, n=2)
    """
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    if not all(map(math.isfinite, known)):
        return Mean(math.nan, math.nan, len(known))
    return Mean(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0, len(known))


@dataclass(frozen=True)
class MethodFigures:
    """A method over its seeds.

    Attributes:
        name: What the comparison calls it.
        runs: Seed -> figures of its run; runs that have not begun are not there.
        seeds: How many seeds were asked for.
    """

    name: str
    runs: Mapping[int, RunFigures]
    seeds: int

    @property
    def finished(self) -> bool:
        """Whether every seed is done."""
        return len(self.runs) == self.seeds and all(run.done for run in self.runs.values())

    def over_seeds(self, number: str) -> Mean | None:
        """One of `NUMBERS` over the seeds that know it."""
        return mean_of([getattr(run, number) for run in self.runs.values()])


@dataclass(frozen=True)
class Equal:
    """The metric of all methods at the same place on an axis.

    Attributes:
        axis: The axis.
        limit: The place: the smallest total, as a mean over seeds, of a method that finished and trained anybody.
        set_by: That method.
        values: Method -> metric there, over the seeds that came as far.
    """

    axis: Axis
    limit: float
    set_by: str
    values: Mapping[str, Mean]


@dataclass(frozen=True)
class Reading:
    """The metric at a place on an axis.

    Attributes:
        value: On the straight line between the evaluations before and after.
        low: The lesser of these two; where the run was evaluated at that very place, the value.
        high: The greater of them.
    """

    value: float
    low: float
    high: float


def at_equal(methods: Sequence[MethodFigures], axis: Axis, *, rounds: int, last: int) -> Equal | None:
    """The metric at the smallest total of an axis; ``None`` where no method has finished or the axis is unknown."""
    totals = {
        method.name: total.mean
        for method in methods
        if method.finished and (total := mean_of([_total(run, axis) for run in method.runs.values()])) is not None
    }
    totals = {name: total for name, total in totals.items() if total > 0}
    if not totals:
        return None
    set_by = min(totals, key=lambda name: totals[name])
    limit = totals[set_by]
    values = {}
    for method in methods:
        read = _read_all(method, axis, limit, totals.get(method.name), rounds=rounds, last=last)
        if (found := mean_of([None if one is None else one.value for one in read.values()])) is not None:
            values[method.name] = found
    return Equal(axis, limit, set_by, values)


def _read_all(
    method: MethodFigures, axis: Axis, limit: float, mean_total: float | None, *, rounds: int, last: int
) -> dict[int, Reading | None]:
    """Seed -> the metric at the limit. Seeds differ in their totals: each is read at its share of the limit."""
    return {
        seed: read_off(run, axis, _own_limit(run, axis, limit, mean_total), rounds=rounds, last=last)
        for seed, run in method.runs.items()
    }


def _total(run: RunFigures, axis: Axis) -> float | None:
    return {"rounds": float(run.round), "bytes": float(run.bytes_down + run.bytes_up)}.get(axis, run.client_seconds)


def _own_limit(run: RunFigures, axis: Axis, limit: float, mean_total: float | None) -> float:
    """The limit, in a run's own measure of a whole run where the method's mean total is known."""
    total = _total(run, axis)
    return limit if mean_total is None or total is None or not mean_total else limit * total / mean_total


def read_off(run: RunFigures, axis: Axis, limit: float, *, rounds: int, last: int) -> Reading | None:
    """A run at a place on an axis; ``None`` where it has not come so far.

    Straight lines between evaluations; the last evaluations, whose mean is the score, count as one point at the end.
    """
    places = [(place, point.value) for point in run.points if (place := point.at(axis)) is not None]
    if len(places) < len(run.points) or not places:
        return None
    if run.done and run.score is not None:
        tail = max(rounds - last, 0)
        early = [pair for pair, point in zip(places, run.points, strict=True) if point.round <= tail]
        places = [*early, (places[-1][0], run.score)]
    x, y = zip(*places, strict=True)
    if limit > x[-1] * (1 + 1e-9):
        return None
    before = max((index for index, place in enumerate(x) if place <= limit * (1 + 1e-9)), default=0)
    evaluated_there = math.isclose(x[before], limit) or limit < x[before]
    around = y[before : before + 1 if evaluated_there else before + 2]
    return Reading(float(np.interp(limit, x, y)), min(around), max(around))


# --- who leads ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedTest:
    """The best two methods, seed by seed.

    Attributes:
        best: The better one in the mean.
        second: The other.
        differences: Seed -> how much better ``best`` was.
        t: Paired t statistic; ``None`` where it is not defined: fewer than two seeds, or no spread at all.
        p: Two-sided.
    """

    best: str
    second: str
    differences: Mapping[int, float]
    t: float | None
    p: float | None

    def words(self, metric: str) -> str:
        """In a sentence or two, with what it is not."""
        values = list(self.differences.values())
        lead = statistics.fmean(values)
        listed = ", ".join(f"{value:+.4f}" for value in values)
        text = f"{self.best} leads {self.second} by {lead:.4f} in {metric} (seed by seed: {listed})"
        if self.t is None or self.p is None:
            return f"{text}; a paired test needs at least two seeds that differ."
        text += f"; paired t-test: t = {self.t:.2f}, p = {self.p:.3f}, n = {len(values)}."
        if len(values) < 5:
            text += f" {len(values)} seeds are few: read it as a hint."
        return text + " The two were picked because they came out best, which makes p too small."


def paired_test(methods: Sequence[MethodFigures], goal: Goal) -> PairedTest | None:
    """The best two of the methods that finished; ``None`` where there are fewer."""
    ranked = ranking([method for method in methods if method.finished], goal)
    if len(ranked) < 2:
        return None
    best, second = ranked[:2]
    sign = 1.0 if goal.higher_is_better else -1.0
    differences = {
        seed: sign * (_score(best.runs[seed]) - _score(second.runs[seed])) for seed in best.runs if seed in second.runs
    }
    return PairedTest(best.name, second.name, differences, *_t_test(list(differences.values())))


@dataclass(frozen=True)
class Lead:
    """How far the best method is ahead of another one where both have taken as much of an axis.

    Attributes:
        other: The other method.
        axis: The axis.
        limit: The smaller one of their two totals, as means over seeds.
        differences: Seed -> how much better the best one was there.
        within: The least and the greatest that the mean of the differences can be if each curve has, in place of a
            straight line, either value of the two evaluations that it is read between.
        p: Of a two-sided paired t test; ``None`` where there are fewer than two seeds, or no spread at all.
    """

    other: str
    axis: Axis
    limit: float
    differences: Mapping[int, float]
    within: tuple[float, float]
    p: float | None

    @property
    def settled(self) -> bool:
        """Whether who is ahead there does not hang on the line drawn between two evaluations."""
        return not self.within[0] < 0 < self.within[1]


def leads(
    methods: Sequence[MethodFigures], goal: Goal, *, rounds: int, last: int, forms: Sequence[MethodFigures] = ()
) -> tuple[Lead, ...]:
    """The best method against each other one that finished, best first, on each axis that both know.

    Unlike `at_equal`, which reads all methods where the cheapest ends, each pair is read where its cheaper one ends.
    The best is one of the methods; their further forms are among the others.
    """
    best = ranking([method for method in methods if method.finished], goal)[:1]
    ranked = ranking([method for method in (*methods, *forms) if method.finished and method not in best], goal)
    found = []
    for leader, other, axis in itertools.product(best, ranked, AXES):
        pair = (leader, other)
        totals = [mean_of([_total(run, axis) for run in method.runs.values()]) for method in pair]
        means = [total.mean for total in totals if total is not None]
        if len(means) < 2 or not min(means) > 0:
            continue
        limit = min(means)
        ours, theirs = (
            _read_all(method, axis, limit, mean, rounds=rounds, last=last)
            for method, mean in zip(pair, means, strict=True)
        )
        both = [(seed, one, their) for seed, one in ours.items() if one and (their := theirs.get(seed))]
        if not both:
            continue
        sign = 1.0 if goal.higher_is_better else -1.0
        differences = {seed: sign * (one.value - their.value) for seed, one, their in both}
        ends = (
            statistics.fmean(sign * (one.low - their.high) for _, one, their in both),
            statistics.fmean(sign * (one.high - their.low) for _, one, their in both),
        )
        p = _t_test(list(differences.values()))[1]
        found.append(Lead(other.name, axis, limit, differences, (min(ends), max(ends)), p))
    return tuple(found)


def _t_test(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """(t, two-sided p) of paired differences; ``None`` where there are fewer than two, or no spread but rounding."""
    if len(differences) < 2 or max(differences) - min(differences) <= 1e-9 * max(map(abs, differences)):
        return None, None
    t, p = (float(number) for number in stats.ttest_1samp(differences, 0.0))
    return t, p


def ranking(methods: Sequence[MethodFigures], goal: Goal) -> list[MethodFigures]:
    """Methods with a score, best first; one whose score is not a number comes last."""
    sign = -1.0 if goal.higher_is_better else 1.0

    def key(method: MethodFigures) -> float:
        mean = method.over_seeds("score")
        return math.inf if mean is None or math.isnan(mean.mean) else sign * mean.mean

    return sorted((method for method in methods if method.over_seeds("score") is not None), key=key)


def _score(run: RunFigures) -> float:
    return math.nan if run.score is None else run.score


# --- for the plots ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """A method's curve: at each evaluation that all its seeds have, mean place, mean metric and spread."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    sd: tuple[float, ...]


def band(method: MethodFigures, axis: Axis) -> Band | None:
    """The curve over an axis; ``None`` where there is nothing to draw."""
    by_round = [{point.round: point for point in run.points} for run in method.runs.values()]
    common = sorted(set.intersection(*map(set, by_round))) if by_round else []
    x, y, sd = [], [], []
    for round in common:
        place = mean_of([points[round].at(axis) for points in by_round])
        value = mean_of([points[round].value for points in by_round])
        if place is not None and value is not None and place.n == len(by_round):
            x.append(place.mean)
            y.append(value.mean)
            sd.append(value.sd)
    return Band(tuple(x), tuple(y), tuple(sd)) if len(x) > 1 else None


Lookup: TypeAlias = Callable[[int], str]


def block_shares(lines: Sequence[Line], tier_of: Lookup, tiers: Sequence[str], num_blocks: int) -> NDArray[np.float64]:
    """(tiers, blocks) share of a tier's sampled clients that trained the block; NaN where none was sampled."""
    trained, sampled = np.zeros((len(tiers), num_blocks)), np.zeros(len(tiers))
    row = {tier: index for index, tier in enumerate(tiers)}
    for line in lines:
        for entry in (*_entries(line, "plans"), *_entries(line, "left_out")):
            tier = row[tier_of(cast(int, entry["client_id"]))]
            sampled[tier] += 1
            trained[tier, list(cast(Sequence[int], entry.get("trained", ())))] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return trained / sampled[:, None]
