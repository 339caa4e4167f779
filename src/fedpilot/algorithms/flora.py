"""FLoRA: clients train fresh pairs at ranks of their own; the server stacks them and merges the stack into the base.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", 2024,
arXiv 2409.05976.

Differs from the paper: ranks are the largest that fit a client's memory (the paper gives them); all clients of a round
draw the same rows of A, from a seed, so that A does not travel down; a client that missed rounds gets their stacks
(the paper's clients take part in every round); a stack that is larger than the weight travels as the dense change; the
head, which the paper does not have, is averaged.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from fedpilot import base_deltas, lora, planning, tensors
from fedpilot.memory import MemoryProfile
from fedpilot.types import BaseDelta, ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload


@dataclass(frozen=True)
class FLoRAState:
    """What the server remembers.

    Attributes:
        head: The global head.
        seed: Of the fresh pairs of all rounds.
        base: All stacks so far.
        held: Client -> version of the base that it has.
    """

    head: Tensors
    seed: int
    base: BaseDelta = field(default_factory=BaseDelta)
    held: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FLoRA:
    """FLoRA.

    Attributes:
        r_min: Smallest rank; a client that cannot train it everywhere is left out.
        r_max: Largest rank.
        weights: ``examples`` weighs clients by n_k as the paper does; ``uniform`` does not.
    """

    changes_base: ClassVar[bool] = True

    spec: ModelSpec
    profile: MemoryProfile
    r_min: int = 2
    r_max: int = 16
    weights: Literal["examples", "uniform"] = "examples"

    def __post_init__(self) -> None:
        planning.check_ranks(self.r_min, self.r_max)

    def init(self, rng: np.random.Generator) -> FLoRAState:
        """The model as it is."""
        return FLoRAState(head=lora.init(self.spec, {}, rng), seed=int(rng.integers(2**63)))

    def plan(
        self, state: FLoRAState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """All modules at r_k, the largest rank that fits."""
        ranks = range(self.r_min, self.r_max + 1)
        return [planning.largest_rank(self.profile, self.spec, client, ranks) for client in cohort]

    def distribute(self, state: FLoRAState, plan: Plan) -> Task:
        """A fresh pair, A random and B = 0, that the client draws itself; and the stacks that it lacks."""
        pairs, drawn = lora.draw(self.spec, [state.seed, state.base.version], plan.ranks, self.r_max)
        lacking = base_deltas.lacking(state.base, state.held, plan.client_id)
        return Task(plan, {**pairs, **state.head}, lacking, drawn)

    def local_update(self, task: Task, site: Site) -> Upload:
        """W <- W + s B A for each stack; then local epochs from the fresh pair."""
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        return site.upload(task.plan, metrics)

    def aggregate(self, state: FLoRAState, uploads: Iterable[Upload]) -> FLoRAState:
        """A = [p_1 A_1; ...; p_K A_K], B = [B_1 | ... | B_K]: s B A is the exact mean of the clients' s B_k A_k."""
        stacks = lora.product_sums(self.spec)
        head, held, total = tensors.HolderMean(), dict(state.held), 0.0
        for upload in uploads:
            weight = upload.weight(self.weights)
            for module in lora.modules_of(upload.tensors):
                stacks[module].add(upload.tensors[lora.b_name(module)], upload.tensors[lora.a_name(module)], weight)
            head.add(tensors.only(upload.tensors, frozenset(state.head)), weight)
            held[upload.client_id] = state.base.version
            total += weight
        step: dict[str, torch.Tensor] = {}
        for module, stack in stacks.items():
            b, a = stack.factors()
            step |= base_deltas.pair(module, b * (self.spec.scale / total), a)
        base = base_deltas.extended(state.base, step)
        return replace(state, head={**state.head, **head.result()}, base=base, held=held)

    def deploy(self, state: FLoRAState) -> Deployment:
        """The merged base and the head; no pair is left beside it."""
        return Deployment(state.head, state.base)
