"""The exact search: a dynamic program from the top block down, for many cases of many clients at once.

**Recursion.** Let blocks j..L-1 be decided. What is chosen below adds the same bytes to all that they did, so four
numbers say all about their memory (each with the resident bytes of blocks j..L-1 included):

- D: the highest of their forward and backward stages and of the head, above what the blocks below saved and hold;
- P: gradients of the head and of these blocks; a backward pass further down stands on them;
- Q: the optimiser's stage, scratch included;
- R: resident bytes alone; a forward pass further down stands on them.

Deciding block k = j - 1, which costs (resident, saved, forward, backward, gradient, optimiser), gives

    D' = resident + max(saved + max(D, P + backward), R + forward)
    P' = resident + gradient + P
    Q' = resident + gradient + max(Q, P + optimiser)
    R' = resident + R

from D = head_peak, P = head_gradient, Q = head_gradient + head_optimiser_peak, R = 0. After the lowest trained block s
the peak is ``fixed + sum frozen_resident[:s] + max(D, Q, R + max frozen_forward_peak[:s])``: unrolled, the formula of
``CostTable``. Operations F and the value V are sums.

**Why it is exact.** The recursion is monotone: a state with no more D, P, Q, R, F and no less V ends at least as well
as another with every continuation, so of two states with as many checkpointed blocks the dominated one can go. So can
a state that cannot end within the limits, and one that cannot end better than the best plan found: its bound, which is
the case's bound less the reduced costs of its choices (``multipliers``), is too low, or only just high enough and its
peak is no lower. Nothing else is dropped but by the *width*, a cap on the states of a case after a block; a case in
which it bit is searched again, wider, until it does not, or is given up, which the plan's ``gap`` tells. Overlooking a
dominated state or poor multipliers cost time, never the optimum.
"""

from dataclasses import dataclass

import numpy as np

from fedpilot.allocation.bounds import HEAD, OPERATIONS, RECOMPUTE, Limits, Relaxation
from fedpilot.allocation.costs import NEVER, Bools, Floats, Ints

GRID = 2.0**-36
"""Values are whole multiples of this and sum to at most 1, so that their sums are exact and ties are ties."""
TOLERANCE = 2.0**-38
"""More than bounds lose by rounding: a bound below V + GRID - TOLERANCE proves a value of at most V."""
NEIGHBOURS = 3
"""How many states with a little less D a state is compared with."""
D, P, Q, R, F, COUNT, HEAD_SUM, RECOMPUTE_SUM = range(8)
"""Registers of a state; COUNT is the number of its checkpointed blocks, the sums are those of the bound's rows."""


class Best:
    """The best plan found for each client: by value, then by peak; -1 marks frozen blocks.

    ``bound`` is the highest bound of the client's cases that were given up.
    """

    def __init__(self, num_clients: int, num_blocks: int) -> None:
        self.value: Floats = np.full(num_clients, -np.inf)
        self.bound: Floats = np.full(num_clients, -np.inf)
        self.peak: Ints = np.full(num_clients, 2**62, dtype=np.int64)
        self.flops: Ints = np.zeros(num_clients, dtype=np.int64)
        self.picked: Ints = np.full((num_clients, num_blocks), -1, dtype=np.int64)

    def take(self, part: slice, other: "Best") -> None:
        """Takes over the plans of some clients."""
        self.value[part], self.bound[part], self.peak[part] = other.value, other.bound, other.peak
        self.flops[part], self.picked[part] = other.flops, other.picked

    def floor(self, clients: Ints) -> Floats:
        """A bound below this proves a lower value than the plan's."""
        return np.maximum(self.value[clients] - TOLERANCE, -1e300)

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


@dataclass(frozen=True)
class _States:
    """States after one block: registers (8, num), value, bound, case; the state and the choice that they come from."""

    registers: Ints
    value: Floats
    bound: Floats
    case: Ints
    parent: Ints
    choice: Ints

    def where(self, keep: Bools | Ints) -> "_States":
        kept = (self.value[keep], self.bound[keep], self.case[keep], self.parent[keep], self.choice[keep])
        return _States(self.registers[:, keep], *kept)


class Search:
    """One run over given cases; betters ``best`` in place.

    Args:
        relaxation: Of the table.
        slack: What ``slack`` returns for the table.
        cases: What to search.
        values: (num_clients, num_blocks, num_choices).
        limits: Of the clients.
        reduced: (num_cases, num_blocks, num_choices) reduced costs, inf for what a case forbids.
        best: Best plans so far.
        width: Most states of a case that are kept after a block.

    Attributes:
        cut: (num_cases,) after ``run``, whether the width bit: then the case is not settled.
    """

    def __init__(
        self,
        relaxation: Relaxation,
        slack: Ints,
        cases: Cases,
        values: Floats,
        limits: Limits,
        reduced: Floats,
        best: Best,
        width: int,
    ) -> None:
        self.relaxation, self.costs, self.slack = relaxation, relaxation.costs, slack
        self.cases, self.values, self.reduced, self.best, self.width = cases, values, reduced, best, width
        self.cut: Bools = np.zeros(len(cases), dtype=np.bool_)
        self.lowest, self.count = relaxation.lowest[cases.case], relaxation.count[cases.case]
        self.standing = self.costs.table.fixed + self.costs.frozen_resident[self.lowest]
        self.memory = limits.budget_bytes[cases.client] - self.standing
        self.operations = limits.max_flops[cases.client] - self.costs.frozen_flops[self.lowest]
        # Least that a sum still grows by, without the choices that alone push the bound below the best plan's value.
        allowed = reduced <= (cases.bound - best.floor(cases.client))[:, None, None]
        self.rests = {kind: relaxation.least_sums(cases.case, kind, allowed) for kind in relaxation.kinds}

    def run(self) -> None:
        """Decides block after block."""
        states, history = self._start(), list[_States]()
        for k in range(self.costs.num_blocks - 1, -1, -1):
            states = self._expand(states, k)
            states = states.where(self._may_better(states, k))
            ends = self.lowest[states.case] == k
            if ends.any():
                self._finish(states.where(ends), k, history)
                states = states.where(~ends)
            states = self._prune(states, k)
            history.append(states)

    def _may_better(self, states: _States, k: int) -> Bools:
        """Whether a continuation may fit and be better than the best plan."""
        client, least = self.cases.client[states.case], self._least_peak(states, k)
        keep = self.best.may_better(client, self._tight(states), least + self.standing[states.case])
        keep &= least <= self.memory[states.case]
        if self.relaxation.deadline:
            keep &= states.registers[F] + self._rest(states, k, OPERATIONS) <= self.operations[states.case]
        return keep

    def _start(self) -> _States:
        table, n = self.costs.table, len(self.cases)
        registers = np.zeros((8, n), dtype=np.int64)
        registers[D], registers[P] = table.head_peak, table.head_gradient
        registers[Q], registers[F] = table.head_gradient + table.head_optimiser_peak, table.head_flops
        registers[HEAD_SUM], registers[RECOMPUTE_SUM] = table.head_peak, table.head_gradient
        none = np.zeros(n, dtype=np.int64)
        return _States(registers, np.zeros(n), self.cases.bound, np.arange(n, dtype=np.int64), none, none)

    def _expand(self, states: _States, k: int) -> _States:
        """All choices for block k whose bound reaches the best plan."""
        costs = self.costs
        bound = states.bound[:, None] - self.reduced[states.case, k]
        parent, choice = np.nonzero(bound >= self.best.floor(self.cases.client[states.case])[:, None])
        case, before = states.case[parent], states.registers[:, parent]
        at = ((self.lowest[case] == k).astype(np.int64), k, choice)
        resident, held = costs.resident[at], costs.resident[at] + costs.gradient[at]
        after = np.empty_like(before)
        after[D] = np.maximum(before[D], before[P] + costs.backward[at]) + costs.saved[at]
        after[D] = np.maximum(after[D], before[R] + costs.forward[at]) + resident
        after[P] = before[P] + held
        after[Q] = np.maximum(before[Q], before[P] + costs.optimiser[at]) + held
        after[R] = before[R] + resident
        after[F] = before[F] + costs.flops[at]
        after[COUNT] = before[COUNT] + costs.recomputes[choice]
        after[HEAD_SUM] = before[HEAD_SUM] + self.relaxation.costs_of_rows[HEAD][at]
        after[RECOMPUTE_SUM] = before[RECOMPUTE_SUM] + self.relaxation.costs_of_rows[RECOMPUTE][at]
        value = states.value[parent] + self.values[self.cases.client[case], k, choice]
        return _States(after, value, bound[parent, choice], case, parent, choice)

    def _tight(self, states: _States) -> Floats:
        """The bound with true stages in place of the rows, which are at most as high: D for head, and so on."""
        registers, case = states.registers, states.case
        price = self.cases.theta[case] / self.relaxation.scale
        bound = states.bound - price[:, 0] * np.maximum(0, registers[D] - registers[HEAD_SUM])
        if RECOMPUTE in self.rests:
            after = registers[D] - self.relaxation.recompute[self.cases.case[case]]
            stage = np.where(registers[COUNT] == 0, registers[P], after)
            bound -= price[:, 1] * np.maximum(0, stage - registers[RECOMPUTE_SUM])
        return np.asarray(bound)

    def _rest(self, states: _States, k: int, kind: int) -> Ints:
        """Least that a row's sum still grows by after block k, given how many blocks are yet to be checkpointed."""
        return np.asarray(self.rests[kind][states.case, k, self.count[states.case] - states.registers[COUNT]])

    def _least_peak(self, states: _States, k: int) -> Ints:
        """Least peak of the continuations, above what stands; the peak itself where nothing is left to decide."""
        registers, case = states.registers, states.case
        least = registers[D] + self._rest(states, k, HEAD)
        if RECOMPUTE in self.rests:
            recompute = np.where(registers[COUNT] == 0, self.relaxation.recompute[self.cases.case[case]], 0)
            np.maximum(least, registers[P] + self._rest(states, k, RECOMPUTE) + recompute, out=least)
        s = self.lowest[case]
        others = np.maximum(registers[Q], registers[R] + self.costs.frozen_forward[s])
        return np.asarray(np.maximum(least, np.where(s == k, others, NEVER)), dtype=np.int64)

    def _finish(self, states: _States, k: int, history: list[_States]) -> None:
        """Takes the best of the complete plans, the lowest block of which is k, into ``best``."""
        client, best = self.cases.client[states.case], self.best
        registers = states.registers
        peak = np.maximum(np.maximum(registers[D], registers[Q]), registers[R] + self.costs.frozen_forward[k])
        peak = peak + self.standing[states.case]
        order = np.lexsort((peak, -states.value, client))
        first = order[np.unique(client[order], return_index=True)[1]]
        client, value = client[first], states.value[first]
        better = (value > best.value[client]) | ((value == best.value[client]) & (peak[first] < best.peak[client]))
        first, client = first[better], client[better]
        best.value[client], best.peak[client] = states.value[first], peak[first]
        best.flops[client] = registers[F, first] + self.costs.frozen_flops[k]
        best.picked[client] = -1
        best.picked[client, k] = states.choice[first]
        at = states.parent[first]
        for block, step in zip(range(k + 1, self.costs.num_blocks), reversed(history), strict=True):
            best.picked[client, block] = step.choice[at]
            at = step.parent[at]

    def _prune(self, states: _States, k: int) -> _States:
        """Drops dominated states, and those of the lowest bounds beyond the width."""
        if not (states.case[1:] == states.case[:-1]).any():
            return states
        registers = states.registers
        # A register that D outruns in every continuation is raised to where it just does not: fewer distinct states.
        for register in (P, Q, R):
            np.maximum(registers[register], registers[D] - self.slack[register, k], out=registers[register])
        group = states.case * (self.costs.num_blocks + 1) + registers[COUNT]
        order = np.lexsort((-states.value, registers[D], group))  # whoever dominates a state comes before it
        states = states.where(order)
        compared = (D, P, Q, R, F) if self.relaxation.deadline else (D, P, Q, R)
        return self._narrow(states.where(~_dominated(states, group[order], compared)))

    def _narrow(self, states: _States) -> _States:
        if np.bincount(states.case).max(initial=0) <= self.width:
            return states
        states = states.where(np.argsort(4.0 * states.case - np.maximum(self._tight(states), -1.0), kind="stable"))
        starts = np.flatnonzero(np.diff(states.case, prepend=-1))
        place = np.arange(len(states.case)) - np.repeat(starts, np.diff(starts, append=len(states.case)))
        self.cut[states.case[place >= self.width]] = True
        return states.where(place < self.width)


def _dominated(states: _States, group: Ints, compared: tuple[int, ...]) -> Bools:
    """Whether a state is dominated by one before it in its group: one of the nearest, or that of the highest value."""
    result = np.zeros(len(group), dtype=np.bool_)
    place = np.arange(len(group))

    def compare(better: Ints, worse: Ints) -> None:
        same = group[better] == group[worse]
        better, worse = better[same], worse[same]
        beats = states.value[better] >= states.value[worse]
        for register in compared:
            beats &= states.registers[register, better] <= states.registers[register, worse]
        result[worse[beats]] = True

    for distance in range(1, NEIGHBOURS + 1):
        compare(place[:-distance], place[distance:])
    height = 4.0 * group + states.value
    highest = np.maximum.accumulate(np.where(height >= np.maximum.accumulate(height), place, 0))
    compare(highest[:-1], place[1:])
    return result


def slack(relaxation: Relaxation) -> Ints:
    """(register, num_blocks) most by which a stage below block k can exceed D, counted from P, Q or R."""
    costs = relaxation.costs
    result = np.full((6, costs.num_blocks), NEVER, dtype=np.int64)
    for k in range(1, costs.num_blocks):
        j = k - 1  # the next block to be decided, above the lowest or as the lowest
        later = np.stack([result[:, j], np.full(6, NEVER)])
        later[1, Q], later[1, R] = 0, costs.frozen_forward[j]
        saved, gain = costs.saved[:, j], costs.gradient[:, j] - costs.saved[:, j]
        result[Q, k] = (gain + later[:, Q, None]).max()
        result[P, k] = max(
            costs.backward[:, j].max(),
            (gain + later[:, P, None]).max(),
            (costs.optimiser[:, j] + gain + later[:, Q, None]).max(),
        )
        result[R, k] = max((costs.forward[:, j] - saved).max(), (later[:, R, None] - saved).max())
    return result
