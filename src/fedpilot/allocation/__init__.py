"""Who trains which blocks: the exact optimum under the true cost of memory, and other strategies beside it."""

from fedpilot.allocation.costs import Allocation, choice_values, flops, peak
from fedpilot.allocation.exact import allocate, allocate_many
from fedpilot.allocation.strategies import (
    additive,
    everything,
    everything_checkpointed,
    random_subset,
    smallest_budget,
    suffix,
)

__all__ = [
    "Allocation",
    "additive",
    "allocate",
    "allocate_many",
    "choice_values",
    "everything",
    "everything_checkpointed",
    "flops",
    "peak",
    "random_subset",
    "smallest_budget",
    "suffix",
]
