"""Plans that several algorithms share, and the check that a plan fits its client."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fedpilot import lora, memory
from fedpilot.allocation import Allocation
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, LeftOut, ModelSpec, Plan


def trainable(spec: ModelSpec, modules: Iterable[str]) -> frozenset[str]:
    """Names of both factors of the modules, and of the head."""
    return frozenset(lora.names(modules)) | frozenset(spec.head)


def train_blocks(spec: ModelSpec, client_id: int, rank: int, blocks: Iterable[int]) -> Plan:
    """Every module holds a pair of the rank; those of the blocks are trained."""
    ranks = dict.fromkeys(spec.modules, rank)
    return Plan(client_id=client_id, ranks=ranks, trainable=trainable(spec, lora.blocks_modules(spec, blocks)))


def train_all(spec: ModelSpec, client_id: int, rank: int) -> Plan:
    """Every module is trained at the rank."""
    return train_blocks(spec, client_id, rank, range(spec.num_blocks))


def from_allocation(spec: ModelSpec, client_id: int, rank: int, allocation: Allocation) -> Plan:
    """The plan of an allocation: trained blocks at their chosen rank, all others hold the full pair frozen."""
    ranks = dict.fromkeys(spec.modules, rank)
    trained: list[str] = []
    for block, choice in enumerate(allocation.choices):
        if choice is not None and choice.rank is not None:
            modules = lora.blocks_modules(spec, [block])
            ranks |= dict.fromkeys(modules, choice.rank)
            trained += modules
    recomputed = frozenset(
        block for block, choice in enumerate(allocation.choices) if choice is not None and choice.checkpointed
    )
    return Plan(client_id=client_id, ranks=ranks, trainable=trainable(spec, trained), checkpointed=recomputed)


def trained_blocks(spec: ModelSpec, plan: Plan) -> tuple[int, ...]:
    """Blocks of which the plan trains at least one tensor, ascending."""
    return tuple(
        sorted({spec.block_of[module] for module in plan.ranks if plan.trainable & frozenset(lora.names([module]))})
    )


def max_flops(client: ClientProfile) -> float | None:
    """Floating-point operations that one step may cost so that the local update meets its deadline."""
    if client.deadline_s is None or client.flops_per_second is None:
        return None
    return client.deadline_s * client.flops_per_second / client.num_steps


def priced(profile: MemoryProfile, plan: Plan, client: ClientProfile) -> Plan:
    """The plan with its predicted peak and, where the client's speed is known, its predicted seconds."""
    seconds = None
    if client.flops_per_second is not None:
        seconds = memory.seconds(profile, plan, client.flops_per_second, client.num_steps)
    return replace(plan, peak_bytes=memory.peak_bytes(profile, plan), seconds=seconds)


def fits(plan: Plan, client: ClientProfile) -> bool:
    """Whether a priced plan keeps its client's budget and deadline."""
    in_memory = plan.peak_bytes is not None and plan.peak_bytes <= client.memory_bytes
    in_time = client.deadline_s is None or plan.seconds is None or plan.seconds <= client.deadline_s
    return in_memory and in_time


def left_out(client: ClientProfile, smallest: Plan) -> LeftOut:
    """Why a client sits out, from the cheapest plan that it would have needed to fit."""
    needed = smallest.peak_bytes
    if needed is not None and needed > client.memory_bytes:
        reason = f"needs {needed} bytes for the least that this method trains, has {client.memory_bytes}"
        return LeftOut(client.client_id, reason, needed)
    return LeftOut(client.client_id, f"needs {smallest.seconds:.1f} s, deadline {client.deadline_s:.1f} s")


def fit_or_leave_out(profile: MemoryProfile, plan: Plan, client: ClientProfile) -> Plan | LeftOut:
    """The priced plan where it fits, otherwise the reason why not."""
    plan = priced(profile, plan, client)
    return plan if fits(plan, client) else left_out(client, plan)


def largest_rank(
    profile: MemoryProfile, spec: ModelSpec, client: ClientProfile, ranks: Sequence[int]
) -> Plan | LeftOut:
    """All modules trained at the largest of the ranks that fits; costs grow with the rank, so bisection finds it."""
    ordered = sorted(set(ranks))
    plans: dict[int, Plan] = {}

    def fitting(rank: int) -> bool:
        plans[rank] = priced(profile, train_all(spec, client.client_id, rank), client)
        return fits(plans[rank], client)

    if not fitting(ordered[0]):
        return left_out(client, plans[ordered[0]])
    low, high = 0, len(ordered)  # ordered[low] fits, ordered[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(ordered[middle]) else (low, middle)
    return plans[ordered[low]]
