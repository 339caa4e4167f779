"""Robust rules: a round's uploads replaced by what a hostile minority of them cannot move far.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", 2018, arXiv 1803.01498 (median
and trimmed mean, entry by entry); Blanchard et al., "Byzantine-Tolerant Machine Learning", 2017, arXiv 1703.02757
(Multi-Krum).

A rule stands between the uploads and ``aggregate``: every upload keeps its client and its numbers, and gets the
robust value of each tensor, whose mean over the holders is that value again. So methods stay as they are. All uploads
of a round are held at once.

The rules look at the tensors as they are averaged and not at the products: for any c, ``(c A, B / c)`` changes no
weight, and ruins a mean of factors. Clients count alike: how many examples one has is its own claim.

Differs from the papers: with fewer uploads than ``2 f + 3``, Multi-Krum takes the largest f that its n allow.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from fedpilot import tensors
from fedpilot.errors import PlanError
from fedpilot.types import Averages, Averaging, Tensors, Upload

Rule: TypeAlias = Literal["mean", "trimmed-mean", "median", "multi-krum"]


@dataclass(frozen=True)
class Robust:
    """Which rule, and against how many.

    Attributes:
        rule: ``mean`` leaves uploads as they are; ``trimmed-mean`` and ``median`` go entry by entry over a tensor's
            holders; ``multi-krum`` takes the mean of the uploads that lie closest to their neighbours.
        attackers: Share of the uploads that may be hostile. The trimmed mean drops ``floor(share * holders)`` values
            at each end; Multi-Krum drops ``floor(share * uploads)`` uploads. The median needs no such number.
    """

    rule: Rule = "mean"
    attackers: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.attackers < 0.5:
            raise PlanError(f"attackers must lie in [0, 0.5), got {self.attackers}; no rule survives a hostile half")

    def check(self, algorithm: object) -> None:
        """Refuses a method whose aggregation is not a plain mean of alike tensors.

        Raises:
            PlanError: As said.
        """
        if self.rule == "mean":
            return
        how = algorithm.averaging if isinstance(algorithm, Averages) else None
        if reason := self._against(how):
            raise PlanError(
                f"rule {self.rule!r} must replace a plain mean, got {type(algorithm).__name__}, {reason}; take fedit, "
                "ffa-lora with participation 'all' or 'exclusive', or, but for 'multi-krum', fed-pilot with "
                "aggregation 'layerwise' and one rank, each with weights 'uniform'; or rule 'mean' with screening"
            )

    def __call__(self, uploads: Iterable[Upload]) -> Iterator[Upload]:
        """The uploads with robust tensors; none where Multi-Krum has fewer than three to choose among."""
        if self.rule == "mean":
            yield from uploads
            return
        held = list(uploads)
        if self.rule == "multi-krum":
            robust = self._krum([upload.tensors for upload in held])
        else:
            names = dict.fromkeys(name for upload in held for name in upload.tensors)
            robust = {name: value for name in names if (value := self._entrywise(name, held)) is not None}
        if self.rule == "multi-krum" and len(held) < 3:
            return
        for upload in held:
            yield replace(upload, tensors={name: robust.get(name, value) for name, value in upload.tensors.items()})

    def _against(self, how: Averaging | None) -> str:
        """Why the rule cannot serve the method; empty where it can."""
        if how is None:
            return "which does not average what clients send"
        if not how.same_shapes:
            return "whose clients send a tensor in unlike shapes"
        if self.rule == "multi-krum" and not how.same_names:
            return "whose clients send unlike tensors"
        return "" if how.uniform else "which weighs clients unlike"

    def _entrywise(self, name: str, held: Sequence[Upload]) -> torch.Tensor | None:
        """Robust value of a tensor over its holders; ``None`` where no value is dropped."""
        values = [upload.tensors[name] for upload in held if name in upload.tensors]
        count, drop = len(values), math.floor(self.attackers * len(values))
        if self.rule == "median":
            drop = (count - 1) // 2
        if drop == 0:
            return None
        return torch.stack(values).sort(dim=0).values[drop : count - drop].mean(dim=0)

    def _krum(self, held: Sequence[Tensors]) -> Tensors:
        """Mean of the n - f uploads with the smallest sums of squared distances to their n - f - 2 nearest."""
        count = len(held)
        hostile = min(math.floor(self.attackers * count), (count - 3) // 2)
        if hostile < 1:
            return {}
        nearest = squared_distances(held).sort(dim=1).values[:, 1 : count - hostile - 1]
        chosen = nearest.sum(dim=1).sort(stable=True).indices[: count - hostile].sort().values
        return tensors.weighted_mean((held[index], 1.0) for index in chosen.tolist())


def squared_distances(held: Sequence[Tensors]) -> torch.Tensor:
    """(n, n) squared Euclidean distances between sets of the same tensors."""
    gram = torch.zeros(len(held), len(held), dtype=torch.float64)
    for name in held[0]:
        rows = torch.stack([each[name].flatten() for each in held]).double()
        rows -= rows.median(dim=0).values  # near to most of them, so that close ones keep their digits
        gram += rows @ rows.T
    squares = gram.diagonal()
    found = (squares[:, None] + squares[None, :] - 2 * gram).clamp_(min=0.0)
    return found.fill_diagonal_(-1.0)  # an upload sorts ahead of all others as its own neighbour
