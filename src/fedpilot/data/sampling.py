"""Choosing some of a table's rows with every class and group in proportion."""

import numpy as np
from numpy.typing import NDArray

from fedpilot.data.tables import Rows

MIN_GROUP = 5
"""Rows that a column's values must have on average for the column to group them."""


def strata(rows: Rows) -> NDArray[np.int64]:
    """Number of each row's combination of class and kept columns, but for columns whose values hardly recur."""
    combined = rows.labels
    for values in rows.columns.values():
        distinct, codes = np.unique(values, return_inverse=True)
        if len(distinct) * MIN_GROUP > len(rows):
            continue
        _, combined = np.unique(combined * (codes.max(initial=0) + 1) + codes, return_inverse=True)
    return combined


def spread(groups: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """``count`` positions, each group with its share to within one: equally spaced steps through the sorted groups.

    >>> spread(np.array([0, 1, 0, 1, 0, 1, 0, 1]), 4).tolist()
    [2, 6, 3, 7]
    """
    order = np.argsort(groups, kind="stable")
    count = min(count, len(order))
    return order[(2 * np.arange(count) + 1) * len(order) // max(2 * count, 1)]
