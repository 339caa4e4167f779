"""How far a round's new global update is from the exact weighted mean of the clients' updates.

With ΔW_k the change of an adapted module's effective weight (``scale * B @ A`` plus what was added to its base) that
client k made to what it got, and U the change that the server made to the global one,

    error = ||U - M||_F / ||M||_F,   M = Σ p_k ΔW_k / Σ p_k over the clients that trained the module,

with both norms over all modules together. Averaging A and B apart gives an error, as a mean of products is not the
product of the means; methods that are exact give none beyond rounding.

Where all modules together are larger than `DENSE_BYTES`, each matrix X (out, in) is replaced by ``X @ S`` with S a
fixed Gaussian (in, `WIDTH`) of variance 1 / WIDTH. ``||X S||²`` is ``||X||²`` in expectation, with a relative standard
deviation of at most sqrt(2 / WIDTH), 12.5 %, and less the more directions X has: the square of the error is estimated
to about a fifth. An error of zero stays zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Generic, Protocol, runtime_checkable

import torch

from fedpilot import base_deltas, lora
from fedpilot.types import Algorithm, BaseDelta, Deployment, GoesOnFrom, Plan, State, Tensors, Upload

DENSE_BYTES = 256 * 2**20
"""Bytes of all adapted modules' weights in float32 up to which the error is computed and not estimated."""

WIDTH = 128
"""Columns of the sketch."""


def global_model(algorithm: Algorithm[State], state: State) -> Deployment:
    """What the next round's clients go on from, whole: as a rule what is deployed."""
    deployed = algorithm.deploy(state)
    if isinstance(algorithm, GoesOnFrom):
        return replace(deployed, tensors=algorithm.goes_on_from(state))
    return deployed


@runtime_checkable
class Weighs(Protocol):
    """An algorithm that says how it weighs clients: ``examples`` or ``uniform``."""

    @property
    def weights(self) -> str:
        """Which of the two."""


class AggregationError(Generic[State]):
    """Collects a round's error, one upload at a time; its memory does not grow with the clients.

    Args:
        algorithm: The method; its ``distribute`` is asked again for what a client got.
        state: Before the round's aggregation.
        plans: Of the round.
    """

    def __init__(self, algorithm: Algorithm[State], state: State, plans: Sequence[Plan]) -> None:
        self._algorithm, self._state, self._spec = algorithm, state, algorithm.spec
        self._plans = {plan.client_id: plan for plan in plans}
        self._uniform = isinstance(algorithm, Weighs) and algorithm.weights == "uniform"
        size = 4 * sum(out_features * in_features for out_features, in_features in self._spec.modules.values())
        self._dense = size <= DENSE_BYTES
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float] = {}

    def take(self, upload: Upload) -> Upload:
        """Adds a client's update to the mean, and hands the upload on."""
        sent = self._algorithm.distribute(self._state, self._plans[upload.client_id]).tensors
        weight = 1.0 if self._uniform else float(upload.num_examples)
        for module in self._spec.modules:
            change = self._of_client(module, sent, upload.tensors)
            if change is None:
                continue
            if module in self._sums:
                self._sums[module].add_(change, alpha=weight)
            else:
                self._sums[module] = change * weight
            self._weights[module] = self._weights.get(module, 0.0) + weight
        return upload

    def result(self, state: State) -> float:
        """The error of the state after the aggregation; 0 where neither clients nor server changed a module."""
        before, after = global_model(self._algorithm, self._state), global_model(self._algorithm, state)
        based = _steps_between(before.base_delta, after.base_delta)
        far = ideal = 0.0
        for module in self._spec.modules:
            made = self._of_server(module, before, after, based)
            if module in self._sums:
                mean = self._sums[module] / self._weights[module]
                ideal += _square(mean)
                made = mean if made is None else made - mean
            far += 0.0 if made is None else _square(made)
        return math.sqrt(far / ideal) if ideal else math.inf if far else 0.0

    def _of_client(self, module: str, sent: Tensors, trained: Tensors) -> torch.Tensor | None:
        """Change of the module's effective weight, or its sketch; ``None`` where the client did not train it."""
        a, b = lora.a_name(module), lora.b_name(module)
        change = self._of_base(module, trained)
        if a not in trained and b not in trained:
            return change
        pair = self._of_pairs(
            (sent[a], sent[b]),
            (trained.get(a, sent[a]), trained.get(b, sent[b])),
        )
        return pair if change is None else pair + change

    def _of_server(
        self, module: str, before: Deployment, after: Deployment, based: Sequence[Tensors]
    ) -> torch.Tensor | None:
        """Change of the global effective weight, or its sketch; ``None`` where nothing can have changed."""
        a, b = lora.a_name(module), lora.b_name(module)
        old, new = before.tensors, after.tensors
        parts = [change for step in based if (change := self._of_base(module, step)) is not None]
        if a in old and a in new:
            parts.append(self._of_pairs((old[a], old[b]), (new[a], new[b])))
        elif a in old:
            parts.append(-self._product(old[b], old[a]) * self._spec.scale)
        elif a in new:
            parts.append(self._product(new[b], new[a]) * self._spec.scale)
        return sum(parts[1:], start=parts[0]) if parts else None

    def _of_pairs(self, old: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """``scale * (B' A' - B A)``; at equal ranks as ``(B' - B) A' + B (A' - A)``, which loses no digits."""
        (a, b), (a_new, b_new) = old, new
        if a.shape == a_new.shape:
            left, right = torch.cat([b_new - b, b], dim=1), torch.cat([a_new, a_new - a])
        else:
            left, right = torch.cat([b_new, -b], dim=1), torch.cat([a_new, a])
        return self._product(left, right) * self._spec.scale

    def _of_base(self, module: str, step: Tensors) -> torch.Tensor | None:
        """A change of the frozen weight itself: dense, or as factors."""
        weight = base_deltas.weight_name(module)
        if weight in step:
            change = step[weight].float()
            return change if self._dense else change @ _sketch(change.shape[1])
        a, b = base_deltas.a_name(module), base_deltas.b_name(module)
        return self._product(step[b], step[a]) if a in step else None

    def _product(self, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """``B @ A``, (out, in), or its sketch, (out, WIDTH), which is never (out, in) on the way."""
        a, b = a.float(), b.float()
        return b @ (a if self._dense else a @ _sketch(a.shape[1]))


def _steps_between(before: BaseDelta, after: BaseDelta) -> Sequence[Tensors]:
    """What was added to the base since."""
    if before.version >= after.snapshot_version:
        return base_deltas.steps_after(after, before.version)
    old: Mapping[str, torch.Tensor] = base_deltas.total(before)
    return [base_deltas.total(after), {name: -tensor for name, tensor in old.items()}]


@cache
def _sketch(in_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(in_features)
    return torch.randn(in_features, WIDTH, generator=generator) / math.sqrt(WIDTH)


def _square(x: torch.Tensor) -> float:
    return float(x.double().square().sum())
