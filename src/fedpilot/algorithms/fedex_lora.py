"""FedEx-LoRA: A and B are averaged apart, and what that gets wrong is added to the base, so that the mean is exact.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models",
ACL 2025, arXiv 2410.09432.

Differs from the paper: the residual is sum p_k (B_k - B)(A_k - A) for any weights, of rank (K - 1) r at most, where the
paper's has K r; a client that missed rounds gets their residuals (the paper's clients take part in every round).
Differs from the released code: the residual of a linear layer is not transposed.
Reconstructed: ``assign = "keep"``, of which the paper gives the rule but not what absent clients do.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from fedpilot import base_deltas, lora, planning, tensors
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import BaseDelta, ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload

NOISE = 1e-12
"""Singular values below this share of the summed terms' norms are rounding of float64."""


@dataclass(frozen=True)
class FedExLoRAState:
    """What the server remembers.

    Attributes:
        adapter: What new clients start from: A and B, and the head; the head alone where pairs are drawn each round.
        seed: Of the pairs that are drawn.
        base: All residuals so far.
        held: Client -> version of the base that it has.
        own: Client -> its pairs as it last sent them, with ``assign = "keep"``.
    """

    adapter: Tensors
    seed: int
    base: BaseDelta = field(default_factory=BaseDelta)
    held: Mapping[int, int] = field(default_factory=dict)
    own: Mapping[int, Tensors] = field(default_factory=dict)


@dataclass(frozen=True)
class FedExLoRA:
    """FedEx-LoRA.

    Attributes:
        rank: Rank r of every pair.
        ranks: Ranks of the clients, as methods of unlike ranks take them; must name no other than ``rank``.
        residual_rank: r' of the truncated variant; ``None`` for the exact residual.
        assign: What clients start from: ``avg``, the means A and B; ``keep``, the pair that each sent last;
            ``reinit``, a fresh pair. The base takes up the rest of the exact mean.
        participation: As in FedIT: ``all``, ``exclusive`` or ``straggler``.
        weights: ``uniform`` as the paper; ``examples`` weighs clients by n_k.
        budget_bytes: Smallest budget of the population, for ``straggler``.
    """

    changes_base: ClassVar[bool] = True

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    ranks: tuple[int, ...] = ()
    residual_rank: int | None = None
    assign: Literal["avg", "keep", "reinit"] = "avg"
    participation: planning.Participation = "all"
    weights: Literal["examples", "uniform"] = "uniform"
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_alike(self.ranks)
        if self.residual_rank is not None and self.residual_rank < 1:
            raise PlanError(f"residual_rank must be at least 1, got {self.residual_rank}; choose fedit for none")

    def init(self, rng: np.random.Generator) -> FedExLoRAState:
        """A fresh adapter; B = 0, so the model starts as the base.

        Raises:
            PlanError: ``ranks`` names another rank than ``rank``.
        """
        _check_alike({self.rank, *self.ranks})
        ranks = {} if self.assign == "reinit" else dict.fromkeys(self.spec.modules, self.rank)
        return FedExLoRAState(adapter=lora.init(self.spec, ranks, rng), seed=int(rng.integers(2**63)))

    def plan(
        self, state: FedExLoRAState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """The same plan for everybody.

        Raises:
            PlanError: ``participation = "all"`` and a client cannot train everything.
        """
        return planning.alike(self.profile, self.spec, cohort, self.rank, self.participation, self.budget_bytes)

    def distribute(self, state: FedExLoRAState, plan: Plan) -> Task:
        """A_k <- A, B_k <- B, and the residuals that the client lacks."""
        lacking = base_deltas.lacking(state.base, state.held, plan.client_id)
        if self.assign == "reinit":
            pairs, drawn = lora.draw(self.spec, [state.seed, state.base.version], plan.ranks, self.rank)
            return Task(plan, {**pairs, **state.adapter}, lacking, drawn)
        return Task(plan, {**state.adapter, **state.own.get(plan.client_id, {})}, lacking)

    def local_update(self, task: Task, site: Site) -> Upload:
        """W <- W + s ΔW_res; then local epochs from the assigned pair."""
        if self.assign == "keep":
            task = replace(task, base_delta=self._without_own(task))
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        return site.upload(task.plan, metrics)

    def aggregate(self, state: FedExLoRAState, uploads: Iterable[Upload]) -> FedExLoRAState:
        """A = Σ p_k A_k, B = Σ p_k B_k, ΔW_res = Σ p_k B_k A_k - B A; with ``keep`` less what each started from."""
        sums = {module: _Products(*shape) for module, shape in self.spec.modules.items()}
        mean, held, own, total = tensors.HolderMean(), dict(state.held), dict(state.own), 0.0
        for upload in uploads:
            weight = upload.weight(self.weights)
            exact = {name: tensor.double() for name, tensor in upload.tensors.items()}
            mean.add(exact, weight)
            for module in lora.modules_of(exact):
                sums[module].add(module, exact, weight)
                if self.assign == "keep":
                    sums[module].add(module, own.get(upload.client_id, state.adapter), -weight)
            if self.assign == "keep":
                own[upload.client_id] = {name: t for name, t in upload.tensors.items() if name not in self.spec.head}
            held[upload.client_id] = state.base.version
            total += weight
        means, step = mean.result(), dict[str, torch.Tensor]()
        for module in lora.modules_of(means):
            if self.assign == "avg":
                sums[module].add(module, means, -total)
            b, a = sums[module].factors(self.residual_rank)
            step |= base_deltas.pair(module, (self.spec.scale / total * b).float(), a.float())
        assigned = means if self.assign == "avg" else tensors.only(means, frozenset(self.spec.head))
        adapter = {**state.adapter, **{name: tensor.float() for name, tensor in assigned.items()}}
        return FedExLoRAState(adapter, state.seed, base_deltas.extended(state.base, step), held, own)

    def deploy(self, state: FedExLoRAState) -> Deployment:
        """The base with all residuals, and the mean pair; with ``keep`` and ``reinit`` all of it is in the base."""
        return Deployment(state.adapter, state.base)

    def _without_own(self, task: Task) -> BaseDelta:
        """The base less the client's own product: with its own pair beside it, it starts as the global model."""
        step: dict[str, torch.Tensor] = {}
        for module in lora.modules_of(task.tensors):
            b, a = task.tensors[lora.b_name(module)], task.tensors[lora.a_name(module)]
            step |= base_deltas.pair(module, -self.spec.scale * b, a)
        return replace(base_deltas.extended(task.base_delta, step), since=task.base_delta.since)


def _check_alike(ranks: Iterable[int]) -> None:
    if len(unlike := sorted(set(ranks))) > 1:
        raise PlanError(
            f"ranks must all be equal, got {', '.join(map(str, unlike))}: A and B are averaged at one shape; "
            "choose flora, flexlora or hetlora for unlike ranks"
        )


class _Products:
    """Σ w_k B_k A_k of a module in float64, one client at a time, and the size of its terms, for rounding."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self._sum = lora.ProductSum(out_features, in_features, dtype=torch.float64)
        self._size = 0.0

    def add(self, module: str, adapter: Tensors, weight: float) -> None:
        b, a = adapter[lora.b_name(module)].double(), adapter[lora.a_name(module)].double()
        self._sum.add(b, a, weight)
        self._size += abs(weight) * float(b.norm() * a.norm())

    def factors(self, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """B (out, k) and A (k, in) of the sum, k its own rank; with a smaller ``rank``, of the sum nearest to it."""
        u, s, vh = self._sum.svd()
        kept = int((s > NOISE * self._size).sum())
        kept = kept if rank is None else min(kept, rank)
        root = s[:kept].sqrt()
        return u[:, :kept] * root, root[:, None] * vh[:kept]
