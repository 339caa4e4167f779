"""Traces a model a few times and takes the traces apart, so that any plan can be put together from the parts.

A probe plan gives neighbouring blocks different roles, so that few steps show them all. Its ranks are primes, one for
each kind of module: a storage whose bytes a prime divides is proportional to that kind's rank, and so one trace is
exact for every rank.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from fedpilot.errors import PlanError
from fedpilot.memory.counting import Part, Recording, StepProgram, Storage, record
from fedpilot.memory.profile import (
    BlockTrace,
    MemoryProfile,
    MicroTrace,
    ModuleFacts,
    OptimiserTrace,
    Segment,
    state_key,
)
from fedpilot.types import ModelSpec, Plan

# None divides the size of a usual layer, batch or vocabulary; fake tensors of such ranks cost nothing.
_PRIMES = (
    *(10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093, 10099, 10103),
    *(10111, 10133, 10139, 10141, 10151, 10159, 10163, 10169, 10177, 10181, 10193, 10211),
)

ProgramFor = Callable[[Plan, int], StepProgram]
"""Builds the step of a plan with so many examples in a micro-batch."""


@dataclass(frozen=True)
class _Treatment:
    """How a probe treats a block; ``pattern`` as in ``state_key``."""

    role: str
    checkpointed: bool
    pattern: tuple[str, ...]


@dataclass
class _Findings:
    """What the probes of one micro-batch have shown."""

    before: int = 0
    pre: Segment | None = None
    head: Segment | None = None
    head_alone: Segment | None = None
    shared: tuple[int, ...] = ()
    blocks: dict[str, BlockTrace] = field(default_factory=dict)
    clip: dict[int, int] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    state: set[tuple[int, int]] = field(default_factory=set)
    scratch: set[tuple[int, int, int]] = field(default_factory=set)


def trace(
    program_for: ProgramFor,
    spec: ModelSpec,
    *,
    batch: int,
    micro_batches: Sequence[int] = (),
    patterns: Sequence[str] = ("AB",),
    checkpointing: bool = True,
    train_head: bool = True,
) -> MemoryProfile:
    """Traces a model's training step; the programs should be of fake tensors, for ranks of the probes are absurd.

    Args:
        program_for: Builds the step of a plan.
        spec: The model.
        batch: Examples of an optimiser step.
        micro_batches: Examples of a forward pass, each a divisor of ``batch``; empty for the whole batch only.
        patterns: What a trained block trains, each in all its modules: ``AB``, ``A`` or ``B``; or ``/`` between one
            entry a module, as in ``AB/-/B`` (``-`` for a frozen pair, nothing for no pair).
        checkpointing: Whether to trace blocks that are recomputed too.
        train_head: Whether every plan trains the head, if there is one.

    Raises:
        PlanError: A micro-batch is no divisor of the batch.
    """
    for size in micro_batches:
        if size < 1 or batch % size:
            raise PlanError(f"a micro-batch must divide the batch of {batch}, got {size}; choose a divisor")
    prober = _Prober(program_for, spec, tuple(patterns), checkpointing, train_head)
    sizes = tuple(micro_batches) or (batch,)
    first = program_for(prober.first_plan(sizes[0]), sizes[0])
    groups = _groups(first.blocks, prober.kinds_of)
    profile = _standing(first, spec, prober, groups, train_head, batch)
    found = {size: prober.probe(groups, size, second=size < batch) for size in sizes}
    return replace(
        profile,
        optimiser=_optimiser(list(found.values())),
        micro={size: _micro(findings) for size, findings in found.items()},
    )


class _Prober:
    """Plans probes, runs them and sorts what they show."""

    def __init__(
        self, program_for: ProgramFor, spec: ModelSpec, patterns: tuple[str, ...], checkpointing: bool, train_head: bool
    ) -> None:
        self._program_for = program_for
        self._spec = spec
        self._patterns = patterns
        self._kept = (False, True) if checkpointing else (False,)
        self._head = frozenset(spec.head) if train_head else frozenset()
        self.kind_of = {module: _kind(module, spec.block_of[module]) for module in spec.modules}
        self.kinds = tuple(dict.fromkeys(self.kind_of.values()))
        self.primes = dict(zip(self.kinds, _PRIMES, strict=False))
        if len(self.kinds) > len(_PRIMES):
            raise PlanError(
                f"a model must have at most {len(_PRIMES)} kinds of adapted modules, got {len(self.kinds)}; adapt fewer"
            )
        self.modules_of: list[list[str]] = [[] for _ in range(spec.num_blocks)]
        for module, block in spec.block_of.items():
            self.modules_of[block].append(module)
        self.kinds_of = [tuple(self.kind_of[module] for module in modules) for modules in self.modules_of]

    def first_plan(self, micro_batch: int) -> Plan:
        """All blocks loaded, the last one trained."""
        last = len(self.modules_of) - 1
        roles = {block: "lowest" if block == last else "below" for block in range(last + 1)}
        return self._plan({block: self._default(block, role) for block, role in roles.items()}, micro_batch)

    def _plan(self, treatments: Mapping[int, _Treatment], micro_batch: int) -> Plan:
        """A probe's plan; blocks without a treatment are not loaded."""
        ranks: dict[str, int] = {}
        trainable = set(self._head)
        for block, treatment in treatments.items():
            for module, trained in zip(self.modules_of[block], treatment.pattern, strict=True):
                if trained:
                    ranks[module] = self.primes[self.kind_of[module]]
                trainable |= {f"{module}.lora_{letter}" for letter in trained if letter in "AB"}
        kept = frozenset(block for block, treatment in treatments.items() if treatment.checkpointed)
        blocks = tuple(sorted(treatments)) if len(treatments) < len(self.modules_of) else None
        return Plan(0, ranks, frozenset(trainable), blocks=blocks, checkpointed=kept, micro_batch=micro_batch)

    def probe(self, groups: Sequence[int], micro_batch: int, *, second: bool) -> _Findings:
        """Runs all probes of a micro-batch; ``second`` looks at the second micro-batch, with gradients standing."""
        findings = _Findings()
        for number, treatments in enumerate(self._schedule(groups)):
            warm = number < 2  # the optimiser's scratch needs its state, and two numbers of trained tensors
            program = self._program_for(self._plan(treatments, micro_batch), micro_batch)
            recording = record(program, warm=warm, passes=None if warm else 1 + second)
            parts = _Parts(recording, [self.primes[kind] for kind in self.kinds], int(second))
            self._sort(parts, findings, groups, treatments)
            if warm:
                self._sort_optimiser(parts, findings)
        return findings

    def _sort(
        self, parts: "_Parts", findings: _Findings, groups: Sequence[int], treatments: Mapping[int, _Treatment]
    ) -> None:
        if findings.pre is None:  # the first probe trains the last block only: hardly anything holds what is shared
            findings.pre, findings.shared = parts.segment("pre"), parts.shared
            findings.before = parts.before
        if all(treatment.role == "below" for treatment in treatments.values()):
            findings.head_alone = parts.segment("head")
        elif findings.head is None:
            findings.head = parts.segment("head")
        for position, (block, treatment) in enumerate(sorted(treatments.items())):
            key = state_key(groups[block], block == 0, treatment.role, treatment.checkpointed, treatment.pattern)
            findings.blocks.setdefault(key, parts.block(position))

    def _sort_optimiser(self, parts: "_Parts", findings: _Findings) -> None:
        recording, clip = parts.recording, parts.segment("clip")
        size = len(recording.trained)
        findings.clip[size] = max(findings.clip.get(size, 0), clip.peak(parts.no_ranks))
        findings.left.append(int(clip.net[0]))
        findings.state |= set(zip(recording.trained, recording.state, strict=True))
        findings.scratch |= parts.scratch()

    def _schedule(self, groups: Sequence[int]) -> Iterator[dict[int, _Treatment]]:
        """Treatments of few blocks at a time, probe by probe, until each structure was seen in each role.

        The first block is always there: the model itself holds its input too, so that it behaves unlike the others.
        """
        missing = {
            (group, block == 0, treatment): None
            for block, group in enumerate(groups)
            for treatment in self._roles(block, len(groups))
        }
        queue = [len(groups) - 1, *([len(groups)] if self._head else [])]
        while queue or missing:
            lowest = queue.pop(0) if queue else self._next_lowest(groups, missing)
            if lowest is None:
                return
            treatments = {}
            for block, group in enumerate(groups):
                role = "below" if block < lowest else "lowest" if block == lowest else "above"
                options = [t for g, f, t in missing if (g, f, t.role) == (group, block == 0, role)]
                if options or block in (0, lowest):
                    treatments[block] = options[0] if options else self._default(block, role)
                    missing.pop((group, block == 0, treatments[block]), None)
            yield treatments

    def _next_lowest(self, groups: Sequence[int], missing: Mapping[tuple[int, bool, _Treatment], None]) -> int | None:
        """The lowest block with which the next probe shows something new; low ones first, for they show most."""
        open_roles = [(group, first, treatment.role) for group, first, treatment in missing]
        for block, group in enumerate(groups):
            if (group, block == 0, "lowest") in open_roles:
                return block
        for block, group in enumerate(groups):
            if (group, block == 0, "above") in open_roles:
                return 0
            if (group, block == 0, "below") in open_roles and block + 1 < len(groups):
                return block + 1
        return None

    def _roles(self, block: int, num_blocks: int) -> Iterator[_Treatment]:
        count = len(self.modules_of[block])
        trained = [pattern_parts(pattern, count) for pattern in self._patterns]
        untrained = [("-",) * count, ("",) * count] if count else [()]
        if block < num_blocks - 1 or self._head:
            yield from (_Treatment("below", kept, pattern) for pattern in untrained for kept in self._kept)
        if count:
            yield from (_Treatment("lowest", kept, pattern) for pattern in trained for kept in self._kept)
        if block > 0:
            patterns = dict.fromkeys([*untrained, *(trained if count else [])])
            yield from (_Treatment("above", kept, pattern) for pattern in patterns for kept in self._kept)

    def _default(self, block: int, role: str) -> _Treatment:
        count = len(self.modules_of[block])
        pattern = pattern_parts(self._patterns[0], count) if role == "lowest" else ("-",) * count
        return _Treatment(role, False, pattern)


class _Parts:
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
        """Constant bytes besides gradients that earlier passes have left; nothing before the first."""
        if self._micro == 0:
            return 0
        start = self._spans[Part("pre", self._micro)][0]
        gradients = sum(size for size in self.recording.trained if self._column(size)[0] == 0)
        return int(self._live[2 * start, 0] - self._live[0, 0]) - gradients

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
        return Segment(self._live[2 * end] - base, _highest(np.hstack([rows, more])), flops)

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

    def scratch(self) -> set[tuple[int, int, int]]:
        """The optimiser's moments as multiples of the updated tensor, the one before, and a constant."""
        start, end = self._spans.get(Part("optimiser", self._spans_micro("optimiser")), (0, 0))
        made = [s for s in self.recording.storages if s.part.kind == "optimiser"]
        result = set()
        for operator in range(start, end):
            alive = [s for s in made if s.birth <= 2 * operator + 1 and (s.end is None or s.end > 2 * operator + 1)]
            result.add(self._multiples(self.recording.owners[operator], alive))
        return result

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


def pattern_parts(pattern: str, count: int) -> tuple[str, ...]:
    """A pattern as one entry for each of a block's adapted modules.

    >>> pattern_parts("AB", 2), pattern_parts("B//-", 3)
    (('AB', 'AB'), ('B', '', '-'))

    Raises:
        PlanError: Wrong number of entries, or an unknown one.
    """
    parts = tuple(pattern.split("/")) if "/" in pattern else (pattern,) * count
    if len(parts) != count or any(part not in ("AB", "A", "B", "-", "") for part in parts):
        raise PlanError(
            f"a pattern must give AB, A, B, - or nothing for each of a block's {count} modules, got {pattern!r}; "
            "name one for all, or one a module between slashes"
        )
    return parts


def _alive(
    storages: Sequence[Storage], columns: Sequence[tuple[int, int]], num_columns: int, length: int
) -> np.ndarray:
    """(half steps, columns) live values, each storage adding its value to its column."""
    change = np.zeros((length + 1, num_columns), dtype=np.int64)
    for storage, (column, value) in zip(storages, columns, strict=True):
        change[min(storage.birth, length), column] += value
        change[length if storage.end is None else min(storage.end, length), column] -= value
    return np.cumsum(change, axis=0)[:length]


def _highest(rows: np.ndarray) -> np.ndarray:
    """The rows that no other row reaches in all columns: only they can be the highest for some ranks."""
    rows = np.unique(rows, axis=0)
    kept: list[np.ndarray] = []
    for row in rows[np.argsort(-rows.sum(axis=1), kind="stable")]:
        if not any((other >= row).all() for other in kept):
            kept.append(row)
    return np.array(kept, dtype=np.int64).reshape(-1, rows.shape[1])


def _kind(module: str, block: int) -> str:
    """The module's name with the number of its block starred out."""
    return re.sub(rf"(^|\.){block}(?=\.|$)", r"\1*", module, count=1)


def _groups(blocks: Sequence[torch.nn.Module], kinds_of: Sequence[tuple[str, ...]]) -> tuple[int, ...]:
    """Number of each block's structure: its class, its settings, the shapes of its tensors, its adapted modules."""
    numbers: dict[object, int] = {}
    result = []
    for block, kinds in zip(blocks, kinds_of, strict=True):
        tensors = [*block.named_parameters(), *block.named_buffers()]
        settings = {
            name: value
            for name, value in vars(block).items()
            if isinstance(value, str | int | float) and not re.search(r"idx|index|layer_id", name)
        }
        key = (
            type(block).__qualname__,
            tuple((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors),
            tuple(sorted((name, str(value)) for name, value in settings.items())),
            kinds,
        )
        result.append(numbers.setdefault(key, len(numbers)))
    return tuple(result)


def _storage_bytes(tensors: Sequence[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages that were not seen before, which then are."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def _standing(
    program: StepProgram, spec: ModelSpec, prober: _Prober, groups: tuple[int, ...], train_head: bool, batch: int
) -> MemoryProfile:
    """The profile's part that stands through a step."""
    seen: set[int] = set()
    pairs = {name: t for name, t in program.parameters.items() if name not in spec.head}
    _storage_bytes(list(pairs.values()), seen)
    head = {name: _storage_bytes([program.parameters[name]], seen) for name in spec.head}
    batch_bytes = _storage_bytes(program.batch, seen)
    block_bytes = tuple(_storage_bytes([*block.parameters(), *block.buffers()], seen) for block in program.blocks)
    kind_index = {kind: index for index, kind in enumerate(prober.kinds)}
    return MemoryProfile(
        modules={
            module: ModuleFacts(*shape, kind_index[prober.kind_of[module]], spec.block_of[module])
            for module, shape in spec.modules.items()
        },
        kinds=prober.kinds,
        groups=groups,
        head=head,
        head_trained=train_head,
        batch=batch,
        base_bytes=_storage_bytes(program.resident, seen),
        block_bytes=block_bytes,
        batch_bytes=batch_bytes,
        element_bytes=next(iter(pairs.values())).element_size(),
        optimiser=OptimiserTrace((0, 0), (), (0, 0), 0),
    )


def _micro(findings: _Findings) -> MicroTrace:
    assert findings.pre is not None, "there is a first probe"
    assert findings.head is not None, "it trains a block"
    return MicroTrace(
        findings.before, findings.pre, findings.head, findings.head_alone, findings.shared, findings.blocks
    )


def _optimiser(findings: Sequence[_Findings]) -> OptimiserTrace:
    states = sorted({pair for found in findings for pair in found.state})
    scratch = np.array(sorted({triple for found in findings for triple in found.scratch}), dtype=np.int64)
    clip = {count: peak for found in findings for count, peak in sorted(found.clip.items())}
    return OptimiserTrace(
        state=_line(states),
        scratch=tuple((int(own), int(before), int(rest)) for own, before, rest in _highest(scratch.reshape(-1, 3))),
        clip=tuple(reversed(_line(sorted(clip.items())))),  # type: ignore[arg-type]
        left=max(left for found in findings for left in found.left),
    )


def _line(points: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Slope and constant of the line through points with whole slopes; of a single size, all is slope or constant."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 != x0:
            slope = (y1 - y0) // (x1 - x0)
            return slope, y0 - slope * x0
    return 0, max((y for _, y in points), default=0)
