"""Memory of steps that train an attachment: each plan that may be asked for is traced whole.

An attachment may run the model more than once in a step, hook tensors of its own into every block and train what lies
in none, so that a step is not the sum of parts that `fedpilot.memory.probing` takes apart. Its plans are few, one for
each lowest trained block, and a whole trace is exact.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fedpilot import attachments
from fedpilot.errors import PlanError
from fedpilot.memory.counting import LiveStorages
from fedpilot.memory.probing import ProgramFor
from fedpilot.memory.profile import MemoryProfile, OptimiserTrace, WholeTrace
from fedpilot.memory.recording import flops_of
from fedpilot.types import Attachment, ModelSpec, Plan


def trace_attached(
    program_for: ProgramFor,
    spec: ModelSpec,
    attachment: Attachment,
    *,
    batch: int,
    micro_batches: Sequence[int] = (),
    checkpointing: bool = False,
) -> MemoryProfile:
    """Traces the steps of all `candidates`; the arguments are those of `memory.trace`.

    Raises:
        PlanError: A micro-batch is no divisor of the batch.
    """
    sizes = sorted(set(micro_batches or (batch,)), reverse=True)
    for size in sizes:
        if size < 1 or batch % size:
            raise PlanError(f"a micro-batch must divide the batch of {batch}, got {size}; choose a divisor")
    plans = [plan for size in sizes for plan in candidates(spec, attachment, batch, size, checkpointing)]
    return trace_plans(program_for, spec, plans, batch=batch, sizes=sizes)


def trace_plans(
    program_for: ProgramFor,
    spec: ModelSpec,
    plans: Sequence[Plan],
    *,
    batch: int,
    sizes: Sequence[int],
    item_shape: tuple[int, ...] = (),
    rehearsed: int = 0,
) -> MemoryProfile:
    """Traces the steps of these plans whole, and so knows no other.

    Args:
        program_for: Builds the step of a plan.
        spec: The model.
        plans: All that may be asked for.
        batch: Examples of an optimiser step.
        sizes: Their micro-batches, the largest first.
        item_shape: Of a synthetic item, where clients condense.
        rehearsed: Steps that one run of such a program is, where it is more than one; it is then run once.
    """
    return MemoryProfile(
        modules={},
        kinds=(),
        groups=tuple(range(spec.num_blocks)),
        head={},
        head_trained=False,
        batch=batch,
        base_bytes=0,
        block_bytes=(0,) * spec.num_blocks,
        batch_bytes=0,
        element_bytes=4,
        optimiser=OptimiserTrace((0, 0), (), (0, 0), 0),
        sizes=tuple(sizes),
        plans={key_of(plan, batch): _traced(program_for, plan, plan.micro_batch or batch, rehearsed) for plan in plans},
        item_shape=item_shape,
    )


def candidates(
    spec: ModelSpec, attachment: Attachment, batch: int, micro_batch: int, checkpointing: bool
) -> Iterator[Plan]:
    """One plan for each block that may be the lowest trained one, upwards; then the same with blocks recomputed."""
    size = None if micro_batch == batch else micro_batch
    for kept in (False, True) if checkpointing else (False,):
        for first in sorted(set(spec.block_of.values())):
            plan = replace(attachments.suffix_plan(spec, 0, attachment, first), micro_batch=size)
            yield replace(plan, checkpointed=frozenset(range(first, spec.num_blocks))) if kept else plan


def whole_trace(profile: MemoryProfile, plan: Plan) -> WholeTrace:
    """The trace of a plan with an attachment, whoever's plan it is.

    Raises:
        PlanError: It was not traced.
    """
    found = profile.plans.get(key_of(plan, profile.batch))
    if found is None:
        raise PlanError(
            "a plan with an attachment must be one that was traced, a suffix of blocks in a traced micro-batch, got "
            f"{len(plan.trainable)} trained tensors in micro-batches of {plan.micro_batch or profile.batch}; "
            "take it from attachments.suffix_plan and trace its own attachment"
        )
    return found


def key_of(plan: Plan, batch: int) -> str:
    """What a plan's memory depends on, in short."""
    facts = [
        None if plan.attachment is None else attachments.to_table(plan.attachment),
        sorted(plan.trainable),
        sorted(plan.ranks.items()),
        sorted(plan.checkpointed),
        sorted(plan.scored),
        None if plan.blocks is None else list(plan.blocks),
        plan.micro_batch or batch,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _traced(program_for: ProgramFor, plan: Plan, micro_batch: int, rehearsed: int) -> WholeTrace:
    program = program_for(plan, micro_batch)
    counter = _Counter()
    counter.hold([*program.resident, *program.sums])
    standing = counter.live
    with program.context(), counter.counting():
        program.step()  # makes the optimiser's state
        first = counter.flops
        if not rehearsed:
            program.step()
    flops = first // rehearsed if rehearsed else counter.flops - first
    held = sum(tensor.numel() * tensor.element_size() for tensor in program.parameters.values())
    return WholeTrace(counter.peak, flops, standing, held)


class _Counter(LiveStorages):  # type: ignore[no-untyped-call]
    """Counts operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def _after(
        self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object], result: object
    ) -> None:
        self.flops += flops_of(func, args, kwargs, result)
