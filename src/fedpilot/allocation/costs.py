"""The cost of a plan: the peak of ``CostTable`` written out, and the table as stacked arrays for the search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from fedpilot.errors import PlanError
from fedpilot.types import BlockCosts, Choice, CostTable

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

NEVER = -(2**60)
"""Stands for a stage that does not exist: below every cost, and sums of a few do not overflow."""


@dataclass(frozen=True)
class Allocation:
    """What one client trains.

    Attributes:
        choices: For each block its choice; ``None`` for the blocks below the lowest trained one.
        value: Sum of the values of the choices.
        peak_bytes: Peak of a training step.
        flops: Floating-point operations of a training step.
        gap: By at most so much another plan that fits can be worth more; 0 where it is proved that none is.
    """

    choices: tuple[Choice | None, ...]
    value: float
    peak_bytes: int
    flops: int
    gap: float = 0.0

    @property
    def trained_blocks(self) -> tuple[int, ...]:
        """Blocks that are trained, ascending."""
        return tuple(j for j, choice in enumerate(self.choices) if choice is not None and choice.rank is not None)

    @property
    def lowest(self) -> int:
        """The lowest trained block."""
        return self.trained_blocks[0]


@dataclass(frozen=True)
class Costs:
    """A cost table, checked and stacked; axis 0 is 0 for ``above`` and 1 for ``lowest``: (2, num_blocks, num_choices).

    Attributes:
        trains: (num_choices,) whether the choice trains.
        recomputes: (num_choices,) whether it is checkpointed.
        frozen_resident: (num_blocks + 1,) sum over the blocks below.
        frozen_flops: (num_blocks + 1,) sum over the blocks below.
        frozen_forward: (num_blocks + 1,) largest of the blocks below.
    """

    table: CostTable
    resident: Ints
    saved: Ints
    forward: Ints
    backward: Ints
    gradient: Ints
    optimiser: Ints
    flops: Ints
    trains: Bools
    recomputes: Bools
    frozen_resident: Ints
    frozen_flops: Ints
    frozen_forward: Ints

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return int(self.resident.shape[1])

    @property
    def num_choices(self) -> int:
        """Number of choices."""
        return int(self.resident.shape[2])


def stack(table: CostTable) -> Costs:
    """The table's arrays, stacked.

    Raises:
        PlanError: Shapes contradict each other, costs are not whole numbers below 2**52, or no choice trains.
    """
    shape = (len(table.frozen_resident), len(table.choices))
    for where, costs in (("above", table.above), ("lowest", table.lowest)):
        for field in fields(BlockCosts):
            _check(f"{where}.{field.name}", getattr(costs, field.name), shape)
    for name in ("frozen_resident", "frozen_forward_peak", "frozen_flops"):
        _check(name, getattr(table, name), shape[:1])
    trains = np.array([choice.rank is not None for choice in table.choices], dtype=np.bool_)
    if not trains.any():
        raise PlanError(f"a cost table must have a choice that trains, got {table.choices}; give it a rank")

    def both(name: str) -> Ints:
        return np.stack([getattr(table.above, name), getattr(table.lowest, name)]).astype(np.int64)

    return Costs(
        table=table,
        resident=both("resident"),
        saved=both("saved"),
        forward=both("forward_peak"),
        backward=both("backward_peak"),
        gradient=both("gradient"),
        optimiser=both("optimiser_peak"),
        flops=both("flops"),
        trains=trains,
        recomputes=np.array([choice.checkpointed for choice in table.choices], dtype=np.bool_),
        frozen_resident=np.concatenate([[0], np.cumsum(table.frozen_resident)]).astype(np.int64),
        frozen_flops=np.concatenate([[0], np.cumsum(table.frozen_flops)]).astype(np.int64),
        frozen_forward=np.concatenate([[NEVER], np.maximum.accumulate(table.frozen_forward_peak)]).astype(np.int64),
    )


def _check(name: str, array: npt.NDArray[np.int64], shape: tuple[int, ...]) -> None:
    if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        raise PlanError(
            f"{name} of a cost table must be whole numbers of shape {shape}, got {array.dtype} of shape "
            f"{array.shape}; build the table with memory.cost_table"
        )
    if np.abs(array).max() >= 2**52:
        raise PlanError(f"{name} of a cost table must be below 2**52, got {np.abs(array).max()}; it is one step's cost")


def peak(table: CostTable, choices: Sequence[Choice | None]) -> int:
    """Peak bytes of a training step: the formula of ``CostTable``, stage by stage.

    Args:
        table: Costs.
        choices: One for each block; ``None`` for the blocks below the lowest trained one.

    Raises:
        PlanError: The choices are not a plan of this table.
    """
    s, blocks, picked = _locate(table, choices)

    def cost(name: str) -> Ints:
        above, lowest = getattr(table.above, name)[blocks, picked], getattr(table.lowest, name)[blocks, picked]
        return np.asarray(np.where(blocks == s, lowest, above), dtype=np.int64)

    saved, gradient = cost("saved"), cost("gradient")
    saved_with, gradient_with = np.cumsum(saved), np.cumsum(gradient[::-1])[::-1]  # this block included
    stages = [
        *table.frozen_forward_peak[:s],
        *(saved_with - saved + cost("forward_peak")),
        saved.sum() + table.head_peak,
        *(saved_with + table.head_gradient + gradient_with - gradient + cost("backward_peak")),
        table.head_gradient + gradient.sum() + max(cost("optimiser_peak").max(), table.head_optimiser_peak),
    ]
    standing = table.fixed + table.frozen_resident[:s].sum() + cost("resident").sum()
    return int(standing + max(stages))


def flops(table: CostTable, choices: Sequence[Choice | None]) -> int:
    """Floating-point operations of a training step; arguments and errors as for ``peak``."""
    s, blocks, picked = _locate(table, choices)
    costs = np.where(blocks == s, table.lowest.flops[blocks, picked], table.above.flops[blocks, picked])
    return int(table.head_flops + table.frozen_flops[:s].sum() + costs.sum())


def _locate(table: CostTable, choices: Sequence[Choice | None]) -> tuple[int, Ints, Ints]:
    """The lowest trained block; the blocks from there on; the index of each one's choice."""
    num_blocks = len(table.frozen_resident)
    s = next((j for j, choice in enumerate(choices) if choice is not None), num_blocks)
    above = [choice for choice in choices[s:] if choice in table.choices and choice is not None]
    if len(choices) != num_blocks or not above or above[0].rank is None or len(above) != num_blocks - s:
        raise PlanError(
            f"choices must be None below the lowest trained block, a choice that trains there and choices of the table "
            f"above it, {num_blocks} in all, got {tuple(choices)}; take them from an Allocation of the same table"
        )
    picked = np.array([table.choices.index(choice) for choice in above], dtype=np.int64)
    return s, np.arange(s, num_blocks, dtype=np.int64), picked


def choice_values(table: CostTable, block_values: npt.ArrayLike, rank_weights: Mapping[int, float]) -> Floats:
    """Values of choices from values of blocks: block value times the weight of the rank; 0 for passing through.

    Args:
        table: Costs, for the meaning of the choices.
        block_values: (..., num_blocks).
        rank_weights: Rank -> weight; must name every rank of the table.

    Returns:
        (..., num_blocks, num_choices).
    """
    ranks = [choice.rank for choice in table.choices]
    missing = {rank for rank in ranks if rank is not None} - set(rank_weights)
    if missing:
        raise PlanError(f"rank_weights must name every rank of the table, got none for {sorted(missing)}; add them")
    weights = np.array([0.0 if rank is None else rank_weights[rank] for rank in ranks])
    return np.asarray(np.asarray(block_values, dtype=np.float64)[..., None] * weights)
