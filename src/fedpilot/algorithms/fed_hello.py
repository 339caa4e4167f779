"""Fed-HeLLo: clients sample the blocks that they train, by Fisher information or by a fixed geometric prior.

Zhang et al., "Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA Allocation", 2025,
arXiv 2506.12213v1.

Differs from the paper: Fisher scores are measured on the clients, each over the deepest blocks that it can afford, and
averaged on the server (the paper has a proxy set there); n_i is what fits the client's memory (the paper states it);
the shapes at other depths than 12, and all but the bottleneck's, are reconstructed. Differs from its code: gradients
of the loss, not of a raw logit, over every example of the set; clusters are sorted before they get their weights; a
Fisher allocation is in force until the next refresh, not for one round; other blocks are frozen, not trained at rate
0; the head is averaged, where theirs stays as it was drawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedpilot import lora, planning, tensors
from fedpilot.allocation import Shape, cluster_weights, shape_weights
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload


@dataclass(frozen=True)
class FedHelloState:
    """What the server remembers.

    Attributes:
        round: Rounds done.
        adapter: The global adapter, head included.
        fim: Block -> FIM(l) of the last refresh that measured it; empty before the first.
    """

    round: int
    adapter: Tensors
    fim: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FedHello:
    """Fed-HeLLo.

    Attributes:
        rank: Rank r of every pair.
        allocation: ``fim`` draws blocks by clusters of their Fisher scores, after a warm start by the shape (FIM-HLA);
            ``random-geometric`` draws them by the shape (RGD-HLA); ``geometric`` takes the shape's widest first
            (GD-HLA).
        shape: Prior over blocks, from the input up: ``triangle``, ``inverted-triangle``, ``bottleneck``, ``uniform``.
        fim_examples: Size of a client's importance set.
        warmup_rounds: Rounds before the first measurement.
        refresh_every: Rounds between two measurements.
        weights: ``uniform`` is the paper's mean over holders; ``examples`` weighs them by n_k, in scores too.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    allocation: Literal["fim", "geometric", "random-geometric"] = "fim"
    shape: Shape = "bottleneck"
    fim_examples: int = 100
    warmup_rounds: int = 50
    refresh_every: int = 50
    weights: Literal["uniform", "examples"] = "uniform"

    def __post_init__(self) -> None:
        for name, least in (("fim_examples", 1), ("warmup_rounds", 0), ("refresh_every", 1)):
            if getattr(self, name) < least:
                raise PlanError(f"{name} must be at least {least}, got {getattr(self, name)}; raise it")

    def init(self, rng: np.random.Generator) -> FedHelloState:
        """A fresh adapter and no scores."""
        return FedHelloState(round=0, adapter=lora.init(self.spec, dict.fromkeys(self.spec.modules, self.rank), rng))

    def plan(
        self, state: FedHelloState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """Blocks in the order of the draw, or widest first; each is trained if it still fits the client."""
        solver: planning.Sampler = "ranked" if self.allocation == "geometric" else "weighted"
        allocate = planning.BlockAllocation(self.spec, self.profile, self.rank, (self.rank,), solver=solver)
        plans = allocate(cohort, [self.selection_weights(state)] * len(cohort), rng)
        if self._measures(state):
            return planning.scoring(self.profile, self.spec, plans, cohort, self.fim_examples)
        return plans

    def distribute(self, state: FedHelloState, plan: Plan) -> Task:
        """The whole adapter: blocks that are not trained stay in the forward pass."""
        return Task(plan, state.adapter)

    def local_update(self, task: Task, site: Site) -> Upload:
        """FIM(l) = mean over the set of ||gradient of block l's pairs||², where asked for; then local epochs."""
        site.model.load(task)
        fim: dict[str, float] = {}
        if task.plan.scored:
            squares = site.model.gradients(task.plan.scored, num_examples=self.fim_examples, squared=True)
            for block in sorted({self.spec.block_of[module] for module in lora.modules_of(squares)}):
                pairs = lora.names(lora.blocks_modules(self.spec, [block]))
                fim[f"fim/{block}"] = sum(float(squares[name].double().sum()) for name in pairs)
        metrics = site.model.fit(task.plan.trainable)
        return site.upload(task.plan, {**metrics, **fim})

    def aggregate(self, state: FedHelloState, uploads: Iterable[Upload]) -> FedHelloState:
        """Mean over the clients that trained a block, A and B apart; scores likewise over those that measured it."""
        mean, measured = tensors.HolderMean(), dict[int, list[tuple[float, float]]]()
        for upload in uploads:
            weight = upload.weight(self.weights)
            mean.add(upload.tensors, weight)
            for block in range(self.spec.num_blocks):
                if f"fim/{block}" in upload.metrics:
                    measured.setdefault(block, []).append((upload.metrics[f"fim/{block}"], weight))
        fim = {block: sum(f * w for f, w in found) / sum(w for _, w in found) for block, found in measured.items()}
        return FedHelloState(state.round + 1, {**state.adapter, **mean.result()}, {**state.fim, **fim})

    def deploy(self, state: FedHelloState) -> Deployment:
        """The global adapter."""
        return Deployment(state.adapter)

    def explain(self, state: FedHelloState) -> Mapping[str, float]:
        """FIM(l) by block, for the record."""
        return {f"fim/{block}": score for block, score in sorted(state.fim.items())}

    def selection_weights(self, state: FedHelloState) -> Mapping[int, float]:
        """Block -> chance to be drawn first: 1, 2 or 3 parts by its cluster, or by the shape before the first scores.

        A block that no client could measure counts as the mean of the others.
        """
        if not state.fim:
            return dict(enumerate(shape_weights(self.shape, self.spec.num_blocks)))
        unknown = sum(state.fim.values()) / len(state.fim)
        scores = [state.fim.get(block, unknown) for block in range(self.spec.num_blocks)]
        return dict(enumerate(cluster_weights(scores)))

    def _measures(self, state: FedHelloState) -> bool:
        """Whether scores are measured in the coming round."""
        since = state.round - self.warmup_rounds
        return self.allocation == "fim" and since >= 0 and (since % self.refresh_every == 0 or not state.fim)
