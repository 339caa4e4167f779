"""Plans that several algorithms share, and the check that a plan fits its client."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from fedpilot import allocation, lora, memory
from fedpilot.allocation import Allocation
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, CostTable, LeftOut, ModelSpec, Plan

Solver: TypeAlias = Literal["exact", "additive", "suffix", "random", "all", "all-checkpointed"]


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
        has = client.memory_bytes / 2**20
        reason = f"needs {needed / 2**20:.1f} MiB for the least that this method trains, has {has:.1f} MiB"
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


@dataclass(frozen=True)
class BlockAllocation:
    """How blocks are given to clients under their budgets.

    Attributes:
        spec: The model.
        profile: Its costs.
        rank: Rank of the global adapter; blocks that are not trained hold it frozen.
        ranks: Ranks that a trained block may take.
        rank_exponent: A block of value v is worth ``v * (r / rank) ** rank_exponent`` at rank r.
        solver: ``exact``, ``additive``, or one that does not look at values.
        checkpointing: Whether the exact solver may recompute blocks.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int
    ranks: tuple[int, ...]
    rank_exponent: float = 0.5
    solver: Solver = "exact"
    checkpointing: bool = False

    def __call__(
        self, cohort: Sequence[ClientProfile], values: Sequence[Mapping[int, float]], rng: np.random.Generator
    ) -> list[Plan | LeftOut]:
        """A priced plan for each client, or why not; ``values`` maps block -> value, client by client.

        Of two micro-batches that allow the same value the larger is taken: it needs fewer passes.
        """
        tables = {m: self._table(m) for m in sorted(self.profile.micro, reverse=True)}
        best: list[tuple[int, Allocation] | None] = [None] * len(cohort)
        for micro_batch, table in tables.items():
            for index, found in enumerate(self._solve(table, cohort, values, rng)):
                held = best[index]
                if found is not None and (held is None or found.value > held[1].value):
                    best[index] = (micro_batch, found)
        return [
            self._left_out(tables, client) if found is None else self._plan(client, *found, value)
            for client, value, found in zip(cohort, values, best, strict=True)
        ]

    def _table(self, micro_batch: int) -> CostTable:
        return memory.cost_table(
            self.profile,
            ranks=self.ranks,
            checkpointing=self.checkpointing or self.solver == "all-checkpointed",
            micro_batch=micro_batch,
            adapter_rank=self.rank,
        )

    def _solve(
        self,
        table: CostTable,
        cohort: Sequence[ClientProfile],
        values: Sequence[Mapping[int, float]],
        rng: np.random.Generator,
    ) -> list[Allocation | None]:
        block_values = np.array([[value[j] for j in range(self.spec.num_blocks)] for value in values])
        weights = {rank: (rank / self.rank) ** self.rank_exponent for rank in self.ranks}
        by_choice = allocation.choice_values(table, block_values, weights)
        limits = [max_flops(client) for client in cohort]
        if self.solver == "exact":
            budgets = np.array([client.memory_bytes for client in cohort])
            flops = None if all(limit is None for limit in limits) else _as_array(limits)
            return allocation.allocate_many(table, by_choice, budgets, max_flops=flops)
        return [
            self._strategy(table, client.memory_bytes, value, limit, rng)
            for client, value, limit in zip(cohort, by_choice, limits, strict=True)
        ]

    def _strategy(
        self, table: CostTable, budget: int, values: np.ndarray, limit: float | None, rng: np.random.Generator
    ) -> Allocation | None:
        match self.solver:
            case "additive":
                return allocation.additive(table, values, budget, max_flops=limit)
            case "suffix":
                return allocation.suffix(table, budget, values=values, max_flops=limit)
            case "random":
                return allocation.random_subset(table, budget, rng, values=values, max_flops=limit)
            case "all":
                return allocation.everything(table, budget, values=values, max_flops=limit)
            case _:
                return allocation.everything_checkpointed(table, budget, values=values, max_flops=limit)

    def _plan(self, client: ClientProfile, micro_batch: int, found: Allocation, values: Mapping[int, float]) -> Plan:
        plan = from_allocation(self.spec, client.client_id, self.rank, found)
        whole = micro_batch == max(self.profile.micro)
        plan = replace(plan, micro_batch=None if whole else micro_batch, values=values)
        return priced(self.profile, plan, client)

    def _left_out(self, tables: Mapping[int, CostTable], client: ClientProfile) -> LeftOut:
        """Names the cheapest plan that this solver could have chosen."""
        if self.solver in ("all", "all-checkpointed"):
            ample = replace(client, memory_bytes=2**62, deadline_s=None)
            solved = {
                m: self._strategy(t, 2**62, np.zeros_like(t.above.saved), None, _NO_RNG) for m, t in tables.items()
            }
            plans = [self._plan(ample, m, found, {}) for m, found in solved.items() if found is not None]
        else:
            limit = max_flops(client)
            cheapest = {m: allocation.smallest_budget(table, max_flops=limit) for m, table in tables.items()}
            if all(found is None for found in cheapest.values()):  # no budget would do: the deadline is the reason
                cheapest = {m: allocation.smallest_budget(table) for m, table in tables.items()}
            plans = [self._plan(client, m, found, {}) for m, found in cheapest.items() if found is not None]
        return left_out(client, min(plans, key=lambda plan: plan.peak_bytes or 0))


_NO_RNG = np.random.default_rng(0)  # strategies that train everything draw nothing


def _as_array(limits: Sequence[float | None]) -> np.ndarray:
    """Limits as numbers; no limit is a very large one."""
    return np.array([2.0**62 if limit is None else limit for limit in limits])


def affordable_suffix(profile: MemoryProfile, spec: ModelSpec, client: ClientProfile, rank: int) -> range:
    """The deepest blocks whose gradients the client can measure at once; empty where it can measure none."""
    for first in range(spec.num_blocks):
        blocks = range(first, spec.num_blocks)
        names = frozenset(lora.names(lora.blocks_modules(spec, blocks)))
        plan = Plan(client.client_id, dict.fromkeys(spec.modules, rank), trainable=frozenset(), scored=names)
        if memory.peak_bytes(profile, plan) <= client.memory_bytes:
            return blocks
    return range(0)
