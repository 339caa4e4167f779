"""From a deployment and data to numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedpilot import training
from fedpilot.errors import DataError
from fedpilot.model import AdaptedModel, cross_entropy
from fedpilot.training import Batch, Examples
from fedpilot.types import Deployment


@dataclass(frozen=True)
class _Totals:
    """Sums over examples, so that means over any split are exact."""

    targets: float = 0.0
    loss: float = 0.0
    correct: float = 0.0

    def __add__(self, other: "_Totals") -> "_Totals":
        return _Totals(self.targets + other.targets, self.loss + other.loss, self.correct + other.correct)

    def metrics(self, task: str, suffix: str) -> dict[str, float]:
        """Means over targets: accuracy and loss, or loss and perplexity of a language model."""
        loss = self.loss / self.targets if self.targets else math.nan
        if task == "causal-lm":
            perplexity = math.exp(loss) if loss < 700 else math.inf
            return {f"loss{suffix}": loss, f"perplexity{suffix}": perplexity}
        accuracy = self.correct / self.targets if self.targets else math.nan
        return {f"accuracy{suffix}": accuracy, f"loss{suffix}": loss}


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
    if len(examples) == 0:
        raise DataError("an evaluation must have examples, got none; give the test set a larger share")
    if groups is not None and len(groups) != len(examples):
        raise DataError(f"groups must name each of the {len(examples)} examples, got {len(groups)} names")
    adapted.deploy(deployment)
    adapted.base.eval()
    if groups is None:
        return _measure(adapted, examples, batch_size, autocast).metrics(adapted.task_type, "")
    totals = _Totals()
    by_group: dict[str, float] = {}
    for group in sorted(set(groups)):
        members = examples.subset([index for index, name in enumerate(groups) if name == group])
        measured = _measure(adapted, members, batch_size, autocast)
        by_group |= measured.metrics(adapted.task_type, f"/{group}")
        totals += measured
    return totals.metrics(adapted.task_type, "") | by_group


@torch.no_grad()
def _measure(adapted: AdaptedModel, examples: Examples, batch_size: int, autocast: str) -> _Totals:
    totals = _Totals()
    for batch in examples.batches(batch_size, None):
        totals += _measure_batch(adapted, training.on_device(batch, adapted.device), autocast)
    return totals


def _measure_batch(adapted: AdaptedModel, batch: Batch, autocast: str) -> _Totals:
    labels = batch["labels"]
    with training.arithmetic(autocast, adapted.device.type):
        logits = adapted.logits(batch)
    loss = float(cross_entropy(logits, labels))
    correct = float((logits.argmax(dim=-1) == labels).sum()) if labels.ndim == 1 else 0.0
    return _Totals(float(training.num_targets(batch)), loss, correct)
