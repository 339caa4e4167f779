"""Weights that blocks are drawn by: Fed-HeLLo's geometric shapes, and its clusters of importance scores."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Literal, TypeAlias

import numpy as np

from fedpilot.errors import PlanError

Shape: TypeAlias = Literal["triangle", "inverted-triangle", "bottleneck", "uniform"]

_SHAPES: Mapping[Shape, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "triangle": ((1 / 3, 2 / 3), (3, 2, 1)),
    "inverted-triangle": ((1 / 3, 2 / 3), (1, 2, 3)),
    "bottleneck": ((3 / 12, 5 / 12, 8 / 12, 9 / 12), (3, 2, 1, 2, 3)),
    "uniform": ((), (1,)),
}
"""Where the levels change, as shares of the depth from the input, and the levels."""


def shape_weights(shape: Shape, num_blocks: int) -> list[float]:
    """Weights of the blocks, from the input up; they sum to 1.

    >>> [round(27 * weight) for weight in shape_weights("bottleneck", 12)]
    [3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3]

    Raises:
        PlanError: The shape is unknown.
    """
    if shape not in _SHAPES:
        raise PlanError(f"shape must be one of {', '.join(_SHAPES)}, got {shape!r}; choose one of them")
    edges, levels = _SHAPES[shape]
    return _shares([levels[bisect(edges, (block + 0.5) / num_blocks)] for block in range(num_blocks)])


def cluster_weights(scores: Sequence[float]) -> list[float]:
    """One part for the blocks of the lowest cluster, two and three for the next; they sum to 1."""
    return _shares([1 + cluster for cluster in three_means(scores)])


def three_means(scores: Sequence[float]) -> list[int]:
    """Cluster of each score, 0 for the lowest: the partition into at most three of the least squared spread.

    On a line the best clusters are runs of the sorted scores, so trying all pairs of cuts is exact; equal scores are
    never cut apart.

    >>> three_means([5.0, 1.0, 5.2, 9.0, 1.1])
    [1, 0, 1, 2, 0]
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    cuts = [i for i in range(1, len(ordered)) if ordered[i] != ordered[i - 1]]

    def spread(chosen: tuple[int, ...]) -> float:
        return sum(float(ordered[i:j].var()) * (j - i) for i, j in pairwise((0, *chosen, len(ordered))))

    best = min(combinations(cuts, min(2, len(cuts))), key=spread)
    return [bisect([float(ordered[cut]) for cut in best], score) for score in scores]


def _shares(parts: Sequence[int]) -> list[float]:
    return [part / sum(parts) for part in parts]
