"""FedIT: every client trains the whole adapter; the server averages A and B apart.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", 2023, arXiv 2305.05644v2.

Differs from the paper: ``participation`` decides what happens where memory does not suffice, which the paper does
not treat. ``exclusive`` and ``straggler`` are the usual baselines of the work on heterogeneous clients.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedpilot import lora, planning, tensors
from fedpilot.memory import MemoryProfile
from fedpilot.types import Averaging, ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload


@dataclass(frozen=True)
class FedITState:
    """The global adapter, head included."""

    adapter: Tensors


@dataclass(frozen=True)
class FedIT:
    """FedIT.

    Attributes:
        rank: Rank r of every pair.
        participation: ``all`` asks everybody to train everything and refuses to run where that does not fit;
            ``exclusive`` leaves out whom it does not fit; ``straggler`` lets everybody train what the weakest client of
            the population can: the deepest blocks that fit ``budget_bytes``.
        weights: ``examples`` weighs clients by n_k as the paper does; ``uniform`` does not.
        budget_bytes: Smallest budget of the population, for ``straggler``.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    participation: planning.Participation = "all"
    weights: Literal["examples", "uniform"] = "examples"
    budget_bytes: int | None = None

    @property
    def averaging(self) -> Averaging:
        """Of A and B apart."""
        return Averaging(uniform=self.weights == "uniform")

    def init(self, rng: np.random.Generator) -> FedITState:
        """A fresh adapter; B = 0, so the model starts as the base."""
        return FedITState(adapter=lora.init(self.spec, dict.fromkeys(self.spec.modules, self.rank), rng))

    def plan(
        self, state: FedITState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """The same plan for everybody.

        Raises:
            PlanError: ``participation = "all"`` and a client cannot train everything.
        """
        return planning.alike(self.profile, self.spec, cohort, self.rank, self.participation, self.budget_bytes)

    def distribute(self, state: FedITState, plan: Plan) -> Task:
        """The whole adapter."""
        return Task(plan, state.adapter)

    def local_update(self, task: Task, site: Site) -> Upload:
        """Local epochs from the global adapter."""
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        return site.upload(task.plan, metrics)

    def aggregate(self, state: FedITState, uploads: Iterable[Upload]) -> FedITState:
        """Ā = Σ p_k A_k and B̄ = Σ p_k B_k."""
        mean = tensors.weighted_mean((upload.tensors, upload.weight(self.weights)) for upload in uploads)
        return FedITState(adapter={**state.adapter, **mean})

    def deploy(self, state: FedITState) -> Deployment:
        """The global adapter."""
        return Deployment(state.adapter)
