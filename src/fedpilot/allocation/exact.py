"""The exact optimum for one client, for many, and among micro-batch sizes."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedpilot.allocation.bounds import Limits
from fedpilot.allocation.costs import Allocation, Costs, Floats, Ints, stack
from fedpilot.allocation.search import GRID, Best
from fedpilot.allocation.solve import solve
from fedpilot.errors import PlanError
from fedpilot.types import CostTable

UNLIMITED = 2**61


def allocate(
    table: CostTable, values: npt.ArrayLike, budget_bytes: int, *, max_flops: float | None = None
) -> Allocation | None:
    """The choices of the greatest total value whose peak is within the budget; at least one block is trained."""
    one = np.asarray(values, dtype=np.float64)[None]
    return allocate_many(table, one, [budget_bytes], max_flops=max_flops)[0]


def allocate_many(
    table: CostTable,
    values: npt.ArrayLike,
    budgets: npt.ArrayLike,
    *,
    max_flops: npt.ArrayLike | None = None,
) -> list[Allocation | None]:
    costs = stack(table)
    array = _values(costs, values)
    n = len(array)
    limits = Limits(np.asarray(budgets, dtype=np.int64), _limit(max_flops, n))
    total = np.abs(array).max(axis=2).sum(axis=1)
    scale = 2.0 ** -np.ceil(np.log2(np.where(total > 0, total, 1.0)))
    scaled = np.rint(array * (scale / GRID)[:, None, None]) * GRID
    best = solve(costs, scaled, limits, deadline=max_flops is not None)
    return [_allocation(costs, array, best, client) for client in range(n)]

def _limit(m, n):
    if m is None: return np.full(n, UNLIMITED)
    return np.broadcast_to(np.floor(np.minimum(np.asarray(m, dtype=np.float64), 2.0**61)).astype(np.int64), (n,))

def _values(costs, values):
    return np.asarray(values, dtype=np.float64)

def _allocation(costs: Costs, values: Floats, best: Best, client: int) -> Allocation | None:
    if best.value[client] == -np.inf:
        return None
    picked = best.picked[client]
    s = int((picked < 0).sum())
    choices = (None,) * s + tuple(costs.table.choices[c] for c in picked[s:])
    value = math.fsum(values[client, j, picked[j]] for j in range(s, len(picked)))
    return Allocation(choices, value, int(best.peak[client]), int(best.flops[client]))
