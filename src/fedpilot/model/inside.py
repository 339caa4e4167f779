"""A loaded model seen from inside: the states that enter a block, the head's input, and what follows from given ones.

Real examples go through the whole model and are looked at on their way; synthetic ones may begin at a block, as if the
blocks below had given them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fedpilot import condensation, lora, training
from fedpilot.errors import ModelError
from fedpilot.memory import StepProgram
from fedpilot.model.adapted import AdaptedModel
from fedpilot.training import Batch, TrainingSettings
from fedpilot.types import Condensation, Plan, StepKind, Task, Tensors


class ModelLens:
    """Implements `condensation.Lens` over an adapted model, as it is loaded and as its dropout stands.

    Args:
        adapted: The model.
        how: The space of synthetic items.
        autocast: Arithmetic of the matrix products, as in `TrainingSettings`.

    Raises:
        ModelError: The model is no classifier, or lacks the space or the block.
    """

    def __init__(self, adapted: AdaptedModel, how: Condensation, autocast: str = "float32") -> None:
        spec, images = adapted.spec, adapted.task_type == "image-classification"
        if not spec.head:
            raise ModelError(f"condensation must have a classifier, got {adapted.task_type}; choose another algorithm")
        if how.space == "pixels" and not images:
            raise ModelError(f"space 'pixels' must go with images, got {adapted.task_type}; set space = 'hidden'")
        if how.depth >= spec.num_blocks:
            raise ModelError(f"depth must be below {spec.num_blocks}, the model's blocks, got {how.depth}; lower it")
        self._adapted, self._how, self._autocast = adapted, how, autocast
        self._head = adapted.base.get_submodule(list(spec.head)[-1].rpartition(".")[0])

    @property
    def num_classes(self) -> int:
        """Of the head."""
        return self._adapted.num_labels

    def real(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Examples as items, with their features and logits; without a graph."""
        with torch.no_grad(), _input_of(self._adapted.blocks[self._how.depth]) as entered:
            features, logits = self._seen(batch)
            if self._how.space == "pixels":
                return batch["pixel_values"], features, logits
            return fitted(entered[0], batch.get("attention_mask"), self._how.length), features, logits

    def synthetic(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits of items, with the graph back to them."""
        if self._how.space == "pixels":
            return self._seen({"pixel_values": items})
        return self._seen(None, items)

    def _seen(self, batch: Batch | None, hidden: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        adapted = self._adapted
        with training.arithmetic(self._autocast, adapted.device.type), _input_of(self._head) as features:
            if hidden is not None:
                logits, mask = adapted.logits_from(hidden, self._how.depth), None
            else:
                assert batch is not None, "either of the two is given"
                logits, mask = adapted.logits(batch), batch.get("attention_mask")
        return pooled(features.pop(), mask).float(), logits.float()


def item_shape(adapted: AdaptedModel, how: Condensation) -> tuple[int, ...]:
    """Of a synthetic item; the model need not have weights."""
    lens = ModelLens(adapted, how)
    with adapted.mode:
        items, _, _ = lens.real(adapted.made_up_batch(1))
    return tuple(items.shape[1:])


def condensing_program(
    adapted: AdaptedModel, plan: Plan, how: Condensation, settings: TrainingSettings, micro_batch: int | None = None
) -> StepProgram:
    """A client's whole condensation in short (`condensation.rehearsal`), for tracing and measuring.

    It overwrites the loaded adapters: `load` before the model is used again.
    """
    tensors: Tensors
    if adapted.has_storage:
        tensors = lora.init(adapted.spec, plan.ranks, np.random.default_rng(0))
    else:
        shapes = lora.shapes(adapted.spec, plan.ranks)
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    adapted.load(Task(plan, tensors))
    adapted.base.eval()
    piece = micro_batch or plan.micro_batch or settings.batch_size
    with adapted.mode:
        batch = adapted.made_up_batch(piece)
    inputs = tuple(batch.values())
    return StepProgram(
        resident=(*adapted.resident(), *inputs),
        blocks=adapted.blocks,
        parameters=adapted.parameters_by_name(),
        step=condensation.rehearsal(ModelLens(adapted, how, settings.autocast), batch, how, piece),
        batch=inputs,
        context=lambda: adapted.mode,
    )


def program_of(
    adapted: AdaptedModel,
    plan: Plan,
    settings: TrainingSettings,
    micro_batch: int | None = None,
    kind: StepKind | None = None,
) -> StepProgram:
    """What a client of a method of this kind runs: an optimiser step (`AdaptedModel.program`), or its condensation."""
    if kind is not None and kind.condensation is not None:
        return condensing_program(adapted, plan, kind.condensation, settings, micro_batch)
    return adapted.program(plan, settings, micro_batch, kind)


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the module's first argument is in the forward pass within."""
    found: list[torch.Tensor] = []

    def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0])

    handle = module.register_forward_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def pooled(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(examples, width): of a head that reads every position, the last one that is no padding."""
    if features.ndim == 2:
        return features
    if mask is None:
        return features[:, -1]
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=1)
    return features.take_along_dim(last[:, None, None], dim=1)[:, 0]


def fitted(hidden: torch.Tensor, mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """(examples, length, width): texts cut, or filled up with the mean of their own tokens; images as they are.

    Args:
        hidden: (examples, positions, width).
        mask: (examples, positions), 1 for tokens; ``None`` for images.
        length: Positions that are wanted.
    """
    if mask is None:
        return hidden
    count = mask.sum(dim=1, keepdim=True)
    order = (1 - mask).argsort(dim=1, stable=True)  # tokens first, wherever the padding stands
    hidden = hidden.take_along_dim(order[:, :, None], dim=1)
    inside = (torch.arange(hidden.shape[1], device=hidden.device) < count)[:, :, None]
    mean = (hidden * inside).sum(dim=1, keepdim=True) / count[:, :, None]
    missing = max(length - hidden.shape[1], 0)
    hidden = nn.functional.pad(hidden, (0, 0, 0, missing))[:, :length]
    inside = nn.functional.pad(inside, (0, 0, 0, missing))[:, :length]
    return torch.where(inside, hidden, mean)
