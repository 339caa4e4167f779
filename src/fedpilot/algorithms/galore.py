"""Federated GaLore: clients train whole weights with a projected optimiser; the server averages the changes.

Mahla et al., "Exploring Gradient Subspaces: Addressing and Overcoming LoRA's Limitations in Federated Fine-Tuning of
Large Language Models", 2024, arXiv 2410.23111v6; called FedFTG in its code. The optimiser is that of Zhao et al.,
"GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024, arXiv 2403.03507.

Differs from the paper: changes travel instead of weights, as exact factors where one projector made them and factors
are smaller; ``participation`` decides what happens where memory does not suffice. Differs from its code: gradients are
projected (there the optimiser gets no rank, so that it is plain AdamW); moments and projectors do not survive a round.
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
    LeftOut,
    ModelSpec,
    Plan,
    Projection,
    Site,
    StepKind,
    Task,
    Tensors,
    Upload,
)


@dataclass(frozen=True)
class GaLoreState:
    """What the server remembers.

    Attributes:
        head: The global head.
        base: All averaged changes so far.
        held: Client -> version of the base that it has.
    """

    head: Tensors
    base: BaseDelta = field(default_factory=BaseDelta)
    held: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GaLore:
    """Federated GaLore.

    Attributes:
        rank: r of the projection; at most the smaller side of every adapted module.
        gap: T, steps between two projectors.
        scale: α, factor on the projected-back step.
        participation: ``all`` asks everybody to train everything and refuses to run where that does not fit;
            ``exclusive`` leaves out whom it does not fit; ``suffix`` lets a client train the deepest blocks that fit.
        weights: ``uniform`` weighs clients alike as the paper does; ``examples`` weighs them by n_k.
    """

    changes_base: ClassVar[bool] = True

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 16
    gap: int = 200
    scale: float = 0.25
    participation: Literal["all", "exclusive", "suffix"] = "all"
    weights: Literal["examples", "uniform"] = "uniform"

    def __post_init__(self) -> None:
        for name in ("rank", "gap"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if not 0 < self.scale < float("inf"):
            raise PlanError(f"scale must be positive and finite, got {self.scale}; GaLore's own is 0.25")

    @property
    def step_kind(self) -> StepKind:
        """Projected AdamW on whole weights.

        Raises:
            PlanError: The rank is above a side of a module.
        """
        largest, module = min((min(shape), module) for module, shape in self.spec.modules.items())
        if self.rank > largest:
            raise PlanError(
                f"rank must be at most {largest}, the smaller side of {module} {self.spec.modules[module]}, "
                f"got {self.rank}; choose at most {largest}, or a method whose pairs may have any rank, such as fedit"
            )
        return StepKind(patterns=("W",), projection=Projection(self.rank, self.gap, self.scale))

    def init(self, rng: np.random.Generator) -> GaLoreState:
        """The model as it is.

        Raises:
            PlanError: The rank is above a side of a module.
        """
        _ = self.step_kind  # refuses before the first round
        return GaLoreState(head=lora.init(self.spec, {}, rng))

    def plan(
        self, state: GaLoreState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """All weights, or those of the deepest blocks that fit.

        Raises:
            PlanError: ``participation = "all"`` and a client cannot train everything.
        """
        lowest = sorted(set(self.spec.block_of.values())) if self.participation == "suffix" else [0]
        plans = [self._plan_from(block) for block in lowest]
        entries = planning.first_that_fits(self.profile, plans, cohort)
        if self.participation == "all":
            return planning.required(entries, cohort, "everything", "'suffix' or 'exclusive'")
        return entries

    def distribute(self, state: GaLoreState, plan: Plan) -> Task:
        """The head, and the averaged changes that the client lacks."""
        return Task(plan, state.head, base_deltas.lacking(state.base, state.held, plan.client_id))

    def local_update(self, task: Task, site: Site) -> Upload:
        """Local epochs from W^{t-1}; up goes ΔW_k = W_k - W^{t-1}, as factors where these say it exactly."""
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable, kind=self.step_kind)
        after = site.model.read()
        changes = dict(tensors.only(after, task.plan.trainable))
        for module in self.spec.modules:
            weight, pair = base_deltas.weight_name(module), tensors.only(after, frozenset(pair_names(module)))
            if pair and tensors.num_bytes(pair) < tensors.num_bytes({weight: changes[weight]}):
                del changes[weight]
                changes |= pair
        return Upload(site.profile.client_id, site.profile.num_examples, changes, metrics)

    def aggregate(self, state: GaLoreState, uploads: Iterable[Upload]) -> GaLoreState:
        """W^t = W^{t-1} + Σ p_k ΔW_k over the clients that trained W; factors are stacked until dense is smaller."""
        stacks = lora.product_sums(self.spec)
        dense: dict[str, torch.Tensor] = {}
        totals, head, held = dict.fromkeys(stacks, 0.0), tensors.HolderMean(), dict(state.held)
        for upload in uploads:
            p, changes = upload.weight(self.weights), upload.tensors
            for module, stack in stacks.items():
                (a, b), weight = pair_names(module), base_deltas.weight_name(module)
                if a in changes:
                    stack.add(changes[b], changes[a], p)
                elif weight in changes:
                    dense[module] = torch.add(dense.get(module, torch.zeros(())), changes[weight], alpha=p)
                totals[module] += p if a in changes or weight in changes else 0.0
            head.add(tensors.only(changes, frozenset(state.head)), p)
            held[upload.client_id] = state.base.version
        step: dict[str, torch.Tensor] = {}
        for module, total in totals.items():
            left, right = stacks[module].factors()
            if module in dense:
                step[base_deltas.weight_name(module)] = (dense[module] + left @ right) / total
            elif total:
                step |= base_deltas.pair(module, left / total, right)
        base = base_deltas.extended(state.base, step)
        return replace(state, head={**state.head, **head.result()}, base=base, held=held)

    def deploy(self, state: GaLoreState) -> Deployment:
        """The changed base and the head; there is no pair."""
        return Deployment(state.head, state.base)

    def _plan_from(self, lowest: int) -> Plan:
        modules = lora.blocks_modules(self.spec, range(lowest, self.spec.num_blocks))
        return Plan(-1, {}, frozenset(map(base_deltas.weight_name, modules)) | frozenset(self.spec.head))


def pair_names(module: str) -> tuple[str, str]:
    """Names of the factors of a module's change: (rank, in), (out, rank)."""
    return base_deltas.a_name(module), base_deltas.b_name(module)
