"""Cuts a recorded step into its parts, each as a small matrix of bytes."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from fedpilot.memory.profile import BlockTrace, Segment
from fedpilot.memory.recording import Part, Recording, Storage


class Parts:
    """One recorded step, cut into parts.

    Attributes:
        recording: The step.
        shared: Bytes of the shared storages of the micro-batch that is looked at.
        no_ranks: (1 + kinds,) a 1 and zeros.
    """

    def __init__(self, recording: Recording, primes: Sequence[int], micro: int) -> None:
        self.recording = recording
        self._primes = primes
        self._micro = micro
        starts = [0, *(t for t in range(1, len(recording.parts)) if recording.parts[t] != recording.parts[t - 1])]
        ends = [*starts[1:], len(recording.parts)]
        self._spans = {recording.parts[start]: (start, end) for start, end in zip(starts, ends, strict=True)}
        shared = recording.shared(micro)
        self.shared = tuple(storage.num_bytes for storage in shared)
        self._shared = _alive(shared, [(i, s.num_bytes) for i, s in enumerate(shared)], len(shared), self._length)
        self._late = self._find_late()
        late = [storage for storages in self._late.values() for storage in storages]
        excluded = {id(storage) for storage in (*shared, *late)}
        self._live = self._sum([storage for storage in recording.storages if id(storage) not in excluded])
        self._live_late = self._sum(late)
        self.no_ranks = np.eye(1, 1 + len(primes), dtype=np.int64)[0]

    def _sum(self, storages: Sequence[Storage]) -> np.ndarray:
        """(half steps, 1 + kinds) live bytes of these storages."""
        columns = [self._column(storage.num_bytes) for storage in storages]
        return _alive(storages, columns, 1 + len(self._primes), self._length)

    def _find_late(self) -> dict[int, list[Storage]]:
        """Position of a block -> what its forward pass made and the head's part sees the end of, but for its output."""
        start, end = self._spans.get(Part("head", self._micro), (0, 0))
        outputs = {id(storage) for storage in self.recording.outputs}
        found: dict[int, list[Storage]] = {}
        for storage in self.recording.storages:
            ends_there = storage.end is not None and 2 * start < storage.end <= 2 * end
            if storage.part[:2] == ("forward", self._micro) and ends_there and id(storage) not in outputs:
                found.setdefault(storage.part.block, []).append(storage)
        return found

    @property
    def before(self) -> int:
        """Constant bytes that earlier passes have left, a trained head's gradients among them; 0 for the first pass."""
        start, _ = self._spans[Part("pre", self._micro)]
        return int(self._live[2 * start, 0] - self._live[0, 0])

    @property
    def _length(self) -> int:
        return 2 * len(self.recording.parts) + 1

    def _column(self, num_bytes: int) -> tuple[int, int]:
        for column, prime in enumerate(self._primes, start=1):
            if num_bytes % prime == 0:
                return column, num_bytes // prime
        return 0, num_bytes

    def segment(self, kind: str, block: int = -1) -> Segment:
        """A part above what stood when its first operator began; empty where the step has no such part."""
        micro = self._micro if kind in ("pre", "forward", "head", "backward") else self._spans_micro(kind)
        start, end = self._spans.get(Part(kind, micro, block), (0, 0))
        moments = slice(2 * start + 1, 2 * end, 2)
        base = self._live[2 * start]
        rows, more = self._live[moments] - base, self._shared[moments]
        if kind == "pre":  # what is shared later is still being made
            rows[:, 0] += more.sum(axis=1)
            more = more[:, :0]
        if kind == "forward":  # the model's frame holds all that is shared, whatever blocks do
            rows += self._live_late[moments] - self._live_late[2 * start]
            more = more[:, :0]
        if kind == "head":
            more = np.hstack([more, ~np.array(self.recording.backward[start:end], dtype=bool).reshape(-1, 1)])
        flops = np.zeros(len(base), dtype=np.int64)
        for operator, count in self.recording.flops:
            if start <= operator < end:
                column, value = self._column(count)
                flops[column] += value
        return Segment(self._live[2 * end] - base, highest(np.hstack([rows, more])), flops)

    def _spans_micro(self, kind: str) -> int:
        return next((part.micro for part in self._spans if part.kind == kind), 0)

    def block(self, block: int) -> BlockTrace:
        """A block's part in both passes."""
        late = np.zeros_like(self.no_ranks)
        for storage in self._late.get(block, ()):
            column, value = self._column(storage.num_bytes)
            late[column] += value
        holds = frozenset(self.recording.holds.get((self._micro, block), ()))
        return BlockTrace(self.segment("forward", block), late, self.segment("backward", block), holds)

    def scratch(self, whole: Collection[int] = ()) -> set[tuple[int, int, int]]:
        """The optimiser's moments as multiples of the updated tensor, the one before, and a constant.

        Args:
            whole: Indices of trained tensors that are left out: see `whole_scratch`.
        """
        return {self._multiples(owner, alive) for owner, alive in self._optimiser_moments() if owner not in whole}

    def whole_scratch(self, index: int) -> int:
        """Most bytes that the optimiser has made and not yet freed while it updates a trained tensor."""
        sums = (sum(s.num_bytes for s in alive) for owner, alive in self._optimiser_moments() if owner == index)
        return max(sums, default=0)

    def _optimiser_moments(self) -> Iterator[tuple[int, list[Storage]]]:
        """After each of the optimiser's operators: the tensor that is updated, and what the optimiser made."""
        start, end = self._spans.get(Part("optimiser", self._spans_micro("optimiser")), (0, 0))
        made = [s for s in self.recording.storages if s.part.kind == "optimiser"]
        for operator in range(start, end):
            alive = [s for s in made if s.birth <= 2 * operator + 1 and (s.end is None or s.end > 2 * operator + 1)]
            yield self.recording.owners[operator], alive

    def _multiples(self, owner: int, alive: Sequence[Storage]) -> tuple[int, int, int]:
        own = previous = constant = 0
        for storage in alive:
            size = self.recording.trained[storage.owner] if storage.owner >= 0 else 0
            if not size or storage.num_bytes % size or storage.owner < owner - 1:
                constant += storage.num_bytes
            elif storage.owner == owner:
                own += storage.num_bytes // size
            else:
                previous += storage.num_bytes // size
        return own, previous, constant


def _alive(
    storages: Sequence[Storage], columns: Sequence[tuple[int, int]], num_columns: int, length: int
) -> np.ndarray:
    """(half steps, columns) live values, each storage adding its value to its column."""
    change = np.zeros((length + 1, num_columns), dtype=np.int64)
    for storage, (column, value) in zip(storages, columns, strict=True):
        change[min(storage.birth, length), column] += value
        change[length if storage.end is None else min(storage.end, length), column] -= value
    return np.cumsum(change, axis=0)[:length]


def highest(rows: np.ndarray) -> np.ndarray:
    """The rows that no other row reaches in all columns: only they can be the highest for some ranks."""
    rows = np.unique(rows, axis=0)
    kept: list[np.ndarray] = []
    for row in rows[np.argsort(-rows.sum(axis=1), kind="stable")]:
        if not any((other >= row).all() for other in kept):
            kept.append(row)
    return np.array(kept, dtype=np.int64).reshape(-1, rows.shape[1])
