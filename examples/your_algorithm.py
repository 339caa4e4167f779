"""A new algorithm in one file: FedIT with clipped updates, so that no client can drag the adapter far.

Copy it, change the steps, give it a row in `tests/algorithms/test_contract.py`. `python examples/your_algorithm.py`
lists what an algorithm has to provide.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedpilot import lora, planning, tensors
from fedpilot.memory import MemoryProfile
from fedpilot.types import Algorithm, ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload


@dataclass(frozen=True)
class ClippedState:
    """The global adapter, head included."""

    adapter: Tensors


@dataclass(frozen=True)
class ClippedFedIT:
    """FedIT whose server clips each client's update to norm `clip` before it averages."""

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    clip: float = 1.0

    def init(self, rng: np.random.Generator) -> ClippedState:
        return ClippedState(lora.init(self.spec, dict.fromkeys(self.spec.modules, self.rank), rng))

    def plan(
        self, state: ClippedState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        return [
            planning.fit_or_leave_out(self.profile, planning.train_all(self.spec, c.client_id, self.rank), c)
            for c in cohort
        ]

    def distribute(self, state: ClippedState, plan: Plan) -> Task:
        return Task(plan, state.adapter)

    def local_update(self, task: Task, site: Site) -> Upload:
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        return site.upload(task.plan, metrics)

    def aggregate(self, state: ClippedState, uploads: Iterable[Upload]) -> ClippedState:
        mean = tensors.HolderMean()
        for upload in uploads:
            update = tensors.subtract(upload.tensors, state.adapter)
            factor = min(1.0, self.clip / max(tensors.norm(update), 1e-12))
            mean.add(tensors.scale(update, factor), upload.num_examples)
        return ClippedState(tensors.add(state.adapter, mean.result()))

    def deploy(self, state: ClippedState) -> Deployment:
        return Deployment(state.adapter)


if __name__ == "__main__":
    print("An algorithm provides:", ", ".join(name for name in vars(Algorithm) if not name.startswith("_")))
