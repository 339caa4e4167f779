"""From values and limits to best plans: multipliers, bounds, then the search, for a batch of clients.

1. One θ a client is moved against its best case; every step bounds all cases of the client.
2. The best case alone gets its own θ and a narrow search: that gives a plan, as a rule the best one or close to it.
3. Cases whose bound is below the plan's value are settled. The others get their own θ and the full search.
"""

import numpy as np

from fedpilot.allocation.bounds import CHECKPOINTED, PLAIN, Limits, Relaxation
from fedpilot.allocation.costs import Bools, Costs, Floats, Ints
from fedpilot.allocation.search import TOLERANCE, Best, Cases, Search

CLIENTS_AT_ONCE = 512
CASES_AT_ONCE = 1024
STATES_AT_ONCE = 2**18
SHARED_STEPS = 24
OWN_STEPS = 16
PROMISING = 3
NARROW, WIDE = 4, 4


def solve(costs: Costs, values: Floats, limits: Limits, *, deadline: bool) -> Best:
    """Exact optimum of every client; a client for which nothing fits keeps the value -inf.

    Args:
        costs: The table.
        values: (num_clients, num_blocks, num_choices), scaled to sums of at most 1.
        limits: Of the clients.
        deadline: Whether any client has one.
    """
    search = Search(Relaxation(costs, deadline=deadline))
    result = Best(len(values), costs.num_blocks)
    for first in range(0, len(values), CLIENTS_AT_ONCE):
        part = slice(first, first + CLIENTS_AT_ONCE)
        best = _solve_some(search, values[part], Limits(limits.budget_bytes[part], limits.max_flops[part]))
        result.value[part], result.peak[part] = best.value, best.peak
        result.flops[part], result.picked[part] = best.flops, best.picked
    return result


def _solve_some(search: Search, values: Floats, limits: Limits) -> Best:
    best = Best(len(values), search.costs.num_blocks)
    cases = _bounded(search.relaxation, values, limits)
    if not len(cases):
        return best
    # Cases come ordered by client, then by bound: the first of each client is its most promising.
    starts = np.flatnonzero(np.diff(cases.client, prepend=-1))
    place = np.arange(len(cases)) - np.repeat(starts, np.diff(starts, append=len(cases)))
    for nth in range(PROMISING):
        _settle(search, cases.where(place == nth), values, limits, best, NARROW)
    _settle(search, cases, values, limits, best, WIDE, widen=True)
    return best


def _bounded(relaxation: Relaxation, values: Floats, limits: Limits) -> Cases:
    """All cases that could fit, each with the best bound that its client's multipliers came by."""
    possible = relaxation.possible(limits)
    clients = np.flatnonzero(possible.any(axis=1))
    values, limits = values[clients], Limits(limits.budget_bytes[clients], limits.max_flops[clients])
    possible = possible[clients]
    everyone = np.arange(len(clients))
    bound = np.full(possible.shape, np.inf)
    step_of = np.zeros(possible.shape, dtype=np.int64)
    steps = _Steps(len(clients), relaxation.free)
    thetas: list[Floats] = []
    for number in range(SHARED_STEPS):
        now = np.where(possible, relaxation.all_cases(values, limits, steps.theta), -np.inf)
        np.copyto(step_of, number, where=now < bound)
        np.minimum(bound, now, out=bound)
        thetas.append(steps.theta)
        top = now.argmax(axis=1)
        lagrangian = Lagrangian(relaxation, Cases(everyone, top, now[everyone, top], steps.theta), values, limits)
        steps.advance(now[everyone, top], lagrangian.at(steps.theta)[1], floor=None)
    bound[~possible] = -np.inf
    row, case = np.nonzero(possible)
    order = np.lexsort((-case, -bound[row, case], row))  # of a lowest block's cases the later save more memory
    row, case = row[order], case[order]
    return Cases(clients[row], case, bound[row, case], np.stack(thetas)[step_of[row, case], row])


def _settle(search: Search, cases: Cases, values: Floats, limits: Limits, best: Best, first_width: int, *, widen: bool = False) -> None:
    """Searches the cases; with ``widen`` until all of them are settled."""
    cases = cases.where(cases.bound >= best.floor(cases.client))
    for first in range(0, len(cases), CASES_AT_ONCE):
        some = cases.where(slice(first, first + CASES_AT_ONCE))
        some = some.where(some.bound >= best.floor(some.client))
        some, reduced = _tightened(search.relaxation, some, values, limits, best)
        width = first_width
        while len(some):
            cut = np.zeros(len(some), dtype=np.bool_)
            at_once = max(1, STATES_AT_ONCE // width)
            for start in range(0, len(some), at_once):
                part = slice(start, start + at_once)
                cut[part] = search.run(some.where(part), values, limits, reduced[part], best, width)
            keep = cut & (some.bound >= best.floor(some.client)) & widen
            some, reduced, width = some.where(keep), reduced[keep], width * 4


def _tightened(
    relaxation: Relaxation, cases: Cases, values: Floats, limits: Limits, best: Best
) -> tuple[Cases, Floats]:
    """The cases that are still open with their own best multipliers, and the reduced costs there."""
    lagrangian = Lagrangian(relaxation, cases, values, limits)
    steps = _Steps(len(cases), relaxation.free, cases.theta)
    for _ in range(OWN_STEPS):
        bound, slack = lagrangian.at(steps.theta)
        steps.advance(bound, slack, floor=best.floor(cases.client))
    tight = Cases(cases.client, cases.case, steps.best, steps.best_theta)
    return tight, lagrangian.reduced_costs(steps.best_theta)


class Lagrangian:
    """The relaxed problems of given cases, each with multipliers of its own."""

    def __init__(self, relaxation: Relaxation, cases: Cases, values: Floats, limits: Limits) -> None:
        costs, s = relaxation.costs, relaxation.lowest[cases.case, None]
        blocks = np.arange(costs.num_blocks)
        forbidden = (blocks == s)[:, :, None] & ~costs.trains
        kind = relaxation.kind[cases.case, None]
        forbidden |= (((kind == PLAIN) & costs.recomputes) | ((kind == CHECKPOINTED) & ~costs.recomputes))[:, None, :]
        own = np.where(forbidden, -np.inf, values[cases.client])
        frozen = np.where(np.arange(costs.num_choices) == 0, 0.0, -np.inf)
        self.values: Floats = np.where((blocks < s)[:, :, None], frozen, own)
        which = (blocks == s).astype(np.int64)
        self.rows = [np.where((blocks < s)[:, :, None], 0.0, row[which, blocks]) for row in relaxation.rows]
        self.capacity = relaxation.capacity(limits.of(cases.client), cases.case)

    def at(self, theta: Floats) -> tuple[Floats, Floats]:
        """Bound (num,) and what the relaxed optimum leaves of each row (num, num_rows), a subgradient."""
        reduced = self._reduced(theta)
        pick = reduced.argmax(axis=2)[:, :, None]
        bound = np.take_along_axis(reduced, pick, axis=2).sum(axis=(1, 2)) + (theta * self.capacity).sum(axis=1)
        used = [np.take_along_axis(row, pick, axis=2).sum(axis=(1, 2)) for row in self.rows]
        return bound, self.capacity - np.stack(used, axis=1)

    def reduced_costs(self, theta: Floats) -> Floats:
        """(num, num_blocks, num_choices) what the bound loses by each choice."""
        reduced = self._reduced(theta)
        return np.asarray(reduced.max(axis=2, keepdims=True) - reduced)

    def _reduced(self, theta: Floats) -> Floats:
        reduced = self.values.copy()
        for row, cost in enumerate(self.rows):
            reduced -= theta[:, row, None, None] * cost
        return reduced


class _Steps:
    """Projected subgradient steps towards a level a little under the best bound so far (Polyak's step length)."""

    def __init__(self, num: int, free: Bools, theta: Floats | None = None) -> None:
        self.theta: Floats = np.zeros((num, len(free))) if theta is None else theta
        self._least = np.where(free, -256.0, 0.0)
        self.best: Floats = np.full(num, np.inf)
        self.best_theta = self.theta
        self._drop = np.full(num, 0.1)

    def advance(self, bound: Floats, slack: Floats, floor: Floats | None) -> None:
        """Notes the bound at θ and moves θ; ``floor`` is a value that need not be undercut."""
        better = bound < self.best
        self.best_theta = np.where(better[:, None], self.theta, self.best_theta)
        self._drop = np.where(bound < self.best - 0.5 * self._drop, self._drop, 0.6 * self._drop)
        self.best = np.minimum(bound, self.best)
        target = self.best - self._drop if floor is None else np.maximum(self.best - self._drop, floor)
        uphill = np.where((self.theta <= self._least) & (slack > 0), 0.0, slack)
        length = (bound - target) / np.maximum((uphill**2).sum(axis=1), 1e-12)
        self.theta = np.clip(self.theta - np.maximum(length, 0.0)[:, None] * uphill, self._least, 256.0)


__all__ = ["TOLERANCE", "Bools", "Ints", "solve"]
