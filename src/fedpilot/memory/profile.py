"""What tracing leaves: the parts of a training step as small matrices of integers, and their JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np


@dataclass(frozen=True)
class Segment:
    """One part of a step, in bytes above what stood when it began.

    Columns are a constant, then a factor on the rank of each kind of module, then (in ``rows`` only) more: each shared
    storage, and in the head's part a flag. A storage is constant or proportional to one rank, so that the columns are
    exact for every rank.

    Attributes:
        net: (1 + kinds,) what the part leaves behind; negative where it frees more than it makes.
        rows: (num_rows, 1 + kinds + more) the moments that can be the highest; others are dominated by one of these.
        flops: (1 + kinds,) floating-point operations.
    """

    net: np.ndarray
    rows: np.ndarray
    flops: np.ndarray

    def peak(self, ranks: np.ndarray, more: np.ndarray | None = None) -> int:
        """Highest bytes above the start.

        Args:
            ranks: (1 + kinds,) a 1, then the rank of each kind.
            more: (more,) factors on the columns after those; ``None`` for zeros.
        """
        if not len(self.rows):
            return 0
        size = len(ranks)
        total = self.rows[:, :size] @ ranks
        if more is not None:
            total = total + self.rows[:, size:] @ more
        return int(total.max())


@dataclass(frozen=True)
class BlockTrace:
    """A block in one role: below the lowest trained one, the lowest, or above it.

    Attributes:
        forward: Its forward pass.
        late: (1 + kinds,) bytes made in it, and not in ``forward.net``, that live until the model's forward pass ends
            and no longer: under autocast, casts of trained tensors.
        backward: Its backward pass; no rows below the lowest trained block.
        holds: Shared storages that it keeps for its backward pass.
    """

    forward: Segment
    late: np.ndarray
    backward: Segment
    holds: frozenset[int]


@dataclass(frozen=True)
class MicroTrace:
    """One forward and backward pass over a micro-batch; where there are several, over the second of them.

    Attributes:
        before: Bytes besides gradients that stand since the first pass: counts and the loss so far.
        pre: From the start of the pass to the first block.
        head: Head and loss, forward and backward, below a gradient that goes on to the blocks; the last column of its
            rows is 1 in the forward pass.
        head_alone: The same where no block is trained; ``None`` if the model has no head to train.
        shared: Bytes of the storages made before the first block that the model's frame and several blocks may hold.
        blocks: ``BlockTrace`` by ``state_key``.
    """

    before: int
    pre: Segment
    head: Segment
    head_alone: Segment | None
    shared: tuple[int, ...]
    blocks: Mapping[str, BlockTrace]


@dataclass(frozen=True)
class OptimiserTrace:
    """What clipping and the optimiser need, as functions of the bytes n of each trained tensor.

    Attributes:
        state: (factor, constant): state of a tensor is ``factor * n + constant``.
        scratch: (own, previous, constant) triples; scratch is the largest ``own * n + previous * n_before + constant``.
        clip: (constant, per tensor) bytes of clipping.
        left: Bytes that come with clipping and stand while the optimiser runs, less what ends there.
        whole: (state, scratch) bytes of a weight that is trained whole, by `whole_key` of its shape: they follow from
            its sides and the rank of a projection, not from its size.
    """

    state: tuple[int, int]
    scratch: tuple[tuple[int, int, int], ...]
    clip: tuple[int, int]
    left: int
    whole: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class WholeTrace:
    """One plan's step, traced whole.

    Attributes:
        peak: Highest live bytes.
        flops: Floating-point operations of a step.
        standing: Bytes of weights, buffers, inputs and all that the plan holds.
        held: Of these, what the plan holds: the attachment and the head.
    """

    peak: int
    flops: int
    standing: int
    held: int


@dataclass(frozen=True)
class ModuleFacts:
    """An adapted module: its shape, its kind (index into ``MemoryProfile.kinds``) and its block."""

    out_features: int
    in_features: int
    kind: int
    block: int


@dataclass(frozen=True)
class MemoryProfile:
    """A traced model with its optimiser and batch: everything that predicts the bytes of a step, as pure numbers.

    Attributes:
        modules: Adapted modules in the model's order.
        kinds: Names of the modules with the block's number starred out; ranks are per module, bytes per kind.
        groups: Block -> number of its structure; blocks of one number behave alike.
        head: Head tensor -> bytes.
        head_trained: Whether the head was trained in the traces.
        batch: Examples of an optimiser step.
        base_bytes: Weights and buffers outside the blocks and the head.
        block_bytes: Weights and buffers of each block.
        batch_bytes: Inputs and labels of the batch.
        element_bytes: Of an entry of A and B.
        optimiser: Its state and scratch.
        micro: Micro-batch -> trace.
        by_example: Whether gradients are kept by example: sums of the trained tensors' size stand through the step, and
            a gradient of each example of the last micro-batch stands until clipping ends.
        overhead_bytes: Measured on a device by ``calibrate``: context, workspaces, rounding.
        sizes: Micro-batches of the plans that were traced whole; empty where the step was taken apart.
        plans: Their traces, by `memory.attached.key_of`; all fields but ``batch`` then say nothing.
        item_shape: Of a synthetic item, where clients condense.
    """

    modules: Mapping[str, ModuleFacts]
    kinds: tuple[str, ...]
    groups: tuple[int, ...]
    head: Mapping[str, int]
    head_trained: bool
    batch: int
    base_bytes: int
    block_bytes: tuple[int, ...]
    batch_bytes: int
    element_bytes: int
    optimiser: OptimiserTrace
    micro: Mapping[int, MicroTrace] = field(default_factory=dict)
    by_example: bool = False
    overhead_bytes: int = 0
    sizes: tuple[int, ...] = ()
    plans: Mapping[str, WholeTrace] = field(default_factory=dict)
    item_shape: tuple[int, ...] = ()

    def kinds_of(self, block: int) -> tuple[int, ...]:
        """Kinds of the block's adapted modules, in the model's order."""
        return tuple(facts.kind for facts in self.modules.values() if facts.block == block)

    def with_overhead(self, overhead_bytes: int) -> "MemoryProfile":
        """The same model on a device that needs so much besides."""
        return replace(self, overhead_bytes=overhead_bytes)

    def to_json(self) -> str:
        """Text that ``from_json`` reads back."""
        return json.dumps(
            {
                **{name: getattr(self, name) for name in _PLAIN},
                "modules": {name: list(vars(facts).values()) for name, facts in self.modules.items()},
                "optimiser": vars(self.optimiser),
                "micro": {str(size): _micro_to(trace) for size, trace in self.micro.items()},
                "plans": {key: list(vars(whole).values()) for key, whole in self.plans.items()},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "MemoryProfile":
        """Reads what ``to_json`` wrote."""
        data = json.loads(text)
        optimiser = data["optimiser"]
        return cls(
            modules={name: ModuleFacts(*facts) for name, facts in data["modules"].items()},
            kinds=tuple(data["kinds"]),
            groups=tuple(data["groups"]),
            head=data["head"],
            head_trained=data["head_trained"],
            batch=data["batch"],
            base_bytes=data["base_bytes"],
            block_bytes=tuple(data["block_bytes"]),
            batch_bytes=data["batch_bytes"],
            element_bytes=data["element_bytes"],
            optimiser=OptimiserTrace(
                state=(optimiser["state"][0], optimiser["state"][1]),
                scratch=tuple((own, previous, constant) for own, previous, constant in optimiser["scratch"]),
                clip=(optimiser["clip"][0], optimiser["clip"][1]),
                left=optimiser["left"],
                whole={key: (state, scratch) for key, (state, scratch) in optimiser["whole"].items()},
            ),
            micro={int(size): _micro_from(trace) for size, trace in data["micro"].items()},
            by_example=data["by_example"],
            overhead_bytes=data["overhead_bytes"],
            sizes=tuple(data["sizes"]),
            item_shape=tuple(data["item_shape"]),
            plans={key: WholeTrace(*numbers) for key, numbers in data["plans"].items()},
        )


_PLAIN = (
    *("kinds", "groups", "head", "head_trained", "batch", "base_bytes"),
    *("block_bytes", "batch_bytes", "element_bytes", "by_example", "overhead_bytes", "sizes", "item_shape"),
)


def whole_key(out_features: int, in_features: int) -> str:
    """Name of a shape in `OptimiserTrace.whole`."""
    return f"{out_features}x{in_features}"


def state_key(group: int, first: bool, role: str, checkpointed: bool, pattern: tuple[str, ...]) -> str:
    """Name of one way to treat a block.

    Args:
        group: Number of its structure.
        first: Whether it is next to the input, whose embeddings the model itself holds too.
        role: ``below``, ``lowest`` or ``above`` the lowest trained block.
        checkpointed: Whether it is recomputed in the backward pass.
        pattern: For each of its modules what is trained: ``AB``, ``A``, ``B``, ``W`` for the whole weight, ``-`` for a
            frozen pair and the empty text for no pair.
    """
    place = "first" if first else "later"
    kept = "checkpointed" if checkpointed else "plain"
    return f"{group} {place} {role} {kept} {'/'.join(pattern)}"


class _SegmentData(TypedDict):
    net: list[int]
    rows: list[list[int]]
    num_columns: int
    flops: list[int]


class _MicroData(TypedDict):
    before: int
    pre: _SegmentData
    head: _SegmentData
    head_alone: _SegmentData | None
    shared: list[int]
    blocks: dict[str, tuple[_SegmentData, list[int], _SegmentData, list[int]]]


def _segment_to(segment: Segment) -> _SegmentData:
    return {
        "net": segment.net.tolist(),
        "rows": segment.rows.tolist(),
        "num_columns": segment.rows.shape[1],
        "flops": segment.flops.tolist(),
    }


def _segment_from(data: _SegmentData) -> Segment:
    return Segment(
        np.array(data["net"], dtype=np.int64),
        np.array(data["rows"], dtype=np.int64).reshape(-1, data["num_columns"]),
        np.array(data["flops"], dtype=np.int64),
    )


def _micro_to(trace: MicroTrace) -> _MicroData:
    return {
        "before": trace.before,
        "pre": _segment_to(trace.pre),
        "head": _segment_to(trace.head),
        "head_alone": None if trace.head_alone is None else _segment_to(trace.head_alone),
        "shared": list(trace.shared),
        "blocks": {
            key: (_segment_to(block.forward), block.late.tolist(), _segment_to(block.backward), sorted(block.holds))
            for key, block in trace.blocks.items()
        },
    }


def _micro_from(data: _MicroData) -> MicroTrace:
    return MicroTrace(
        before=data["before"],
        pre=_segment_from(data["pre"]),
        head=_segment_from(data["head"]),
        head_alone=None if data["head_alone"] is None else _segment_from(data["head_alone"]),
        shared=tuple(data["shared"]),
        blocks={
            key: BlockTrace(
                _segment_from(forward), np.array(late, dtype=np.int64), _segment_from(backward), frozenset(holds)
            )
            for key, (forward, late, backward, holds) in data["blocks"].items()
        },
    )
