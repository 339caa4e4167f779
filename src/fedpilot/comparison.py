"""What the lines of two runs say: where each stood when, and who came out ahead."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fedpilot.config import setup
from fedpilot.config.recipe import Recipe
from fedpilot.config.sections import AlgorithmSettings

Line: TypeAlias = Mapping[str, object]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class Standing:
    """Where a run stood after a round.

    Attributes:
        round: The round.
        seconds: Of training until then, as a federation of machines would take them: each round lasts as long as its
            slowest client. Evaluation is not counted.
        metrics: Of the evaluation; empty where the round was not evaluated.
    """

    round: int
    seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """The method beside its baseline.

    Attributes:
        metric: What decides.
        higher_is_better: Its direction.
        method: Name of the method.
        baseline: Name of the baseline.
        participants: How many clients ever took part in the baseline.
        before: The untrained model.
        after: The method after its last round.
        equal_rounds: The baseline after as many rounds.
        equal_time: The baseline after the first evaluated round that ends at the same training time or later; ``None``
            where no client could take part.
    """

    metric: str
    higher_is_better: bool
    method: str
    baseline: str
    participants: int
    before: Standing
    after: Standing
    equal_rounds: Standing
    equal_time: Standing | None

    def lead(self, other: Standing) -> float:
        """How much better the method is than the other standing, in the metric; negative when it is worse."""
        ahead = self.after.metrics[self.metric] - other.metrics[self.metric]
        return ahead if self.higher_is_better else -ahead

    def winner(self, other: Standing) -> str:
        """Name of whoever is ahead, or ``tie``."""
        ahead = self.lead(other)
        return "tie" if ahead == 0 or math.isnan(ahead) else self.method if ahead > 0 else self.baseline


def standings(lines: Sequence[Line]) -> list[Standing]:
    """Where the run stood after each of its rounds, from 0."""
    result: list[Standing] = []
    seconds = 0.0
    for line in lines:
        uploads = cast(Sequence[Mapping[str, Mapping[str, float]]], line["uploads"])
        seconds += max((upload["metrics"]["seconds"] for upload in uploads), default=0.0)
        seconds += cast(Mapping[str, float], line.get("seconds", {})).get("refine", 0.0)  # what the server trains
        metrics = cast(Mapping[str, float | None], line["metrics"])
        known = {name: math.nan if value is None else value for name, value in metrics.items()}
        result.append(Standing(cast(int, line["round"]), seconds, known))
    return result


def took_part(lines: Sequence[Line]) -> set[int]:
    """Clients of whom at least one upload was accepted."""
    uploads = [upload for line in lines for upload in cast(Sequence[Mapping[str, int]], line["uploads"])]
    return {upload["client_id"] for upload in uploads}


def rounds_trained(lines: Sequence[Line], num_clients: int, num_blocks: int) -> NDArray[np.int64]:
    """(clients, blocks) rounds in which each client trained each block; -1 for a client that only sat out."""
    counts = np.zeros((num_clients, num_blocks), dtype=np.int64)
    planned, sat_out = set(), set()
    for line in lines:
        for plan in cast(Sequence[Mapping[str, object]], line["plans"]):
            client = cast(int, plan["client_id"])
            planned.add(client)
            counts[client, list(cast(Sequence[int], plan["trained"]))] += 1
        sat_out |= {cast(Mapping[str, int], entry)["client_id"] for entry in cast(Sequence[object], line["left_out"])}
    counts[list(sat_out - planned)] = -1
    return counts


def compare(recipe: Recipe, lines: Sequence[Line], baseline_lines: Sequence[Line]) -> Comparison:
    """The method's lines beside the baseline's."""
    assert recipe.baseline is not None, "asked only of a recipe with a baseline"
    goal = setup.goal(recipe)
    own, others = standings(lines), standings(baseline_lines)
    last = own[-1]
    participants = took_part(baseline_lines)
    equal_time = next((stood for stood in others if stood.metrics and stood.seconds >= last.seconds), None)
    return Comparison(
        metric=goal.metric,
        higher_is_better=goal.higher_is_better,
        method=display_name(recipe.algorithm),
        baseline=display_name(recipe.baseline),
        participants=len(participants),
        before=own[0],
        after=last,
        equal_rounds=next(stood for stood in others if stood.round == last.round),
        equal_time=equal_time if participants else None,
    )


def display_name(method: AlgorithmSettings) -> str:
    """The method's name with its participation, which makes a baseline what it is."""
    participation = method.options.get("participation")
    return method.name if participation is None else f"{method.name} ({participation})"


def summary(comparison: Comparison) -> dict[str, object]:
    """The comparison as JSON, with who is ahead written out."""

    def stood(standing: Standing | None) -> dict[str, object] | None:
        if standing is None:
            return None
        metrics = {name: value if math.isfinite(value) else None for name, value in standing.metrics.items()}
        return {"round": standing.round, "training_seconds": round(standing.seconds, 3), "metrics": metrics}

    equal_time = comparison.equal_time
    return {
        "metric": comparison.metric,
        "higher_is_better": comparison.higher_is_better,
        "method": comparison.method,
        "before": stood(comparison.before),
        "after": stood(comparison.after),
        "baseline": comparison.baseline,
        "baseline_participants": comparison.participants,
        "baseline_equal_rounds": stood(comparison.equal_rounds),
        "baseline_equal_time": stood(equal_time),
        "winner_equal_rounds": comparison.winner(comparison.equal_rounds),
        "winner_equal_time": None if equal_time is None else comparison.winner(equal_time),
    }
