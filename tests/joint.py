"""Runs of real methods on tiny models, with so many clients in a pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from fedpilot import tensors
from fedpilot.algorithms import ALGORITHMS
from fedpilot.client import ClientModel
from fedpilot.config import setup
from fedpilot.engines.in_process import InProcess
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel
from fedpilot.rounds import RoundRecord, run_rounds
from fedpilot.together import Together
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile, HasStepKind, Site, StepKind, Tensors
from tests import tiny

SIZES = (10, 7, 13, 4)
"""Examples of each client: with batches of four they take 3, 2, 4 and 1 steps, and end on 2, 3, 1 and 4 examples."""


@cache
def model(family: str) -> AdaptedModel:
    """One without dropout for all tests."""
    return tiny.build(family, dropout=0.0)


@cache
def profile(family: str, kind: StepKind | None, checkpointing: bool = False) -> MemoryProfile:
    """Of a step with batches of four."""
    sketch, settings = tiny.build(family, device="fake", dropout=0.0), TrainingSettings(0.02, batch_size=4)
    return setup.profile_of(sketch, settings, checkpointing=checkpointing, kind=kind)


def method(name: str, family: str, **options: Any) -> Any:
    """A method on a tiny model, with the memory profile that it asks for; a private step is priced like another."""
    make = {"spec": model(family).spec, **options}
    made = ALGORITHMS[name](**make, profile=None)
    kind = replace(made.step_kind, private=None) if isinstance(made, HasStepKind) else None
    return ALGORITHMS[name](**make, profile=profile(family, kind))


@dataclass
class Run:
    """A few rounds.

    Attributes:
        adapter: What is deployed after them.
        records: Of the rounds.
    """

    adapter: Tensors
    records: list[RoundRecord] = field(default_factory=list)

    def metrics(self, name: str) -> list[float]:
        """A metric of all uploads, round by round."""
        return [upload.metrics[name] for record in self.records for upload in record.uploads]


def run(
    algorithm: Any,
    family: str,
    per_pass: int,
    *,
    sizes: Sequence[int] = SIZES,
    budgets: Mapping[int, int] | None = None,
    rounds: int = 2,
    adapted: AdaptedModel | None = None,
    **settings: Any,
) -> Run:
    """Rounds of a method over clients of these sizes."""
    training = TrainingSettings(**{"learning_rate": 0.05, "batch_size": 4, "optimiser": "sgd", **settings})
    shared = adapted or model(family)
    people = [ClientProfile(k, n, (budgets or {}).get(k, 2**62)) for k, n in enumerate(sizes)]

    def site_for(client_id: int, round: int) -> Site:
        data = tiny.examples(family, sizes[client_id], seed=client_id)
        seed = 100 * client_id + round
        own = ClientModel(shared, data, training, learning_rate=training.learning_rate, seed=seed)
        return Site(people[client_id], own)

    engine = InProcess(algorithm, site_for, together=Together(per_pass) if per_pass > 1 else None)
    result = Run({})
    for state, record in run_rounds(algorithm, engine, people, lambda deployment: {}, num_rounds=rounds, seed=0):
        result.adapter = algorithm.deploy(state).tensors
        result.records.append(record)
    return result


def relative(a: Tensors, b: Tensors) -> float:
    """Largest distance of two tensors of one name, in units of the second's norm."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-30)) for name in b)


def moved(a: Tensors, b: Tensors) -> float:
    """Norm of what changed."""
    return tensors.norm({name: a[name] - b[name] for name in b})
