"""A recipe from start to end: the method's run, its baseline's for the same training time, and who came out ahead."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from fedpilot import checkpoint, trackers
from fedpilot.comparison import Comparison, Line, Standing, compare, display_name, standings, summary, took_part
from fedpilot.config import setup
from fedpilot.config.recipe import Recipe, read_recipe
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.config.setup import Experiment
from fedpilot.errors import ConfigError, RecordError
from fedpilot.manifest import as_json, check_same_run, differences, manifest
from fedpilot.record import RunDirectory, strict
from fedpilot.rounds import Evaluate, Observer, Unwatched, check_clients, generator, measured
from fedpilot.runs import train
from fedpilot.startup import Parent
from fedpilot.stopping import Halted
from fedpilot.types import Algorithm, Engine

logger = logging.getLogger(__name__)

BASELINE, COMPARISON, RECIPE, LOG, TEST = "baseline", "comparison.json", "recipe.toml", "log.txt", "test.json"
KEPT = "kept"  # folder of what clients keep, where the recipe wants it on disk


EngineFor: TypeAlias = Callable[[AlgorithmSettings, Algorithm[Any]], Engine]
"""A method's settings and the method -> what carries its tasks."""


@dataclass(frozen=True)
class Job:
    """A recipe in its run directory.

    Attributes:
        experiment: The parts.
        directory: The method's run; the baseline's is in its folder ``baseline``.
        engine_for: Method -> the engine that carries its run; ``None`` for the recipe's own.
        noise_key: Secret that the server's noise follows from; ``None`` for the recipe's seed.
        halt: Whether to end after a round, although the run is not over.
    """

    experiment: Experiment
    directory: RunDirectory
    engine_for: EngineFor | None = None
    noise_key: bytes | None = field(default=None, repr=False)
    halt: Callable[[], bool] = field(default=lambda: False, repr=False)

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
        recipe = replace(self.recipe, algorithm=self.recipe.baseline, baseline=None)
        if (path / "manifest.json").exists():
            return opened(path, recipe)
        return RunDirectory.create(path, facts_of(recipe))


Watch: TypeAlias = Callable[[str, int], AbstractContextManager[Observer]]
"""Name of a method and its last round -> who watches its run."""


def unwatched(name: str, num_rounds: int) -> AbstractContextManager[Observer]:
    """Nobody watches."""
    return nullcontext(Unwatched())


def start(recipe: Recipe, path: Path | None = None, *, traces: Path | None = None, parent: Parent | None = None) -> Job:
    """A new run directory with everything up to the first round.

    Args:
        recipe: The configuration.
        path: The run directory, new or empty; ``None`` for a free name in the recipe's ``out``.
        traces: Folder that keeps memory profiles; ``None`` to trace anew.
        parent: Of worker processes, if there is one already.

    Raises:
        FedpilotError: Data, model or directory cannot be had as asked; nothing is written then.
    """
    trackers.check(recipe.run.trackers)
    alone = replace(recipe, methods={})  # a run has one method
    experiment = setup.experiment(alone, traces=traces, trains=True, parent=parent)
    recipe = experiment.recipe  # now with what was measured on this machine
    where = path or free_path(Path(recipe.run.out), recipe.run.name)
    people = experiment.population
    known = {
        "label_names": list(people.table.label_names),
        "tiers": list(people.tiers),
        "num_blocks": experiment.sketch.spec.num_blocks,
    }
    if people.clicks is not None:
        known["click_model"] = people.clicks.facts(people.table.test)
    directory = RunDirectory.create(where, facts_of(recipe) | known)
    checkpoint.write_file(directory.path / RECIPE, recipe.to_toml().encode())
    return Job(experiment, directory)


def resume(path: Path, *, traces: Path | None = None, parent: Parent | None = None) -> Job:
    """A run that was stopped, or is done.

    Args:
        path: The run directory.
        traces: Folder that keeps memory profiles; ``None`` to trace anew.
        parent: Of worker processes, if there is one already.

    Raises:
        RecordError: There is no run.
    """
    recipe = recipe_of(path)
    trackers.check(recipe.run.trackers)
    experiment = setup.experiment(recipe, traces=traces, trains=True, parent=parent)
    return Job(experiment, opened(path, recipe))


def recipe_of(path: Path) -> Recipe:
    """The configuration that a run was started with.

    Raises:
        RecordError: There is no run.
        ConfigError: It was made by another version with other settings.
    """
    return _recipe_in(RunDirectory.open(path))


def _recipe_in(directory: RunDirectory) -> Recipe:
    file, found = directory.path / "manifest.json", directory.manifest.get("config")
    if not isinstance(found, dict):
        raise RecordError(f"{file} must hold a configuration, got none; restore it from a copy")
    return read_recipe(found, str(file))


def opened(path: Path, recipe: Recipe) -> RunDirectory:
    """A run to go on with. Settings that fedpilot did not have yet when it began stand at their defaults.

    Raises:
        RecordError: There is no run, or it was made with another configuration.
    """
    directory = RunDirectory.open(path)
    found = dict(directory.manifest)
    with suppress(ConfigError):  # if it cannot be read as a recipe, the comparison names what differs
        found["config"] = as_json(_recipe_in(directory).resolved())
    for line in differences(directory.manifest.get("config"), found.get("config")):
        logger.warning("%s was started before there was a setting, which takes its default (%s)", path, line)
    check_same_run(path, found, facts_of(recipe))
    return directory


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


def tested(directory: RunDirectory) -> Standing | None:
    """What the test set said of a run that was evaluated on validation data; ``None`` before its end.

    Raises:
        RecordError: The file is damaged.
    """
    file = directory.path / TEST
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
        metrics = {name: math.nan if value is None else value for name, value in found["metrics"].items()}
        return Standing(int(found["round"]), 0.0, metrics)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "delete it and resume the run to write it again"
        raise RecordError(f"{file} must hold a round and its metrics, got {error!r}; {advice}") from error


def run(job: Job, watch: Watch = unwatched, *, read_test: bool = True) -> Comparison | None:
    """Runs what is left of the method and its baseline, and writes ``comparison.json`` and ``report.html``.

    Args:
        job: The run.
        watch: Who watches.
        read_test: Whether a run that is evaluated on validation data reads the test set at its end.

    Returns:
        The comparison; ``None`` for a recipe without a baseline.

    Raises:
        ConfigError: The recipe's engine is one whose nodes must join first.
        Halted: The job was asked to end.
    """
    recipe = job.recipe
    if job.engine_for is None and recipe.run.engine != "in-process":
        return _over_flower(job, watch, read_test)
    from fedpilot.report import page, people  # templates take their time, and a plan needs none

    people.write(job.experiment.population, job.path)
    comparison = _run(job, watch, read_test)
    page.try_to_write(job.path)
    return comparison


def _run(job: Job, watch: Watch, read_test: bool) -> Comparison | None:
    recipe = job.recipe
    if recipe.baseline is not None and not job.directory.checkpoints():
        baseline = job.experiment.algorithm(recipe.baseline)  # its run comes last, its refusal should not
        state = baseline.init(generator(recipe.run.seed, 0))
        check_clients(baseline, state, job.experiment.population.clients, recipe.run.seed)
    with watch(recipe.algorithm.name, recipe.run.rounds) as observer:
        ended = _train(job, recipe.algorithm, job.directory, recipe.run.rounds, observer, stop_early=True)
    if read_test:
        ended.read_test()
    if recipe.baseline is None:
        return None
    if job.halt():
        raise Halted
    directory = _run_baseline(job, recipe.baseline, job.directory.lines(), watch, read_test)
    comparison = compare(recipe, job.directory.lines(), directory.lines())
    checkpoint.write_file(job.path / COMPARISON, (json.dumps(summary(comparison), indent=2) + "\n").encode())
    return comparison


def check_engine(recipe: Recipe) -> None:
    """Refuses a recipe whose nodes must join first.

    Raises:
        ConfigError: As said.
    """
    if recipe.run.engine == "flower":
        raise ConfigError(['run.engine must be another one here, got "flower"; use fedpilot serve and fedpilot join'])


def _over_flower(job: Job, watch: Watch, read_test: bool) -> Comparison | None:
    check_engine(job.recipe)
    from fedpilot.engines.flower.commands import require

    require()
    from fedpilot.engines.flower import simulation  # an extra, and it needs this module

    return simulation.run(job, watch, read_test=read_test)


@dataclass(frozen=True)
class _Ended:
    """A run whose rounds are done."""

    experiment: Experiment
    directory: RunDirectory
    round: int
    measured: Callable[[Evaluate], Mapping[str, float]]

    def read_test(self) -> None:
        """Writes ``test.json``, once, where the rounds were evaluated on validation data."""
        known = tested(self.directory)
        if self.experiment.recipe.evaluation.on == "test" or (known is not None and known.round == self.round):
            return
        metrics = strict(self.measured(partial(self.experiment.evaluate_on, "test")))
        text = json.dumps({"round": self.round, "metrics": metrics}, indent=2) + "\n"
        checkpoint.write_file(self.directory.path / TEST, text.encode())


def _train(
    job: Job, method: AlgorithmSettings, directory: RunDirectory, rounds: int, observer: Observer, *, stop_early: bool
) -> _Ended:
    experiment = job.experiment
    algorithm = experiment.algorithm(method)
    outcome = train(
        algorithm,
        job.engine_for(method, algorithm)
        if job.engine_for is not None
        else experiment.engine(algorithm, directory.path / KEPT),
        experiment.population.clients,
        experiment.evaluate,
        directory,
        num_rounds=rounds,
        cohort_size=job.recipe.run.cohort,
        best=setup.goal(job.recipe),
        early_stop=setup.early_stop(job.recipe) if stop_early else None,
        observer=observer,
        cadence=setup.cadence(job.recipe),
        measure_aggregation=job.recipe.evaluation.aggregation_error,
        safeguards=replace(job.recipe.safeguards, noise_key=job.noise_key),
        tracked_by=job.recipe.run.trackers,
        server=experiment.server_site(algorithm),
        halt=job.halt,
    )
    return _Ended(experiment, directory, outcome.round, partial(measured, algorithm, outcome.state))


def _run_baseline(
    job: Job, method: AlgorithmSettings, lines: Sequence[Line], watch: Watch, read_test: bool
) -> RunDirectory:
    """As many rounds as the method had, then more until it has had as much training time."""
    directory = job.baseline_directory()
    target = standings(lines)[-1]
    name = display_name(method)
    rounds = target.round
    while True:
        with watch(name, rounds) as observer:
            ended = _train(job, method, directory, rounds, observer, stop_early=False)
        stood = standings(directory.lines())[-1]
        if stood.seconds >= target.seconds or not took_part(directory.lines()):
            if read_test:
                ended.read_test()
            return directory
        rounds = stood.round + max(1, math.floor((target.seconds - stood.seconds) / (stood.seconds / stood.round)))
