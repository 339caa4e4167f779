"""From a deployment and data to numbers."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import ArrayLike

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
        scores: Of two classes, the predicted share of class 1 for each example, and its class; empty of more classes.
        uses: Examples by the set of a pool that they were run with; empty without a pool.
        task: What was measured, where that is not the model's own task: a language model that chooses among answers is
            a classifier.
    """

    number: int
    group: str | None
    totals: Totals
    scores: tuple[tuple[float, int], ...] = ()
    task: str | None = None
    uses: tuple[float, ...] = ()


def evaluate(
    adapted: AdaptedModel,
    deployment: Deployment,
    examples: Examples,
    *,
    groups: Sequence[str] | None = None,
    batch_size: int = 64,
    autocast: str = "float32",
    answers: Sequence[int] = (),
) -> dict[str, float]:
    """Accuracy and loss, or loss and perplexity of a language model; exact means over examples, or over words.

    Of two classes also ``auc``, the area under the ROC curve; NaN where the examples have one class only. Of a pool
    also ``sets_in_use``, exp of the entropy of how examples spread over its sets: 1 where all choose the same one, N
    where they spread evenly over N.

    Args:
        adapted: The model; it holds the deployment afterwards.
        deployment: What is evaluated.
        examples: The test set.
        groups: One name for each example; each group's metrics are added as ``accuracy/<group>`` and so on.
        batch_size: Examples of one forward pass; does not change the result beyond rounding.
        autocast: Arithmetic, as in `TrainingSettings`.
        answers: Token of each class, where a language model chooses among them: its figures are then a classifier's,
            of the softmax over these tokens at the first target of each example.

    Raises:
        DataError: There are no examples, or not one group name for each.
    """
    measured = measure(
        adapted, deployment, examples, groups=groups, batch_size=batch_size, autocast=autocast, answers=answers
    )
    return combined(adapted.task_type, measured)


def measure(
    adapted: AdaptedModel,
    deployment: Deployment,
    examples: Examples,
    *,
    groups: Sequence[str] | None = None,
    batch_size: int = 64,
    autocast: str = "float32",
    answers: Sequence[int] = (),
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
            _measured(adapted, number, group, training.on_device(batch, adapted.device), autocast, answers)
            for number, (group, batch) in islice(batches, part, None, parts)
        ]


def combined(task: str, measured: Iterable[Measured]) -> dict[str, float]:
    """The metrics of `evaluate` from all of its batches, in whatever order: the same to the bit."""
    by_group: dict[str | None, Totals] = {}
    scores: dict[str | None, list[tuple[float, int]]] = {}
    uses: dict[str | None, np.ndarray] = {}
    for batch in sorted(measured, key=lambda batch: batch.number):
        by_group[batch.group] = by_group.get(batch.group, Totals()) + batch.totals
        scores.setdefault(batch.group, []).extend(batch.scores)
        uses[batch.group] = uses.get(batch.group, 0) + np.array(batch.uses)
        task = batch.task or task
    metrics: dict[str, float] = {}
    for group, totals in by_group.items():
        if group is not None:
            suffix = f"/{group}"
            metrics |= totals.metrics(task, suffix) | _auc(scores[group], suffix) | _sets_in_use(uses[group], suffix)
    overall = _auc([score for of_group in scores.values() for score in of_group], "")
    overall |= _sets_in_use(sum(uses.values(), np.zeros(())), "")
    return sum(by_group.values(), Totals()).metrics(task, "") | overall | metrics


def _sets_in_use(uses: np.ndarray, suffix: str) -> dict[str, float]:
    """exp of the entropy of a choice's shares; nothing where there was none."""
    if not uses.size or not uses.sum():
        return {}
    shares = uses[uses > 0] / uses.sum()
    return {f"sets_in_use{suffix}": float(np.exp(-(shares * np.log(shares)).sum()))}


def _auc(scores: Sequence[tuple[float, int]], suffix: str) -> dict[str, float]:
    """Area under the ROC curve; nothing where there are no scores, NaN where they are of one class."""
    if not scores:
        return {}
    shares, labels = zip(*scores, strict=True)
    return {f"auc{suffix}": area_under_curve(labels, shares) if len(set(labels)) == 2 else math.nan}


def area_under_curve(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of scores of two classes."""
    from sklearn.metrics import roc_auc_score  # takes its time, and most commands need none

    return float(roc_auc_score(labels, scores))


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


def _measured(
    adapted: AdaptedModel, number: int, group: str | None, batch: Batch, autocast: str, answers: Sequence[int]
) -> Measured:
    labels = batch["labels"]
    with training.arithmetic(autocast, adapted.device.type):
        logits = adapted.logits(batch)
    if labels.ndim == 2 and not answers:
        return Measured(number, group, Totals(float(training.num_targets(batch)), float(cross_entropy(logits, labels))))
    task = "sequence-classification" if answers else None
    if answers:
        logits, labels = choice(logits, labels, answers)
    correct = float((logits.argmax(dim=-1) == labels).sum())
    totals = Totals(float(len(labels)), float(cross_entropy(logits, labels)), correct)
    scores: tuple[tuple[float, int], ...] = ()
    if logits.shape[-1] == 2:
        shares = logits.float().softmax(dim=-1)[:, 1].tolist()
        scores = tuple(zip(shares, labels.tolist(), strict=True))
    uses = adapted.sets_used()
    return Measured(number, group, totals, scores, task, () if uses is None else tuple(uses.tolist()))


def choice(logits: torch.Tensor, labels: torch.Tensor, answers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A language model's logits of the answers where each example's first target stands, and which answer it is.

    Args:
        logits: (examples, length, words).
        labels: (examples, length), `training.IGNORED` where there is no target; not shifted.
        answers: Token of each class.

    Returns:
        (examples, answers) and (examples,).

    Raises:
        DataError: An example's first target is none of the answers.
    """
    first = (labels != training.IGNORED).int().argmax(dim=1)
    rows = torch.arange(len(labels), device=labels.device)
    tokens = torch.tensor(list(answers), device=labels.device)
    found = labels[rows, first].unsqueeze(1) == tokens
    if not bool(found.any(dim=1).all()):
        raise DataError("every example's first target must be one of the answers, got another; check data.answers")
    return logits[rows, first - 1][:, tokens], found.int().argmax(dim=1)
