"""From values and limits to best plans: multipliers, bounds, then the search, for a batch of clients.

1. One θ a client is moved against its best case; every step bounds all cases of the client.
2. The best case alone gets its own θ and a narrow search: that gives a plan, as a rule the best one or close to it.
3. Cases whose bound is below the plan's value are settled. The others get their own θ and the full search.
"""

import numpy as np

from fedpilot.allocation.bounds import MISSING, Limits, Relaxation
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
    steps = _Steps(len(clients), len(relaxation.rows))
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
    cases = cases.where(_open(search.relaxation, cases, best))
    for first in range(0, len(cases), CASES_AT_ONCE):
        some = cases.where(slice(first, first + CASES_AT_ONCE))
        some = some.where(_open(search.relaxation, some, best))
        some, reduced = _tightened(search.relaxation, some, values, limits, best)
        width = first_width
        while len(some):
            cut = np.zeros(len(some), dtype=np.bool_)
            at_once = max(1, STATES_AT_ONCE // width)
            for start in range(0, len(some), at_once):
                part = slice(start, start + at_once)
                cut[part] = search.run(some.where(part), values, limits, reduced[part], best, width)
            keep = cut & _open(search.relaxation, some, best) & widen
            some, reduced, width = some.where(keep), reduced[keep], width * 4


def _open(relaxation: Relaxation, cases: Cases, best: Best) -> Bools:
    return best.may_better(cases.client, cases.bound, relaxation.least_peak[cases.case])


def _tightened(
    relaxation: Relaxation, cases: Cases, values: Floats, limits: Limits, best: Best
) -> tuple[Cases, Floats]:
    """The cases that are still open with their own best multipliers, and the reduced costs there."""
    lagrangian = Lagrangian(relaxation, cases, values, limits)
    steps = _Steps(len(cases), len(relaxation.rows), cases.theta)
    for _ in range(OWN_STEPS):
        bound, slack = lagrangian.at(steps.theta)
        steps.advance(bound, slack, floor=best.floor(cases.client))
    tight = Cases(cases.client, cases.case, steps.best, steps.best_theta)
    return tight, lagrangian.reduced_costs(steps.best_theta)


class Lagrangian:
    """The relaxed problems of given cases, each with multipliers of its own."""

    def __init__(self, relaxation: Relaxation, cases: Cases, values: Floats, limits: Limits) -> None:
        costs, self.count = relaxation.costs, relaxation.count[cases.case]
        blocks, s = np.arange(costs.num_blocks), relaxation.lowest[cases.case, None]
        self.frozen: Bools = blocks < s
        is_lowest = blocks == s
        forbidden = is_lowest[:, :, None] & ~costs.trains
        self.kinds: list[tuple[Floats, list[Floats]]] = []  # plain, checkpointed: values and costs
        self.columns = [np.flatnonzero(~costs.recomputes), np.flatnonzero(costs.recomputes)]
        for columns in self.columns:
            own = np.where(forbidden[:, :, columns], MISSING, values[cases.client][:, :, columns])
            rows = [row[is_lowest.astype(np.int64), blocks][:, :, columns] for row in relaxation.rows]
            self.kinds.append((own, rows))
        self.capacity = relaxation.capacity(limits.of(cases.client), cases.case)

    def at(self, theta: Floats) -> tuple[Floats, Floats]:
        """Bound (num,) and what the relaxed optimum leaves of each row (num, num_rows), a subgradient."""
        best, used = [], []
        for own, rows in self.kinds:
            reduced = _reduced(own, rows, theta)
            if not reduced.shape[2]:
                best.append(np.full(reduced.shape[:2], MISSING))
                used.append([np.zeros(reduced.shape[:2])] * len(rows))
                continue
            pick = reduced.argmax(axis=2)[:, :, None]
            best.append(np.take_along_axis(reduced, pick, axis=2)[:, :, 0])
            used.append([np.take_along_axis(row, pick, axis=2)[:, :, 0] for row in rows])
        checkpointed = self._checkpointed(best[1] - best[0])
        bound = self._sum(np.where(checkpointed, best[1], best[0])) + (theta * self.capacity).sum(axis=1)
        costs = [self._sum(np.where(checkpointed, there, plain)) for plain, there in zip(*used, strict=True)]
        return bound, self.capacity - np.stack(costs, axis=1)

    def reduced_costs(self, theta: Floats) -> Floats:
        """(num, num_blocks, num_choices) what the bound loses by each choice; inf for frozen blocks.

        The number of checkpointed blocks is priced half-way between the gains of the last block that is and the first that is
        not; that price leaves the bound as it is.
        """
        reduced = [_reduced(own, rows, theta) for own, rows in self.kinds]
        best = [each.max(axis=2, initial=MISSING) for each in reduced]
        gain = -np.sort(-np.where(self.frozen, 4 * MISSING, best[1] - best[0]), axis=1)
        ends = np.full((len(gain), 1), -8 * MISSING)
        gain = np.concatenate([ends, gain, -ends], axis=1)
        row = np.arange(len(gain))
        price = (gain[row, self.count] + gain[row, self.count + 1]) / 2
        reduced[1] = reduced[1] - price[:, None, None]
        top = np.maximum(best[0], best[1] - price[:, None])[:, :, None]
        result = np.empty((*top.shape[:2], sum(map(len, self.columns))))
        for columns, each in zip(self.columns, reduced, strict=True):
            result[:, :, columns] = np.where(each < MISSING / 2, np.inf, top - each)
        result[self.frozen] = np.inf
        return result

    def _sum(self, by_block: Floats) -> Floats:
        return np.asarray(np.where(self.frozen, 0.0, by_block).sum(axis=1))

    def _checkpointed(self, gain: Floats) -> Bools:
        """The blocks of the greatest gains, as many as the case has."""
        if not self.count.any():
            return np.zeros(gain.shape, dtype=np.bool_)
        order = np.argsort(np.where(self.frozen, -4 * MISSING, -gain), axis=1, kind="stable")
        result = np.zeros(gain.shape, dtype=np.bool_)
        np.put_along_axis(result, order, np.arange(gain.shape[1]) < self.count[:, None], axis=1)
        return result


def _reduced(own: Floats, rows: list[Floats], theta: Floats) -> Floats:
    reduced = own.copy()
    for row, cost in enumerate(rows):
        reduced -= theta[:, row, None, None] * cost
    return reduced


class _Steps:
    """Projected subgradient steps towards a level a little under the best bound so far (Polyak's step length)."""

    def __init__(self, num: int, num_rows: int, theta: Floats | None = None) -> None:
        self.theta: Floats = np.zeros((num, num_rows)) if theta is None else theta
        self.best: Floats = np.full(num, np.inf)
        self.best_theta = self.theta
        self._drop = np.full(num, 0.2)

    def advance(self, bound: Floats, slack: Floats, floor: Floats | None) -> None:
        """Notes the bound at θ and moves θ; ``floor`` is a value that need not be undercut."""
        better = bound < self.best
        self.best_theta = np.where(better[:, None], self.theta, self.best_theta)
        self._drop = np.where(bound < self.best - 0.5 * self._drop, self._drop, 0.8 * self._drop)
        self.best = np.minimum(bound, self.best)
        target = self.best - self._drop if floor is None else np.maximum(self.best - self._drop, floor)
        uphill = np.where((self.theta <= 0.0) & (slack > 0), 0.0, slack)
        length = (bound - target) / np.maximum((uphill**2).sum(axis=1), 1e-12)
        self.theta = np.clip(self.theta - np.maximum(length, 0.0)[:, None] * uphill, 0.0, 256.0)


__all__ = ["TOLERANCE", "Bools", "Ints", "solve"]
