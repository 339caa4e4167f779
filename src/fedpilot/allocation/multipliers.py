"""Multipliers of each case of its own: bounds, subgradients, reduced costs."""

import numpy as np

from fedpilot.allocation.bounds import MISSING, Limits, Relaxation
from fedpilot.allocation.costs import Bools, Floats
from fedpilot.allocation.search import Cases


class Lagrangian:
    """The relaxed problems of given cases, each with multipliers of its own."""

    def __init__(self, relaxation: Relaxation, cases: Cases, values: Floats, limits: Limits) -> None:
        costs, self.count = relaxation.costs, relaxation.count[cases.case]
        blocks, s = np.arange(costs.num_blocks), relaxation.lowest[cases.case, None]
        self.frozen: Bools = blocks < s
        is_lowest = blocks == s
        forbidden = is_lowest[:, :, None] & ~costs.trains
        self.never: Bools = forbidden | self.frozen[:, :, None]
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
            if reduced.shape[2]:
                at = (*np.ogrid[: len(reduced), : reduced.shape[1]], reduced.argmax(axis=2))
                best.append(reduced[at])
                used.append([row[at] for row in rows])
            else:
                best.append(np.full(reduced.shape[:2], MISSING))
                used.append([np.zeros(reduced.shape[:2])] * len(rows))
        checkpointed = self._checkpointed(best[1] - best[0])
        bound = self._sum(np.where(checkpointed, best[1], best[0])) + (theta * self.capacity).sum(axis=1)
        costs = [self._sum(np.where(checkpointed, there, plain)) for plain, there in zip(*used, strict=True)]
        return bound, self.capacity - np.stack(costs, axis=1)

    def reduced_costs(self, theta: Floats) -> Floats:
        """(num, num_blocks, num_choices) what the bound loses by each choice; inf where it may not be taken.

        Checkpointing a block is priced half-way between the gains of the last block that is checkpointed and of the
        first that is not. At that price every block's best choice is the one that the bound counts.
        """
        reduced = [_reduced(own, rows, theta) for own, rows in self.kinds]
        best = [each.max(axis=2) if each.shape[2] else np.full(each.shape[:2], MISSING) for each in reduced]
        gain = -np.sort(-np.where(self.frozen, -np.inf, best[1] - best[0]), axis=1)
        ends = np.full((len(gain), 1), np.inf)
        gain, row = np.concatenate([ends, gain, -ends], axis=1), np.arange(len(gain))
        last, first = gain[row, self.count], gain[row, self.count + 1]
        price = (np.where(np.isinf(last), first + 2, last) + np.where(np.isinf(first), last - 2, first)) / 2
        top = np.maximum(best[0], best[1] - price[:, None])[:, :, None]
        result = np.empty((*top.shape[:2], sum(map(len, self.columns))))
        result[:, :, self.columns[0]] = top - reduced[0]
        result[:, :, self.columns[1]] = top - (reduced[1] - price[:, None, None])
        return np.where(self.never, np.inf, result)

    def _sum(self, by_block: Floats) -> Floats:
        return np.asarray(np.where(self.frozen, 0.0, by_block).sum(axis=1))

    def _checkpointed(self, gain: Floats) -> Bools:
        """The blocks of the greatest gains, as many as the case has."""
        if not self.count.any():
            return np.zeros(gain.shape, dtype=np.bool_)
        order = np.argsort(np.where(self.frozen, np.inf, -gain), axis=1, kind="stable")
        result = np.zeros(gain.shape, dtype=np.bool_)
        np.put_along_axis(result, order, np.arange(gain.shape[1]) < self.count[:, None], axis=1)
        return result


def _reduced(own: Floats, rows: list[Floats], theta: Floats) -> Floats:
    reduced = own.copy()
    for row, cost in enumerate(rows):
        reduced -= theta[:, row, None, None] * cost
    return reduced


class Steps:
    """Projected subgradient steps towards a level a little under the best bound so far (Polyak's step length).

    Args:
        theta: (num, num_rows) to start from.

    Attributes:
        theta: Where the next bound is wanted.
        best: (num,) best bound so far.
        best_theta: Where it was met.
    """

    def __init__(self, theta: Floats) -> None:
        self.theta = self.best_theta = theta
        self.best: Floats = np.full(len(theta), np.inf)
        self._drop = np.full(len(theta), 0.2)

    def advance(self, bound: Floats, subgradient: Floats, floor: Floats | float = -np.inf) -> None:
        """Notes the bound at θ and moves θ; ``floor`` is a bound that need not be undercut."""
        better = bound < self.best
        self.best_theta = np.where(better[:, None], self.theta, self.best_theta)
        self._drop = np.where(bound < self.best - 0.5 * self._drop, self._drop, 0.8 * self._drop)
        self.best = np.minimum(bound, self.best)
        target = np.maximum(self.best - self._drop, floor)
        uphill = np.where((self.theta <= 0) & (subgradient > 0), 0.0, subgradient)
        length = np.maximum(bound - target, 0.0) / np.maximum((uphill**2).sum(axis=1), 1e-12)
        self.theta = np.clip(self.theta - length[:, None] * uphill, 0.0, 256.0)
