"""Each client's place in a round: its data, its randomness, the shared model."""

from collections.abc import Callable, Mapping

import numpy as np

from fedpilot.client import ClientModel
from fedpilot.config.population import Population
from fedpilot.config.recipe import Recipe
from fedpilot.model import AdaptedModel
from fedpilot.privacy.client_dp import LocalNoise
from fedpilot.types import Penalty, Plan, Site, StepKind, Task, Tensors

ORDER, SUBSET = 1, 2  # what a seed is for


class Clients:
    """Makes each client's site.

    Args:
        recipe: Training settings and seed.
        population: Data.
        adapted: The shared model.
    """

    def __init__(self, recipe: Recipe, population: Population, adapted: AdaptedModel) -> None:
        self._recipe, self._population, self._adapted = recipe, population, adapted
        self._measured: set[object] = set()

    def site(self, client_id: int, round: int) -> Site:
        """The client's place in a round."""
        settings, rounds = self._recipe.training, self._recipe.run.rounds
        # A baseline may go on after the last planned round, to use the same time: the schedule has ended by then.
        rate = settings.learning_rate_at(min(round, rounds), rounds)

        def make(measure_peak: bool) -> ClientModel:
            return ClientModel(
                self._adapted,
                self._population.examples[client_id],
                settings,
                learning_rate=rate,
                seed=seed_of(self._recipe.run.seed, ORDER, client_id, round),
                subset_seed=seed_of(self._recipe.run.seed, SUBSET, client_id),
                measure_peak=measure_peak,
            )

        private, release = self._recipe.safeguards.private, None
        if private is not None and private.kind == "local":
            release = LocalNoise(private, (self._recipe.run.seed, client_id, round))
        return Site(self._population.clients[client_id], _Measured(make, self._measured), release=release)


class _Measured:
    """A client's model that measures its peak the first time that it trains what a plan says."""

    def __init__(self, make: Callable[[bool], ClientModel], measured: set[object]) -> None:
        self._make, self._seen = make, measured
        self._model: ClientModel | None = None

    def load(self, task: Task) -> None:
        """As `ClientModel.load`."""
        key = _shape(task.plan)
        self._model = self._make(key not in self._seen)
        self._seen.add(key)
        self._model.load(task)

    def fit(
        self,
        trainable: frozenset[str],
        *,
        penalty: Penalty | None = None,
        max_steps: int | None = None,
        kind: StepKind | None = None,
    ) -> Mapping[str, float]:
        """As `ClientModel.fit`."""
        return self._loaded().fit(trainable, penalty=penalty, max_steps=max_steps, kind=kind)

    def gradients(self, names: frozenset[str], *, num_examples: int, squared: bool = False) -> Tensors:
        """As `ClientModel.gradients`."""
        return self._loaded().gradients(names, num_examples=num_examples, squared=squared)

    def read(self) -> Tensors:
        """As `ClientModel.read`."""
        return self._loaded().read()

    def _loaded(self) -> ClientModel:
        assert self._model is not None, "a task is loaded before it is worked on"
        return self._model


def _shape(plan: Plan) -> object:
    """What a plan's memory depends on."""
    ranks = tuple(sorted(plan.ranks.items()))
    return plan.client_id, ranks, plan.trainable, plan.blocks, plan.checkpointed, plan.micro_batch


def seed_of(*numbers: int) -> int:
    """A seed that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
