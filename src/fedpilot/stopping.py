"""Which round was best, and when to stop; pure functions of the recorded metrics."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpilot.errors import ConfigError


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
        """Index of the best entry; a later one must be better by more than ``min_delta``. NaN is never better."""
        sign = 1.0 if self.higher_is_better else -1.0
        best: int | None = None
        highest = -math.inf
        for index, metrics in enumerate(history):
            value = sign * self.value(metrics)
            if math.isfinite(value) and (best is None or value - highest > min_delta):
                best, highest = index, value
        return best


@dataclass(frozen=True)
class EarlyStop:
    """Stops after ``patience`` rounds without a gain of more than ``min_delta``.

    Everything follows from the recorded metrics, so a resumed run stops where the uninterrupted one would have.
    """

    goal: Goal
    patience: int
    min_delta: float = 0.0

    def due(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the last of these rounds, in order, is the last."""
        best = self.goal.best(history, self.min_delta)
        return len(history) - 1 - (-1 if best is None else best) >= self.patience
