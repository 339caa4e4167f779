"""A comparison in its folder: which runs there are, what they have in common, and whether they can be made at all."""

import fcntl
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpilot import checkpoint, jobs
from fedpilot.config import schema, setup
from fedpilot.config.population import Population, load_population
from fedpilot.config.recipe import Recipe, method_names, method_recipe
from fedpilot.config.schema import ByteSize
from fedpilot.errors import ConfigError, FedpilotError, RecordError
from fedpilot.record import RunDirectory
from fedpilot.rounds import PLANNING, generator, plan_record
from fedpilot.types import LeftOut, Plan

MEASURED, TUNED, TRACES, LOGS = "measured.json", "tuned.toml", "traces", "logs"


@dataclass(frozen=True)
class Member:
    """One run of a comparison.

    Attributes:
        method: Name of its method.
        seed: Of the run; the split among clients follows from it too.
        recipe: Its whole configuration.
        path: Its run directory.
        read_test: Whether the test set is read at its end, where its rounds are evaluated on validation data.
    """

    method: str
    seed: int
    recipe: Recipe
    path: Path
    read_test: bool = True

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.path.parent.name} {self.path.name}"

    def started(self) -> bool:
        """Whether there is a run to go on with."""
        return (self.path / "manifest.json").exists()

    def lines(self) -> list[dict[str, object]]:
        """Its rounds so far."""
        return RunDirectory.open(self.path).lines() if self.started() else []

    def done(self) -> bool:
        """Whether nothing is left to do.

        The last checkpoint is asked for and not the last line: a run may have stopped between the two.
        """
        if not self.started():
            return False
        directory = RunDirectory.open(self.path)
        saved = directory.checkpoints()
        last = self.recipe.run.rounds
        if not saved or saved[-1].name != f"round-{last:04d}":
            return False
        reads = self.read_test and self.recipe.evaluation.on == "validation"
        return not reads or jobs.tested(directory) is not None


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        recipe: What all methods share.
        methods: Their names, in the order of the report.
        seeds: Number of seeds.
        path: Its folder: runs are in ``<method>/seed-<s>``.
        measured: Method -> settings of ``[clients]`` that were measured on this machine.
        tuned: Method -> overrides that a search has chosen.
    """

    recipe: Recipe
    methods: tuple[str, ...]
    seeds: int
    path: Path
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tuned: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def members(self) -> list[Member]:
        """All runs: every method with the first seed, then with the second, and so on."""
        return [self.member(method, index) for index in range(self.seeds) for method in self.methods]

    def member(self, method: str, index: int) -> Member:
        """The run of a method with the seed of that index."""
        recipe = self.member_recipe(method, index, self.tuned.get(method, ()))
        seed = recipe.run.seed
        return Member(method, seed, recipe, self.path / method / f"seed-{seed}")

    def member_recipe(self, method: str, index: int, overrides: Sequence[str] = ()) -> Recipe:
        """A method's recipe with the seed of that index.

        The seed decides the split among clients, the cohorts and all that is drawn; ``data.seed`` stays, so that what
        one seed is tested on no other seed trains on.
        """
        recipe = method_recipe(self.recipe, method, overrides)
        run = replace(
            recipe.run, name=method, out="runs", seed=self.recipe.run.seed + index, threads=1
        )  # not the folder's place: it may be moved
        partition = replace(recipe.partition, seed=self.recipe.partition.seed + index)
        clients = replace(recipe.clients, **self.measured.get(method, {}))
        return replace(recipe, run=run, partition=partition, clients=clients)


@dataclass(frozen=True)
class DryPlan:
    """What a method would ask of the whole population in its first round.

    Attributes:
        method: Its name.
        left_out: Clients for which nothing fits.
        clients: All of them.
        blocks: Fewest and most blocks that a client trains.
        seconds: Predicted seconds of the slowest client, where speeds are known.
    """

    method: str
    left_out: int
    clients: int
    blocks: tuple[int, int]
    seconds: float | None


def study(recipe: Recipe, methods: Sequence[str], seeds: int, path: Path) -> Study:
    """A comparison in a folder, with what was measured and chosen for it before.

    Raises:
        ConfigError: A method is unknown, named twice or wrong; all problems at once.
    """
    problems = [
        f"--algorithms must be known methods, got {name!r}; {schema.suggestion(name, method_names(recipe))}"
        for name in methods
        if name not in method_names(recipe)
    ]
    problems += [
        f"--algorithms must name each method once, got {name!r} {methods.count(name)} times"
        for name in dict.fromkeys(methods)
        if methods.count(name) > 1
    ]
    if not methods:
        problems.append(f"--algorithms must name a method, got none; known: {', '.join(method_names(recipe))}")
    if problems:
        raise ConfigError(problems)
    measured = _read_json(path / MEASURED)
    for of_method in measured.values():
        if "flops_per_second" in of_method:
            of_method["flops_per_second"] = tuple(of_method["flops_per_second"])
        if "overhead_bytes" in of_method:
            of_method["overhead_bytes"] = ByteSize(of_method["overhead_bytes"])
    return Study(recipe, tuple(methods), seeds, path, measured, read_tuned(path))


def read_tuned(path: Path) -> dict[str, list[str]]:
    """Method -> overrides that were chosen for it in this folder.

    Raises:
        RecordError: The file cannot be read.
    """
    file = path / TUNED
    if not file.exists():
        return {}
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        return {name: list(table["set"]) for name, table in found.get("methods", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{file} must hold what a search chose, got {error}; delete it and search again") from error


def check(made: Study) -> tuple[Study, list[DryPlan]]:
    """Plans the first round of every method, for every client, without weights; refuses what cannot run.

    What is measured on this machine, a device's overhead or the speed that deadlines need, is measured here once and
    kept in the folder.

    Returns:
        The study with what was measured, and what each method would do.

    Raises:
        ConfigError: Methods that cannot run, all of them.
        RecordError: Runs in the folder were made with another recipe.
    """
    people: Population | None = None
    measured = {method: dict(known) for method, known in made.measured.items()}
    problems: list[str] = []
    plans: list[DryPlan] = []
    for method in made.methods:
        recipe = replace(made, measured=measured).member_recipe(method, 0, made.tuned.get(method, ()))
        speeds = next((known["flops_per_second"] for known in measured.values() if "flops_per_second" in known), ())
        if speeds:
            recipe = replace(recipe, clients=replace(recipe.clients, flops_per_second=speeds))
        try:
            people = people or load_population(recipe)
            if speeds:
                clients = tuple(replace(client, flops_per_second=speeds[0]) for client in people.clients)
                people = replace(people, clients=clients)
            found, recipe = _dry(recipe, people, made.path / TRACES)
        except FedpilotError as error:
            problems += [f"method {method!r}: {problem}" for problem in str(error).split("\n")]
            continue
        plans.append(replace(found, method=method))
        measured[method] = _what_was_measured(made.recipe, recipe)
    if problems:
        raise ConfigError(problems)
    checked = replace(made, measured={method: known for method, known in measured.items() if known})
    _check_runs(checked)
    if checked.measured:
        made.path.mkdir(parents=True, exist_ok=True)
        checkpoint.write_file(made.path / MEASURED, json.dumps(checked.measured, indent=2).encode())
    return checked, plans


def _dry(recipe: Recipe, people: Population, traces: Path) -> tuple[DryPlan, Recipe]:
    experiment = setup.experiment(recipe, people=people, traces=traces)
    method, seed = experiment.algorithm(dry=True), recipe.run.seed
    entries = method.plan(method.init(generator(seed, 0)), experiment.population.clients, generator(seed, 1, PLANNING))
    planned = [entry for entry in entries if isinstance(entry, Plan)]
    clients = experiment.population.clients
    records = [plan_record(plan, clients[plan.client_id], experiment.sketch.spec) for plan in planned]
    counts = [len(record.trained) for record in records] or [0]
    seconds = [plan.seconds for plan in planned if plan.seconds is not None]
    return (
        DryPlan(
            recipe.algorithm.name,
            sum(isinstance(entry, LeftOut) for entry in entries),
            len(entries),
            (min(counts), max(counts)),
            max(seconds, default=None),
        ),
        experiment.recipe,
    )


def _what_was_measured(given: Recipe, found: Recipe) -> dict[str, object]:
    """Settings of ``[clients]`` that the recipe does not say and the machine did."""
    names = ("flops_per_second", "overhead_bytes")
    pairs = {name: (getattr(given.clients, name), getattr(found.clients, name)) for name in names}
    return {name: after for name, (before, after) in pairs.items() if after != before}


def _check_runs(made: Study) -> None:
    """Compares the runs in the folder with what they would be now."""
    problems = []
    for member in made.members():
        if member.started():
            try:
                jobs.opened(member.path, member.recipe)
            except RecordError as error:
                problems.append(str(error))
    if problems:
        more = f" ({len(problems) - 1} more runs differ, too)" if len(problems) > 1 else ""
        raise RecordError(problems[0] + more)


def _read_json(file: Path) -> dict[str, dict[str, Any]]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_bytes())
        return {name: dict(table) for name, table in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise RecordError(f"{file} must be JSON, got {error}; restore it from a copy or delete it") from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps a second comparison out of the folder.

    Raises:
        RecordError: There is one at work.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RecordError(
                f"{path} must be worked on by one comparison at a time, got a second; wait for the other, or choose "
                "another folder"
            ) from error
        yield
