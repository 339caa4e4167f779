"""Lowers a profile to costs by block and choice, the input of allocation."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fedpilot.errors import PlanError
from fedpilot.memory.assembly import check, lookup, pair_bytes, scratch_bytes
from fedpilot.memory.probing import pattern_parts
from fedpilot.memory.profile import BlockTrace, MemoryProfile
from fedpilot.types import BlockCosts, Choice, CostTable, Plan


def cost_table(
    profile: MemoryProfile,
    ranks: Sequence[int],
    *,
    checkpointing: bool,
    micro_batch: int | None = None,
    adapter_rank: int | None = None,
    pattern: str = "AB",
) -> CostTable:
    """The profile as block-by-block costs; every plan over it loads all blocks.

    The table's peak is `peak_bytes` of the same plan, or in a few corners a little more, never less. It counts masks
    that recomputed blocks alone hold in every backward pass, embeddings that a trained first block holds twice in
    forward passes, and at their largest: casts of trained tensors under autocast in forward passes, clipping, and the
    optimiser's scratch.

    Args:
        profile: The traced model.
        ranks: Ranks that a trained block may have, in all of its modules.
        checkpointing: Whether blocks may be recomputed.
        micro_batch: Examples of a forward pass; ``None`` for the whole batch.
        adapter_rank: Rank of the frozen pairs that an untrained block holds; ``None`` if it holds none.
        pattern: What a trained block trains, as given to `trace`.

    Raises:
        PlanError: Something was not traced, or the pattern trains whole weights.
    """
    if "W" in pattern:
        raise PlanError(f"a cost table's pattern must train pairs, got {pattern!r}; price such plans with peak_bytes")
    return _Lowering(profile, checkpointing, micro_batch or profile.batch, adapter_rank, pattern).table(tuple(ranks))


class _Entry(NamedTuple):
    """A block under one choice in one role."""

    trace: BlockTrace
    ranks: np.ndarray
    trained: tuple[int, ...]

    @property
    def forward_net(self) -> int:
        """Bytes that the forward pass leaves."""
        return int(self.trace.forward.net @ self.ranks)

    @property
    def late(self) -> int:
        """Bytes that live until the model's forward pass ends."""
        return int(self.trace.late @ self.ranks)

    @property
    def flops(self) -> int:
        """Operations of both passes."""
        return int((self.trace.forward.flops + self.trace.backward.flops) @ self.ranks)


_Cost = Callable[[int, _Entry], int]
"""A cost of a block under a choice."""

_Row = list[_Entry | None]
"""A block under every choice; ``None`` where the choice cannot be."""


class _Lowering:
    """Adds up a profile block by block.

    The table knows no storages that several blocks share. One that every choice for the lowest block holds, or that
    blocks above may hold while the lowest does not, is counted in every backward pass; one that only the lowest block
    may hold is counted with what that block saves.
    """

    def __init__(
        self, profile: MemoryProfile, checkpointing: bool, micro_batch: int, adapter_rank: int | None, pattern: str
    ) -> None:
        head = frozenset(profile.head) if profile.head_trained else frozenset()
        check(profile, Plan(0, {}, head, micro_batch=micro_batch))
        self._profile, self._pattern, self._adapter_rank = profile, pattern, adapter_rank
        self._kept = (False, True) if checkpointing else (False,)
        self._trace = profile.micro[micro_batch]
        self._accumulates = micro_batch < profile.batch or profile.by_example
        self._passes = profile.batch // micro_batch
        self._blocks = range(len(profile.groups))
        self._no_ranks = np.eye(1, 1 + len(profile.kinds), dtype=np.int64)[0]
        self._head = tuple(profile.head.values()) if profile.head_trained else ()
        self._head_gradient = 0 if self._accumulates else sum(self._head)

    def table(self, ranks: tuple[int, ...]) -> CostTable:
        """The table with these ranks to choose from."""
        profile, trace = self._profile, self._trace
        choices = tuple(Choice(rank, kept) for rank in (None, *ranks) for kept in self._kept)
        below = [self._entry(block, "below", Choice(None)) for block in self._blocks]
        lowest: list[_Row] = [
            [None if choice.rank is None else self._entry(block, "lowest", choice) for choice in choices]
            for block in self._blocks
        ]
        above: list[_Row] = [
            [self._entry(block, "above", choice) if block else None for choice in choices] for block in self._blocks
        ]
        everywhere = self._everywhere(lowest, above)
        # What embeddings and blocks below leave stands with what the lowest block saves.
        left = [int(x) for x in np.cumsum([trace.pre.net[0], *(entry.forward_net for entry in below)])]
        after = self._after(above)
        # Which blocks lie below is not known here: the most that any choice leaves until the forward pass ends.
        most = [max((entry.late for entry in (*lowest[b], *above[b]) if entry), default=0) for b in self._blocks]
        late = [int(x) for x in np.cumsum([0, *most])]
        rest = max([0, *(left[b] + after[b] + self._drift(e) for b in self._blocks for e in lowest[b] if e)])
        clip = profile.optimiser.clip[0] + profile.optimiser.clip[1] * (2 * len(profile.modules) + len(self._head))
        return CostTable(
            choices=choices,
            above=self._above(above, everywhere, after, rest, late),
            lowest=self._lowest(lowest, everywhere, after, rest, left),
            frozen_resident=_whole(pair_bytes(profile, b, below[b].ranks) for b in self._blocks),
            frozen_forward_peak=_whole(self._frozen_peak(b, below[b], left[b]) for b in self._blocks),
            frozen_flops=_whole(self._passes * entry.flops for entry in below),
            fixed=self._fixed(),
            head_peak=self._head_peak(everywhere, late[-1]),
            head_gradient=self._head_gradient,
            head_optimiser_peak=rest + max(clip, profile.optimiser.left + self._scratch(self._head)),
            head_flops=self._passes * int(trace.pre.flops[0] + trace.head.flops[0]),
        )

    def _entry(self, block: int, role: str, choice: Choice) -> _Entry:
        profile = self._profile
        modules = [facts for facts in profile.modules.values() if facts.block == block]
        untrained = "" if self._adapter_rank is None else "-"
        pattern = pattern_parts(untrained if choice.rank is None else self._pattern, len(modules))
        ranks, trained = self._no_ranks.copy(), []
        for facts, part in zip(modules, pattern, strict=True):
            rank = (self._adapter_rank if choice.rank is None else choice.rank) if part else 0
            ranks[1 + facts.kind] = rank or 0
            sizes = {"A": facts.in_features, "B": facts.out_features}
            trained += [sizes[letter] * int(rank or 0) * profile.element_bytes for letter in part if letter in sizes]
        trace = lookup(self._trace, profile, block, block == 0, role, choice.checkpointed, pattern)
        return _Entry(trace, ranks, tuple(trained))

    def _everywhere(self, lowest: list[_Row], above: list[_Row]) -> frozenset[int]:
        """Shared storages to count in every backward pass."""
        bottom = [entry.trace.holds for row in lowest for entry in row if entry]
        top = frozenset().union(*(entry.trace.holds for row in above for entry in row if entry))
        always = frozenset.intersection(*bottom) if bottom else frozenset()
        return always | top

    def _after(self, above: list[_Row]) -> list[int]:
        """Bytes besides gradients that head and blocks above leave when a block's backward pass begins."""
        drift = [max((self._drift(entry) for entry in row if entry), default=0) for row in above]
        head = int(self._trace.head.net[0]) - self._head_gradient
        return [head + sum(drift[block + 1 :]) for block in self._blocks]

    def _drift(self, entry: _Entry) -> int:
        """Bytes besides gradients that both passes of a block leave together."""
        return entry.forward_net + int(entry.trace.backward.net @ entry.ranks) - self._gradient(entry)

    def _gradient(self, entry: _Entry) -> int:
        return 0 if self._accumulates else sum(entry.trained)

    def _above(
        self, rows: list[_Row], everywhere: frozenset[int], after: list[int], rest: int, late: list[int]
    ) -> BlockCosts:
        shared = self._trace.shared
        held = sum(shared[index] for index in everywhere)

        def backward(block: int, entry: _Entry) -> int:
            nothing = np.zeros(len(shared), dtype=np.int64)
            return after[block] + held + entry.trace.backward.peak(entry.ranks, nothing)

        def forward(block: int, entry: _Entry) -> int:
            return late[block] + sum(shared) + entry.trace.forward.peak(entry.ranks)

        return self._costs(rows, lambda block, entry: entry.forward_net, forward, backward, rest)

    def _lowest(
        self, rows: list[_Row], everywhere: frozenset[int], after: list[int], rest: int, left: list[int]
    ) -> BlockCosts:
        shared = self._trace.shared

        def alone(entry: _Entry) -> int:
            return sum(shared[index] for index in entry.trace.holds - everywhere)

        def saved(block: int, entry: _Entry) -> int:
            return left[block] + entry.forward_net + alone(entry)

        def forward(block: int, entry: _Entry) -> int:
            before = self._trace.pre.peak(self._no_ranks) if block == 0 else 0
            return max(before, left[block] + sum(shared) + entry.trace.forward.peak(entry.ranks))

        def backward(block: int, entry: _Entry) -> int:
            holds = np.array([index in entry.trace.holds for index in range(len(shared))], dtype=np.int64)
            return after[block] - alone(entry) + entry.trace.backward.peak(entry.ranks, holds)

        return self._costs(rows, saved, forward, backward, rest)

    def _costs(self, rows: list[_Row], saved: _Cost, forward: _Cost, backward: _Cost, rest: int) -> BlockCosts:
        optimiser = self._profile.optimiser

        def resident(block: int, entry: _Entry) -> int:
            accumulated = sum(entry.trained) if self._accumulates else 0
            return pair_bytes(self._profile, block, entry.ranks) + self._state(entry.trained) + accumulated

        def scratch(block: int, entry: _Entry) -> int:
            return rest + optimiser.left + self._scratch(entry.trained) if entry.trained else 0

        def array(cost: _Cost) -> np.ndarray:
            return np.array(
                [[cost(block, entry) if entry else 0 for entry in row] for block, row in enumerate(rows)],
                dtype=np.int64,
            )

        return BlockCosts(
            resident=array(resident),
            saved=array(saved),
            forward_peak=array(forward),
            backward_peak=array(backward),
            gradient=array(lambda block, entry: self._gradient(entry)),
            optimiser_peak=array(scratch),
            flops=array(lambda block, entry: self._passes * entry.flops),
        )

    def _frozen_peak(self, block: int, entry: _Entry, left: int) -> int:
        peak = left + sum(self._trace.shared) + entry.trace.forward.peak(entry.ranks)
        return max(peak, self._trace.pre.peak(self._no_ranks)) if block == 0 else peak

    def _head_peak(self, everywhere: frozenset[int], late: int) -> int:
        shared = self._trace.shared
        frame = np.array([index not in everywhere for index in range(len(shared))], dtype=np.int64)
        return sum(shared[index] for index in everywhere) + self._trace.head.peak(
            self._no_ranks, np.append(frame, late)
        )

    def _fixed(self) -> int:
        profile = self._profile
        weights = profile.base_bytes + sum(profile.block_bytes) + sum(profile.head.values())
        accumulated = sum(self._head) if self._accumulates else 0
        standing = weights + profile.batch_bytes + self._state(self._head)
        return profile.overhead_bytes + standing + accumulated + self._trace.before

    def _state(self, sizes: Sequence[int]) -> int:
        factor, constant = self._profile.optimiser.state
        return sum(factor * size + constant for size in sizes)

    def _scratch(self, sizes: Sequence[int]) -> int:
        """Scratch for tensors of so many bytes, whatever was updated before them."""
        alone = (scratch_bytes(self._profile, (size, size)) for size in (*sizes[:1], *sizes[-1:]))
        return max([scratch_bytes(self._profile, sizes), *alone])


def _whole(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)
