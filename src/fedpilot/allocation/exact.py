"""The exact optimum: for one client, for many, among micro-batch sizes; and the smallest budget that allows a plan."""

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

UNLIMITED = 2**60


def allocate(
    table: CostTable, values: npt.ArrayLike, budget_bytes: float, *, max_flops: float | None = None
) -> Allocation | None:
    """The plan of the greatest value that fits one client; see ``allocate_many``.

    Args:
        table: Costs.
        values: (num_blocks, num_choices) value of each choice; 0 for the choices that do not train.
        budget_bytes: The peak may not exceed it.
        max_flops: The step's operations may not exceed it: deadline times speed by the number of steps.

    Returns:
        The plan, or ``None`` where no plan that trains at least one block fits.

    Raises:
        PlanError: As ``allocate_many``.
    """
    one = np.asarray(values, dtype=np.float64)[None]
    return allocate_many(table, one, [budget_bytes], max_flops=max_flops)[0]


def allocate_many(
    table: CostTable,
    values: npt.ArrayLike,
    budgets: npt.ArrayLike,
    *,
    max_flops: npt.ArrayLike | None = None,
) -> list[Allocation | None]:
    """The plan of the greatest value that fits, for each of many clients that share a cost table.

    A plan is a lowest trained block, a choice that trains for it, and any choice for each block above it. Of plans of
    the same value the one of the lowest peak is taken; of those, always the same one for the same call. What it trains
    is then computed with as few operations as the limits allow: no block is recomputed that need not be. Values are
    compared after rounding to a grid of 2**-36 (1.5e-11) of their possible sum or finer, so that ties are exact.

    The plan is the optimum wherever its ``gap`` is 0, which is so for blocks of equal costs. Where every block costs
    something else and memory and a deadline bind at once, the search is now and then given up after some seconds a
    client; ``gap`` then bounds what was missed. The lowest peak among equal values is given up earlier.

    Args:
        table: Costs.
        values: (num_clients, num_blocks, num_choices) value of each choice; 0 for the choices that do not train.
        budgets: (num_clients,) bytes that the peak may not exceed.
        max_flops: One number or (num_clients,); the step's operations may not exceed it.

    Returns:
        One plan a client; ``None`` where no plan that trains at least one block fits.

    Raises:
        PlanError: Shapes do not match, or a value, a budget or a limit is not a number or negative where it may not be.
    """
    costs = stack(table)
    array = _values(costs, values)
    limits = Limits(
        _limit("budgets", budgets, len(array), one_each=True),
        _flops_limits(max_flops, len(array)),
    )
    scaled, exponent = _on_grid(array)
    best = solve(costs, scaled, limits, deadline=max_flops is not None)
    _hasten(costs, scaled, limits, best, deadline=max_flops is not None)
    missed = np.zeros(len(array))
    np.subtract(best.bound, best.value, out=missed, where=best.bound > best.value)
    gaps = np.ldexp(missed, exponent).tolist()
    return [_allocation(costs, array, best, client, gap) for client, gap in enumerate(gaps)]


def allocate_micro_batches(
    tables: Sequence[tuple[int, CostTable]],
    values: npt.ArrayLike,
    budget_bytes: float,
    *,
    max_flops: float | None = None,
) -> tuple[int, Allocation] | None:
    """The micro-batch size that allows the greatest value, and its plan; the larger size where two allow the same.

    Args:
        tables: Micro-batch size and the costs of a whole step with it; all tables have the same choices.
        values: (num_blocks, num_choices).
        budget_bytes: As for ``allocate``.
        max_flops: As for ``allocate``.

    Raises:
        PlanError: As ``allocate``, or the tables' choices differ.
    """
    if len({table.choices for _, table in tables}) > 1:
        raise PlanError("tables of all micro-batch sizes must have the same choices, got different ones; rebuild them")
    found: tuple[int, Allocation] | None = None
    for micro_batch, table in sorted(tables, key=lambda pair: -pair[0]):
        allocation = allocate(table, values, budget_bytes, max_flops=max_flops)
        if allocation is not None and (found is None or allocation.value > found[1].value):
            found = micro_batch, allocation
    return found


def smallest_budget(table: CostTable, *, max_flops: float | None = None) -> Allocation | None:
    """The plan of the lowest peak, which is the smallest budget with which anything fits.

    Returns:
        The plan, its value 0; ``None`` where every plan exceeds ``max_flops``.
    """
    costs = stack(table)
    nothing = np.zeros((1, costs.num_blocks, costs.num_choices))
    limits = Limits(np.array([UNLIMITED]), _flops_limits(max_flops, 1))
    best = solve(costs, nothing, limits, deadline=max_flops is not None, give_up=False)
    return _allocation(costs, nothing, best, 0, gap=0.0)


def _hasten(costs: Costs, values: Floats, limits: Limits, best: Best, *, deadline: bool) -> None:
    """Gives plans the forms of their choices that take the fewest operations within the limits.

    Forms of a choice have its rank and its value: plain or recomputed. Each trained block is worth more here than all
    operations that can be saved, so that the optimum trains the same; a plan for which the search finds nothing better
    stays as it is.
    """
    held = best.picked >= 0
    picked = np.maximum(best.picked, 0)[..., None]
    ranks = np.array([choice.rank or 0 for choice in costs.table.choices])
    forms = held[..., None] & (ranks == ranks[picked]) & (values == np.take_along_axis(values, picked, axis=2))
    blocks = np.arange(costs.num_blocks)
    flops = costs.flops[(blocks == np.argmax(held, axis=1)[:, None]).astype(np.int64), blocks]
    saved = np.where(forms, np.where(forms, flops, 0).max(axis=2, keepdims=True) - flops, 0)
    most = saved.max(axis=2)
    clients = np.flatnonzero((np.take_along_axis(saved, picked, axis=2)[..., 0] < most).any(axis=1))
    held, forms = held[clients], forms[clients]
    trained = forms & costs.trains
    share = 1.0 / (trained.any(axis=2).sum(axis=1) + 1)
    wanted = trained + 0.5 * saved[clients] / most[clients].sum(axis=1)[:, None, None]
    found = solve(costs, np.rint(wanted * share[:, None, None] / GRID) * GRID, limits.of(clients), deadline=deadline)
    kept = np.take_along_axis(forms, np.maximum(found.picked, 0)[..., None], axis=2)[..., 0]
    better = (kept == held).all(axis=1) & ((found.picked >= 0) == held).all(axis=1)
    better &= found.flops < best.flops[clients]
    to = clients[better]
    best.picked[to], best.peak[to], best.flops[to] = found.picked[better], found.peak[better], found.flops[better]


def _values(costs: Costs, values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    shape = (costs.num_blocks, costs.num_choices)
    if array.ndim != 3 or array.shape[1:] != shape:
        raise PlanError(
            f"values must be of shape (clients, {shape[0]} blocks, {shape[1]} choices), got {array.shape}; "
            "make them with choice_values"
        )
    if not np.isfinite(array).all():
        client, block, choice = np.argwhere(~np.isfinite(array))[0]
        raise PlanError(
            f"values must be finite, got {array[client, block, choice]} for client {client}, block {block}, choice "
            f"{choice}; replace it"
        )
    if array[:, :, ~costs.trains].any():
        raise PlanError("values of choices that do not train must be 0, got others; make them with choice_values")
    return array


def _limit(name: str, limit: npt.ArrayLike, num_clients: int, *, one_each: bool = False) -> Ints:
    array = np.asarray(limit, dtype=np.float64 if np.asarray(limit).dtype.kind == "f" else np.int64)
    if array.shape != (num_clients,) and (one_each or array.shape != ()):
        raise PlanError(f"{name} must be one for each of {num_clients} clients, got shape {array.shape}; give as many")
    if not (array >= 0).all():  # not a number is not either
        raise PlanError(f"{name} must be at least 0, got {array[~(array >= 0)][0]}; correct it")
    whole = np.floor(np.minimum(array, UNLIMITED)).astype(np.int64)
    return np.broadcast_to(whole, (num_clients,))


def _flops_limits(max_flops: npt.ArrayLike | None, num_clients: int) -> Ints:
    return _limit("max_flops", UNLIMITED if max_flops is None else max_flops, num_clients)


def _on_grid(values: Floats) -> tuple[Floats, Ints]:
    """Divided by 2**exponent, so that no plan's value exceeds 1, and rounded to whole multiples of ``GRID``."""
    total = np.abs(values).max(axis=2).sum(axis=1)[:, None, None]
    _, exponent = np.frexp(total)
    return np.rint(np.ldexp(values, -exponent) / GRID) * GRID, exponent[:, 0, 0]


def _allocation(costs: Costs, values: Floats, best: Best, client: int, gap: float) -> Allocation | None:
    if best.value[client] == -np.inf:
        return None
    picked = best.picked[client]
    s = int((picked < 0).sum())
    choices = (None,) * s + tuple(costs.table.choices[choice] for choice in picked[s:])
    value = math.fsum(values[client, block, picked[block]] for block in range(s, len(picked)))
    return Allocation(choices, value, int(best.peak[client]), int(best.flops[client]), gap)
