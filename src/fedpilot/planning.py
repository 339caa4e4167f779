"""Plans that several algorithms share, and the check that a plan fits its client."""

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from fedpilot import allocation, lora, memory
from fedpilot.allocation import Allocation
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import Attachment, ClientProfile, CostTable, LeftOut, ModelSpec, Plan

Solver: TypeAlias = Literal["exact", "additive", "suffix", "random", "all", "all-checkpointed"]
Factors: TypeAlias = Literal["AB", "B"]
"""What is trained of a pair."""

Sampler: TypeAlias = Literal["weighted", "ranked"]
"""Ways to choose blocks whose values are weights: drawn in proportion to them, or the largest first."""

Participation: TypeAlias = Literal["all", "exclusive", "straggler"]
"""Who takes part where all clients must train the same; see `alike`."""


def trainable(spec: ModelSpec, modules: Iterable[str], factors: Factors = "AB") -> frozenset[str]:
    """Names of both factors of the modules, or of B alone, and of the head."""
    names = lora.names(modules) if factors == "AB" else map(lora.b_name, modules)
    return frozenset(names) | frozenset(spec.head)


def train_blocks(spec: ModelSpec, client_id: int, rank: int, blocks: Iterable[int], factors: Factors = "AB") -> Plan:
    """Every module holds a pair of the rank; those of the blocks are trained."""
    names = trainable(spec, lora.blocks_modules(spec, blocks), factors)
    return Plan(client_id=client_id, ranks=dict.fromkeys(spec.modules, rank), trainable=names)


def frozen_from(spec: ModelSpec, client_id: int, rank: int, depth: int) -> Plan:
    """Nothing is trained; modules from the block on hold a pair of the rank, those below none."""
    modules = lora.blocks_modules(spec, range(depth, spec.num_blocks))
    return Plan(client_id=client_id, ranks=dict.fromkeys(modules, rank), trainable=frozenset())


def train_all(spec: ModelSpec, client_id: int, rank: int, factors: Factors = "AB") -> Plan:
    """Every module is trained at the rank."""
    return train_blocks(spec, client_id, rank, range(spec.num_blocks), factors)


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
    owners = {name.rpartition(".")[0] for name in plan.trainable}
    return tuple(sorted({spec.block_of[owner] for owner in owners if owner in spec.block_of}))


def max_flops(client: ClientProfile) -> float | None:
    """Floating-point operations that one step may cost so that the local update meets its deadline."""
    if client.deadline_s is None or client.flops_per_second is None:
        return None
    return client.deadline_s * client.flops_per_second / client.num_steps


def within(client: ClientProfile, seconds: float) -> ClientProfile:
    """The client with a deadline of so many seconds, where it has no earlier one."""
    limit = seconds * (1 + 1e-9)  # what takes just as long may be rounded up
    return replace(client, deadline_s=limit if client.deadline_s is None else min(limit, client.deadline_s))


def priced(profile: MemoryProfile, plan: Plan, client: ClientProfile, num_scored: int = 0) -> Plan:
    """The plan with its predicted peak and, where the client's speed is known, its predicted seconds.

    Args:
        profile: Costs.
        plan: What is trained, and what is scored beforehand.
        client: Whose.
        num_scored: Examples that are scored on, where the plan scores and the client has as many.
    """
    seconds = None
    if client.flops_per_second is not None:
        scored = min(num_scored, client.num_examples)
        seconds = memory.seconds(profile, plan, client.flops_per_second, client.num_steps, scored)
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


def alike(
    profile: MemoryProfile,
    spec: ModelSpec,
    cohort: Sequence[ClientProfile],
    rank: int,
    participation: Participation,
    budget_bytes: int | None = None,
) -> list[Plan | LeftOut]:
    """The same pairs at the same rank for everybody.

    Args:
        profile: Costs.
        spec: The model.
        cohort: The round's clients.
        rank: Of every pair.
        participation: ``all`` trains everything and refuses where that does not fit; ``exclusive`` leaves out whom it
            does not fit; ``straggler`` trains the deepest blocks that fit ``budget_bytes``.
        budget_bytes: Smallest budget of the population, for ``straggler``.

    Raises:
        PlanError: ``all``, and a client cannot train everything; or ``straggler`` without a budget.
    """
    blocks: Sequence[int] = range(spec.num_blocks)
    if participation == "straggler":
        blocks = straggler_blocks(profile, spec, rank, budget_bytes)
    plan = train_blocks(spec, -1, rank, blocks)
    plans = [fit_or_leave_out(profile, replace(plan, client_id=client.client_id), client) for client in cohort]
    return required(plans, cohort, "everything", "'exclusive' or 'straggler'") if participation == "all" else plans


def required(
    entries: list[Plan | LeftOut], cohort: Sequence[ClientProfile], what: str, instead: str
) -> list[Plan | LeftOut]:
    """The entries, where all clients are asked to train the same and none is left out for its budget.

    Whoever was found to have less than it said is left out; a budget that is too small is a recipe's error.

    Args:
        entries: Of the cohort, in its order.
        cohort: The round's clients.
        what: They are asked to train.
        instead: Other values of ``participation``, for the message.

    Raises:
        PlanError: A client is left out that never ran out of memory.
    """
    for entry, client in zip(entries, cohort, strict=True):
        if isinstance(entry, LeftOut) and client.margin == 1.0:
            raise PlanError(
                f"client {entry.client_id} must train {what} with participation 'all', but {entry.reason}; "
                f"raise its budget, or choose participation {instead}"
            )
    return entries


def straggler_blocks(
    profile: MemoryProfile, spec: ModelSpec, rank: int, budget_bytes: int | None, factors: Factors = "AB"
) -> Sequence[int]:
    """The deepest blocks that fit the budget; the last one alone where none does, so that who lacks it is left out.

    Raises:
        PlanError: There is no budget.
    """
    if budget_bytes is None:
        raise PlanError("budget_bytes must be the population's smallest budget for participation 'straggler'")
    for first in range(spec.num_blocks):
        blocks = range(first, spec.num_blocks)
        if memory.peak_bytes(profile, train_blocks(spec, -1, rank, blocks, factors)) <= budget_bytes:
            return blocks
    return blocks


def largest_suffixes(
    profile: MemoryProfile,
    cohort: Sequence[ClientProfile],
    spec: ModelSpec,
    attachment: Attachment,
    checkpointing: bool = False,
    participation: Literal["all", "exclusive", "suffix"] = "suffix",
) -> list[Plan | LeftOut]:
    """For each client the deepest blocks in which it can train an attachment, with all of it that lies in no block.

    Of plans that train the same, whole batches come before small ones and these before recomputed blocks. With another
    participation than ``suffix`` every block counts or none.

    Raises:
        PlanError: ``all``, and a client cannot train every block.
    """
    plans = [
        plan
        for size in profile.sizes
        for plan in memory.candidates(spec, attachment, profile.batch, size, checkpointing)
    ]

    def order(plan: Plan) -> tuple[int, int, int]:
        return -len(plan.trainable), len(plan.checkpointed), -(plan.micro_batch or profile.batch)

    if participation != "suffix":
        most = max(len(plan.trainable) for plan in plans)
        plans = [plan for plan in plans if len(plan.trainable) == most]
    entries = first_that_fits(profile, sorted(plans, key=order), cohort)
    return required(entries, cohort, "every block", "'suffix'") if participation == "all" else entries


def first_that_fits(
    profile: MemoryProfile, plans: Sequence[Plan], cohort: Sequence[ClientProfile]
) -> list[Plan | LeftOut]:
    """For each client the first of the plans that fits it, or why the last does not; each plan is priced once."""
    prices = [(plan, memory.peak_bytes(profile, plan), memory.seconds(profile, plan, 1.0, 1)) for plan in plans]

    def entry(client: ClientProfile) -> Plan | LeftOut:
        for plan, peak, flops in prices:
            seconds = None if client.flops_per_second is None else client.num_steps * flops / client.flops_per_second
            own = replace(plan, client_id=client.client_id, peak_bytes=peak, seconds=seconds)
            if fits(own, client):
                return own
        return left_out(client, own)

    return [entry(client) for client in cohort]


def check_ranks(r_min: int, r_max: int) -> None:
    """Refuses bounds of clients' ranks that hold none.

    Raises:
        PlanError: As said.
    """
    if not 1 <= r_min <= r_max:
        raise PlanError(f"r_min must lie in 1..r_max, got {r_min} with r_max {r_max}; swap or raise them")


def largest_rank(
    profile: MemoryProfile, spec: ModelSpec, client: ClientProfile, ranks: Sequence[int], factors: Factors = "AB"
) -> Plan | LeftOut:
    """All modules trained at the largest of the ranks that fits; costs grow with the rank, so bisection finds it."""
    ordered = sorted(set(ranks))
    plans: dict[int, Plan] = {}

    def fitting(rank: int) -> bool:
        plans[rank] = priced(profile, train_all(spec, client.client_id, rank, factors), client)
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
        solver: ``exact``, ``additive``, a sampler, or one that does not look at values.
        checkpointing: Whether the exact solver may recompute blocks.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int
    ranks: tuple[int, ...]
    rank_exponent: float = 0.5
    solver: Solver | Sampler = "exact"
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
            case "weighted":
                # Worth the number of blocks: of two micro-batches the one is taken that lets more of them train.
                weights, counted = values.max(axis=1), (values > 0).astype(np.float64)
                return allocation.weighted_subset(table, budget, weights, rng, values=counted, max_flops=limit)
            case "ranked":
                order = np.lexsort((-np.arange(len(values)), -values.max(axis=1))).tolist()  # of equals the highest
                return allocation.in_order(table, budget, order, values=values, max_flops=limit)
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


def scoring(
    profile: MemoryProfile,
    spec: ModelSpec,
    entries: Sequence[Plan | LeftOut],
    cohort: Sequence[ClientProfile],
    num_scored: int,
) -> list[Plan | LeftOut]:
    """The cohort's plans, which also score the deepest blocks that they can within each client's budget and deadline.

    Scoring runs as training does: in the plan's micro-batches, and recomputing what it recomputes. Its time comes on
    top of the training's. Where not even the last block can be scored, a plan is what it was.

    Args:
        profile: Costs.
        spec: The model.
        entries: Of the cohort, in its order; the plans hold every pair.
        cohort: The round's clients.
        num_scored: Examples that are scored on, where a client has as many.
    """

    def scored(plan: Plan, client: ClientProfile) -> Plan:
        for first in range(spec.num_blocks):
            names = frozenset(lora.names(lora.blocks_modules(spec, range(first, spec.num_blocks))))
            more = priced(profile, replace(plan, scored=names), client, num_scored)
            if fits(more, client):
                return more
        return plan

    return [
        scored(entry, client) if isinstance(entry, Plan) else entry
        for entry, client in zip(entries, cohort, strict=True)
    ]


MOST_SEQUENCES = 256
"""Subsets of one size that are priced; only blocks of several structures in mixed order can have more that differ."""


@dataclass(frozen=True)
class ShallowModels:
    """Models of some blocks alone, all of them trained: which a client can afford, and a draw among them.

    Attributes:
        spec: The model.
        profile: Its costs.
        rank: Of every pair.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int

    def random_subset(self, client: ClientProfile, rng: np.random.Generator) -> Plan | LeftOut:
        """A priced plan of as many blocks as the client has capacity for, each subset of them as likely.

        Of two micro-batches that allow as many blocks the larger is taken.
        """
        count, micro_batch = max((self.capacity(client, size), size) for size in self.profile.micro)
        if not count:
            return left_out(client, self._smallest(client))
        while True:
            blocks = sorted(rng.choice(self.spec.num_blocks, size=count, replace=False).tolist())
            plan = priced(self.profile, self.plan(client.client_id, blocks, micro_batch), client)
            if fits(plan, client):
                return plan
            count -= 1  # only where `MOST_SEQUENCES` hid the worst subset; of single blocks none is hidden

    def capacity(self, client: ClientProfile, micro_batch: int) -> int:
        """The largest number of blocks of which every subset keeps the client's budget and deadline; 0 for none."""
        counts = range(self.spec.num_blocks, 0, -1)
        return next((count for count in counts if fits(self._limit(client, micro_batch, count), client)), 0)

    def plan(self, client_id: int, blocks: Sequence[int], micro_batch: int) -> Plan:
        """The blocks alone, ascending, with their pairs and the head trained."""
        modules = lora.blocks_modules(self.spec, blocks)
        ranks = dict.fromkeys(modules, self.rank)
        whole = micro_batch == max(self.profile.micro)
        plan = Plan(client_id, ranks, trainable(self.spec, modules), blocks=tuple(blocks))
        return replace(plan, micro_batch=None if whole else micro_batch)

    def _smallest(self, client: ClientProfile) -> Plan:
        """What the client would need for any one block."""
        limits = [self._limit(client, size, 1) for size in self.profile.micro]
        return min(limits, key=lambda plan: plan.peak_bytes or 0)

    def _limit(self, client: ClientProfile, micro_batch: int, count: int) -> Plan:
        """Highest peak and longest time of all subsets of this many blocks, as if of one plan."""
        peak, flops = self._worst[micro_batch, count]
        seconds = None if client.flops_per_second is None else client.num_steps * flops / client.flops_per_second
        return Plan(client.client_id, {}, frozenset(), peak_bytes=peak, seconds=seconds)

    @cached_property
    def _worst(self) -> Mapping[tuple[int, int], tuple[int, float]]:
        """(micro-batch, number of blocks) -> highest peak and most operations of a step of such a subset.

        Blocks of one group behave alike, so one subset of each sequence of groups stands for all.
        """
        kinds = tuple(zip(self.profile.groups, self.profile.block_bytes, strict=True))
        worst: dict[tuple[int, int], tuple[int, float]] = {}
        for size, count in itertools.product(self.profile.micro, range(1, self.spec.num_blocks + 1)):
            subsets = itertools.islice(unlike_subsets(kinds, count), MOST_SEQUENCES)
            plans = [self.plan(-1, blocks, size) for blocks in subsets]
            peaks = [memory.peak_bytes(self.profile, plan) for plan in plans]
            worst[size, count] = max(peaks), max(memory.seconds(self.profile, plan, 1.0, 1) for plan in plans)
        return worst


def unlike_subsets(kinds: Sequence[Hashable], count: int, first: int = 0) -> Iterator[tuple[int, ...]]:
    """One subset, ascending, for each sequence of kinds that a subset of this size can have.

    >>> list(unlike_subsets("aaab", 2))
    [(0, 1), (0, 3)]
    """
    if not count:
        yield ()
        return
    lowest = {kinds[block]: block for block in range(len(kinds) - count, first - 1, -1)}
    for block in sorted(lowest.values()):
        yield from ((block, *rest) for rest in unlike_subsets(kinds, count - 1, block + 1))
