"""Traces a model a few times and takes the traces apart, so that any plan can be put together from the parts.

A probe plan gives neighbouring blocks different roles, so that few steps show them all. Its ranks are primes, one for
each kind of module: a storage whose bytes a prime divides is proportional to that kind's rank, and so one trace is
exact for every rank.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import numpy as np
import torch

from fedpilot import base_deltas
from fedpilot.errors import ModelError, PlanError
from fedpilot.memory.assembly import moments
from fedpilot.memory.counting import StepProgram, measure_peak
from fedpilot.memory.parts import Parts, highest
from fedpilot.memory.profile import (
    BlockTrace,
    MemoryProfile,
    MicroTrace,
    ModuleFacts,
    OptimiserTrace,
    Segment,
    state_key,
    whole_key,
)
from fedpilot.memory.recording import record
from fedpilot.types import ModelSpec, Plan

# None divides the size of a usual layer, batch or vocabulary; fake tensors of such ranks cost nothing.
_PRIMES = (
    *(10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093, 10099, 10103),
    *(10111, 10133, 10139, 10141, 10151, 10159, 10163, 10169, 10177, 10181, 10193, 10211),
)

_TOLERANCE = 0.005
"""Largest relative error of a prediction; what is known to work has none."""

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
    whole: dict[str, tuple[int, int]] = field(default_factory=dict)


def trace(
    program_for: ProgramFor,
    spec: ModelSpec,
    *,
    batch: int,
    micro_batches: Sequence[int] = (),
    patterns: Sequence[str] = ("AB",),
    checkpointing: bool = True,
    train_head: bool = True,
    suffixes: bool = False,
    checked: bool = True,
) -> MemoryProfile:
    """Traces a model's training step; the programs should be of fake tensors, for ranks of the probes are absurd.

    Args:
        program_for: Builds the step of a plan.
        spec: The model.
        batch: Examples of an optimiser step.
        micro_batches: Examples of a forward pass, each a divisor of ``batch``; empty for the whole batch only.
        patterns: What a trained block trains, each in all its modules: ``AB``, ``A``, ``B`` or ``W``, the whole weight;
            or ``/`` between one entry a module, as in ``AB/-/B`` (``-`` for a frozen pair, nothing for no pair).
        checkpointing: Whether to trace blocks that are recomputed too.
        train_head: Whether every plan trains the head, if there is one.
        suffixes: Whether all plans train the deepest loaded blocks, recompute none below and give every block pairs,
            which takes fewer traces; of any other plan the profile knows nothing.
        checked: Whether a whole step is compared with the sum of its parts. A further batch of the same model may do
            without: what breaks the sum lies in the model.

    Raises:
        PlanError: A micro-batch is no divisor of the batch, or a pattern does not fit the blocks.
        ModelError: The parts do not add up to a whole step of this model.
    """
    for size in micro_batches:
        if size < 1 or batch % size:
            raise PlanError(f"a micro-batch must divide the batch of {batch}, got {size}; choose a divisor")
    prober = _Prober(program_for, spec, tuple(patterns), checkpointing, train_head, suffixes)
    sizes = sorted(set(micro_batches or (batch,)), reverse=True)
    profile = _standing(prober, sizes[0], train_head, batch)
    found = {size: prober.probe(profile.groups, size, second=size < batch, whole=size == sizes[0]) for size in sizes}
    profile = replace(
        profile,
        optimiser=_optimiser(found[sizes[0]]),
        micro={size: _micro(findings) for size, findings in found.items()},
    )
    if checked:
        _check_sum(profile, program_for, prober.mixed_plan(sizes[0]))
    return profile


def _check_sum(profile: MemoryProfile, program_for: ProgramFor, plan: Plan) -> None:
    """Compares the prediction for a plan that no probe has seen with a step of it."""
    predicted = max(moment.peak for moment in moments(profile, plan))
    measured = measure_peak(program_for(plan, plan.micro_batch or profile.batch), shortened=True)
    if abs(predicted - measured) > _TOLERANCE * measured:
        raise ModelError(
            f"a step must be the sum of its parts, got {predicted} bytes from the parts and {measured} from the step; "
            "blocks of this model share tensors in a way that the memory profile does not know"
        )


class _Prober:
    """Plans probes, runs them and sorts what they show."""

    def __init__(
        self,
        program_for: ProgramFor,
        spec: ModelSpec,
        patterns: tuple[str, ...],
        checkpointing: bool,
        train_head: bool,
        suffixes: bool,
    ) -> None:
        self.program_for = program_for
        self.spec = spec
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

        self._top = max(spec.block_of.values())
        self._shapes = {base_deltas.weight_name(module): whole_key(*shape) for module, shape in spec.modules.items()}
        self._suffixes = suffixes
        lone = all(set(p) <= set("W/") for p in patterns)
        self._untrained = ("",) if lone else ("-",) if suffixes else ("-", "")

    def _whole_shapes(self, plan: Plan) -> set[str]:
        """Shapes of the weights that a plan trains whole."""
        return {self._shapes[name] for name in plan.trainable if name in self._shapes}

    def lone_plan(self, block: int, micro_batch: int) -> Plan:
        """All blocks loaded, one of them trained and the others without pairs, each of which would take its time."""
        treatments = {b: _Treatment("", False, ("",) * len(modules)) for b, modules in enumerate(self.modules_of)}
        return self._plan(treatments | {block: self._default(block, "lowest")}, micro_batch)

    def mixed_plan(self, micro_batch: int) -> Plan:
        """A few blocks at both ends, trained or not, recomputed or not, with small ranks that differ."""
        blocks = sorted({*range(min(3 if self._suffixes else 4, self._top)), self._top})
        treatments = {}
        for position, block in enumerate(blocks):
            trained = block == self._top or (position > 0 if self._suffixes else position % 2)
            role = "lowest" if trained else "above"
            kept = self._kept[-1] and position > 1
            treatments[block] = replace(self._default(block, role), checkpointed=kept)
        plan = self._plan(treatments, micro_batch)
        return replace(plan, ranks={module: 1 + index % 3 for index, module in enumerate(plan.ranks)})

    def _plan(self, treatments: Mapping[int, _Treatment], micro_batch: int) -> Plan:
        """A probe's plan; blocks without a treatment are not loaded."""
        ranks: dict[str, int] = {}
        trainable = set(self._head)
        for block, treatment in treatments.items():
            for module, trained in zip(self.modules_of[block], treatment.pattern, strict=True):
                if trained == "W":
                    trainable.add(base_deltas.weight_name(module))
                elif trained:
                    ranks[module] = self.primes[self.kind_of[module]]
                trainable |= {f"{module}.lora_{letter}" for letter in trained if letter in "AB"}
        kept = frozenset(block for block, treatment in treatments.items() if treatment.checkpointed)
        blocks = tuple(sorted(treatments)) if len(treatments) < len(self.modules_of) else None
        return Plan(0, ranks, frozenset(trainable), blocks=blocks, checkpointed=kept, micro_batch=micro_batch)

    def probe(self, groups: Sequence[int], micro_batch: int, *, second: bool, whole: bool) -> _Findings:
        """Runs all probes of a micro-batch.

        Args:
            groups: Number of each block's structure.
            micro_batch: Examples of a pass.
            second: Whether to look at the second pass, with gradients standing, instead of the first.
            whole: Whether to look at the optimiser too.
        """
        findings = _Findings()
        for number, treatments in enumerate(chain(self._schedule(groups), self._stand_ins(groups))):
            plan = self._plan(treatments, micro_batch)
            # Scratch needs the optimiser's state, clipping two numbers of trained tensors.
            warm = whole and (number < 2 or not self._whole_shapes(plan) <= findings.whole.keys())
            program = self.program_for(plan, micro_batch)
            recording = record(program, warm=warm, passes=None if warm else 1 + second, second=second)
            parts = Parts(recording, [self.primes[kind] for kind in self.kinds], int(second))
            dense = self._head | (plan.trainable & self._shapes.keys())
            gradients = [program.parameters[name].untyped_storage().nbytes() for name in dense]
            stand = second and not program.sums  # sums stand from the beginning: they are no pass's
            self._sort(parts, findings, groups, treatments, sum(gradients) if stand else 0)
            if warm:
                self._sort_optimiser(parts, findings, micro_batch if program.sums else 0)
        return findings

    def _sort(
        self,
        parts: Parts,
        findings: _Findings,
        groups: Sequence[int],
        treatments: Mapping[int, _Treatment],
        gradients: int,
    ) -> None:
        """Sorts a probe's parts; ``gradients`` are the bytes of dense ones that stand when the pass begins."""
        if findings.pre is None:  # the first probe trains the last block only: hardly anything holds what is shared
            findings.pre, findings.shared = parts.segment("pre"), parts.shared
            findings.before = parts.before - gradients
        if all(treatment.role == "below" for treatment in treatments.values()):
            findings.head_alone = parts.segment("head")
        elif findings.head is None:
            findings.head = parts.segment("head")
        for position, (block, treatment) in enumerate(sorted(treatments.items())):
            key = state_key(groups[block], position == 0, treatment.role, treatment.checkpointed, treatment.pattern)
            findings.blocks.setdefault(key, parts.block(position))

    def _sort_optimiser(self, parts: Parts, findings: _Findings, by_example: int) -> None:
        """Sorts clipping and the optimiser; clipping drops ``by_example`` gradients of each tensor."""
        recording, clip = parts.recording, parts.segment("clip")
        size = len(recording.trained)
        findings.clip[size] = max(findings.clip.get(size, 0), clip.peak(parts.no_ranks))
        dropped = by_example * sum(recording.trained)
        net = clip.net @ np.array([1, *self.primes.values()]) if by_example else clip.net[0]
        findings.left.append(int(net) + dropped)
        keys = [self._shapes.get(name) for name in recording.names]
        whole = [index for index, key in enumerate(keys) if key is not None]
        findings.whole |= {keys[i] or "": (recording.state[i], parts.whole_scratch(i)) for i in whole}
        line = [i for i in range(size) if i not in whole]
        findings.state |= {(recording.trained[i], recording.state[i]) for i in line}
        findings.scratch |= parts.scratch(whole)

    def _schedule(self, groups: Sequence[int]) -> Iterator[dict[int, _Treatment]]:
        """Treatments of few blocks at a time, probe by probe, until each structure was seen in each role.

        The first block is always there: the model itself holds its input too, so that it behaves unlike the others.
        """
        missing = {
            (group, block == 0, treatment): None
            for block, group in enumerate(groups)
            for treatment in self._roles(block, len(groups))
        }
        queue = [self._top, *([len(groups)] if self._head else [])]
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

    def _stand_ins(self, groups: Sequence[int]) -> Iterator[dict[int, _Treatment]]:
        """Structures unlike the first block's next to the input, where shallow models that leave it out have them."""
        lowest_of = {group: block for block, group in reversed(list(enumerate(groups))) if group != groups[0]}
        for block in lowest_of.values():
            for treatment in self._roles(block, len(groups)):
                if treatment.role == "lowest":
                    yield {block: treatment}
                elif treatment.role == "below" and block < self._top:
                    yield {block: treatment, self._top: self._default(self._top, "lowest")}
                elif treatment.role == "below" and self._head:
                    yield {block: treatment}

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
        trained = [pattern_parts(pattern, count) for pattern in self._patterns] if count else []
        untrained = [(part,) * count for part in self._untrained] if count else [()]
        if block < num_blocks - 1 or self._head:
            below = self._kept[:1] if self._suffixes else self._kept
            yield from (_Treatment("below", kept, pattern) for pattern in untrained for kept in below)
        yield from (_Treatment("lowest", kept, pattern) for pattern in trained for kept in self._kept)
        if block > 0:
            patterns = dict.fromkeys([*(() if self._suffixes and trained else untrained), *trained])
            yield from (_Treatment("above", kept, pattern) for pattern in patterns for kept in self._kept)

    def _default(self, block: int, role: str) -> _Treatment:
        count = len(self.modules_of[block])
        pattern = pattern_parts(self._patterns[0], count) if role == "lowest" else self._untrained[:1] * count
        return _Treatment(role, False, pattern)


def pattern_parts(pattern: str, count: int) -> tuple[str, ...]:
    """A pattern as one entry for each of a block's adapted modules.

    >>> pattern_parts("AB", 2), pattern_parts("B//-", 3)
    (('AB', 'AB'), ('B', '', '-'))

    Raises:
        PlanError: Wrong number of entries, or an unknown one.
    """
    parts = tuple(pattern.split("/")) if "/" in pattern else (pattern,) * count
    if len(parts) != count or any(part not in ("AB", "A", "B", "W", "-", "") for part in parts):
        raise PlanError(
            f"a pattern must give AB, A, B, W, - or nothing for each of a block's {count} modules, got {pattern!r}; "
            "name one for all, or one a module between slashes"
        )
    return parts


def _kind(module: str, block: int) -> str:
    """The module's name with the number of its block starred out."""
    return re.sub(rf"(^|\.){block}(?=\.|$)", r"\1*", module, count=1)


def _structure(block: torch.nn.Module, kinds: tuple[str, ...]) -> Hashable:
    """A block's class, its settings, the shapes of its tensors, its adapted modules: blocks alike behave alike."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    settings = {
        name: value
        for name, value in vars(block).items()
        if isinstance(value, str | int | float) and not re.search(r"idx|index|layer_id", name)
    }
    return (
        type(block).__qualname__,
        tuple((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors),
        tuple(sorted((name, str(value)) for name, value in settings.items())),
        kinds,
    )


def _storage_bytes(tensors: Sequence[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages that were not seen before, which then are."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def _standing(prober: _Prober, micro_batch: int, train_head: bool, batch: int) -> MemoryProfile:
    """The profile's part that stands through a step, and which blocks are alike."""
    spec = prober.spec
    adapted = sorted(set(spec.block_of.values()))
    program = prober.program_for(prober.lone_plan(adapted[-1], micro_batch), micro_batch)
    structures = [_structure(block, kinds) for block, kinds in zip(program.blocks, prober.kinds_of, strict=True)]
    seen: set[int] = set()
    pairs = {name: t for name, t in program.parameters.items() if name.endswith((".lora_A", ".lora_B"))}
    _storage_bytes(list(pairs.values()), seen)
    head = {name: _storage_bytes([program.parameters[name]], seen) for name in spec.head}
    batch_bytes = _storage_bytes(program.batch, seen)
    block_bytes = tuple(_storage_bytes([*block.parameters(), *block.buffers()], seen) for block in program.blocks)
    base_bytes = _storage_bytes(program.resident, seen)
    kind_index = {kind: index for index, kind in enumerate(prober.kinds)}
    if len(adapted) > 1:  # the one block with pairs looked unlike the others
        other = prober.program_for(prober.lone_plan(adapted[0], micro_batch), micro_batch)
        structures[adapted[-1]] = _structure(other.blocks[adapted[-1]], prober.kinds_of[adapted[-1]])
    numbers = {structure: number for number, structure in enumerate(dict.fromkeys(structures))}
    return MemoryProfile(
        modules={
            module: ModuleFacts(*shape, kind_index[prober.kind_of[module]], spec.block_of[module])
            for module, shape in spec.modules.items()
        },
        kinds=prober.kinds,
        groups=tuple(numbers[structure] for structure in structures),
        head=head,
        head_trained=train_head,
        batch=batch,
        base_bytes=base_bytes,
        block_bytes=block_bytes,
        batch_bytes=batch_bytes,
        by_example=bool(program.sums),
        element_bytes=next((tensor.element_size() for tensor in pairs.values()), 4),
        optimiser=OptimiserTrace((0, 0), (), (0, 0), 0),
    )


def _micro(findings: _Findings) -> MicroTrace:
    assert findings.pre is not None, "there is a first probe"
    assert findings.head is not None, "it trains a block"
    return MicroTrace(
        findings.before, findings.pre, findings.head, findings.head_alone, findings.shared, findings.blocks
    )


def _optimiser(found: _Findings) -> OptimiserTrace:
    scratch = highest(np.array(sorted(found.scratch), dtype=np.int64).reshape(-1, 3))
    per_tensor, constant = _line(sorted(found.clip.items()))
    return OptimiserTrace(
        state=_state(sorted(found.state)),
        scratch=tuple((int(own), int(before), int(rest)) for own, before, rest in scratch),
        clip=(constant, per_tensor),
        left=max(found.left),
        whole=found.whole,
    )


def _state(points: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """`_line` through (bytes of a tensor, bytes of its state); of a single size, as many whole copies as there are."""
    if len(sizes := {size for size, _ in points}) == 1 and 0 not in sizes:
        return divmod(max(state for _, state in points), sizes.pop())
    return _line(points)


def _line(points: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Slope and constant of the line through points with whole slopes; of a single size, all is slope or constant."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 != x0:
            slope = (y1 - y0) // (x1 - x0)
            return slope, y0 - slope * x0
    return 0, max((y for _, y in points), default=0)
