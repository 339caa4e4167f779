"""FedIT: every client trains the whole adapter; the server averages A and B apart.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", 2023, arXiv 2305.05644v2.

Differs from the paper: ``participation`` decides what happens where memory does not suffice, which the paper does
not treat. ``exclusive`` and ``straggler`` are the usual baselines of the work on heterogeneous clients.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedpilot import allocation, lora, memory, planning, tensors
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload


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
    participation: Literal["all", "exclusive", "straggler"] = "all"
    weights: Literal["examples", "uniform"] = "examples"
    budget_bytes: int | None = None

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
        blocks = self._straggler_blocks() if self.participation == "straggler" else range(self.spec.num_blocks)
        plan = planning.train_blocks(self.spec, -1, self.rank, blocks)
        plans = [
            planning.fit_or_leave_out(self.profile, replace(plan, client_id=client.client_id), client)
            for client in cohort
        ]
        for entry in plans:
            if self.participation == "all" and isinstance(entry, LeftOut):
                raise PlanError(
                    f"client {entry.client_id} must train everything with participation 'all', but {entry.reason}; "
                    "raise its budget, or choose participation 'exclusive' or 'straggler'"
                )
        return plans

    def distribute(self, state: FedITState, plan: Plan) -> Task:
        """The whole adapter."""
        return Task(plan, state.adapter)

    def local_update(self, task: Task, site: Site) -> Upload:
        """Local epochs from the global adapter."""
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        trained = tensors.only(site.model.read(), task.plan.trainable)
        return Upload(site.profile.client_id, site.profile.num_examples, trained, metrics)

    def aggregate(self, state: FedITState, uploads: Iterable[Upload]) -> FedITState:
        """Ā = Σ p_k A_k and B̄ = Σ p_k B_k."""
        mean = tensors.weighted_mean((upload.tensors, self._weight(upload)) for upload in uploads)
        return FedITState(adapter={**state.adapter, **mean})

    def deploy(self, state: FedITState) -> Deployment:
        """The global adapter."""
        return Deployment(state.adapter)

    def _weight(self, upload: Upload) -> float:
        return float(upload.num_examples) if self.weights == "examples" else 1.0

    def _straggler_blocks(self) -> Sequence[int]:
        if self.budget_bytes is None:
            raise PlanError("budget_bytes must be the population's smallest budget for participation 'straggler'")
        table = memory.cost_table(self.profile, ranks=(self.rank,), checkpointing=False, adapter_rank=self.rank)
        chosen = allocation.suffix(table, self.budget_bytes)
        if chosen is None:
            return range(self.spec.num_blocks - 1, self.spec.num_blocks)  # too large for the weakest: it is left out
        return chosen.trained_blocks
