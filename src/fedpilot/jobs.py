"""A recipe from start to end: the method's run, its baseline's for the same training time, and who came out ahead."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, cast

from fedpilot import checkpoint
from fedpilot.comparison import Comparison, Line, compare, display_name, standings, summary, took_part
from fedpilot.config import setup
from fedpilot.config.recipe import Recipe, read_recipe
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.config.setup import Experiment
from fedpilot.errors import RecordError
from fedpilot.manifest import manifest
from fedpilot.record import RunDirectory
from fedpilot.rounds import Observer, Unwatched
from fedpilot.runs import train

BASELINE, COMPARISON, RECIPE, LOG = "baseline", "comparison.json", "recipe.toml", "log.txt"


@dataclass(frozen=True)
class Job:
    """A recipe in its run directory.

    Attributes:
        experiment: The parts.
        directory: The method's run; the baseline's is in its folder ``baseline``.
    """

    experiment: Experiment
    directory: RunDirectory

    @property
    def recipe(self) -> Recipe:
        """The configuration."""
        return self.experiment.recipe

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    def baseline_directory(self) -> RunDirectory:
        """The baseline's run, made where it is not there yet."""
        assert self.recipe.baseline is not None, "asked only of a recipe with a baseline"
        path = self.path / BASELINE
        facts = facts_of(replace(self.recipe, algorithm=self.recipe.baseline, baseline=None))
        if (path / "manifest.json").exists():
            return RunDirectory.open(path, facts)
        return RunDirectory.create(path, facts)


Watch: TypeAlias = Callable[[str, int], AbstractContextManager[Observer]]
"""Name of a method and its last round -> who watches its run."""


def unwatched(name: str, num_rounds: int) -> AbstractContextManager[Observer]:
    """Nobody watches."""
    return nullcontext(Unwatched())


def start(recipe: Recipe, path: Path | None = None) -> Job:
    """A new run directory with everything up to the first round.

    Args:
        recipe: The configuration.
        path: The run directory, new or empty; ``None`` for a free name in the recipe's ``out``.

    Raises:
        FedpilotError: Data, model or directory cannot be had as asked; nothing is written then.
    """
    experiment = setup.experiment(recipe)
    recipe = experiment.recipe  # now with what was measured on this machine
    where = path or free_path(Path(recipe.run.out), recipe.run.name)
    labels = {"label_names": list(experiment.population.table.label_names)}
    directory = RunDirectory.create(where, facts_of(recipe) | labels)
    checkpoint.write_file(directory.path / RECIPE, recipe.to_toml().encode())
    return Job(experiment, directory)


def resume(path: Path) -> Job:
    """A run that was stopped, or is done.

    Raises:
        RecordError: There is no run.
    """
    recipe = recipe_of(path)
    experiment = setup.experiment(recipe)
    return Job(experiment, RunDirectory.open(path, facts_of(recipe)))


def recipe_of(path: Path) -> Recipe:
    """The configuration that a run was started with.

    Raises:
        RecordError: There is no run.
        ConfigError: It was made by another version with other settings.
    """
    found = RunDirectory.open(path).manifest.get("config")
    if not isinstance(found, dict):
        raise RecordError(f"{path / 'manifest.json'} must hold a configuration, got none; restore it from a copy")
    return read_recipe(found, str(path / "manifest.json"))


def facts_of(recipe: Recipe) -> dict[str, object]:
    """The manifest of a run of the recipe."""
    return manifest(recipe.resolved(), seed=recipe.run.seed, dtype=f"{recipe.model.dtype}, {recipe.training.autocast}")


def label_names(directory: RunDirectory) -> tuple[str, ...]:
    """Names of the classes that the run was trained on; empty for a language model."""
    return tuple(cast(Sequence[str], directory.manifest.get("label_names", ())))


def free_path(folder: Path, name: str) -> Path:
    """``folder/name``, or the first of ``name-2``, ``name-3``, ... that is free."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}"
    return path


def run(job: Job, watch: Watch = unwatched) -> Comparison | None:
    """Runs what is left of the method and its baseline, and writes ``comparison.json``.

    Returns:
        The comparison; ``None`` for a recipe without a baseline.
    """
    recipe = job.recipe
    with watch(recipe.algorithm.name, recipe.run.rounds) as observer:
        _train(job, recipe.algorithm, job.directory, recipe.run.rounds, observer, stop_early=True)
    if recipe.baseline is None:
        return None
    directory = _run_baseline(job, recipe.baseline, job.directory.lines(), watch)
    comparison = compare(recipe, job.directory.lines(), directory.lines())
    checkpoint.write_file(job.path / COMPARISON, (json.dumps(summary(comparison), indent=2) + "\n").encode())
    return comparison


def _train(
    job: Job, method: AlgorithmSettings, directory: RunDirectory, rounds: int, observer: Observer, *, stop_early: bool
) -> None:
    experiment = job.experiment
    algorithm = experiment.algorithm(method)
    train(
        algorithm,
        experiment.engine(algorithm),
        experiment.population.clients,
        experiment.evaluate,
        directory,
        num_rounds=rounds,
        cohort_size=job.recipe.run.cohort,
        best=setup.goal(job.recipe),
        early_stop=setup.early_stop(job.recipe) if stop_early else None,
        observer=observer,
    )


def _run_baseline(job: Job, method: AlgorithmSettings, lines: Sequence[Line], watch: Watch) -> RunDirectory:
    """As many rounds as the method had, then more until it has had as much training time."""
    directory = job.baseline_directory()
    target = standings(lines)[-1]
    name = display_name(method)
    rounds = target.round
    while True:
        with watch(name, rounds) as observer:
            _train(job, method, directory, rounds, observer, stop_early=False)
        stood = standings(directory.lines())[-1]
        if stood.seconds >= target.seconds or not took_part(directory.lines()):
            return directory
        rounds = stood.round + max(1, math.floor((target.seconds - stood.seconds) / (stood.seconds / stood.round)))
