"""Other ways to choose blocks: the additive knapsack, baselines that ignore the values, and sampling by weight."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedpilot.allocation.costs import Allocation, flops, peak, stack
from fedpilot.allocation.exact import allocate
from fedpilot.errors import PlanError
from fedpilot.types import BlockCosts, Choice, CostTable

PASSED = Choice(rank=None)


def additive(
    table: CostTable, values: npt.ArrayLike, budget_bytes: float, *, max_flops: float | None = None
) -> Allocation | None:
    """The literal additive knapsack: a block costs what it would if it alone were trained, and costs are summed.

    Every block's stand-alone cost holds the activations of all blocks above it, so a sum counts them many times: what
    this chooses fits with room to spare, and few blocks are chosen. Plain choices only; operations add up likewise.

    Args:
        table: Costs; has the choice to pass through plainly.
        values: (num_blocks, num_choices).
        budget_bytes: The peak may not exceed it.
        max_flops: The step's operations may not exceed it.

    Returns:
        The plan with its true peak and operations, checked against the limits; ``None`` where the knapsack is empty.
    """
    alone = _stand_alone(table)
    found = allocate(alone, np.where(_unusable(table), 0.0, np.asarray(values)), budget_bytes, max_flops=max_flops)
    if found is None:
        return None
    choices = list(found.choices)
    return _fitting(table, choices, budget_bytes, values, max_flops)


def suffix(
    table: CostTable, budget_bytes: float, *, values: npt.ArrayLike | None = None, max_flops: float | None = None
) -> Allocation | None:
    """The longest run of blocks from the top that fits, plain, all at the largest rank with which it does."""
    num_blocks, ranks = len(table.frozen_resident), _ranks(table)
    for s in range(num_blocks):
        for rank in ranks:
            choices = [None] * s + [Choice(rank)] * (num_blocks - s)
            found = _fitting(table, choices, budget_bytes, values, max_flops)
            if found is not None:
                return found
    return None


def random_subset(
    table: CostTable,
    budget_bytes: float,
    rng: np.random.Generator,
    *,
    values: npt.ArrayLike | None = None,
    max_flops: float | None = None,
) -> Allocation | None:
    """Blocks in random order, each trained plainly at the largest rank with which all so far fit, or left out."""
    order = rng.permutation(len(table.frozen_resident)).tolist()
    return in_order(table, budget_bytes, order, values=values, max_flops=max_flops)


def weighted_subset(
    table: CostTable,
    budget_bytes: float,
    weights: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    values: npt.ArrayLike | None = None,
    max_flops: float | None = None,
) -> Allocation | None:
    """Blocks drawn one after the other without replacement, in proportion to weights; each is kept if it still fits.

    Args:
        table: Costs; has the choice to pass through plainly.
        budget_bytes: The peak may not exceed it.
        weights: (num_blocks,) positive; only their ratios count.
        rng: Of the draw; the same number of draws whatever the budget.
        values: (num_blocks, num_choices), for the allocation's value alone.
        max_flops: The step's operations may not exceed it.

    Raises:
        PlanError: Weights are not positive and finite, one a block.
    """
    shape, array = table.frozen_resident.shape, np.asarray(weights, dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all() or not (array > 0).all():
        raise PlanError(f"weights must be {shape[0]} positive finite numbers, one a block, got {array}; give each one")
    # Of exponential waiting times at these rates the shortest is each block's with probability w / sum of w, and so on
    # among the rest: the order of arrival is that of draws without replacement.
    arrivals = rng.exponential(size=shape) / array
    return in_order(table, budget_bytes, np.argsort(arrivals).tolist(), values=values, max_flops=max_flops)


def in_order(
    table: CostTable,
    budget_bytes: float,
    order: Sequence[int],
    *,
    values: npt.ArrayLike | None = None,
    max_flops: float | None = None,
) -> Allocation | None:
    """Blocks in the given order, each trained plainly at the largest rank with which all so far fit, or left out."""
    num_blocks, ranks = len(table.frozen_resident), _ranks(table)
    trained: dict[int, Choice] = {}
    found: Allocation | None = None
    for block in order:
        for rank in ranks:
            choices = _plan(num_blocks, trained | {block: Choice(rank)})
            fitting = _fitting(table, choices, budget_bytes, values, max_flops)
            if fitting is not None:
                trained[block], found = Choice(rank), fitting
                break
    return found


def everything(
    table: CostTable, budget_bytes: float, *, values: npt.ArrayLike | None = None, max_flops: float | None = None
) -> Allocation | None:
    """All blocks at the largest rank, plain, or nothing."""
    choices = [Choice(_ranks(table)[0])] * len(table.frozen_resident)
    return _fitting(table, choices, budget_bytes, values, max_flops)


def everything_checkpointed(
    table: CostTable, budget_bytes: float, *, values: npt.ArrayLike | None = None, max_flops: float | None = None
) -> Allocation | None:
    """All blocks at the largest rank, every one of them checkpointed, or nothing."""
    choices = [Choice(_ranks(table, checkpointed=True)[0], checkpointed=True)] * len(table.frozen_resident)
    return _fitting(table, choices, budget_bytes, values, max_flops)


def _fitting(
    table: CostTable,
    choices: Sequence[Choice | None],
    budget_bytes: float,
    values: npt.ArrayLike | None,
    max_flops: float | None,
) -> Allocation | None:
    needed, operations = peak(table, choices), flops(table, choices)
    if not budget_bytes >= 0 or (max_flops is not None and not max_flops >= 0):
        raise PlanError(
            f"budget_bytes and max_flops must be at least 0, got {budget_bytes} and {max_flops}; correct them"
        )
    if needed > budget_bytes or (max_flops is not None and operations > max_flops):
        return None
    shape = (len(choices), len(table.choices))
    array = np.zeros(shape) if values is None else np.asarray(values, dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise PlanError(f"values must be finite and of shape {shape}, got shape {array.shape}; use choice_values")
    worth = [array[j, table.choices.index(choice)] for j, choice in enumerate(choices) if choice is not None]
    return Allocation(tuple(choices), math.fsum(worth), needed, operations)


def _plan(num_blocks: int, trained: dict[int, Choice]) -> list[Choice | None]:
    return [None if block < min(trained) else trained.get(block, PASSED) for block in range(num_blocks)]


def _ranks(table: CostTable, *, checkpointed: bool = False) -> list[int]:
    """Ranks of the table's choices of one kind, the largest first."""
    ranks = [choice.rank for choice in table.choices if choice.rank is not None and choice.checkpointed == checkpointed]
    kind = "checkpointed" if checkpointed else "plain"
    if not ranks:
        raise PlanError(f"the cost table must have a {kind} choice that trains, got {table.choices}; build it with one")
    if not checkpointed and PASSED not in table.choices:
        raise PlanError(f"the cost table must have the choice {PASSED}, got {table.choices}; build it with one")
    return sorted(ranks, reverse=True)


def _unusable(table: CostTable) -> npt.NDArray[np.bool_]:
    return np.array([choice.checkpointed or choice.rank is None for choice in table.choices])


def _stand_alone(table: CostTable) -> CostTable:
    """A table in which a plan's peak and operations are base plus the sum of stand-alone costs above the base.

    The base is what stands with all blocks frozen. Only resident bytes and operations are not zero.
    """
    costs, ranks = stack(table), _ranks(table)
    num_blocks, num_choices = costs.num_blocks, costs.num_choices
    base, base_flops = table.fixed + int(costs.frozen_resident[-1]), table.head_flops + int(costs.frozen_flops[-1])
    resident = np.zeros((num_blocks, num_choices), dtype=np.int64)
    operations = np.zeros_like(resident)
    for rank in ranks:
        at = table.choices.index(Choice(rank))
        for block in range(num_blocks):
            alone = _plan(num_blocks, {block: Choice(rank)})
            resident[block, at] = peak(table, alone) - base
            operations[block, at] = flops(table, alone) - base_flops
    checkpointed = costs.recomputes
    resident[:, checkpointed] = 2**51  # cannot be afforded
    none, nothing = np.zeros_like(resident), np.zeros(num_blocks, dtype=np.int64)
    block_costs = BlockCosts(resident, none, none, none, none, none, operations)
    summed = replace(table, above=block_costs, lowest=block_costs, fixed=base, head_flops=base_flops)
    summed = replace(summed, frozen_resident=nothing, frozen_forward_peak=nothing, frozen_flops=nothing)
    return replace(summed, head_peak=0, head_gradient=0, head_optimiser_peak=0)
