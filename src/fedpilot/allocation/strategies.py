"""Ways to choose that are not the optimum: the paper's additive knapsack, and baselines that ignore values."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedpilot.allocation.costs import Allocation, flops, peak
from fedpilot.allocation.exact import UNLIMITED, allocate
from fedpilot.types import BlockCosts, Choice, CostTable


def smallest_budget(table: CostTable, *, max_flops: float | None = None) -> Allocation | None:
    """The plan of the smallest peak, which is the smallest budget with which a client can take part.

    The optimum of all-zero values, for ties go to less memory. ``None`` where no plan meets the deadline.
    """
    return allocate(table, np.zeros(table.above.saved.shape), UNLIMITED, max_flops=max_flops)


def suffix(
    table: CostTable,
    budget_bytes: int,
    *,
    values: npt.ArrayLike | None = None,
    max_flops: float | None = None,
) -> Allocation | None:
    """The longest run of deepest blocks that fits, plain, at the largest rank at which it does."""
    num_blocks = len(table.frozen_resident)
    for first in range(num_blocks):
        for choice in _plain(table):
            found = _fitting(table, [None] * first + [choice] * (num_blocks - first), budget_bytes, values, max_flops)
            if found is not None:
                return found
    return None


def random_subset(
    table: CostTable,
    budget_bytes: int,
    rng: np.random.Generator,
    *,
    values: npt.ArrayLike | None = None,
    max_flops: float | None = None,
) -> Allocation | None:
    """Blocks in random order, each taken if it still fits, plain, at the largest rank at which any block fits."""
    num_blocks = len(table.frozen_resident)
    order = rng.permutation(num_blocks)
    for choice in _plain(table):
        chosen: frozenset[int] = frozenset()
        held: Allocation | None = None
        for block in order:
            with_it = chosen | {int(block)}
            found = _fitting(table, _trained(table, with_it, choice), budget_bytes, values, max_flops)
            if found is not None:
                chosen, held = with_it, found
        if held is not None:
            return held
    return None


def everything(
    table: CostTable,
    budget_bytes: int,
    *,
    values: npt.ArrayLike | None = None,
    max_flops: float | None = None,
) -> Allocation | None:
    """All blocks, plain, at the largest rank; or nothing."""
    choice = _plain(table)[0]
    return _fitting(table, [choice] * len(table.frozen_resident), budget_bytes, values, max_flops)


def everything_checkpointed(
    table: CostTable,
    budget_bytes: int,
    *,
    values: npt.ArrayLike | None = None,
    max_flops: float | None = None,
) -> Allocation | None:
    """All blocks, each recomputed, at the largest rank; or nothing."""
    choice = replace(_plain(table)[0], checkpointed=True)
    return _fitting(table, [choice] * len(table.frozen_resident), budget_bytes, values, max_flops)


def additive(
    table: CostTable, values: npt.ArrayLike, budget_bytes: int, *, max_flops: float | None = None
) -> Allocation | None:
    """The paper's literal knapsack: a block costs what it would cost if it alone were trained; costs are summed.

    What comes out is checked against the true peak and the deadline; as long as it keeps one of them not, its lowest
    block is given up.
    """
    found = allocate(_stand_alone(table), values, budget_bytes)
    blocks = () if found is None else found.trained_blocks
    while blocks and found is not None:
        ranks = {j: choice for j, choice in enumerate(found.choices) if choice is not None}
        choices = [
            None if j < blocks[0] else ranks[j] if j in blocks else Choice(None)
            for j in range(len(table.frozen_resident))
        ]
        true = _fitting(table, choices, budget_bytes, values, max_flops)
        if true is not None:
            return true
        blocks = blocks[1:]
    return None


def _plain(table: CostTable) -> list[Choice]:
    """Choices that train without recomputing, largest rank first."""
    ranks = {choice.rank for choice in table.choices if choice.rank is not None}
    return [Choice(rank) for rank in sorted(ranks, reverse=True)]


def _trained(table: CostTable, blocks: frozenset[int], choice: Choice) -> list[Choice | None]:
    """The blocks trained, those above the lowest of them passed through."""
    return [
        None if j < min(blocks) else choice if j in blocks else Choice(None) for j in range(len(table.frozen_resident))
    ]


def _fitting(
    table: CostTable,
    choices: Sequence[Choice | None],
    budget_bytes: int,
    values: npt.ArrayLike | None,
    max_flops: float | None,
) -> Allocation | None:
    """The choices as an allocation where they keep budget and deadline."""
    bytes_, operations = peak(table, choices), flops(table, choices)
    if bytes_ > budget_bytes or (max_flops is not None and operations > max_flops):
        return None
    array = np.zeros(table.above.saved.shape) if values is None else np.asarray(values, dtype=np.float64)
    value = sum(float(array[j, table.choices.index(c)]) for j, c in enumerate(choices) if c is not None)
    return Allocation(tuple(choices), value, bytes_, operations)


def _stand_alone(table: CostTable) -> CostTable:
    """A table whose peak is the sum of stand-alone costs above a model that trains nothing."""
    num_blocks, num_choices = table.above.saved.shape
    idle = table.fixed + int(table.frozen_resident.sum())
    costs = np.zeros((num_blocks, num_choices), dtype=np.int64)
    for index, choice in enumerate(table.choices):
        if choice.checkpointed:
            costs[:, index] = UNLIMITED // num_blocks  # the paper knows no recomputation
        elif choice.rank is not None:
            alone = [peak(table, _trained(table, frozenset([j]), choice)) for j in range(num_blocks)]
            costs[:, index] = np.array(alone) - idle
    zeros, none = np.zeros_like(costs), np.zeros(num_blocks, dtype=np.int64)
    blocks = BlockCosts(costs, zeros, zeros, zeros, zeros, zeros, zeros)
    return CostTable(table.choices, blocks, blocks, none, none, none, idle, 0, 0, 0, 0)
