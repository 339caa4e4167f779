"""One training step and its settings: the code that clients run and that the memory profile traces.

The step is free of data-dependent branches and of host synchronisation, so the same lines run on the CPU, on a GPU and
on the meta device; whoever holds a real loss checks it with `checked`.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any, Literal, Protocol, Self, TypeAlias

import torch
from torch import nn

from fedpilot.errors import PlanError, TrainingError
from fedpilot.galore import GaLoreAdamW
from fedpilot.privacy import NoisySum
from fedpilot.types import Penalty, Projection, StepKind

Batch: TypeAlias = Mapping[str, torch.Tensor]
"""The model's inputs by name, first axis the examples, and ``labels``: (examples,), or (examples, length) of a text."""

IGNORED = -100
"""Label of a position that counts neither in the loss nor in a mean."""


class Examples(Protocol):
    """Encoded examples of one client, or of a test set."""

    def __len__(self) -> int:
        """Number of examples."""

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, max_batches: int | None = None
    ) -> Iterator[Batch]:
        """Every example once, in the generator's order; at most ``max_batches`` batches."""

    def subset(self, indices: Sequence[int]) -> Self:
        """The examples of these positions."""


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimiser": ("adamw", "sgd", "momentum"),
    "autocast": ("float32", "bf16", "auto"),
    "schedule": ("constant", "cosine"),
}


@dataclass(frozen=True)
class TrainingSettings:
    """How a client trains.

    Attributes:
        learning_rate: Of the first round.
        head_lr_factor: The head's learning rate as a multiple of ``learning_rate``: the head starts from nothing, the
            adapter from a trained model.
        optimiser: ``momentum`` is SGD with ``momentum``.
        batch_size: Examples of one optimiser step.
        local_epochs: Passes over the client's data in a round.
        max_steps: Most optimiser steps in a round; ``None`` for no cap.
        weight_decay: Decoupled for AdamW, added to the gradient for SGD.
        momentum: Factor of the ``momentum`` optimiser.
        max_grad_norm: Norm over all gradients together that a step is clipped to; ``None`` for no clipping.
        autocast: Arithmetic of the matrix products; weights and optimiser state stay as they are. ``auto`` is for
            recipes, which put in what the device has (`native_arithmetic`) and record it.
        schedule: Of the learning rate over rounds.
        min_lr_ratio: Share of ``learning_rate`` that the cosine falls to.
        frozen_dropout: Whether dropout acts below the lowest block that a client trains; above it always does.
        cache_bytes: Most that a client remembers of what blocks below its lowest trained one give for its examples, so
            that they run once an example; 0 for nothing. There must be no dropout there. Counts in predicted memory.

    Raises:
        ValueError: A field breaks its rule; the message names all that do.
    """

    learning_rate: float
    head_lr_factor: float = 1.0
    optimiser: Literal["adamw", "sgd", "momentum"] = "adamw"
    batch_size: int = 16
    local_epochs: int = 1
    max_steps: int | None = None
    weight_decay: float = 0.0
    momentum: float = 0.9
    max_grad_norm: float | None = 1.0
    autocast: Literal["float32", "bf16", "auto"] = "float32"
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = 0.0
    frozen_dropout: bool = True
    cache_bytes: int = 0

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                yield f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
        for name in ("batch_size", "local_epochs", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} must be at least 1, got {value}"
        for name in ("learning_rate", "head_lr_factor", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                yield f"{name} must be positive and finite, got {value}"
        if not 0 <= self.weight_decay < math.inf:
            yield f"weight_decay must be zero or more, got {self.weight_decay}"
        if not 0 <= self.momentum < 1:
            yield f"momentum must be in [0, 1), got {self.momentum}"
        if self.cache_bytes < 0:
            yield f"cache_bytes must be zero or more, got {self.cache_bytes}"
        if not 0 <= self.min_lr_ratio <= 1:
            yield f"min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}"

    def learning_rate_at(self, round: int, num_rounds: int) -> float:
        """Learning rate of a round, counted from 1; the first has the full rate, and none is spent on the last minimum.

        >>> settings = TrainingSettings(learning_rate=0.1, schedule="cosine", min_lr_ratio=0.5)
        >>> [round(settings.learning_rate_at(number, 2), 4) for number in (1, 2)]
        [0.1, 0.075]
        """
        if self.schedule == "constant":
            return self.learning_rate
        share = (1 + math.cos(math.pi * (round - 1) / num_rounds)) / 2
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * share)


def make_optimiser(
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
    learning_rate: float,
    head: Collection[str] = (),
) -> torch.optim.Optimizer:
    """A fresh optimiser that updates one tensor at a time.

    Updating all tensors at once (``foreach``) is chosen by device and needs scratch for all of them: it would make the
    traced and the measured peak differ.

    Args:
        parameters: By name.
        settings: Which optimiser.
        learning_rate: Of all but the head.
        head: Names of the head's tensors; its rate is ``head_lr_factor`` times the others'.
    """
    rates = {False: learning_rate, True: learning_rate * settings.head_lr_factor}
    groups: list[dict[str, Any]] = [
        {"params": members, "lr": rates[of_head]}
        for of_head in rates
        if (members := [parameter for name, parameter in parameters.items() if (name in head) == of_head])
    ]
    decay = settings.weight_decay
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=decay, foreach=False, fused=False)
    momentum = settings.momentum if settings.optimiser == "momentum" else 0.0
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, weight_decay=decay, foreach=False, fused=False)


def make_projected_optimiser(
    parameters: Mapping[str, nn.Parameter],
    head: Collection[str],
    settings: TrainingSettings,
    learning_rate: float,
    projection: Projection,
) -> GaLoreAdamW:
    """A fresh optimiser that projects all but the head.

    Raises:
        PlanError: The settings ask for another optimiser than AdamW, or the projection does not fit the weights.
    """
    if settings.optimiser != "adamw":
        raise PlanError(
            f"optimiser must be adamw where gradients are projected, got {settings.optimiser}; "
            "set training.optimiser = 'adamw'"
        )
    projected = [parameter for name, parameter in parameters.items() if name not in head]
    plain = [parameter for name, parameter in parameters.items() if name in head]
    decay = settings.weight_decay
    return GaLoreAdamW(
        projected,
        plain,
        projection,
        learning_rate=learning_rate,
        plain_learning_rate=learning_rate * settings.head_lr_factor,
        weight_decay=decay,
    )


def num_targets(batch: Batch) -> torch.Tensor:
    """How many targets the batch's mean loss is over: examples, or next words; a scalar on the batch's device."""
    labels = batch["labels"]
    if labels.ndim == 1:
        return torch.full((), labels.shape[0], dtype=torch.float32, device=labels.device)
    return (labels[:, 1:] != IGNORED).sum().float()


def targets_by_example(batch: Batch) -> torch.Tensor:
    """(examples,) targets of each example, as `num_targets` counts them."""
    labels = batch["labels"]
    if labels.ndim == 1:
        return torch.ones(labels.shape[0], device=labels.device)
    return (labels[:, 1:] != IGNORED).sum(dim=1).float()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """The batch cut into views of at most ``size`` examples; ``None`` leaves it whole."""
    examples = batch["labels"].shape[0]
    if size is None or size >= examples:
        return [batch]
    return [{name: tensor[i : i + size] for name, tensor in batch.items()} for i in range(0, examples, size)]


def native_arithmetic(device_type: str) -> Literal["float32", "bf16"]:
    """``bf16`` where the device has instructions for its products, on which emulation would be slower than float32."""
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    known = torch.cpu.get_capabilities()
    return "bf16" if any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16")) else "float32"


def arithmetic(autocast: str, device_type: str) -> AbstractContextManager[object]:
    """Context of a forward pass: bf16 matrix products, or everything as it is stored.

    Autocast's cache is off: it would keep casts of the small trained matrices alive, each of which is used once.
    """
    if autocast == "auto":
        raise ValueError("autocast must be settled before it is used, got 'auto'; put in native_arithmetic(device)")
    if autocast != "bf16":
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False)


def backward(
    forward_loss: Callable[[Batch], torch.Tensor], micro_batches: Sequence[Batch], autocast: str, device_type: str
) -> torch.Tensor:
    """Adds the gradient of the batch's mean loss to ``.grad``, however the batch is cut; returns that mean."""
    counts = [num_targets(batch) for batch in micro_batches]
    total = torch.stack(counts).sum().clamp(min=1)
    result: torch.Tensor | None = None
    for batch, count in zip(micro_batches, counts, strict=True):
        with arithmetic(autocast, device_type):
            loss = forward_loss(batch)
        if len(micro_batches) > 1:
            loss = loss * (count / total)
        loss.backward()  # type: ignore[no-untyped-call]
        result = loss.detach() if result is None else result + loss.detach()
        del loss  # else the graph's last values outlive the next forward pass
    assert result is not None, "a batch has at least one micro-batch"
    return result


def train_step(
    forward_loss: Callable[[Batch], torch.Tensor],
    micro_batches: Sequence[Batch],
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
    penalty: Penalty | None = None,
) -> torch.Tensor:
    """One optimiser step.

    Args:
        forward_loss: Mean loss over a micro-batch's targets, a scalar.
        micro_batches: The batch in pieces; their mean is weighted by targets, so the pieces do not show in the result.
        optimiser: Over ``parameters``.
        parameters: What is trained, by global name.
        settings: Clipping and autocast.
        penalty: Added to the loss once, with the live parameters.

    Returns:
        Mean loss of the batch without the penalty, detached; pass it to `checked` where it is real.
    """
    optimiser.zero_grad(set_to_none=True)
    device_type = next(iter(parameters.values())).device.type
    loss = backward(forward_loss, micro_batches, settings.autocast, device_type)
    if penalty is not None:
        penalty(parameters).backward()  # type: ignore[no-untyped-call]
    if settings.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm, foreach=False)
    optimiser.step()
    return loss


def private_step(
    forward_loss: Callable[[Batch], torch.Tensor],
    micro_batches: Iterable[Batch],
    optimiser: torch.optim.Optimizer,
    noisy: NoisySum,
    autocast: str,
) -> torch.Tensor:
    """One optimiser step of DP-SGD.

    What is clipped is the gradient of an example's own mean loss: the plain mean over a batch's words would let an
    example reach the others through their number.

    Args:
        forward_loss: Mean loss over a micro-batch's targets, a scalar.
        micro_batches: The drawn examples in pieces, each read when its turn comes; none for an empty draw.
        optimiser: Over the parameters of ``noisy``.
        noisy: Clips, sums and adds noise.
        autocast: Arithmetic of the matrix products; clipping and noise are float32.

    Returns:
        Mean loss of the batch, detached; zero of an empty one.
    """
    noisy.start()
    total = torch.zeros(2, device=noisy.device)  # summed loss and number of targets
    for batch in micro_batches:
        count = num_targets(batch)
        with noisy.watching():
            with arithmetic(autocast, noisy.device.type):
                loss = forward_loss(batch)
            (loss * count).backward()  # type: ignore[no-untyped-call]
        noisy.add(1 / targets_by_example(batch).clamp(min=1))
        total += torch.stack([loss.detach() * count, count])
        del batch, loss  # else they outlive the next piece's forward pass
    noisy.finish()
    optimiser.step()
    return total[0] / total[1].clamp(min=1)


@dataclass(frozen=True)
class Step:
    """A client's optimiser step with all that stays the same from batch to batch.

    Attributes:
        forward_loss: Mean loss over a micro-batch's targets, a scalar.
        parameters: What is trained, by global name.
        settings: Clipping and autocast.
        optimiser: Over ``parameters``.
        penalty: Added to the loss once a step.
        noisy: Sums of clipped gradients, for DP-SGD, which clips by example instead of by step.
    """

    forward_loss: Callable[[Batch], torch.Tensor]
    parameters: Mapping[str, nn.Parameter]
    settings: TrainingSettings
    optimiser: torch.optim.Optimizer
    penalty: Penalty | None = None
    noisy: NoisySum | None = None

    def __call__(self, micro_batches: Iterable[Batch]) -> torch.Tensor:
        """Trains on a batch in pieces; its mean loss, detached."""
        if self.noisy is not None:
            return private_step(self.forward_loss, micro_batches, self.optimiser, self.noisy, self.settings.autocast)
        return train_step(
            self.forward_loss, list(micro_batches), self.optimiser, self.parameters, self.settings, self.penalty
        )

    def make_state(self) -> None:
        """For tracing a step without noise: leaves the optimiser's state as one does, but runs no pass."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def past_first(self, micro_batches: Sequence[Batch]) -> None:
        """For tracing a step without noise: one with gradients and a loss of its first piece, but no pass of it."""

        def cheap(batch: Batch) -> torch.Tensor:
            return torch.stack([parameter.sum() for parameter in self.parameters.values()]).sum()

        losses = chain([cheap], repeat(self.forward_loss))
        replace(self, forward_loss=lambda batch: next(losses)(batch))(micro_batches)

    def state(self) -> list[torch.Tensor]:
        """Tensors that the step keeps from one batch to the next, beside the parameters."""
        sums = [] if self.noisy is None else self.noisy.sums
        of_optimiser = self.optimiser.state.values()
        return [*sums, *(value for of in of_optimiser for value in of.values() if torch.is_tensor(value))]


def make_step(
    forward_loss: Callable[[Batch], torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
    learning_rate: float,
    *,
    penalty: Penalty | None = None,
    kind: StepKind | None = None,
    head: Collection[str] = (),
    noisy: NoisySum | None = None,
) -> Step:
    """The step of a kind, with a fresh optimiser; clients train with it and the memory profile traces it.

    Args:
        forward_loss: Mean loss over a micro-batch's targets, a scalar.
        parameters: What is trained, by global name.
        settings: Optimiser, clipping and autocast.
        learning_rate: Of this round.
        penalty: Added to the loss once a step.
        kind: Of the step, where it is not plain LoRA's.
        head: Names of the head's tensors, which no kind projects and which have a learning rate of their own.
        noisy: Over ``parameters``, for a private kind.

    Raises:
        PlanError: The kind and the settings, or the kind and the tensors, do not go together.
    """
    if kind is not None and kind.private is not None:
        check_private(kind, penalty)
        assert noisy is not None, "whoever has the model makes the sums of a private step"
    optimiser: torch.optim.Optimizer
    if kind is not None and kind.projection is not None:
        optimiser = make_projected_optimiser(parameters, head, settings, learning_rate, kind.projection)
    else:
        optimiser = make_optimiser(parameters, settings, learning_rate, head)
    return Step(forward_loss, parameters, settings, optimiser, penalty, noisy)


def check_private(kind: StepKind, penalty: Penalty | None) -> None:
    """Refuses a private step of a method whose other use of the examples no accountant covers.

    Raises:
        PlanError: There is a penalty or a projection beside clipping and noise.
    """
    if penalty is not None or kind.projection is not None:
        what = "a penalty" if penalty is not None else "a projection of gradients"
        raise PlanError(
            f"a private step must use the examples through clipped and noisy gradients alone, got {what} too; "
            "choose ffa-lora, or train without differential privacy"
        )


def checked(loss: torch.Tensor | float, step: int) -> float:
    """The loss as a number.

    Raises:
        TrainingError: It is not finite.
    """
    value = float(loss)
    if not math.isfinite(value):
        raise TrainingError(
            f"training loss must be finite, got {value} at local step {step}; "
            "lower the learning rate, set max_grad_norm, or look for broken examples in this client's data"
        )
    return value
