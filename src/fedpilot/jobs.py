"""A recipe from start to end: the method's run, its baseline's for the same training time, and who came out ahead."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fedpilot import checkpoint
from fedpilot.config import setup
from fedpilot.config.recipe import AlgorithmSettings, Recipe, read_recipe
from fedpilot.config.setup import Experiment
from fedpilot.errors import RecordError
from fedpilot.manifest import manifest
from fedpilot.record import RunDirectory
from fedpilot.rounds import Observer, Unwatched
from fedpilot.runs import train

Line: TypeAlias = Mapping[str, object]
"""A line of metrics.jsonl."""

BASELINE, COMPARISON, RECIPE, LOG = "baseline", "comparison.json", "recipe.toml", "log.txt"


@dataclass(frozen=True)
class Standing:
    """Where a run stood after a round.

    Attributes:
        round: The round.
        seconds: Of training until then, as a federation of machines would take them: each round lasts as long as its
            slowest client. Evaluation is not counted.
        metrics: Of the evaluation.
    """

    round: int
    seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """The method beside its baseline.

    Attributes:
        metric: What decides.
        higher_is_better: Its direction.
        method: Name of the method.
        baseline: Name of the baseline.
        participants: How many clients ever took part in the baseline.
        before: The untrained model.
        after: The method after its last round.
        equal_rounds: The baseline after as many rounds.
        equal_time: The baseline after the first round that ends at the same training time or later; ``None`` where no
            client could take part.
    """

    metric: str
    higher_is_better: bool
    method: str
    baseline: str
    participants: int
    before: Standing
    after: Standing
    equal_rounds: Standing
    equal_time: Standing | None

    def lead(self, other: Standing) -> float:
        """How much better the method is than the other standing, in the metric; negative when it is worse."""
        ahead = self.after.metrics[self.metric] - other.metrics[self.metric]
        return ahead if self.higher_is_better else -ahead

    def winner(self, other: Standing) -> str:
        """Name of whoever is ahead, or ``tie``."""
        ahead = self.lead(other)
        return "tie" if ahead == 0 or math.isnan(ahead) else self.method if ahead > 0 else self.baseline


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


# --- what the lines say -------------------------------------------------------------------------------------------


def standings(lines: Sequence[Line]) -> list[Standing]:
    """Where the run stood after each of its rounds, from 0."""
    result: list[Standing] = []
    seconds = 0.0
    for line in lines:
        uploads = cast(Sequence[Mapping[str, Mapping[str, float]]], line["uploads"])
        seconds += max((upload["metrics"]["seconds"] for upload in uploads), default=0.0)
        metrics = cast(Mapping[str, float | None], line["metrics"])
        known = {name: math.nan if value is None else value for name, value in metrics.items()}
        result.append(Standing(cast(int, line["round"]), seconds, known))
    return result


def took_part(lines: Sequence[Line]) -> set[int]:
    """Clients of whom at least one upload was accepted."""
    uploads = [upload for line in lines for upload in cast(Sequence[Mapping[str, int]], line["uploads"])]
    return {upload["client_id"] for upload in uploads}


def rounds_trained(lines: Sequence[Line], num_clients: int, num_blocks: int) -> NDArray[np.int64]:
    """(clients, blocks) rounds in which each client trained each block; -1 for a client that only sat out."""
    counts = np.zeros((num_clients, num_blocks), dtype=np.int64)
    planned, sat_out = set(), set()
    for line in lines:
        for plan in cast(Sequence[Mapping[str, object]], line["plans"]):
            client = cast(int, plan["client_id"])
            planned.add(client)
            counts[client, list(cast(Sequence[int], plan["trained"]))] += 1
        sat_out |= {cast(Mapping[str, int], entry)["client_id"] for entry in cast(Sequence[object], line["left_out"])}
    counts[list(sat_out - planned)] = -1
    return counts


def compare(recipe: Recipe, lines: Sequence[Line], baseline_lines: Sequence[Line]) -> Comparison:
    """The method's lines beside the baseline's."""
    assert recipe.baseline is not None, "asked only of a recipe with a baseline"
    goal = setup.goal(recipe)
    own, others = standings(lines), standings(baseline_lines)
    last = own[-1]
    participants = took_part(baseline_lines)
    equal_time = next((stood for stood in others if stood.seconds >= last.seconds), None)
    return Comparison(
        metric=goal.metric,
        higher_is_better=goal.higher_is_better,
        method=display_name(recipe.algorithm),
        baseline=display_name(recipe.baseline),
        participants=len(participants),
        before=own[0],
        after=last,
        equal_rounds=next(stood for stood in others if stood.round == last.round),
        equal_time=equal_time if participants else None,
    )


def display_name(method: AlgorithmSettings) -> str:
    """The method's name with its participation, which makes a baseline what it is."""
    participation = method.options.get("participation")
    return method.name if participation is None else f"{method.name} ({participation})"


def summary(comparison: Comparison) -> dict[str, object]:
    """The comparison as JSON, with who is ahead written out."""

    def stood(standing: Standing | None) -> dict[str, object] | None:
        if standing is None:
            return None
        metrics = {name: value if math.isfinite(value) else None for name, value in standing.metrics.items()}
        return {"round": standing.round, "training_seconds": round(standing.seconds, 3), "metrics": metrics}

    equal_time = comparison.equal_time
    return {
        "metric": comparison.metric,
        "higher_is_better": comparison.higher_is_better,
        "method": comparison.method,
        "before": stood(comparison.before),
        "after": stood(comparison.after),
        "baseline": comparison.baseline,
        "baseline_participants": comparison.participants,
        "baseline_equal_rounds": stood(comparison.equal_rounds),
        "baseline_equal_time": stood(equal_time),
        "winner_equal_rounds": comparison.winner(comparison.equal_rounds),
        "winner_equal_time": None if equal_time is None else comparison.winner(equal_time),
    }
