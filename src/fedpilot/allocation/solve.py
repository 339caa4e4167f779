"""From values and limits to best plans: bounds, multipliers, then the search, for batches of clients.

1. One θ a client is moved against its best case; every step bounds all cases of the client.
2. The few most promising cases get a θ of their own and a narrow search. That gives a plan, as a rule the best one or
   close to it, and settles the cases whose bounds it beats.
3. The others get a θ of their own and are searched wider and wider, until each is settled.
"""

import numpy as np

from fedpilot.allocation.bounds import Limits, Relaxation
from fedpilot.allocation.costs import Bools, Costs, Floats, Ints
from fedpilot.allocation.multipliers import Lagrangian, Steps
from fedpilot.allocation.search import GRID, TOLERANCE, Best, Cases, Search, slack

# Speed only; the answer does not depend on these.
CLIENTS_AT_ONCE = 2048
CASES_AT_ONCE = 2048
STATES_AT_ONCE = 2**18
SHARED_STEPS = 10
OWN_STEPS = 20
PROMISING = 4
FIRST_WIDTH = 2
WIDER = 4

WIDEST = 2**14
"""Width at which a case is given up; blocks of equal costs need some thousands, costs without pattern can need more."""
WIDEST_FOR_TIES = 2**9
"""Width at which the search for a plan of equal value and lower peak is given up."""


def solve(costs: Costs, values: Floats, limits: Limits, *, deadline: bool, give_up: bool = True) -> Best:
    """Optimum of every client; a client for which nothing fits keeps the value -inf.

    Args:
        costs: The table.
        values: (num_clients, num_blocks, num_choices) multiples of ``GRID`` that sum to at most 1 in any plan.
        limits: Of the clients.
        deadline: Whether operations are limited.
        give_up: Whether the search ends at the widest width; ``Best.bound`` says where it did.
    """
    relaxation = Relaxation(costs, deadline=deadline)
    outrun = slack(relaxation)
    result = Best(len(values), costs.num_blocks)
    for first in range(0, len(values), CLIENTS_AT_ONCE):
        part = slice(first, first + CLIENTS_AT_ONCE)
        batch = _Batch(relaxation, outrun, values[part], limits.of(part), give_up)
        batch.solve()
        result.take(part, batch.best)
    return result


class _Batch:
    """Some clients and the best plans found for them so far."""

    def __init__(self, relaxation: Relaxation, outrun: Ints, values: Floats, limits: Limits, give_up: bool) -> None:
        self.relaxation, self.outrun, self.give_up = relaxation, outrun, give_up
        self.values, self.limits = values, limits
        self.best = Best(len(values), relaxation.costs.num_blocks)

    def solve(self) -> None:
        """Settles all cases of all clients."""
        possible = self.relaxation.possible(self.limits)
        clients = np.flatnonzero(possible.any(axis=1))
        if not len(clients):
            return
        cases = self._bounded(clients, possible[clients])
        starts = np.flatnonzero(np.diff(cases.client, prepend=-1))
        place = np.arange(len(cases)) - np.repeat(starts, np.diff(starts, append=len(cases)))
        for nth in range(PROMISING):
            self._settle(cases.where(place == nth), widen=False)
        self._settle(cases, widen=True)

    def _bounded(self, clients: Ints, possible: Bools) -> Cases:
        """All possible cases, each with the best bound met on the way; by client, then the highest bound first."""
        values, limits = self.values[clients], self.limits.of(clients)
        everyone = np.arange(len(clients))
        bound, step_of = np.full(possible.shape, np.inf), np.zeros(possible.shape, dtype=np.int64)
        steps, thetas = Steps(np.zeros((len(clients), len(self.relaxation.rows)))), list[Floats]()
        for number in range(SHARED_STEPS):
            now = np.where(possible, self.relaxation.all_cases(values, limits, steps.theta), -np.inf)
            np.copyto(step_of, number, where=now < bound)
            np.minimum(bound, now, out=bound)
            thetas.append(steps.theta)
            top = now.argmax(axis=1)
            highest = Cases(everyone, top, now[everyone, top], steps.theta)
            steps.advance(*Lagrangian(self.relaxation, highest, values, limits).at(steps.theta))
        row, case = np.nonzero(possible)
        order = np.lexsort((-case, -bound[row, case], row))  # of one lowest block, more checkpointing saves memory
        row, case = row[order], case[order]
        return Cases(clients[row], case, bound[row, case], np.stack(thetas)[step_of[row, case], row])

    def _settle(self, cases: Cases, *, widen: bool) -> None:
        """Searches the cases; with ``widen`` until all of them are settled."""
        cases = cases.where(self._open(cases))
        for first in range(0, len(cases), CASES_AT_ONCE):
            some = cases.where(slice(first, first + CASES_AT_ONCE))
            some, reduced = self._tightened(some.where(self._open(some)))
            width = FIRST_WIDTH
            while len(some):
                keep = self._search(some, reduced, width) & self._open(some) & widen
                keep &= ~self._given_up(some, keep, width)
                some, reduced, width = some.where(keep), reduced[keep], width * WIDER

    def _given_up(self, cases: Cases, cut: Bools, width: int) -> Bools:
        """Cases that are not searched wider; notes their bounds. None of a client for which no plan is found yet."""
        value = self.best.value[cases.client]
        if not self.give_up or width < WIDEST_FOR_TIES:
            return np.zeros(len(cases), dtype=np.bool_)
        tie = cases.bound < value + (GRID - TOLERANCE)
        result = cut & (value > -np.inf) & (tie | (width >= WIDEST))
        missed = result & ~tie
        np.maximum.at(self.best.bound, cases.client[missed], cases.bound[missed])
        return np.asarray(result)

    def _open(self, cases: Cases) -> Bools:
        return self.best.may_better(cases.client, cases.bound, self.relaxation.least_peak[cases.case])

    def _tightened(self, cases: Cases) -> tuple[Cases, Floats]:
        """The cases that stay open at multipliers of their own, and their reduced costs."""
        lagrangian = Lagrangian(self.relaxation, cases, self.values, self.limits)
        steps, floor = Steps(cases.theta), self.best.floor(cases.client)
        for _ in range(OWN_STEPS):
            steps.advance(*lagrangian.at(steps.theta), floor=floor)
            if (steps.best <= floor + TOLERANCE).all():
                break
        tight = Cases(cases.client, cases.case, steps.best, steps.best_theta)
        keep = self._open(tight)
        return tight.where(keep), lagrangian.reduced_costs(steps.best_theta)[keep]

    def _search(self, cases: Cases, reduced: Floats, width: int) -> Bools:
        """Whether the width bit in each case."""
        at_once = max(1, STATES_AT_ONCE // width)
        cut = [np.zeros(0, dtype=np.bool_)]
        for first in range(0, len(cases), at_once):
            part = slice(first, first + at_once)
            search = Search(
                self.relaxation,
                self.outrun,
                cases.where(part),
                self.values,
                self.limits,
                reduced[part],
                self.best,
                width,
            )
            search.run()
            cut.append(search.cut)
        return np.concatenate(cut)
