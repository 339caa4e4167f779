"""Puts the parts of a profile together into one plan's step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fedpilot import base_deltas, lora
from fedpilot.errors import PlanError
from fedpilot.memory.profile import BlockTrace, MemoryProfile, MicroTrace, Segment, state_key, whole_key
from fedpilot.types import Plan


@dataclass(frozen=True)
class BlockBytes:
    """One loaded block: bytes of its tensors, and its highest moments above what stands throughout the step."""

    block: int
    weights: int
    adapters: int
    gradients: int
    optimiser: int
    saved: int
    forward_peak: int
    backward_peak: int


class Moment(NamedTuple):
    """A part of the step and the highest live bytes in it."""

    part: str
    block: int | None
    peak: int


def moments(profile: MemoryProfile, plan: Plan) -> Iterator[Moment]:
    """Walks through the step."""
    parts = Assembly(profile, plan)
    trace, now = parts.trace, parts.standing
    yield Moment("pre", None, now + trace.pre.peak(parts.no_ranks))
    now += int(trace.pre.net[0])
    shared, late = sum(trace.shared), 0
    for block in parts.blocks:
        forward, ranks = parts.states[block].forward, parts.ranks[block]
        yield Moment("forward", block, now + late + shared + forward.peak(ranks))
        now += int(forward.net @ ranks)
        late += int(parts.states[block].late @ ranks)
    head = parts.head
    yield Moment("head", None, now + parts.held_bytes + head.peak(parts.no_ranks, np.array([*parts.frame_only, late])))
    now += int(head.net[0])
    for block in reversed(parts.blocks[parts.first :]):
        backward, ranks = parts.states[block].backward, parts.ranks[block]
        kept, ending = parts.shared_at(block)
        yield Moment("backward", block, now + kept + backward.peak(ranks, ending))
        now += int(backward.net @ ranks)
    sizes, optimiser = parts.trained_sizes, profile.optimiser
    yield Moment("clip", None, now + optimiser.clip[0] + optimiser.clip[1] * len(sizes))
    if profile.by_example:
        now -= parts.micro_batch * sum(parts.trained_sizes)
    yield Moment("optimiser", None, now + optimiser.left + scratch_bytes(profile, parts.line_sizes, parts.whole))


def scratch_bytes(profile: MemoryProfile, sizes: Sequence[int], whole: Sequence[str] = ()) -> int:
    """Scratch of the optimiser over tensors of so many bytes, in its order, and whole weights of these shapes."""
    pairs = list(pairwise([0, *sizes]))
    moments = [own * n + before * last + rest for own, before, rest in profile.optimiser.scratch for last, n in pairs]
    return max([*moments, *(profile.optimiser.whole[key][1] for key in whole)], default=0)


def state_bytes(profile: MemoryProfile, sizes: Sequence[int], whole: Sequence[str] = ()) -> int:
    """Optimiser state of tensors of so many bytes, and of whole weights of these shapes."""
    factor, constant = profile.optimiser.state
    return sum(factor * size + constant for size in sizes) + sum(profile.optimiser.whole[key][0] for key in whole)


class Assembly:
    """The parts of a profile that make up a plan's step.

    Attributes:
        trace: Of the plan's micro-batch.
        micro_batch: Examples of a forward pass.
        blocks: Loaded blocks.
        first: Position of the lowest trained block in ``blocks``; their number if none is trained.
        ranks: Block -> (1 + kinds,) its ranks after a 1.
        states: Block -> its trace in its role.
        trained_sizes: Bytes of the trained tensors.
        line_sizes: Those of pairs and head, whose optimiser state follows from their size, in the optimiser's order.
        whole: Shapes of the weights that are trained whole, as `whole_key` names them.
        standing: Bytes alive when a pass begins.
    """

    def __init__(self, profile: MemoryProfile, plan: Plan) -> None:
        self.profile = profile
        check(profile, plan)
        self.micro_batch = plan.micro_batch or profile.batch
        self.trace = profile.micro[self.micro_batch]
        self.blocks = tuple(range(len(profile.groups))) if plan.blocks is None else plan.blocks
        self.no_ranks = np.eye(1, 1 + len(profile.kinds), dtype=np.int64)[0]
        self.ranks = {block: self.no_ranks.copy() for block in self.blocks}
        self._sizes: dict[int, list[int]] = {block: [] for block in self.blocks}
        self._whole: dict[int, list[str]] = {block: [] for block in self.blocks}
        self._line: dict[int, list[int]] = {block: [] for block in self.blocks}
        self._patterns: dict[int, list[str]] = {block: [] for block in self.blocks}
        for module, facts in profile.modules.items():
            if facts.block in self.ranks:
                self._add(module, plan)
        self._head_sizes = [size for name, size in profile.head.items() if name in plan.trainable]
        self.trained_sizes = [size for sizes in self._sizes.values() for size in sizes] + self._head_sizes
        self.line_sizes = [size for sizes in self._line.values() for size in sizes] + self._head_sizes
        self.whole = [key for keys in self._whole.values() for key in keys]
        trained = [position for position, block in enumerate(self.blocks) if self._sizes[block]]
        self.first = trained[0] if trained else len(self.blocks)
        self.states = {block: self._state(position, plan) for position, block in enumerate(self.blocks)}

    def _add(self, module: str, plan: Plan) -> None:
        facts = self.profile.modules[module]
        rank, unit = plan.ranks.get(module, 0), self.profile.element_bytes
        sizes = {"A": rank * facts.in_features * unit, "B": rank * facts.out_features * unit}
        letters = [letter for letter in "AB" if f"{module}.lora_{letter}" in plan.trainable]
        self.ranks[facts.block][1 + facts.kind] = rank
        self._line[facts.block] += [sizes[letter] for letter in letters]
        self._sizes[facts.block] += [sizes[letter] for letter in letters]
        if base_deltas.weight_name(module) in plan.trainable:
            self._whole[facts.block].append(whole_key(facts.out_features, facts.in_features))
            self._sizes[facts.block].append(facts.out_features * facts.in_features * unit)
            self._patterns[facts.block].append("W")
        else:
            self._patterns[facts.block].append("" if not rank else "".join(letters) or "-")

    def _state(self, position: int, plan: Plan) -> BlockTrace:
        block = self.blocks[position]
        role = "below" if position < self.first else "lowest" if position == self.first else "above"
        pattern = tuple(self._patterns[block])
        return lookup(self.trace, self.profile, block, position == 0, role, block in plan.checkpointed, pattern)

    @property
    def head(self) -> Segment:
        """Head and loss, with or without a gradient for the blocks."""
        if self.first < len(self.blocks):
            return self.trace.head
        if self.trace.head_alone is None:
            raise PlanError(
                "a plan for a model without a trained head must train a block, got none; train at least one pair"
            )
        return self.trace.head_alone

    @property
    def standing_without_gradients(self) -> int:
        """Weights, buffers, head, batch, pairs and optimiser state."""
        profile = self.profile
        weights = profile.base_bytes + sum(profile.block_bytes[block] for block in self.blocks)
        adapters = sum(self.adapter_bytes(block) for block in self.blocks)
        state = self.optimiser_bytes
        return weights + sum(profile.head.values()) + profile.batch_bytes + adapters + state

    @property
    def accumulates(self) -> bool:
        """Whether gradients, or sums of them, stand during the forward pass: a step has several, or clips each."""
        return self.micro_batch < self.profile.batch or self.profile.by_example

    @property
    def standing(self) -> int:
        """Bytes alive when a pass begins; where gradients accumulate, those of the passes before are among them."""
        accumulated = sum(self.trained_sizes) if self.accumulates else 0
        return self.standing_without_gradients + self.trace.before + accumulated

    def adapter_bytes(self, block: int) -> int:
        """Bytes of all pairs that the block holds."""
        return pair_bytes(self.profile, block, self.ranks[block])

    @property
    def optimiser_bytes(self) -> int:
        """Optimiser state of all trained tensors."""
        return state_bytes(self.profile, self.line_sizes, self.whole)

    def _holders(self, shared: int) -> list[int]:
        return [p for p, block in enumerate(self.blocks) if p >= self.first and shared in self.states[block].holds]

    @property
    def held_bytes(self) -> int:
        """Shared bytes that some block holds after its forward pass."""
        return sum(size for index, size in enumerate(self.trace.shared) if self._holders(index))

    @property
    def frame_only(self) -> np.ndarray:
        """(shared,) 1 for shared storages that no block holds: they die with the model's frame."""
        return np.array([not self._holders(index) for index in range(len(self.trace.shared))], dtype=np.int64)

    def shared_at(self, block: int) -> tuple[int, np.ndarray]:
        """Shared bytes that blocks below hold during the block's backward pass, and which end within it."""
        position = self.blocks.index(block)
        kept, ending = 0, np.zeros(len(self.trace.shared), dtype=np.int64)
        for index, size in enumerate(self.trace.shared):
            lowest = min(self._holders(index), default=len(self.blocks))
            kept += size if lowest < position else 0
            ending[index] = lowest == position
        return kept, ending

    def gradients_at(self, moment: Moment) -> int:
        """Bytes of gradients that are complete at a moment."""
        if self.accumulates or moment.part in ("clip", "optimiser"):
            return sum(self.trained_sizes)
        if moment.block is None or moment.part == "forward":
            return 0
        return sum(self._head_sizes) + sum(sum(sizes) for b, sizes in self._sizes.items() if b > moment.block)

    def block_line(self, block: int, moments: Sequence[Moment]) -> BlockBytes:
        """One block's line of the breakdown."""
        highest = {m.part: m.peak - self.standing_without_gradients for m in moments if m.block == block}
        return BlockBytes(
            block=block,
            weights=self.profile.block_bytes[block],
            adapters=self.adapter_bytes(block),
            gradients=sum(self._sizes[block]),
            optimiser=state_bytes(self.profile, self._line[block], self._whole[block]),
            saved=int(self.states[block].forward.net @ self.ranks[block]),
            forward_peak=highest["forward"],
            backward_peak=highest.get("backward", 0),
        )


def pair_bytes(profile: MemoryProfile, block: int, ranks: np.ndarray) -> int:
    """Bytes of a block's pairs of these ranks, (1 + kinds,)."""
    return sum(
        int(ranks[1 + facts.kind]) * (facts.in_features + facts.out_features) * profile.element_bytes
        for facts in profile.modules.values()
        if facts.block == block
    )


def lookup(
    trace: MicroTrace,
    profile: MemoryProfile,
    block: int,
    first: bool,
    role: str,
    checkpointed: bool,
    pattern: tuple[str, ...],
) -> BlockTrace:
    """The trace of a block in a role.

    Raises:
        PlanError: It was not traced.
    """
    key = state_key(profile.groups[block], first, role, checkpointed, pattern)
    if key not in trace.blocks:
        raise PlanError(
            f"a plan must treat block {block} in a way that was traced, got {role}, "
            f"{'recomputed' if checkpointed else 'plain'}, {'/'.join(pattern) or 'no pairs'}; "
            "pass the pattern (and checkpointing) to trace"
        )
    return trace.blocks[key]


def check(profile: MemoryProfile, plan: Plan) -> None:
    """Raises `PlanError` for what the profile does not know."""
    blocks = range(len(profile.groups))
    size = plan.micro_batch or profile.batch
    if size not in profile.micro:
        known = ", ".join(map(str, sorted(profile.micro)))
        raise PlanError(f"a plan's micro-batch must be one that was traced ({known}), got {size}; trace it too")
    unknown = sorted({*(plan.blocks or ()), *plan.checkpointed} - set(blocks))
    if unknown:
        raise PlanError(f"a plan's blocks must be among 0 to {len(blocks) - 1}, got {unknown[0]}; use the model's own")
    for module, rank in plan.ranks.items():
        if module not in profile.modules:
            raise PlanError(f"a plan's module must be one that is adapted, got {module}; use the profile's modules")
        if rank < 1:
            raise PlanError(f"the rank of {module} must be at least 1, got {rank}; leave the module out instead")
        if plan.blocks is not None and profile.modules[module].block not in plan.blocks:
            raise PlanError(f"{module} must lie in a loaded block {plan.blocks}, got its rank; leave the module out")
    loaded = blocks if plan.blocks is None else plan.blocks
    bare = (m for m, facts in profile.modules.items() if m not in plan.ranks and facts.block in loaded)
    held = {*lora.names(plan.ranks), *profile.head, *map(base_deltas.weight_name, bare)}
    stray = sorted((plan.trainable | plan.scored) - held)
    if stray:
        raise PlanError(f"a trainable or scored tensor must be one that the plan holds, got {stray[0]}; give it a rank")
    expected = frozenset(profile.head) if profile.head_trained else frozenset()
    if (plan.trainable or not plan.scored) and plan.trainable & frozenset(profile.head) != expected:
        raise PlanError(
            f"a plan must train {'the whole head' if expected else 'nothing of the head'}, as it was traced, got "
            f"{sorted(plan.trainable & frozenset(profile.head)) or 'none of it'}; set train_head when tracing"
        )
