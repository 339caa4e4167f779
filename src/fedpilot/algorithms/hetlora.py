"""HetLoRA: clients hold truncations of one adapter at ranks of their own and prune themselves.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", 2024, arXiv 2401.06432v2.

Differs from the paper: ranks are the largest that fit a client's memory (the paper draws them at random); one norm a
client over all modules weighs it by default (the paper leaves open whether norms are per module); slots above the
largest rank of a round are kept for richer rounds; the dense head, which the paper does not have, is averaged by
examples.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from fedpilot import lora, planning, tensors
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import Averaging, ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload


@dataclass(frozen=True)
class HetLoRAState:
    """The global adapter at rank r_max and the ranks that clients came back with, which they never exceed again."""

    adapter: Tensors
    ranks: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class HetLoRA:
    """HetLoRA.

    Attributes:
        r_min: Smallest rank; a client that cannot train it everywhere is left out.
        r_max: Rank of the global adapter.
        gamma: γ; the last (1 - γ) r_k slots are penalised and may be pruned. 1 switches pruning off.
        lam: λ, factor of the penalty on those slots.
        weights: ``sparsity`` weighs a client by S_k = ||B_k A_k||, as the paper; ``examples`` and ``uniform`` do not.
        norm: Whether S_k is one number a ``client`` or one a ``module``.
    """

    spec: ModelSpec
    profile: MemoryProfile
    r_min: int = 2
    r_max: int = 16
    gamma: float = 0.99
    lam: float = 0.01
    weights: Literal["sparsity", "examples", "uniform"] = "sparsity"
    norm: Literal["client", "module"] = "client"

    def __post_init__(self) -> None:
        planning.check_ranks(self.r_min, self.r_max)
        if not 0 < self.gamma <= 1:
            raise PlanError(f"gamma must lie in (0, 1], got {self.gamma}; 1 switches pruning off")

    @property
    def averaging(self) -> Averaging:
        """Of padded pairs; ranks follow what clients prune."""
        return Averaging(self.weights == "uniform", same_shapes=False, tensors_only=self.gamma == 1, padded=True)

    def init(self, rng: np.random.Generator) -> HetLoRAState:
        """A fresh adapter at rank r_max."""
        return HetLoRAState(adapter=lora.init(self.spec, dict.fromkeys(self.spec.modules, self.r_max), rng))

    def plan(
        self, state: HetLoRAState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """All modules at the largest rank that fits and that the client has not pruned away."""
        return [
            planning.largest_rank(
                self.profile,
                self.spec,
                client,
                range(self.r_min, state.ranks.get(client.client_id, self.r_max) + 1),
            )
            for client in cohort
        ]

    def distribute(self, state: HetLoRAState, plan: Plan) -> Task:
        """Truncation: the first r_k rows of A and columns of B."""
        return Task(plan, lora.truncate(state.adapter, plan.ranks))

    def local_update(self, task: Task, site: Site) -> Upload:
        """min F_k + λ Σ ||B[:, q:]|| ||A[q:]||, q = floor(γ r_k); a tail that shrank is pruned."""
        rank = next(iter(task.plan.ranks.values()))
        q = math.floor(self.gamma * rank)
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable, penalty=lambda live: self.lam * tail_norm(live, q))
        trained = tensors.only(site.model.read(), task.plan.trainable)
        if tail_norm(trained, q) < tail_norm(task.tensors, q):  # strictly; an empty tail never shrinks
            rank = max(self.r_min, q)
            trained = lora.truncate(trained, dict.fromkeys(task.plan.ranks, rank))
        return Upload(site.profile.client_id, site.profile.num_examples, trained, {**metrics, "rank": float(rank)})

    def aggregate(self, state: HetLoRAState, uploads: Iterable[Upload]) -> HetLoRAState:
        """A = Σ p_k pad(A_k), B = Σ p_k pad(B_k), with p_k in proportion to S_k; pad to max r_k of the round.

        The padding is averaged in, as the paper does: a slot that few clients hold shrinks by what the others weigh.
        One that nobody in the round holds stays as it was: zeros in both factors would never train again.
        """
        mean = lora.SlotMean(state.adapter, padded=True)
        ranks = dict(state.ranks)
        for upload in uploads:
            ranks[upload.client_id] = max(self.r_min, _rank(upload))
            for weight, names in self._weights(upload):
                mean.add(tensors.select(upload.tensors, names), weight)
        return HetLoRAState(adapter={**state.adapter, **mean.result()}, ranks=ranks)

    def deploy(self, state: HetLoRAState) -> Deployment:
        """The global adapter at rank r_max."""
        return Deployment(state.adapter)

    def _weights(self, upload: Upload) -> Iterable[tuple[float, Sequence[str]]]:
        """Weight of each group of an upload's tensors; the head always goes by examples."""
        modules = lora.modules_of(upload.tensors)
        head = [name for name in upload.tensors if name in self.spec.head]
        yield float(upload.num_examples) if self.weights != "uniform" else 1.0, head
        if self.weights == "sparsity" and self.norm == "module":
            for module in modules:
                yield sparsity(upload.tensors, [module]), lora.names([module])
        elif self.weights == "sparsity":
            yield sparsity(upload.tensors, modules), lora.names(modules)
        else:
            yield upload.weight(self.weights), lora.names(modules)


def _rank(upload: Upload) -> int:
    """The largest rank that came; what the client says of it is for people."""
    return max((upload.tensors[lora.a_name(m)].shape[0] for m in lora.modules_of(upload.tensors)), default=0)


def tail_norm(adapter: Tensors, q: int) -> torch.Tensor:
    """Σ over modules of ||B[:, q:]||_F ||A[q:]||_F, a scalar."""
    products = [
        torch.linalg.norm(adapter[lora.b_name(module)][:, q:]) * torch.linalg.norm(adapter[lora.a_name(module)][q:])
        for module in lora.modules_of(adapter)
    ]
    return torch.stack(products).sum()


def sparsity(adapter: Tensors, modules: Sequence[str], eps: float = 1e-8) -> float:
    """S_k = ||B_k A_k||_F over the modules, without the product; eps keeps a round of zeros a plain mean."""
    pairs = [(adapter[lora.a_name(m)], adapter[lora.b_name(m)]) for m in modules]
    squares = [lora.product_norm(a, b, dtype=torch.float32) ** 2 for a, b in pairs]
    return math.sqrt(sum(squares)) + eps
