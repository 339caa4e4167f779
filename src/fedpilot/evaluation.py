"""From a deployment and data to numbers."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from fedpilot import training
from fedpilot.errors import DataError
from fedpilot.model import AdaptedModel, cross_entropy
from fedpilot.training import Batch, Examples
from fedpilot.types import Deployment


@dataclass(frozen=True)
class Totals:
    """Sums over examples, so that means over any split are exact."""

    targets: float = 0.0
    loss: float = 0.0
    correct: float = 0.0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.targets + other.targets, self.loss + other.loss, self.correct + other.correct)

    def metrics(self, task: str, suffix: str) -> dict[str, float]:
        """Means over targets: accuracy and loss, or loss and perplexity of a language model."""
        loss = self.loss / self.targets if self.targets else math.nan
        if task == "causal-lm":
            perplexity = math.exp(loss) if loss < 700 else math.inf
            return {f"loss{suffix}": loss, f"perplexity{suffix}": perplexity}
        accuracy = self.correct / self.targets if self.targets else math.nan
        return {f"accuracy{suffix}": accuracy, f"loss{suffix}": loss}


@dataclass(frozen=True)
class Measured:
    """Sums over one batch of an evaluation.

    Attributes:
        number: Of the batch, from 0; sums are taken in this order, whoever measured which batch.
        group: Name of the group that the batch belongs to; ``None`` where there are none.
        totals: The sums.
    """

    number: int
    group: str | None
    totals: Totals


def evaluate(
    adapted: AdaptedModel,
    deployment: Deployment,
    examples: Examples,
    *,
    groups: Sequence[str] | None = None,
    batch_size: int = 64,
    autocast: str = "float32",
) -> dict[str, float]:
    """Accuracy and loss, or loss and perplexity of a language model; exact means over examples, or over words.

    Args:
        adapted: The model; it holds the deployment afterwards.
        deployment: What is evaluated.
        examples: The test set.
        groups: One name for each example; each group's metrics are added as ``accuracy/<group>`` and so on.
        batch_size: Examples of one forward pass; does not change the result beyond rounding.
        autocast: Arithmetic, as in `TrainingSettings`.

    Raises:
        DataError: There are no examples, or not one group name for each.
    """
    measured = measure(adapted, deployment, examples, groups=groups, batch_size=batch_size, autocast=autocast)
    return combined(adapted.task_type, measured)


def measure(
    adapted: AdaptedModel,
    deployment: Deployment,
    examples: Examples,
    *,
    groups: Sequence[str] | None = None,
    batch_size: int = 64,
    autocast: str = "float32",
    part: int = 0,
    parts: int = 1,
) -> list[Measured]:
    """Every ``parts``-th batch of `evaluate`, from number ``part`` on: batches are dealt out, the longest first.

    Raises:
        DataError: There are no examples, or not one group name for each.
    """
    if len(examples) == 0:
        raise DataError("an evaluation must have examples, got none; give the test set a larger share")
    if groups is not None and len(groups) != len(examples):
        raise DataError(f"groups must name each of the {len(examples)} examples, got {len(groups)} names")
    adapted.deploy(deployment)
    adapted.base.eval()
    batches = enumerate(_batches(examples, groups, batch_size))
    with torch.no_grad():
        return [
            Measured(number, group, _measure_batch(adapted, training.on_device(batch, adapted.device), autocast))
            for number, (group, batch) in islice(batches, part, None, parts)
        ]


def combined(task: str, measured: Iterable[Measured]) -> dict[str, float]:
    """The metrics of `evaluate` from all of its batches, in whatever order: the same to the bit."""
    by_group: dict[str | None, Totals] = {}
    for batch in sorted(measured, key=lambda batch: batch.number):
        by_group[batch.group] = by_group.get(batch.group, Totals()) + batch.totals
    metrics: dict[str, float] = {}
    for group, totals in by_group.items():
        metrics |= {} if group is None else totals.metrics(task, f"/{group}")
    return sum(by_group.values(), Totals()).metrics(task, "") | metrics


def _batches(examples: Examples, groups: Sequence[str] | None, batch_size: int) -> Iterator[tuple[str | None, Batch]]:
    """All batches with their group, each group's longest first."""
    if groups is None:
        for batch in examples.batches(batch_size, None):
            yield None, batch
        return
    for group in sorted(set(groups)):
        members = examples.subset([index for index, name in enumerate(groups) if name == group])
        for batch in members.batches(batch_size, None):
            yield group, batch


def _measure_batch(adapted: AdaptedModel, batch: Batch, autocast: str) -> Totals:
    labels = batch["labels"]
    with training.arithmetic(autocast, adapted.device.type):
        logits = adapted.logits(batch)
    loss = float(cross_entropy(logits, labels))
    correct = float((logits.argmax(dim=-1) == labels).sum()) if labels.ndim == 1 else 0.0
    return Totals(float(training.num_targets(batch)), loss, correct)
