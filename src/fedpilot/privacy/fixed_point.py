"""Named tensors as one vector of integers modulo a power of two, so that masks add up to nothing.

The canonical layout holds all tensors flattened in name order, each padded to its full shape, and behind them one
weight for each slot: row i of an A, column i of a B, or a whole tensor of another kind. A client that lacks a slot
writes zeros, also for its weight: under masks nobody sees who held what, and the sums still give the mean over holders.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from fedpilot.errors import PlanError, UploadError
from fedpilot.types import Tensors

Words: TypeAlias = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]
"""(entries,) unsigned integers; sums wrap around."""


@dataclass(frozen=True)
class FixedPoint:
    """How tensors become integers.

    With n contributions of weight w_k, every entry of a sum ``Σ w_k x_k`` is off by at most ``n * step / 2``.

    Attributes:
        shapes: Name -> full shape; a pair at the largest rank.
        step: Distance of two neighbouring values of ``weight * entry``.
        bound: Largest magnitude of an entry; a larger one is an error and is not cut.
        max_clients: Most contributions to a sum.
        max_weight: Largest weight of a client.
        bits: Of an integer.
    """

    shapes: Mapping[str, tuple[int, ...]]
    step: float = 2.0**-16
    bound: float = 4.0
    max_clients: int = 100
    max_weight: int = 1
    bits: Literal[32, 64] = 32

    @classmethod
    def finest(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        bound: float,
        max_clients: int,
        max_weight: int,
        bits: Literal[32, 64],
    ) -> "FixedPoint":
        """The one with the smallest power of two for a step at which no sum can wrap around.

        >>> FixedPoint.finest({}, bound=4.0, max_clients=10, max_weight=1, bits=32).step == 2.0**-25
        True
        """
        room = 2.0 ** (bits - 1) / (max_clients * max_weight) - 1
        if room <= 1:
            raise PlanError(
                f"weights must leave room for a sum in {bits} bits, got {max_clients} clients of weight up to "
                f"{max_weight}; take 64 bits or weights 'uniform'"
            )
        exponent = math.floor(math.log2(room / bound))
        if max_clients * max_weight * max(bound * 2.0**exponent + 1, 1) >= 2 ** (bits - 1):
            exponent -= 1
        return cls(shapes, 2.0**-exponent, bound, max_clients, max_weight, bits)

    def __post_init__(self) -> None:
        if not (self.step > 0 and self.bound > 0 and self.max_clients > 0 and self.max_weight > 0):
            raise PlanError(
                "step, bound, max_clients and max_weight must be positive, got "
                f"{self.step}, {self.bound}, {self.max_clients} and {self.max_weight}; change what is not"
            )
        most = self.max_clients * self.max_weight * max(self.bound / self.step + 1, 1)
        if most >= 2 ** (self.bits - 1):
            raise PlanError(
                f"sums must lie below 2^{self.bits - 1} steps, got up to {most:.3g} with {self.max_clients} clients of "
                f"weight {self.max_weight}, bound {self.bound:g} and step {self.step:g}; take 64 bits or a larger step"
            )

    @property
    def num_entries(self) -> int:
        """Length of the vector."""
        return sum(int(np.prod(shape)) + _num_slots(name, shape) for name, shape in self.shapes.items())

    @property
    def num_bytes(self) -> int:
        """Bytes of the vector."""
        return self.num_entries * self.bits // 8

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of the vector; little endian on the wire."""
        return np.dtype(f"<u{self.bits // 8}")

    def encoded(self, tensors: Tensors, weight: int = 1) -> Words:
        """The vector of ``weight * tensors``.

        Args:
            tensors: Any of the layout's; a pair may have fewer slots.
            weight: A whole number.

        Raises:
            UploadError: An entry is beyond the bound or not finite, or a name, shape or weight is not of the layout.
        """
        if not 1 <= weight <= self.max_weight:
            raise UploadError(f"weight must lie in 1..{self.max_weight}, got {weight}; agree on a larger max_weight")
        if foreign := sorted(tensors.keys() - self.shapes.keys()):
            raise UploadError(f"tensors must be of the agreed layout, got {foreign[0]}; agree on the layout again")
        values: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        for name, shape in sorted(self.shapes.items()):
            padded, held = np.zeros(shape), np.zeros(_num_slots(name, shape))
            if name in tensors:
                part = self._checked(name, tensors[name])
                padded[tuple(slice(size) for size in part.shape)] = part
                held[: _num_slots(name, part.shape)] = weight
            values.append(np.rint(padded * (weight / self.step)).ravel())
            weights.append(held)
        return np.concatenate([*values, *weights]).astype(np.int64).astype(self.dtype)

    def decoded(self, vector: Words) -> "Sums":
        """Sums of values and weights, from a sum of vectors."""
        signed = vector.astype(self.dtype).view(f"<i{self.bits // 8}").astype(np.float64)
        values: dict[str, torch.Tensor] = {}
        weights: dict[str, torch.Tensor] = {}
        start = 0
        for name, shape in sorted(self.shapes.items()):
            stop = start + int(np.prod(shape))
            values[name] = torch.from_numpy(signed[start:stop] * self.step).reshape(shape)
            start = stop
        for name, shape in sorted(self.shapes.items()):
            stop = start + _num_slots(name, shape)
            weights[name] = torch.from_numpy(signed[start:stop].copy())
            start = stop
        return Sums(values, weights)

    def _checked(self, name: str, tensor: torch.Tensor) -> np.ndarray:
        array: np.ndarray = tensor.detach().double().cpu().numpy()
        shape = self.shapes[name]
        axis = _slot_axis(name)
        if array.ndim != len(shape) or any(
            size > full if at == axis else size != full
            for at, (size, full) in enumerate(zip(array.shape, shape, strict=True))
        ):
            raise UploadError(f"{name} must fit into {shape}, got {array.shape}; train at most at the agreed rank")
        largest = float(np.abs(array).max(initial=0.0))
        if not largest <= self.bound:
            raise UploadError(
                f"entries of {name} must lie within ±{self.bound:g} to be summed, got {largest:g}; raise the bound, or "
                "clip the update"
            )
        return array


@dataclass(frozen=True)
class Sums:
    """What clients sent, summed.

    Attributes:
        values: Name -> ``Σ w_k x_k``, float64.
        weights: Name -> (slots,) ``Σ w_k`` over those who held the slot.
    """

    values: Tensors
    weights: Tensors

    def mean(self, present: Tensors, total_weight: float | None = None) -> Tensors:
        """The mean over holders; a slot that nobody held keeps its present value.

        Args:
            present: Values of every tensor, whose dtypes the mean takes.
            total_weight: Divides every slot where given, as if who lacked it had sent zeros (HetLoRA's padding).
        """
        return dict(self._means(present, total_weight))

    def moved(self, present: Tensors, *, padded: bool) -> Tensors:
        """The mean of what clients hold, where what was summed is how it differs from the present values.

        Args:
            present: Present values of every tensor, whose leading slots the clients started from.
            padded: Whether a slot that a client lacks counts as a zero of its weight; else it does not count.

        Returns:
            Each tensor that somebody held; a slot that nobody held as it was.
        """
        return dict(self._moved(present, padded))

    def _moved(self, present: Tensors, padded: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for name, change in self.values.items():
            held = self.weights[name]
            if not bool((held > 0).any()):
                continue
            old = present[name].double()
            axis, shape = _slot_axis(name), [1] * old.dim()
            if axis is not None:
                shape[axis] = -1
            of_slot = held.reshape(shape)
            mean = (old * of_slot + change) / held.max() if padded else old + change / of_slot.clamp(min=1.0)
            yield name, torch.where(of_slot > 0, mean, old).to(present[name].dtype)

    def _means(self, present: Tensors, total_weight: float | None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self.values.items():
            held = self.weights[name]
            axis = _slot_axis(name)
            shape = [1] * value.dim()
            if axis is not None:
                shape[axis] = -1
            held = held.reshape(shape)
            divisor = held.clamp(min=1.0) if total_weight is None else torch.full_like(held, total_weight)
            mean = (value / divisor).to(present[name].dtype)
            yield name, torch.where(held > 0, mean, present[name])


def _slot_axis(name: str) -> int | None:
    return 0 if name.endswith(".lora_A") else 1 if name.endswith(".lora_B") else None


def _num_slots(name: str, shape: tuple[int, ...]) -> int:
    axis = _slot_axis(name)
    return 1 if axis is None else shape[axis]
