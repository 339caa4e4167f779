"""Algebra of low-rank pairs: ``A`` is (rank, in), ``B`` is (out, rank), the weight's change is ``scale * B @ A``."""

import math
from collections.abc import Iterable, Mapping, Sequence

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


def draw(spec: ModelSpec, seed: Sequence[int], ranks: Mapping[str, int], rank: int) -> tuple[Tensors, Fresh]:
    """Fresh pairs of these ranks, and how a client draws them itself: a smaller rank is the first rows of ``rank``.

    Args:
        spec: The model.
        seed: Numbers that no other draw has, such as those of the run and of the round.
        ranks: Module -> rank, at most ``rank``; a module that is left out gets no pair.
        rank: At which all modules are drawn.
    """
    drawn = Fresh(int(np.random.SeedSequence(seed).generate_state(1)[0]), rank, frozenset(names(ranks)))
    return fresh(spec, drawn, ranks), drawn


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


def product_norm(a: torch.Tensor, b: torch.Tensor, *, dtype: torch.dtype = torch.float64) -> float:
    """Frobenius norm of ``B @ A`` from two (rank, rank) products: ``||BA||² = <BᵀB, AAᵀ>``.

    >>> a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0], [2.0]])
    >>> round(product_norm(a, b), 4), round(float((b @ a).norm()), 4)
    (11.1803, 11.1803)

    Args:
        a: (rank, in).
        b: (out, rank).
        dtype: Of the two products; their inner product is in float64. In float32 they are faster, and good enough where
            ``B @ A`` is not much smaller than its factors.
    """
    a, b = a.to(dtype), b.to(dtype)
    return math.sqrt(max(float(((b.T @ b).double() * (a @ a.T).double()).sum()), 0.0))


def factored_svd(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decomposition of ``left @ right`` without the product: QR of both, SVD of the small core.

    The largest entry of every right vector is positive, so that equal inputs give equal signs.

    >>> u, s, vh = factored_svd(torch.tensor([[3.0], [4.0], [0.0]]), torch.tensor([[0.0, -2.0]]))
    >>> (u * s).round(decimals=4).tolist(), vh.round(decimals=4).abs().tolist()
    ([[-6.0], [-8.0], [0.0]], [[0.0, 1.0]])

    Args:
        left: (out, rank).
        right: (rank, in); the rank may exceed either side.

    Returns:
        Left vectors (out, k), singular values (k,) descending, right vectors (k, in), with k = min(out, rank, in).
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return _with_signs(q_left @ u, s, vh @ q_right.T)


def _with_signs(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The decomposition in which the largest entry of every right vector is positive."""
    signs = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign()
    return u * signs.T, s, vh * signs


def pair_of(
    u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, fresh_a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best pair of a rank for a decomposed product: ``A = Vh[:rank]`` and ``B = (U S)[:, :rank]``.

    A slot for which there is no singular value above rounding is as at the start of a run: zero in B, and in A the row
    of ``fresh_a``, because a slot that is zero in both factors has no gradient.

    Args:
        u: (out, k).
        s: (k,), descending.
        vh: (k, in).
        fresh_a: (rank, in).

    Returns:
        A (rank, in) and B (out, rank).
    """
    rank, noise = fresh_a.shape[0], 10 * torch.finfo(s.dtype).eps * s[0]
    kept = min(int((s > noise).sum()), rank)
    b = torch.nn.functional.pad(u[:, :kept] * s[:kept], (0, rank - kept))
    # Row by row, as a checkpoint gives them back: the order in which a product is summed follows the layout.
    return torch.cat([vh[:kept], fresh_a[kept:].to(vh.dtype)]).contiguous(), b.contiguous()


class ProductSum:
    """Running sum of ``weight * B @ A``, exact, in memory that does not grow with the terms.

    Terms are stacked: ``left`` (out, R) beside each other, ``right`` (R, in) below each other, with R the sum of the
    ranks. The (out, in) product is not formed as long as R <= min(out, in). Beyond that the sum has full rank in
    general, so that no exact form has fewer numbers than the sum itself: it is kept dense, and new terms are
    stacked up to ``block`` before they are multiplied in.

    >>> total = ProductSum(3, 2)
    >>> total.add(torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[1.0, 1.0]]), 2.0)
    >>> total.add(torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[5.0, 0.0]]))
    >>> total.times(torch.eye(2)).tolist()
    [[2.0, 2.0], [5.0, 0.0], [4.0, 4.0]]

    Args:
        out_features: Rows of B.
        in_features: Columns of A.
        block: Ranks that are stacked for one product once the sum is dense.
        dtype: Of the sum; at least float32.
    """

    def __init__(
        self, out_features: int, in_features: int, *, block: int = 256, dtype: torch.dtype = torch.float32
    ) -> None:
        self._limit, self._block = min(out_features, in_features), block
        # Slabs, so that nothing is moved as the stack grows; of B transposed, so that both are rows.
        self._left_t = [torch.empty(0, out_features, dtype=dtype)]
        self._right = [torch.empty(0, in_features, dtype=dtype)]
        self._used = 0  # rows of the last slab
        self._dense: torch.Tensor | None = None

    def add(self, b: torch.Tensor, a: torch.Tensor, weight: float = 1.0) -> None:
        """Takes ``weight * b @ a`` in; ``b`` is (out, rank), ``a`` is (rank, in). Copies both."""
        if self._used + a.shape[0] > len(self._right[-1]):
            self._make_room(a.shape[0])
        slots = slice(self._used, self._used + a.shape[0])
        torch.mul(b.T, weight, out=self._left_t[-1][slots])
        self._right[-1][slots] = a
        self._used += a.shape[0]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """The sum times ``x`` (in, columns): (out, columns)."""
        left, right = self._stack
        product = left @ (right @ x)
        return product if self._dense is None else product + self._dense @ x

    def norm(self) -> float:
        """Frobenius norm of the sum."""
        left, right = self._stack
        if self._dense is None:
            return product_norm(right, left)
        return float(torch.addmm(self._dense, left, right).double().norm())

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of B (out, R) and A (R, in) whose product is the sum; once it is dense, A is the identity."""
        left, right = self._stack
        if self._dense is None:
            return left.contiguous(), right
        return torch.addmm(self._dense, left, right), torch.eye(right.shape[1], dtype=right.dtype)

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left vectors (out, k), singular values (k,) and right vectors (k, in) of the sum; see `factored_svd`."""
        left, right = self._stack
        if self._dense is None:
            return factored_svd(left, right)
        u, s, vh = torch.linalg.svd(torch.addmm(self._dense, left, right), full_matrices=False)
        return _with_signs(u, s, vh)

    @property
    def rank(self) -> int:
        """Largest rank that the sum can have: the stacked ranks, or the smaller side once it is dense."""
        return sum(map(len, self._right[:-1])) + self._used if self._dense is None else self._limit

    @property
    def _stack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of ``left`` and ``right`` as one piece each."""
        left_t, right = torch.cat(_filled(self._left_t, self._used)), torch.cat(_filled(self._right, self._used))
        return left_t.T, right

    def _make_room(self, rank: int) -> None:
        """A new slab: for eight terms, or for a block once the sum is dense, which it becomes at its limit."""
        stacked = self.rank
        self._left_t, self._right = _filled(self._left_t, self._used), _filled(self._right, self._used)
        if self._dense is not None or (stacked > 0 and stacked + rank > self._limit):
            for left_t, right in zip(self._left_t, self._right, strict=True):
                self._dense = left_t.T @ right if self._dense is None else self._dense.addmm_(left_t.T, right)
            self._left_t, self._right = self._left_t[:1], self._right[:1]
        room = max(rank, min(8 * rank, self._limit - stacked) if self._dense is None else self._block)
        for slabs in (self._left_t, self._right):
            slabs.append(slabs[0].new_empty(room, slabs[0].shape[1]))
        self._used = 0


def _filled(slabs: list[torch.Tensor], used: int) -> list[torch.Tensor]:
    """The slabs, the last one without the rows that are not used yet."""
    return [*slabs[:-1], slabs[-1][:used]]


def product_sums(spec: ModelSpec) -> dict[str, ProductSum]:
    """Module -> an empty `ProductSum` of its shape."""
    return {module: ProductSum(*shape) for module, shape in spec.modules.items()}


class SlotMean:
    """Weighted mean over holders, slot by slot: row i of A and column i of B count only clients of rank above i.

    A slot that nobody holds keeps its present value; a tensor that nobody sent is not in the result.

    Args:
        present: Present values of all tensors; their shapes are those of the result.
        padded: Whether a slot that a client lacks, up to the largest rank that was sent, counts as a zero of its weight
            (HetLoRA).
    """

    def __init__(self, present: Tensors, *, padded: bool = False) -> None:
        self._present, self._padded = present, padded
        self._sums: dict[str, torch.Tensor] = {}
        self._held: dict[str, dict[int, float]] = {}  # name -> slots -> total weight of those who hold just these

    def add(self, term: Tensors, weight: float) -> None:
        """Takes ``weight * term`` in; pairs may have fewer slots than the present ones."""
        for name, tensor in term.items():
            if name not in self._sums:
                self._sums[name], self._held[name] = torch.zeros_like(self._present[name]), {}
            target, dim = self._sums[name], _slot_dim(name)
            held = 1 if dim is None else tensor.shape[dim]
            if dim is not None and held < target.shape[dim]:
                target = target.narrow(dim, 0, held)
            target.add_(tensor, alpha=weight)
            self._held[name][held] = self._held[name].get(held, 0.0) + weight

    def result(self) -> Tensors:
        """Mean of each tensor that somebody sent."""
        return {name: self._mean(name) for name in self._sums}

    @property
    def weights(self) -> Mapping[str, float]:
        """Name -> total weight of the clients that sent at least one slot of it."""
        return {name: sum(held.values()) for name, held in self._held.items()}

    def _mean(self, name: str) -> torch.Tensor:
        total, held, dim = self._sums[name], self._held[name], _slot_dim(name)
        whole = sum(held.values())
        if dim is None or (max(held) == total.shape[dim] and (self._padded or len(held) == 1)):
            return total / whole
        slots = [
            whole if self._padded else sum(weight for count, weight in held.items() if count > slot)
            for slot in range(max(held))
        ]
        shape = (-1, 1) if dim == 0 else (1, -1)
        mean = total.narrow(dim, 0, len(slots)) / torch.tensor(slots, dtype=total.dtype).reshape(shape)
        return torch.cat([mean, self._present[name].narrow(dim, len(slots), total.shape[dim] - len(slots))], dim=dim)


def _slot_dim(name: str) -> int | None:
    """Axis of a tensor that counts rank slots; ``None`` for a dense tensor."""
    if name.endswith(".lora_A"):
        return 0
    return 1 if name.endswith(".lora_B") else None
