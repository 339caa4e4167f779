"""The exact search: a dynamic program from the top block down, for all cases of many clients at once.

**Recursion.** Let blocks j..L-1 be decided. Whatever is chosen below adds the same bytes to all that they did, so four
numbers say all about their memory (each with the resident bytes of blocks j..L-1 included):

- D: the highest of their forward and backward stages and of the head, above what the blocks below saved and hold;
- P: gradients of the head and of these blocks; a backward pass further down stands on them;
- Q: the optimiser's stage, scratch included;
- R: resident bytes alone; a forward pass further down stands on them.

Deciding block k = j - 1, which costs (resident, saved, forward, backward, gradient, optimiser), gives

    D' = resident + max(saved + max(D, P + backward), R + forward)        Q' = resident + gradient + max(Q, P + optimiser)
    P' = resident + gradient + P                                          R' = resident + R

from D = head_peak, P = head_gradient, Q = head_gradient + head_optimiser_peak, R = 0. After the lowest trained block s the
peak is ``fixed + sum frozen_resident[:s] + max(D, Q, R + max frozen_forward_peak[:s])``: unrolled, the formula of
``CostTable``. Operations F and value V are sums.

**Why it is exact.** The recursion is monotone: a state with no more D, P, Q, R, F and no less V ends at least as well with
every continuation, so a state that another one of its case dominates can go. So can a state that cannot end within the
limits, and one whose bound (``bounds``: root bound minus the reduced costs of its choices) is below a value already
reached. Nothing else is thrown away but by the *width*, a cap on states of a case at a block; a case in which
the cap bit is marked and searched again, eight times wider, until it does not bite. Finding fewer dominated states than
there are, or poor multipliers, costs time and never the optimum.
"""

from dataclasses import dataclass

import numpy as np

from fedpilot.allocation.bounds import Limits, Relaxation
from fedpilot.allocation.costs import NEVER, Bools, Floats, Ints

LOWEST_VALUE = -1e300
GRID = 2.0**-36
"""Values are whole multiples of this and sum to at most 1, so that their sums are exact and ties are ties."""
TOLERANCE = 2.0**-38
"""More than bounds lose by rounding: a bound below V + GRID - TOLERANCE proves a value of at most V."""
NEIGHBOURS = 4
"""How many states with a little less D a state is compared with."""
D, P, Q, R, F, COUNT = range(6)


class Best:
    """The best plan found for each client: value, then peak; -1 marks frozen blocks."""

    def __init__(self, num_clients: int, num_blocks: int) -> None:
        self.value: Floats = np.full(num_clients, -np.inf)
        self.peak: Ints = np.full(num_clients, 2**62, dtype=np.int64)
        self.flops: Ints = np.zeros(num_clients, dtype=np.int64)
        self.picked: Ints = np.full((num_clients, num_blocks), -1, dtype=np.int64)

    def floor(self, clients: Ints) -> Floats:
        """A bound below this proves a lower value than the plan's."""
        return np.maximum(self.value[clients] - TOLERANCE, LOWEST_VALUE)

    def may_better(self, clients: Ints, bound: Floats, least_peak: Ints) -> Bools:
        """Whether the value may be greater, or as great at a lower peak."""
        value = self.value[clients]
        tie = (bound >= value - TOLERANCE) & (least_peak < self.peak[clients])
        return np.asarray((bound >= value + (GRID - TOLERANCE)) | tie)


@dataclass(frozen=True)
class Cases:
    """Cases to be searched, each of one client.

    Attributes:
        client: (num,) row of the client.
        case: (num,) index into the relaxation's cases.
        bound: (num,) upper bound.
        theta: (num, num_rows) multipliers that gave the bound.
    """

    client: Ints
    case: Ints
    bound: Floats
    theta: Floats

    def __len__(self) -> int:
        return len(self.client)

    def where(self, keep: Bools | slice) -> "Cases":
        """Those that are kept."""
        return Cases(self.client[keep], self.case[keep], self.bound[keep], self.theta[keep])


@dataclass
class _Level:
    """States after one block: five registers, value, bound, case; where each came from."""

    registers: Ints
    value: Floats
    bound: Floats
    case: Ints
    parent: Ints
    choice: Ints

    def where(self, keep: Bools | Ints) -> "_Level":
        return _Level(
            self.registers[:, keep],
            self.value[keep],
            self.bound[keep],
            self.case[keep],
            self.parent[keep],
            self.choice[keep],
        )


class Search:
    """The dynamic program over one cost table."""

    def __init__(self, relaxation: Relaxation) -> None:
        self.relaxation, self.costs = relaxation, relaxation.costs
        self.slack = self._slack()
        self.compared = (D, F, P, Q, R) if relaxation.deadline else (D, P, Q, R)

    def run(self, cases: Cases, values: Floats, limits: Limits, reduced: Floats, best: Best, width: int) -> Bools:
        """Searches the cases and betters ``best`` in place.

        Args:
            cases: What to search; one client's cases may be among them several times.
            values: (num_clients, num_blocks, num_choices).
            limits: Of the clients.
            reduced: (num_cases, num_blocks, num_choices) reduced costs, inf for what a case forbids.
            best: Best plans so far.
            width: Most states of a case that are kept at a block.

        Returns:
            (num_cases,) whether the width bit: then the case is not settled.
        """
        lowest = self.relaxation.lowest[cases.case]
        standing = self.costs.table.fixed + self.costs.frozen_resident[lowest]
        memory = limits.budget_bytes[cases.client] - standing
        rests = self._rests(cases, reduced, best)
        operations = limits.max_flops[cases.client] - self.costs.frozen_flops[lowest]
        cut = np.zeros(len(cases), dtype=np.bool_)
        level = self._start(cases)
        history: list[_Level] = []
        for k in range(self.costs.num_blocks - 1, -1, -1):
            if not len(level.case):
                break
            level = self._expand(level, k, cases, values, lowest, reduced, best)
            ends = lowest[level.case] == k
            least = self._least_peak(level, k, cases, rests)
            keep = least <= memory[level.case]
            keep &= level.registers[F] + self._rest(level, k, cases, rests[2]) <= operations[level.case]
            keep &= best.may_better(cases.client[level.case], level.bound, least + standing[level.case])
            self._finish(level.where(ends & keep), k, cases, history, best)
            level = self._prune(level.where(~ends & keep), k, cases, best, width, cut)
            history.append(level)
        return cut

    def _start(self, cases: Cases) -> _Level:
        table, n = self.costs.table, len(cases)
        start = [0] * 6
        start[D], start[P] = table.head_peak, table.head_gradient
        start[Q] = table.head_gradient + table.head_optimiser_peak
        start[F] = table.head_flops
        registers = np.repeat(np.array(start, dtype=np.int64)[:, None], n, axis=1)
        none = np.zeros(n, dtype=np.int64)
        return _Level(registers, np.zeros(n), cases.bound.copy(), np.arange(n, dtype=np.int64), none, none)

    def _expand(
        self, level: _Level, k: int, cases: Cases, values: Floats, lowest: Ints, reduced: Floats, best: Best
    ) -> _Level:
        """All choices of block k whose bound may better the best plan."""
        bound = level.bound[:, None] - reduced[level.case, k]
        parent, choice = np.nonzero(bound >= best.floor(cases.client[level.case])[:, None])
        case, before = level.case[parent], level.registers[:, parent]
        at = (np.where(lowest[case] == k, 1, 0), k, choice)
        costs = self.costs
        resident, saved, held = costs.resident[at], costs.saved[at], costs.resident[at] + costs.gradient[at]
        after = np.empty_like(before)
        after[D] = resident + np.maximum(
            saved + np.maximum(before[D], before[P] + costs.backward[at]), before[R] + costs.forward[at]
        )
        after[P] = held + before[P]
        after[Q] = held + np.maximum(before[Q], before[P] + costs.optimiser[at])
        after[R] = resident + before[R]
        after[F] = costs.flops[at] + before[F]
        after[COUNT] = costs.recomputes[choice] + before[COUNT]
        value = level.value[parent] + values[cases.client[case], k, choice]
        return _Level(after, value, bound[parent, choice], case, parent, choice)

    def _rest(self, level: _Level, k: int, cases: Cases, rest: Ints) -> Ints:
        """Least that a sum still grows by when block k has been decided and so many blocks are yet to be checkpointed."""
        return rest[level.case, k, self.relaxation.count[cases.case[level.case]] - level.registers[COUNT]]

    def _least_peak(self, level: _Level, k: int, cases: Cases, rests: tuple[Ints, Ints, Ints]) -> Ints:
        """The peak, above what stands, of the cheapest continuation or less; the peak where none is left."""
        registers, case = level.registers, cases.case[level.case]
        recompute = np.where(registers[COUNT] == 0, self.relaxation.recompute[case], 0)
        least = np.maximum(
            registers[D] + self._rest(level, k, cases, rests[0]),
            registers[P] + self._rest(level, k, cases, rests[1]) + recompute,
        )
        s = self.relaxation.lowest[case]
        whole = np.maximum(registers[Q], registers[R] + self.costs.frozen_forward[s])
        return np.where(s == k, np.maximum(least, np.where(registers[COUNT] == self.relaxation.count[case], whole, 2**60)), least)

    def _finish(self, level: _Level, k: int, cases: Cases, history: list[_Level], best: Best) -> None:
        """Takes the best of the complete plans, the last block of which is k, into ``best``."""
        if not len(level.case):
            return
        costs, client = self.costs, cases.client[level.case]
        highest = np.maximum(level.registers[D], level.registers[Q])
        highest = np.maximum(highest, level.registers[R] + costs.frozen_forward[k])
        peak = highest + costs.table.fixed + costs.frozen_resident[k]
        order = np.lexsort((peak, -level.value, client))
        first = order[np.unique(client[order], return_index=True)[1]]
        client, value, peak = client[first], level.value[first], peak[first]
        better = (value > best.value[client]) | ((value == best.value[client]) & (peak < best.peak[client]))
        first, client = first[better], client[better]
        best.value[client], best.peak[client] = value[better], peak[better]
        best.flops[client] = level.registers[F, first] + costs.frozen_flops[k]
        best.picked[client] = -1
        best.picked[client, k] = level.choice[first]
        at = level.parent[first]
        for above in range(k + 1, costs.num_blocks):
            step = history[costs.num_blocks - 1 - above]
            best.picked[client, above] = step.choice[at]
            at = step.parent[at]

    def _prune(self, level: _Level, k: int, cases: Cases, best: Best, width: int, cut: Bools) -> _Level:
        """Drops dominated states, then those of the lowest bounds beyond the width; marks the cases it bit in."""
        level = level.where(level.bound >= best.floor(cases.client[level.case]))
        if len(level.case) < 2 or not (level.case[1:] == level.case[:-1]).any():
            return level
        # A register that D outruns in every continuation is raised to where it just does not: fewer distinct states.
        for register in (P, Q, R):
            np.maximum(
                level.registers[register], level.registers[D] - self.slack[register, k], out=level.registers[register]
            )
        group = level.case * (self.costs.num_blocks + 1) + level.registers[COUNT]
        order = np.lexsort((-level.value, level.registers[D], group))  # whoever dominates a state comes before it
        level = level.where(order)
        return self._narrow(level.where(~_dominated(level, group[order], self.compared)), width, cut)

    def _narrow(self, level: _Level, width: int, cut: Bools) -> _Level:
        """Drops the states of the lowest bounds beyond the width; marks the cases in which it did."""
        if np.bincount(level.case).max(initial=0) <= width:
            return level
        level = level.where(np.argsort(4.0 * level.case - np.maximum(level.bound, -1.0), kind="stable"))
        starts = np.flatnonzero(np.diff(level.case, prepend=-1))
        place = np.arange(len(level.case)) - np.repeat(starts, np.diff(starts, append=len(level.case)))
        cut[level.case[place >= width]] = True
        return level.where(place < width)

    def _rests(self, cases: Cases, reduced: Floats, best: Best) -> tuple[Ints, Ints, Ints]:
        """Least sums of the rows without the choices that alone push the bound below the best plan's value."""
        allowed = reduced <= (cases.bound - best.floor(cases.client))[:, None, None]
        head, recompute, operations = (
            self.relaxation.least_sums(cases.case, row, allowed) for row in self.relaxation.costs_of_rows
        )
        return head, recompute, operations

    def _slack(self) -> Ints:
        """(register, num_blocks) most by which a stage below block k can exceed D, counted from P, Q or R."""
        costs = self.costs
        slack = np.full((5, costs.num_blocks), NEVER, dtype=np.int64)
        for k in range(1, costs.num_blocks):
            j = k - 1  # the next block to be decided, above or lowest
            later = np.array([slack[:, j], np.full(5, NEVER)])  # what comes after it
            later[1, Q], later[1, R] = 0, costs.frozen_forward[j]
            saved, gain = costs.saved[:, j], costs.gradient[:, j] - costs.saved[:, j]
            scratch = costs.optimiser[:, j] + gain
            slack[Q, k] = (gain + later[:, Q, None]).max()
            slack[P, k] = max(
                costs.backward[:, j].max(), (gain + later[:, P, None]).max(), (scratch + later[:, Q, None]).max()
            )
            slack[R, k] = max((costs.forward[:, j] - saved).max(), (later[:, R, None] - saved).max())
        return slack


def _dominated(level: _Level, group: Ints, compared: tuple[int, ...]) -> Bools:
    """Whether a state is dominated by one before it in its group: one of the nearest, or that of the highest value."""
    result = np.zeros(len(group), dtype=np.bool_)

    def compare(better: Ints, worse: Ints) -> None:
        beats = (group[better] == group[worse]) & (level.value[better] >= level.value[worse])
        for register in compared:
            beats &= level.registers[register, better] <= level.registers[register, worse]
        result[worse[beats]] = True

    place = np.arange(len(group))
    for distance in range(1, NEIGHBOURS + 1):
        compare(place[:-distance], place[distance:])
    key = 4.0 * group + level.value
    highest = np.maximum.accumulate(np.where(key >= np.maximum.accumulate(key), place, 0))
    compare(highest[:-1], place[1:])
    return result
