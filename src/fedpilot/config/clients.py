"""Each client's place in a round: its data, its randomness, the shared model."""

import numpy as np

from fedpilot.client import ClientModel
from fedpilot.config.population import Population
from fedpilot.config.recipe import Recipe
from fedpilot.model import AdaptedModel
from fedpilot.privacy.client_dp import LocalNoise
from fedpilot.types import Site

ORDER, SUBSET = 1, 2  # what a seed is for


class Clients:
    """Makes each client's site.

    Args:
        recipe: Training settings and seed.
        population: Data.
        adapted: The shared model.
        noise_key: Secret of one client in one round, which all of its noise follows from; ``None`` for the recipe's
            seed, from which anybody can work it out.
    """

    def __init__(
        self, recipe: Recipe, population: Population, adapted: AdaptedModel, *, noise_key: bytes | None = None
    ) -> None:
        self._recipe, self._population, self._adapted = recipe, population, adapted
        self._noise_key = noise_key
        self._measured: set[object] = set()

    def site(self, client_id: int, round: int) -> Site:
        """The client's place in a round."""
        settings, rounds = self._recipe.training, self._recipe.run.rounds
        # A baseline may go on after the last planned round, to use the same time: the schedule has ended by then.
        rate = settings.learning_rate_at(min(round, rounds), rounds)

        model = ClientModel(
            self._adapted,
            self._population.examples[client_id],
            settings,
            learning_rate=rate,
            seed=seed_of(self._recipe.run.seed, ORDER, client_id, round),
            subset_seed=seed_of(self._recipe.run.seed, SUBSET, client_id),
            measured=self._measured,
            noise_key=self._noise_key,
        )
        private, release = self._recipe.safeguards.private, None
        if private is not None and private.kind == "local":
            release = LocalNoise(private, (self._recipe.run.seed, client_id, round), self._noise_key)
        return Site(self._population.clients[client_id], model, release=release)


def seed_of(*numbers: int) -> int:
    """A seed that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
