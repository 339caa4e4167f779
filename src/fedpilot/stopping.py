"""Which round was best, and when to stop; pure functions of the recorded metrics."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpilot.errors import ConfigError


class Halted(Exception):  # noqa: N818 - it is no error
    """A run ended after a round because it was asked to; it can be gone on with."""


@dataclass(frozen=True)
class Goal:
    """A metric of the evaluation and the direction that is better.

    >>> Goal("accuracy").best([{"accuracy": 0.5}, {"accuracy": 0.75}, {"accuracy": 0.75}])
    1
    """

    metric: str
    higher_is_better: bool = True

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric.

        Raises:
            ConfigError: The evaluation does not give it.
        """
        if self.metric in metrics:
            return metrics[self.metric]
        near = difflib.get_close_matches(self.metric, list(metrics), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of these"
        raise ConfigError([f"metric must be one of {', '.join(sorted(metrics))}, got {self.metric!r}; {hint}"])

    def best(self, history: Sequence[Mapping[str, float]], min_delta: float = 0.0) -> int | None:
        """Index of the best entry; a later one must be better by more than ``min_delta``.

        NaN is never better, and an empty entry, of a round that was not evaluated, is passed over.
        """
        sign = 1.0 if self.higher_is_better else -1.0
        best: int | None = None
        highest = -math.inf
        for index, metrics in enumerate(history):
            if not metrics:
                continue
            value = sign * self.value(metrics)
            if math.isfinite(value) and (best is None or value - highest > min_delta):
                best, highest = index, value
        return best


@dataclass(frozen=True)
class Cadence:
    """Which rounds of a run are evaluated.

    >>> [round for round in range(13) if Cadence(every=4, last=2).due(round, 13)]
    [0, 4, 8, 12]
    >>> [round for round in range(8) if Cadence(every=4, last=2).due(round, 7)]
    [0, 4, 6, 7]

    Attributes:
        every: Rounds between two evaluations.
        last: Rounds at the end of a run that are always evaluated.
    """

    every: int = 1
    last: int = 5

    def due(self, round: int, num_rounds: int) -> bool:
        """Whether a round of a run of so many is evaluated."""
        return round % self.every == 0 or round > num_rounds - self.last


@dataclass(frozen=True)
class EarlyStop:
    """Stops after ``patience`` rounds without a gain of more than ``min_delta``.

    Everything follows from the recorded metrics, so a resumed run stops where the uninterrupted one would have.
    """

    goal: Goal
    patience: int
    min_delta: float = 0.0

    def due(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the last of these rounds, in order, is the last; a run ends only where it is evaluated."""
        if not history[-1]:
            return False
        best = self.goal.best(history, self.min_delta)
        return len(history) - 1 - (-1 if best is None else best) >= self.patience
