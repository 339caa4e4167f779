"""XGBLoRA: a round is one booster, a rank-1 pair in a few random blocks, that is merged into the base and forgotten.

Zhang et al., "Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs", 2024,
arXiv 2410.19694.

The paper trains in one place. Ours: the mapping to clients. All of them train the same booster from the same draw, and
the server merges the exact mean of their pairs, its best rank-1 form, or, with A frozen, the mean of B.
Differs from the paper: blocks are drawn, not single layers; A is drawn uniformly, as PEFT does, not from a normal
distribution; the step α_t of a booster is 1; the head is averaged by examples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from fedpilot import base_deltas, lora, planning, tensors
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import (
    BaseDelta,
    ClientProfile,
    Deployment,
    Fresh,
    LeftOut,
    ModelSpec,
    Plan,
    Site,
    StepKind,
    Task,
    Tensors,
    Upload,
)


@dataclass(frozen=True)
class XGBLoRAState:
    """What the server remembers.

    Attributes:
        head: The global head.
        seed: Of the fresh pairs of all rounds.
        base: All boosters so far.
        held: Client -> version of the base that it has.
    """

    head: Tensors
    seed: int
    base: BaseDelta = field(default_factory=BaseDelta)
    held: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class XGBLoRA:
    """XGBLoRA.

    Attributes:
        blocks_per_round: L_s, blocks of one booster; ``None`` for a third of the model's.
        kappa: κ, most optimiser steps of a client on one booster.
        lam: λ, factor of the squared norm of the booster in the loss.
        server: What is merged: ``exact``, Σ p_k b_k a_k, of rank K; ``proj1``, its best rank-1 form; ``freeze_a``
            trains b alone beside one shared a, so that the mean of b is exact and of rank 1.
        weights: ``examples`` weighs clients by n_k; ``uniform`` does not.
    """

    changes_base: ClassVar[bool] = True

    spec: ModelSpec
    profile: MemoryProfile
    blocks_per_round: int | None = None
    kappa: int = 16
    lam: float = 0.0
    server: Literal["exact", "proj1", "freeze_a"] = "exact"
    weights: Literal["examples", "uniform"] = "examples"

    def __post_init__(self) -> None:
        if self.blocks_per_round is not None and self.blocks_per_round < 1:
            raise PlanError(
                f"blocks_per_round must be at least 1, got {self.blocks_per_round}; a booster needs a block"
            )
        if self.kappa < 1:
            raise PlanError(f"kappa must be at least 1, got {self.kappa}; a booster needs a step")
        if self.lam < 0:
            raise PlanError(f"lam must be zero or more, got {self.lam}; 0 switches the penalty off")

    @property
    def step_kind(self) -> StepKind:
        """With ``freeze_a`` a block trains B alone."""
        return StepKind(patterns=("B",) if self.server == "freeze_a" else ("AB",))

    def init(self, rng: np.random.Generator) -> XGBLoRAState:
        """The model as it is."""
        return XGBLoRAState(head=lora.init(self.spec, {}, rng), seed=int(rng.integers(2**63)))

    def plan(
        self, state: XGBLoRAState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """S_t, the same random blocks for everybody; who cannot train all of them trains the deepest that fit.

        Raises:
            PlanError: ``blocks_per_round`` exceeds the model's blocks.
        """
        blocks = sorted(set(self.spec.block_of.values()))
        count = self.blocks_per_round or max(1, round(len(blocks) / 3))
        if count > len(blocks):
            raise PlanError(f"blocks_per_round must be at most the model's {len(blocks)} blocks, got {count}; lower it")
        chosen = sorted(int(block) for block in rng.choice(blocks, count, replace=False))
        return [self._deepest(client, chosen) for client in cohort]

    def distribute(self, state: XGBLoRAState, plan: Plan) -> Task:
        """The fresh booster, a random and b = 0, that the client draws itself; and the boosters that it lacks."""
        pairs, drawn = self._fresh(state, plan.ranks)
        lacking = base_deltas.lacking(state.base, state.held, plan.client_id)
        return Task(plan, {**pairs, **state.head}, lacking, drawn)

    def local_update(self, task: Task, site: Site) -> Upload:
        """min F_k + λ (||a||² + ||b||²), κ steps on the merged model."""
        names = task.plan.trainable - frozenset(self.spec.head)

        def penalty(live: Tensors) -> torch.Tensor:
            return self.lam * torch.stack([live[name].square().sum() for name in sorted(names)]).sum()

        site.model.load(task)
        metrics = site.model.fit(
            task.plan.trainable, penalty=penalty if self.lam else None, max_steps=self.kappa, kind=self.step_kind
        )
        return site.upload(task.plan, metrics)

    def aggregate(self, state: XGBLoRAState, uploads: Iterable[Upload]) -> XGBLoRAState:
        """W_l <- W_l + s Σ p_k b_k a_k for l in S_t, over the clients that trained l."""
        products = lora.product_sums(self.spec)
        mean, held = tensors.HolderMean(), dict(state.held)
        for upload in uploads:
            weight = upload.weight(self.weights)
            mean.add(upload.tensors, weight)
            for module in lora.modules_of(upload.tensors):
                products[module].add(upload.tensors[lora.b_name(module)], upload.tensors[lora.a_name(module)], weight)
            held[upload.client_id] = state.base.version
        means, weights, step = mean.result(), mean.weights, dict[str, torch.Tensor]()
        trained = [module for module in self.spec.modules if lora.b_name(module) in means]
        shared = self._fresh(state, dict.fromkeys(trained, 1))[0] if self.server == "freeze_a" else {}
        for module in trained:
            total = weights[lora.b_name(module)]
            if self.server == "freeze_a":
                b, a = means[lora.b_name(module)], shared[lora.a_name(module)]
            elif self.server == "proj1":
                u, s, vh = products[module].svd()
                b, a = u[:, :1] * (s[0] / total), vh[:1]
            else:
                b, a = products[module].factors()
                b = b / total
            step |= base_deltas.pair(module, self.spec.scale * b, a)
        head = {**state.head, **tensors.only(means, frozenset(state.head))}
        return replace(state, head=head, base=base_deltas.extended(state.base, step), held=held)

    def deploy(self, state: XGBLoRAState) -> Deployment:
        """The merged base and the head; no pair is left beside it."""
        return Deployment(state.head, state.base)

    def _fresh(self, state: XGBLoRAState, ranks: Mapping[str, int]) -> tuple[Tensors, Fresh]:
        return lora.draw(self.spec, [state.seed, state.base.version], ranks, 1)

    def _deepest(self, client: ClientProfile, blocks: Sequence[int]) -> Plan | LeftOut:
        """Rank-1 pairs in the blocks, ascending, without the shallowest ones that do not fit; costs grow with depth."""
        client = replace(client, num_steps=min(client.num_steps, self.kappa))
        for first in range(len(blocks)):
            plan = planning.priced(self.profile, self._booster(client, blocks[first:]), client)
            if planning.fits(plan, client):
                return plan
        return planning.left_out(client, plan)

    def _booster(self, client: ClientProfile, blocks: Sequence[int]) -> Plan:
        modules = lora.blocks_modules(self.spec, blocks)
        trained = map(lora.b_name, modules) if self.server == "freeze_a" else lora.names(modules)
        trainable = frozenset(trained) | frozenset(self.spec.head)
        return Plan(client.client_id, dict.fromkeys(modules, 1), trainable)
