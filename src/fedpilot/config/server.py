"""The server's place in a round, for methods that train there: its data, its randomness, the shared model."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import torch

from fedpilot import assets, data
from fedpilot.client import ClientModel
from fedpilot.config.clients import seed_of
from fedpilot.config.population import Population
from fedpilot.config.recipe import Recipe
from fedpilot.model import AdaptedModel
from fedpilot.training import Batch, Examples, TrainingSettings
from fedpilot.types import ClientProfile, Site

SERVER, SERVER_SUBSET = 4, 5  # what a seed is for
SERVER_ID = -1
"""The server's number where clients have theirs."""


class Server:
    """Makes the server's site. It has no budget: the plans that are held against budgets are the clients'.

    Args:
        recipe: Settings and seed.
        examples: Public data; ``None`` where the recipe names none.
        adapted: The model that evaluations and clients of this process use by turns.
    """

    def __init__(self, recipe: Recipe, examples: Examples | None, adapted: AdaptedModel) -> None:
        self._recipe, self._adapted = recipe, adapted
        self._examples: Examples = NoExamples() if examples is None else examples

    def site(self, round: int) -> Site:
        """The server's place in a round; 0 is before the first."""
        settings, run = training_settings(self._recipe), self._recipe.run
        model = ClientModel(
            self._adapted,
            self._examples,
            settings,
            learning_rate=settings.learning_rate,
            seed=seed_of(run.seed, SERVER, round),
            subset_seed=seed_of(run.seed, SERVER_SUBSET),
        )
        return Site(ClientProfile(SERVER_ID, len(self._examples), 2**62, name="server"), model)


class NoExamples:
    """The data of a server that has none; a method that draws from it is told so by `ClientModel`."""

    def __len__(self) -> int:
        return 0

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, max_batches: int | None = None
    ) -> Iterator[Batch]:
        """None."""
        return iter(())

    def subset(self, indices: Sequence[int]) -> Self:
        """Itself, whatever is asked for."""
        return self


def training_settings(recipe: Recipe) -> TrainingSettings:
    """How the server trains: as clients do, but for what ``[server]`` says; how long is the method's to say."""
    own = recipe.server
    return dataclasses.replace(
        recipe.training,
        optimiser=own.optimiser,
        learning_rate=own.learning_rate,
        batch_size=own.batch_size or recipe.training.batch_size,
        local_epochs=1,
        max_steps=None,
        schedule="constant",
        cache_bytes=0,
    )


def public_examples(recipe: Recipe, people: Population) -> Examples | None:
    """The server's data: rows that no client has, or another source; ``None`` where the recipe names neither.

    Raises:
        DataError: The source cannot be read.
    """
    own = recipe.server
    if own.source is None:
        return people.public
    settings = dataclasses.replace(
        recipe.data, source=own.source, text=own.text, image=own.image, prompt=own.prompt, limit=own.limit, test=None
    )
    return data.encode(
        data.load_inputs(settings),
        task=recipe.model.task,
        model=assets.resolve(recipe.model.source),
        name="public data",
        max_length=recipe.model.max_length,
        image_size=recipe.model.image_size,
    )
