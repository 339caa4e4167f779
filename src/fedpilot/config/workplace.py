"""What a recipe's worker processes work with, and whether they are worth having."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedpilot.config.clients import Clients
from fedpilot.config.population import Population
from fedpilot.config.recipe import Recipe
from fedpilot.data import EncodedDataset
from fedpilot.engines.workers import Pool
from fedpilot.errors import ConfigError
from fedpilot.evaluation import Measured, measure
from fedpilot.model import AdaptedModel, ModelSettings, build_model, program_of
from fedpilot.types import Deployment, Plan, StepKind

Split = Literal["test", "validation"]

STEPS = 4
"""Measured steps of each arrangement; one goes before them."""


class Places(Clients):
    """Clients' sites, and a share of an evaluation: one base model for both."""

    def __init__(self, recipe: Recipe, population: Population, adapted: AdaptedModel) -> None:
        super().__init__(recipe, population, adapted)
        self._adapted = adapted

    def measure(self, split: Split, deployment: Deployment, part: int = 0, parts: int = 1) -> list[Measured]:
        """Every ``parts``-th batch of an evaluation; see `evaluation.measure`.

        Raises:
            ConfigError: There is no validation set.
        """
        examples, groups = evaluated(self._recipe, self._population, split)
        return measure(
            self._adapted,
            deployment,
            examples,
            groups=groups,
            batch_size=self._recipe.evaluation.batch_size,
            autocast=self._recipe.training.autocast,
            answers=examples.answers,
            part=part,
            parts=parts,
        )

    def seconds_a_step(self, plan: Plan, kind: StepKind | None) -> float:
        """Seconds of one training step of the plan, on inputs of full length."""
        program = program_of(self._adapted, plan, self._recipe.training, plan.micro_batch, kind)
        program.step()  # the first one also makes the optimiser's state
        started = time.perf_counter()
        for _ in range(STEPS):
            program.step()
        return (time.perf_counter() - started) / STEPS


@dataclass(frozen=True)
class MakePlaces:
    """Loads the base model in the process that worker processes are forked from.

    Attributes:
        recipe: The configuration.
        population: Who takes part.
        settings: The model, with its source resolved.
        num_labels: Classes; ``None`` for a language model.
    """

    recipe: Recipe
    population: Population
    settings: ModelSettings
    num_labels: int | None

    def __call__(self) -> Places:
        """The model with clients and evaluations around it."""
        adapted = build_model(self.settings, num_labels=self.num_labels, device="cpu", seed=self.recipe.run.seed)
        return Places(self.recipe, self.population, adapted)


def evaluated(recipe: Recipe, people: Population, split: Split) -> tuple[EncodedDataset, Sequence[str] | None]:
    """What an evaluation is on: examples, and the group of each where the recipe asks for groups.

    Raises:
        ConfigError: There is no validation set.
    """
    examples, rows = (
        (people.test, people.table.test) if split == "test" else (people.validation, people.table.validation)
    )
    if examples is None or rows is None:
        raise ConfigError(["data.validation_fraction must be above 0 to evaluate on validation data, got 0"])
    by = recipe.evaluation.by
    return examples, None if by is None else rows.column(by).tolist()


def faster_workers(pool: Pool, here: Places, plan: Plan, kind: StepKind | None) -> int:
    """The pool's number of workers, or 1 where this process gets more done with all its threads than they do together.

    Both are measured, one after the other, on a few steps of the plan.
    """
    alone = here.seconds_a_step(plan, kind)
    together = pool.call("seconds_a_step", [(plan, kind)] * pool.count)
    return pool.count if max(together) / pool.count < alone else 1
