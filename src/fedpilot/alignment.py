"""Brings an emulator closer to the blocks that it stands for; teacher and student are one base model, run twice.

With h_T the hidden states after the emulated blocks of the whole model, h_E those after the emulator, and p_full and
p_E what the same blocks above make of them,

    L_S = ||h_T - h_E||² / ||h_T||² + λ KL(p_full || p_E) / (batch · length),

over the positions that are no padding. The first term is the mean square over the squared root mean square of h_T.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedpilot import training
from fedpilot.errors import ModelError, TrainingError
from fedpilot.model import AdaptedModel
from fedpilot.training import Batch, Examples, TrainingSettings

MOST_HELD_OUT = 64
"""Examples that the distance is measured on, at most; a tenth of all where those are fewer."""


@dataclass(frozen=True)
class Emulation:
    """What is compared.

    Attributes:
        adapted: The model with the student loaded: its blocks and its pairs.
        emulated: Blocks, from 0, that the emulator stands for.
        lam: λ; 0 leaves the divergence out.
        layerwise: Whether the hidden states after every kept block count, in a sum, not the last alone.
    """

    adapted: AdaptedModel
    emulated: int
    lam: float
    layerwise: bool = False

    def __post_init__(self) -> None:
        if not self.kept:
            raise ModelError(f"an emulator must keep at least one of the first {self.emulated} blocks, got none")

    @property
    def kept(self) -> tuple[int, ...]:
        """The emulator's blocks."""
        plan = self.adapted.plan
        blocks = None if plan is None else plan.blocks
        return tuple(range(self.emulated) if blocks is None else (b for b in blocks if b < self.emulated))

    def loss(self, batch: Batch) -> torch.Tensor:
        """L_S of a batch, a scalar with its graph."""
        distance, divergence = self._terms(batch, layerwise=self.layerwise, outputs=self.lam > 0)
        return distance if divergence is None else distance + self.lam * divergence

    @torch.no_grad()
    def distance(self, batch: Batch) -> float:
        """The first term alone, after the last block."""
        return float(self._terms(batch, layerwise=False, outputs=False)[0])

    def _terms(self, batch: Batch, *, layerwise: bool, outputs: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        students = self.kept if layerwise else self.kept[-1:]
        teachers = (*students[:-1], self.emulated - 1)
        with torch.no_grad(), self.adapted.whole(range(self.emulated)), self.adapted.watching(teachers) as taught:
            full = self.adapted.logits(batch)
        with self.adapted.watching(students) as learnt:
            own = self.adapted.logits(batch)
        mask = batch.get("attention_mask")
        pairs = zip(teachers, students, strict=True)
        distance = torch.stack([relative_distance(taught[t], learnt[s], mask) for t, s in pairs]).sum()
        return distance, divergence(full, own, mask) if outputs else None


def relative_distance(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """||h_T - h_E||² / ||h_T||² over the positions of the mask.

    >>> relative_distance(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 3.0]]]), None).item()
    0.03999999910593033

    Args:
        teacher: h_T, (examples, length, width).
        student: h_E, of the same shape.
        mask: (examples, length), 1 where there is no padding; ``None`` for none.
    """
    teacher, student = teacher.float(), student.float()
    counts = torch.ones_like(teacher[..., :1]) if mask is None else mask[..., None].float()
    return ((teacher - student).square() * counts).sum() / (teacher.square() * counts).sum()


def divergence(full: torch.Tensor, own: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """KL(p_full || p_E), mean over examples, or over the positions of the mask.

    Args:
        full: Logits of the whole model, (examples, classes) or (examples, length, words).
        own: Logits of the student, of the same shape.
        mask: (examples, length), for a language model.
    """
    expected, found = full.float().log_softmax(dim=-1), own.float().log_softmax(dim=-1)
    apart = (expected.exp() * (expected - found)).sum(dim=-1)
    if apart.ndim == 1 or mask is None:
        return apart.mean()
    return (apart * mask).sum() / mask.sum()


def align(
    task: Emulation,
    examples: Examples,
    settings: TrainingSettings,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    num_steps: int,
    order_seed: int,
    subset_seed: int,
) -> Mapping[str, float]:
    """Trains the student's parameters on L_S with a fresh optimiser, dropout off; see `types.AlignsEmulator`.

    Args:
        task: Teacher and student.
        examples: Public data. Some of it is held out, the same at every call: the distance is measured on that.
        settings: Optimiser, batch, clipping and arithmetic.
        parameters: What is trained.
        learning_rate: Of all steps.
        num_steps: Optimiser steps; the data is gone through as often as they need.
        order_seed: Of the order of examples.
        subset_seed: Of what is held out.

    Raises:
        TrainingError: There are fewer than two examples, or a loss is not finite.
    """
    if len(examples) < 2:
        raise TrainingError(f"alignment must have at least 2 public examples, got {len(examples)}; set server.source")
    device = task.adapted.device
    drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(subset_seed)).tolist()
    count = max(1, min(len(examples) // 10, MOST_HELD_OUT))
    held, others = examples.subset(sorted(drawn[:count])), examples.subset(sorted(drawn[count:]))
    train = training.make_step(task.loss, parameters, settings, learning_rate)
    task.adapted.base.eval()
    before = _mean_distance(task, held, settings)
    losses: list[float] = []
    generator = torch.Generator().manual_seed(order_seed)
    for step, batch in enumerate(_batches(others, settings.batch_size, generator, num_steps), start=1):
        losses.append(training.checked(train([training.on_device(batch, device)]), step))
    after = _mean_distance(task, held, settings)
    mean = sum(losses) / len(losses)
    return {"distance_before": before, "distance": after, "loss": mean, "steps": float(len(losses))}


def _batches(examples: Examples, size: int, generator: torch.Generator, count: int) -> Iterator[Batch]:
    """So many batches, of as many epochs as they need."""
    while count > 0:
        for batch in examples.batches(size, generator, count):
            count -= 1
            yield batch


def _mean_distance(task: Emulation, examples: Examples, settings: TrainingSettings) -> float:
    """Mean over examples of their batch's distance."""
    total = 0.0
    for batch in examples.batches(settings.batch_size):
        batch = training.on_device(batch, task.adapted.device)
        with training.arithmetic(settings.autocast, task.adapted.device.type):
            total += task.distance(batch) * batch["labels"].shape[0]
    return total / len(examples)
