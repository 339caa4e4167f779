"""Which blocks a client trains, at which rank, and which it checkpoints: the best that budget and deadline allow.

``allocate`` and ``allocate_many`` are exact under the cost of ``CostTable``, which is not additive over blocks. The
path from a table to a plan: ``costs`` (the formula), ``bounds`` (upper bounds, by lowest block and number of
checkpointed ones), ``multipliers`` (tighter ones), ``search`` (the recursion, and why it is exact), ``solve`` (the
order of work). ``strategies`` has the baselines and sampling by weight, ``weights`` Fed-HeLLo's weights.

    >>> import numpy as np
    >>> from fedpilot.allocation import allocate
    >>> from fedpilot.types import BlockCosts, Choice, CostTable
    >>> saved = np.array([[4, 5]] * 3)  # a block that is passed through saves 4 bytes, a trained one 5
    >>> none, nothing = np.zeros_like(saved), np.zeros(3, dtype=np.int64)
    >>> costs = BlockCosts(none, saved, none, none, none, none, none)
    >>> table = CostTable((Choice(None), Choice(8)), costs, costs, nothing, nothing, nothing, 100, 0, 0, 0, 0)
    >>> plan = allocate(table, [[0, 9], [0, 1], [0, 3]], 114)
    >>> plan.trained_blocks, plan.value, plan.peak_bytes
    ((0, 2), 12.0, 114)
"""

from fedpilot.allocation.costs import Allocation, choice_values, flops, peak
from fedpilot.allocation.exact import allocate, allocate_many, allocate_micro_batches, smallest_budget
from fedpilot.allocation.strategies import (
    additive,
    everything,
    everything_checkpointed,
    in_order,
    random_subset,
    suffix,
    weighted_subset,
)
from fedpilot.allocation.weights import Shape, cluster_weights, shape_weights, three_means

__all__ = [
    "Allocation",
    "Shape",
    "additive",
    "allocate",
    "allocate_many",
    "allocate_micro_batches",
    "choice_values",
    "cluster_weights",
    "everything",
    "everything_checkpointed",
    "flops",
    "in_order",
    "peak",
    "random_subset",
    "shape_weights",
    "smallest_budget",
    "suffix",
    "three_means",
    "weighted_subset",
]
