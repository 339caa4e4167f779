"""FedRA: each round every client trains a shallower model of as many random blocks as fit its memory.

Su et al., "FedRA: A Random Allocation Strategy for Federated Tuning to Unleash the Power of Heterogeneous Clients",
2023, arXiv 2311.11227.

Differs from the paper: capacities c_i follow from memory (the paper states them): the largest number of blocks of which
every subset fits, so that the draw stays uniform; each client runs its own local steps (theirs are cut to the smallest
client's); frozen weights are not sent, since clients hold the base model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fedpilot import lora, planning, tensors
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload


@dataclass(frozen=True)
class FedRAState:
    """The global adapter of all blocks, head included."""

    adapter: Tensors


@dataclass(frozen=True)
class FedRA:
    """FedRA.

    Attributes:
        rank: Rank r of every pair.
        weights: ``uniform`` is the paper's mean over holders; ``examples`` weighs them by n_k.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    weights: Literal["uniform", "examples"] = "uniform"

    def init(self, rng: np.random.Generator) -> FedRAState:
        """A fresh adapter."""
        return FedRAState(adapter=lora.init(self.spec, dict.fromkeys(self.spec.modules, self.rank), rng))

    def plan(
        self, state: FedRAState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """Row i of the allocation matrix M: c_i of the L blocks, uniformly without replacement.

        Raises:
            PlanError: A block has no adapted module.
        """
        bare = sorted(set(range(self.spec.num_blocks)) - set(self.spec.block_of.values()))
        if bare:
            raise PlanError(
                f"every block must hold an adapted module in FedRA, got none in block {bare[0]}; "
                "add target modules, or choose fed-pilot or fed-hello"
            )
        return [self._shallow.random_subset(client, rng) for client in cohort]

    def distribute(self, state: FedRAState, plan: Plan) -> Task:
        """The pairs of the drawn blocks, and the head."""
        return Task(plan, tensors.select(state.adapter, lora.shapes(self.spec, plan.ranks)))

    def local_update(self, task: Task, site: Site) -> Upload:
        """Local epochs of the shallow model: other blocks are not run at all."""
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        return site.upload(task.plan, metrics)

    def aggregate(self, state: FedRAState, uploads: Iterable[Upload]) -> FedRAState:
        """LoRA_l <- mean over {i : M_il = 1}, A and B apart; a block that nobody drew stays; the head over all."""
        mean = tensors.weighted_mean((upload.tensors, upload.weight(self.weights)) for upload in uploads)
        return FedRAState(adapter={**state.adapter, **mean})

    def deploy(self, state: FedRAState) -> Deployment:
        """The model of full depth."""
        return Deployment(state.adapter)

    @cached_property
    def _shallow(self) -> planning.ShallowModels:
        return planning.ShallowModels(self.spec, self.profile, self.rank)
