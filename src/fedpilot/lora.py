"""Algebra of low-rank pairs: ``A`` is (rank, in), ``B`` is (out, rank), the weight's change is ``scale * B @ A``."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from fedpilot.types import Fresh, ModelSpec, Tensors


def a_name(module: str) -> str:
    """Name of a module's A."""
    return f"{module}.lora_A"


def b_name(module: str) -> str:
    """Name of a module's B."""
    return f"{module}.lora_B"


def names(modules: Iterable[str]) -> tuple[str, ...]:
    """Names of all A and B of the modules, pair by pair."""
    return tuple(name for module in modules for name in (a_name(module), b_name(module)))


def blocks_modules(spec: ModelSpec, blocks: Iterable[int]) -> tuple[str, ...]:
    """Adapted modules that lie in the blocks, in the model's order."""
    wanted = frozenset(blocks)
    return tuple(module for module in spec.modules if spec.block_of[module] in wanted)


def shapes(spec: ModelSpec, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a client with these ranks holds, head included."""
    result: dict[str, tuple[int, ...]] = {}
    for module, rank in ranks.items():
        out_features, in_features = spec.modules[module]
        result[a_name(module)] = (rank, in_features)
        result[b_name(module)] = (out_features, rank)
    return result | {name: tuple(tensor.shape) for name, tensor in spec.head.items()}


def init(spec: ModelSpec, ranks: Mapping[str, int], rng: np.random.Generator) -> Tensors:
    """Fresh pairs: A uniform in ±1/sqrt(in), as PEFT draws it, B zero; the head as the model has it."""
    seed = int(rng.integers(2**63))
    generator = torch.Generator().manual_seed(seed)
    adapter: dict[str, torch.Tensor] = {}
    for module, rank in ranks.items():
        out_features, in_features = spec.modules[module]
        bound = 1 / math.sqrt(in_features)
        adapter[a_name(module)] = (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
        adapter[b_name(module)] = torch.zeros(out_features, rank)
    return adapter | {name: tensor.clone() for name, tensor in spec.head.items()}


def fresh(spec: ModelSpec, drawn: Fresh, ranks: Mapping[str, int]) -> Tensors:
    """The tensors that a client draws itself: those of `init` at the drawn rank, cut to its own ranks."""
    whole = init(spec, dict.fromkeys(spec.modules, drawn.rank), np.random.default_rng(drawn.seed))
    cut = truncate(whole, ranks)
    return {name: cut[name] for name in cut if name in drawn.names}


def modules_of(tensors: Iterable[str]) -> tuple[str, ...]:
    """Modules that have an A among the names, in their order."""
    return tuple(name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A"))


def delta(tensors: Tensors, module: str, scale: float) -> torch.Tensor:
    """Change of the module's weight, ``scale * B @ A``, (out, in)."""
    return scale * (tensors[b_name(module)] @ tensors[a_name(module)])


def truncate(tensors: Tensors, ranks: Mapping[str, int]) -> Tensors:
    """First ``rank`` rows of A and columns of B of the modules in ``ranks``; other tensors (the head) as they are."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            result[name] = tensor
        elif module in ranks:
            rank = ranks[module]
            result[name] = tensor[:rank] if kind == "lora_A" else tensor[:, :rank]
    return result


def pad(tensors: Tensors, rank: int) -> Tensors:
    """Rows of zeros below A and columns of zeros beside B up to ``rank``; other tensors as they are."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A"):
            result[name] = torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        elif name.endswith(".lora_B"):
            result[name] = torch.nn.functional.pad(tensor, (0, rank - tensor.shape[1]))
        else:
            result[name] = tensor
    return result


def product_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of ``B @ A`` from two (rank, rank) products: ``||BA||² = <BᵀB, AAᵀ>``.

    >>> a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0], [2.0]])
    >>> round(product_norm(a, b), 4), round(float((b @ a).norm()), 4)
    (11.1803, 11.1803)
    """
    a, b = a.double(), b.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


class SlotMean:
    """Weighted mean over holders, slot by slot: row i of A and column i of B count only clients of rank above i.

    A slot that nobody holds keeps its present value; a tensor that nobody sent is not in the result.

    Args:
        present: Present values of all tensors; their shapes are those of the result.
    """

    def __init__(self, present: Tensors) -> None:
        self._present = present
        self._sums: dict[str, torch.Tensor] = {}
        self._slot_weights: dict[str, torch.Tensor] = {}

    def add(self, term: Tensors, weight: float) -> None:
        """Takes ``weight * term`` in; pairs may have fewer slots than the present ones."""
        for name, tensor in term.items():
            dim = _slot_dim(name)
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(self._present[name])
                slots = self._present[name].shape[dim] if dim is not None else 1
                self._slot_weights[name] = torch.zeros(slots, dtype=torch.float64)
            held = tensor.shape[dim] if dim is not None else 1
            target = self._sums[name] if dim is None else self._sums[name].narrow(dim, 0, held)
            target.add_(tensor, alpha=weight)
            self._slot_weights[name][:held] += weight

    def result(self) -> Tensors:
        """Mean of each tensor that somebody sent."""
        return {name: self._mean(name) for name in self._sums}

    @property
    def weights(self) -> Mapping[str, float]:
        """Name -> total weight of the clients that sent at least one slot of it."""
        return {name: float(slots[0]) for name, slots in self._slot_weights.items()}

    def _mean(self, name: str) -> torch.Tensor:
        total, slots, dim = self._sums[name], self._slot_weights[name], _slot_dim(name)
        held = int((slots > 0).sum())
        if dim is None or (slots == slots[0]).all():
            return total / float(slots[0])
        shape = (-1, 1) if dim == 0 else (1, -1)
        mean = total.narrow(dim, 0, held) / slots[:held].to(total.dtype).reshape(shape)
        return torch.cat([mean, self._present[name].narrow(dim, held, total.shape[dim] - held)], dim=dim)


def _slot_dim(name: str) -> int | None:
    """Axis of a tensor that counts rank slots; ``None`` for a dense tensor."""
    if name.endswith(".lora_A"):
        return 0
    return 1 if name.endswith(".lora_B") else None
