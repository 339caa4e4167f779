"""Upper bounds on what a client can reach, by Lagrangian relaxation, for many clients at once.

The plans are split into *cases* (s, m): s is the lowest trained block, m the number of checkpointed blocks. These two
decide most of the memory and nearly all operations; within a case what is left to share out comes in small pieces, so
that relaxed problems lie close to whole ones. A plan of a case must keep every one of these *rows*, each linear in the
choices (a cost a block, summed):

- head: resident + saved. The backward pass of the topmost block sees the same saved bytes, so what it needs beyond
  the head is charged to its choice;
- recompute: in the backward pass of the topmost checkpointed block the checkpointed blocks' saved bytes are still
  there, and of a plain block either its saved bytes or, if it lies above, its gradient. So resident + (saved if
  checkpointed, otherwise the lesser of saved and gradient), and the least backward peak of a checkpointed block on top.
  With m = 0 the optimiser's stage implies this row;
- operations, where there is a deadline;
- count: exactly m blocks are checkpointed.

For multipliers θ >= 0 of head, recompute and operations, the greatest ``sum_j (value - θ·cost) + θ·capacity`` over
all ways to checkpoint exactly m blocks is at least the value of every plan of the case that fits: each gets its value
plus θ times what it leaves unused. It is found at once: every block's best plain and best checkpointed choice, and
the m blocks that gain most by the latter. No θ is wrong, good ones are tighter.
"""

from dataclasses import dataclass

import numpy as np

from fedpilot.allocation.costs import Bools, Costs, Floats, Ints

HEAD, RECOMPUTE, OPERATIONS = range(3)
"""The kinds of rows."""
FORBIDDEN = 2**54
"""Cost of a choice that may not be taken: above all limits, and sums over blocks do not overflow."""
MISSING = -64.0
"""Reduced value of a choice that does not exist: worse than any, but finite; a bound only grows by it."""


@dataclass(frozen=True)
class Limits:
    """What the clients of a batch have: (num_clients,) each."""

    budget_bytes: Ints
    max_flops: Ints

    def of(self, clients: Ints | slice) -> "Limits":
        """Those of some clients."""
        return Limits(self.budget_bytes[clients], self.max_flops[clients])


class Relaxation:
    """The cases of a cost table and their rows.

    Attributes:
        deadline: Whether operations are limited.
        lowest: (num_cases,) s of each case.
        count: (num_cases,) m of each case.
        recompute: (num_cases,) least backward peak of the topmost checkpointed block; 0 where m = 0.
        kinds: The kinds of the rows that apply.
        costs_of_rows: (3, 2, num_blocks, num_choices) bytes or operations of each kind, stacked as in ``Costs``.
        least_peak: (num_cases,) no plan of the case has less.
        least_flops: (num_cases,) no plan of the case has less.
        scale: (num_rows,) bytes or operations that count as 1 in ``rows``.
        rows: (num_rows, 2, num_blocks, num_choices) the rows that apply, less what every block costs, scaled.
    """

    def __init__(self, costs: Costs, *, deadline: bool) -> None:
        self.costs, self.deadline = costs, deadline
        some = bool(costs.recomputes.any())
        blocks = np.arange(costs.num_blocks)
        s, m = np.meshgrid(blocks, np.arange(costs.num_blocks + 1 if some else 1), indexing="ij")
        exists = m <= costs.num_blocks - s
        self.lowest: Ints = s[exists].astype(np.int64)
        self.count: Ints = m[exists].astype(np.int64)
        self.recompute = self._least_recompute()
        saved = np.where(costs.recomputes, costs.saved, np.minimum(costs.saved, costs.gradient))
        self.costs_of_rows: Ints = np.stack([costs.resident + costs.saved, costs.resident + saved, costs.flops])
        needs = costs.table.head_gradient + costs.backward[:, -1] - costs.table.head_peak
        self.costs_of_rows[HEAD, :, -1] += np.maximum(0, needs)
        self.kinds = [HEAD, *[RECOMPUTE] * some, *[OPERATIONS] * deadline]
        self._set_rows()
        self._set_least()

    def _set_rows(self) -> None:
        costs, table = self.costs, self.costs.table
        rows = self.costs_of_rows.copy()
        # What every plain and every checkpointed block costs at least is charged to the case, which knows their
        # numbers: then rows differ in what is left to decide, and multipliers are found in few steps.
        plain = np.where(costs.recomputes, FORBIDDEN, rows[:, 0]).min(axis=(1, 2))
        checkpointed = np.where(costs.recomputes, rows[:, 0], FORBIDDEN).min(axis=(1, 2))
        rows -= np.where(costs.recomputes, checkpointed[:, None], plain[:, None])[:, None, None, :]
        scale = np.maximum(np.abs(rows).max(axis=(1, 3)).sum(axis=1), 1).astype(np.float64)
        self.rows: Floats = (rows / scale[:, None, None, None])[self.kinds]
        standing = table.fixed + costs.frozen_resident[self.lowest]
        taken = np.stack(
            [
                standing + table.head_peak,
                standing + table.head_gradient + self.recompute,
                table.head_flops + costs.frozen_flops[self.lowest],
            ]
        )
        num_plain = costs.num_blocks - self.lowest - self.count
        taken += np.where(num_plain > 0, num_plain * plain[:, None], 0)
        taken += np.where(self.count > 0, self.count * checkpointed[:, None], 0)
        self._taken: Ints = taken[self.kinds]  # (num_rows, num_cases) of each row's limit, by the case alone
        self.scale: Floats = scale[self.kinds]

    def _least_recompute(self) -> Ints:
        costs, last = self.costs, self.costs.num_blocks - 1
        least = np.where(costs.recomputes, costs.backward, FORBIDDEN)
        lowest = np.where(costs.trains, least[1], FORBIDDEN).min(axis=1)
        above = np.minimum.accumulate(least[0].min(axis=1)[::-1])[::-1]
        above = np.append(above[1:], FORBIDDEN)  # of all blocks above s
        alone = np.minimum(lowest, above)[self.lowest]
        result = np.where(self.count == 1, alone, above[np.minimum(self.lowest, last)])
        return np.where(self.count == 0, 0, result)

    def limits_of_rows(self, limits: Limits) -> Floats:
        """(num_rows, num_clients) what each row's sum is limited by, before what the case takes."""
        by_kind = (limits.budget_bytes, limits.budget_bytes, limits.max_flops)
        return np.stack([by_kind[kind] for kind in self.kinds])

    def capacity(self, limits: Limits, case: Ints) -> Floats:
        """(num, num_rows) what the rows of one case each may sum to."""
        return np.asarray((self.limits_of_rows(limits) - self._taken[:, case]).T / self.scale)

    def all_cases(self, values: Floats, limits: Limits, theta: Floats) -> Floats:
        """Bound of every case at one θ a client: (num_clients, num_cases).

        Args:
            values: (num_clients, num_blocks, num_choices).
            limits: Of the clients.
            theta: (num_clients, num_rows).
        """
        num_blocks, (above, lowest) = self.costs.num_blocks, self._best(values, theta)
        plain = np.cumsum(above[0][:, ::-1], axis=1)[:, ::-1] - above[0] + lowest[0]  # (client, s)
        most = np.zeros((len(values), num_blocks, num_blocks + 1))  # (client, s, m): the m greatest gains, summed
        if self.count.any():
            blocks = np.arange(num_blocks)
            gain = np.where(blocks[:, None] < blocks, (above[1] - above[0])[:, None, :], 2 * MISSING)
            gain[:, blocks, blocks] = lowest[1] - lowest[0]
            np.cumsum(-np.sort(-gain, axis=2), axis=2, out=most[:, :, 1:])
        bound = np.asarray(plain[:, self.lowest] + most[:, self.lowest, self.count])
        for row, limit in enumerate(self.limits_of_rows(limits)):
            bound += (theta[:, row] / self.scale[row])[:, None] * (limit[:, None] - self._taken[row])
        return bound

    def _best(self, values: Floats, theta: Floats) -> tuple[list[Floats], list[Floats]]:
        """Best reduced value of a block above s and as s, plain and checkpointed: (num_clients, num_blocks) each."""
        best = [[np.full(values.shape[:2], MISSING) for _ in range(2)] for _ in range(2)]
        for choice in range(self.costs.num_choices):  # one at a time: its (client, block) plane stays in the cache
            for which in (0, 1) if self.costs.trains[choice] else (0,):
                reduced = values[:, :, choice].copy()
                for row, cost in enumerate(self.rows[:, which, :, choice]):
                    reduced -= theta[:, row, None] * cost
                so_far = best[which][int(self.costs.recomputes[choice])]
                np.maximum(so_far, reduced, out=so_far)
        return best[0], best[1]

    def possible(self, limits: Limits) -> Bools:
        """(num_clients, num_cases) false where even the cheapest choices break a row."""
        fits = limits.budget_bytes[:, None] >= self.least_peak
        return np.asarray(fits & (limits.max_flops[:, None] >= self.least_flops))

    def _set_least(self) -> None:
        table, at = self.costs.table, (np.arange(len(self.lowest)), self.costs.num_blocks, self.count)
        standing = table.fixed + self.costs.frozen_resident[self.lowest]
        head, recompute, flops = (self.least_sums(at[0], kind)[at] for kind in (HEAD, RECOMPUTE, OPERATIONS))
        recompute += table.head_gradient + self.recompute
        self.least_peak: Ints = standing + np.maximum(table.head_peak + head, recompute)
        self.least_flops: Ints = table.head_flops + self.costs.frozen_flops[self.lowest] + flops

    def least_sums(self, case: Ints, kind: int, allowed: Bools | None = None) -> Ints:
        """Least sums of a cost over the blocks below k with exactly c of them checkpointed.

        Args:
            case: (num,) cases.
            kind: HEAD, RECOMPUTE or OPERATIONS.
            allowed: (num, num_blocks, num_choices) or all that the case allows.

        Returns:
            (num, num_blocks + 1, largest m + 2), by case, k, c; the last c is impossible, and so is c = -1.
        """
        costs, cost, num_blocks = self.costs, self.costs_of_rows[kind], self.costs.num_blocks
        result = np.full((len(case), num_blocks + 1, int(self.count.max()) + 2), FORBIDDEN, dtype=np.int64)
        result[:, 0, 0] = 0
        for k in range(num_blocks):
            lowest = (self.lowest[case] == k)[:, None]
            own = np.where(lowest, np.where(costs.trains, cost[1, k], FORBIDDEN), cost[0, k])
            if allowed is not None:
                own = np.where(allowed[:, k], own, FORBIDDEN)
            frozen = self.lowest[case] > k
            plain = own[:, ~costs.recomputes].min(axis=1, initial=FORBIDDEN)
            checkpointed = own[:, costs.recomputes].min(axis=1, initial=FORBIDDEN)
            plain, checkpointed = np.where(frozen, 0, plain), np.where(frozen, FORBIDDEN, checkpointed)
            result[:, k + 1] = result[:, k] + plain[:, None]
            np.minimum(result[:, k + 1, 1:], result[:, k, :-1] + checkpointed[:, None], out=result[:, k + 1, 1:])
        return result
