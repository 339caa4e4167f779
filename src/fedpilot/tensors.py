"""Arithmetic over dictionaries of named tensors, each function pure."""

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch

from fedpilot.types import Tensors


def add(a: Tensors, b: Tensors) -> Tensors:
    """``a + b`` over equal names."""
    return {name: tensor + b[name] for name, tensor in a.items()}


def subtract(a: Tensors, b: Tensors) -> Tensors:
    """``a - b`` over equal names."""
    return {name: tensor - b[name] for name, tensor in a.items()}


def scale(a: Tensors, factor: float) -> Tensors:
    """``factor * a``."""
    return {name: tensor * factor for name, tensor in a.items()}


def select(a: Tensors, names: Iterable[str]) -> Tensors:
    """The named tensors, in the order of ``names``."""
    return {name: a[name] for name in names}


def only(a: Tensors, names: frozenset[str]) -> Tensors:
    """The tensors whose name is among the names, in their own order."""
    return {name: tensor for name, tensor in a.items() if name in names}


def norm(a: Tensors) -> float:
    """Euclidean norm of all entries together.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    5.0
    """
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in a.values()))


def num_bytes(a: Tensors) -> int:
    """Bytes of the entries."""
    return sum(tensor.numel() * tensor.element_size() for tensor in a.values())


def is_finite(a: Tensors) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in a.values())


def digest(a: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bits; equal only for bit-equal tensors."""
    sha = hashlib.sha256()
    for name in sorted(a):
        tensor = a[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class HolderMean:
    """Weighted mean of each name over its holders, one term at a time; memory does not grow with the terms.

    >>> mean = HolderMean()
    >>> mean.add({"x": torch.tensor([1.0])}, 1.0)
    >>> mean.add({"x": torch.tensor([4.0]), "y": torch.tensor([5.0])}, 2.0)
    >>> {name: value.item() for name, value in mean.result().items()}
    {'x': 3.0, 'y': 5.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, term: Tensors, weight: float) -> None:
        """Takes ``weight * term`` in."""
        for name, tensor in term.items():
            if name in self._sums:
                self._sums[name].add_(tensor, alpha=weight)
            else:
                self._sums[name] = tensor * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def result(self) -> Tensors:
        """Mean of each name that has a positive total weight."""
        return {name: total / self._weights[name] for name, total in self._sums.items() if self._weights[name] > 0}

    @property
    def weights(self) -> Mapping[str, float]:
        """Name -> total weight of its holders."""
        return dict(self._weights)


def weighted_mean(terms: Iterable[tuple[Tensors, float]]) -> Tensors:
    """Mean over holders of ``(tensors, weight)`` terms; see `HolderMean`."""
    mean = HolderMean()
    for term, weight in terms:
        mean.add(term, weight)
    return mean.result()
