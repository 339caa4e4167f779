"""Who takes part: data loaded, split and encoded, and each client's profile."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedpilot import assets, data
from fedpilot.config.clicks import ClickStage, click_stage
from fedpilot.config.recipe import Recipe, wants_gpu
from fedpilot.data import EncodedDataset, Table
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile

TIERS = 3  # what a seed is for


@dataclass(frozen=True)
class Population:
    """Who takes part, and with what.

    Attributes:
        table: The data before encoding.
        train: All training examples.
        test: Examples that nobody trains on and no setting is chosen by.
        parts: Positions in ``train`` of each client's examples.
        clients: Their profiles; client k is entry k.
        tiers: Tier of each client.
        validation: Examples held out of the training data for choosing settings; ``None`` where none were asked for.
        public: Examples of the training data that the server holds; ``None`` where none were asked for.
        clicks: The click model that gave the examples their user vectors; ``None`` where none was asked for.
    """

    table: Table
    train: EncodedDataset
    test: EncodedDataset
    parts: tuple[np.ndarray, ...]
    clients: tuple[ClientProfile, ...]
    tiers: tuple[str, ...]
    validation: EncodedDataset | None = None
    public: EncodedDataset | None = None
    clicks: ClickStage | None = None

    @cached_property
    def examples(self) -> tuple[EncodedDataset, ...]:
        """Each client's examples."""
        pairs = zip(self.parts, self.clients, strict=True)
        return tuple(self.train.subset(part, name=client.name) for part, client in pairs)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the columns of ``counts``."""
        return self.table.label_names or ("examples",)

    @cached_property
    def counts(self) -> np.ndarray:
        """(clients, classes) examples of each client by class."""
        return data.partition_table(self.parts, self.table.train.labels, len(self.class_names))


def load_population(recipe: Recipe) -> Population:
    """Loads, splits and encodes the data, and gives each client its tier.

    Raises:
        DataError: The data cannot be had or split as asked.
        AssetError: A packaged asset cannot be had.
    """
    source = assets.resolve(recipe.model.source)
    table = data.load(data_settings(recipe))
    parts = data.partition(table.train, recipe.partition)
    names = data.client_names(table.train, recipe.partition)
    stage = click_stage(recipe)
    named = {
        "training data": table.train,
        "test data": table.test,
        "validation data": table.validation,
        "public data": table.public,
    }
    train, test, validation, public = (
        None if rows is None else _encoded(recipe, rows, source, name, stage) for name, rows in named.items()
    )
    assert train is not None, "every table has training rows"
    assert test is not None, "every table has test rows"
    tiers = tier_of_clients(recipe, len(parts))
    clients = tuple(
        ClientProfile(
            client_id=k,
            num_examples=len(part),
            memory_bytes=recipe.clients.memory[tier],
            deadline_s=_of_tier(recipe.clients.deadline_s, tier),
            flops_per_second=_of_tier(recipe.clients.flops_per_second, tier),
            name=name,
            num_steps=num_steps(len(part), recipe.training),
        )
        for k, (part, name, tier) in enumerate(zip(parts, names, tiers, strict=True))
    )
    called = recipe.clients.tiers or tuple(f"tier {number}" for number in range(1, len(recipe.clients.memory) + 1))
    of_clients = tuple(called[tier] for tier in tiers)
    return Population(table, train, test, tuple(parts), clients, of_clients, validation, public, stage)


def _encoded(recipe: Recipe, rows: data.Rows, source: str, name: str, stage: ClickStage | None) -> EncodedDataset:
    """Rows as the model takes them, with each example's user vector where there is a click model."""
    made = data.encode(
        rows,
        task=recipe.model.task,
        model=source,
        max_length=recipe.model.max_length,
        image_size=recipe.model.image_size,
        name=name,
        answers=recipe.data.answers,
    )
    made = in_few_widths(recipe, made)
    return made if stage is None else dataclasses.replace(made, side=stage.side(rows))


def in_few_widths(recipe: Recipe, examples: EncodedDataset) -> EncodedDataset:
    """The examples, in batches of few lengths where each shape of a product costs code: in bf16 on a CPU."""
    if recipe.products != "bf16" or wants_gpu(recipe.run):
        return examples
    return dataclasses.replace(examples, widths=data.few_widths(examples.longest))


def data_settings(recipe: Recipe) -> data.DataSettings:
    """The data section with the columns that other sections name."""
    named = (recipe.partition.column, recipe.evaluation.by)
    columns = dict.fromkeys([*recipe.data.columns, *(name for name in named if name is not None)])
    return dataclasses.replace(recipe.data, columns=tuple(columns))


def tier_of_clients(recipe: Recipe, num_clients: int) -> list[int]:
    """Index of each client's tier."""
    tiers = [k % len(recipe.clients.memory) for k in range(num_clients)]
    if recipe.clients.assign == "shuffle":
        rng = np.random.default_rng([recipe.run.seed, TIERS])
        tiers = [tiers[k] for k in rng.permutation(num_clients)]
    return tiers


def num_steps(num_examples: int, settings: TrainingSettings) -> int:
    """Optimiser steps of a client's local update."""
    steps = -(-num_examples // settings.batch_size) * settings.local_epochs
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def _of_tier(values: tuple[float, ...], tier: int) -> float | None:
    return values[tier] if values else None
