"""Methods that train on the server, from the recipe to the run directory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedpilot import comparison, jobs, rounds, tensors
from fedpilot.config import setup
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.config.server import SERVER_ID, NoExamples, public_examples
from fedpilot.errors import TrainingError
from fedpilot.jobs import Job
from fedpilot.types import Plan, Task
from tests.engines.flower.recipes import RECIPE
from tests.test_cli import save_data, save_model

BIOT = ("algorithm.name=fedbiot", "algorithm.adapter_blocks=1", "algorithm.pre_steps=2", "algorithm.align_steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    save_model(folder / "model")
    save_data(folder / "data.csv")
    lines = ["sentence", *(f"a good day {k} in town" for k in range(12))]
    (folder / "public.csv").write_text("\n".join(lines) + "\n")
    (folder / "toy.toml").write_text(RECIPE)
    return folder


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "toy.toml", [*BIOT, *overrides])


def ran(folder: Path, path: Path, *overrides: str) -> Job:
    job = jobs.start(recipe(folder, *overrides), path, traces=folder / "traces")
    jobs.run(job)
    if job.experiment.pool is not None:
        job.experiment.pool.close()
    return job


def without_times(job: Job) -> list[dict[str, Any]]:
    """What is recorded, but for seconds."""
    kept = ("round", "metrics", "facts", "plans", "bytes_down", "bytes_up")
    return [{key: line[key] for key in kept} for line in job.directory.lines()]


def test_a_run_has_both_evaluations_and_what_the_server_did_in_every_round(folder: Path, tmp_path: Path) -> None:
    job = ran(folder, tmp_path / "run", "evaluation.on=validation", "data.validation_fraction=0.2")
    lines = job.directory.lines()
    for line in lines:
        assert {"accuracy", "loss", "emulator_accuracy", "emulator_loss"} <= line["metrics"].keys()  # type: ignore[attr-defined]
        assert line["facts"]["alignment/steps"] == (1 if line["round"] else 2)  # type: ignore[index]
        assert line["seconds"]["refine"] > 0  # type: ignore[index]
    spent = [max(up["metrics"]["seconds"] for up in line["uploads"]) for line in lines[1:]]  # type: ignore[attr-defined]
    refined = [line["seconds"]["refine"] for line in lines]  # type: ignore[index]
    assert comparison.standings(lines)[-1].seconds == pytest.approx(sum(spent) + sum(refined))
    assert lines[0]["metrics"]["emulator_loss"] != lines[0]["metrics"]["loss"]  # type: ignore[index]
    tested = jobs.tested(job.directory)
    assert tested is not None
    assert {"accuracy", "emulator_accuracy"} <= tested.metrics.keys()
    assert (job.path / "report.html").stat().st_size > 1000


@pytest.mark.slow
def test_the_run_is_the_same_to_the_bit_in_worker_processes(folder: Path, tmp_path: Path) -> None:
    one, two = (ran(folder, tmp_path / str(n), f"run.workers={n}") for n in (1, 2))
    assert without_times(one) == without_times(two)
    digests = [tensors.digest(job.directory.load_adapter("last")[0].tensors) for job in (one, two)]
    assert digests[0] == digests[1]


class _StoppedError(Exception):
    """In place of a kill."""


def test_a_stopped_run_goes_on_to_the_same_bits_and_prepares_only_where_that_was_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(folder, tmp_path / "whole")
    prepare = setup.ALGORITHMS["fedbiot"].prepare
    prepared: list[int] = []

    def counted(self: Any, state: Any, server: Any) -> Any:
        prepared.append(1)
        return prepare(self, state, server)

    monkeypatch.setattr(setup.ALGORITHMS["fedbiot"], "prepare", counted)

    def stopped(path: Path, *where: str) -> Job:
        job = jobs.start(recipe(folder), path, traces=folder / "traces")
        with pytest.MonkeyPatch.context() as patch:
            _stop_at(patch, where)
            with pytest.raises(_StoppedError):
                jobs.run(job)
        again = jobs.resume(path, traces=folder / "traces")
        jobs.run(again)
        return again

    for number, (place, times) in enumerate((("evaluate", 2), ("round 1", 1), ("round 2", 1))):
        prepared.clear()
        again = stopped(tmp_path / str(number), place)
        assert without_times(again) == without_times(whole)
        assert len(prepared) == times


def _stop_at(patch: pytest.MonkeyPatch, where: Sequence[str]) -> None:
    """Before the first evaluation is done, or before a round's refinement."""
    if where == ("evaluate",):

        def evaluate(*_: object) -> dict[str, float]:
            raise _StoppedError

        patch.setattr(setup.Experiment, "evaluate", evaluate)
        return
    site = setup.Server.site

    def refused(self: Any, round: int) -> Any:
        if f"round {round}" in where:
            raise _StoppedError
        return site(self, round)

    patch.setattr(setup.Server, "site", refused)


def test_the_servers_rows_are_no_clients(folder: Path) -> None:
    made = setup.experiment(recipe(folder), traces=folder / "traces")
    people = made.population
    assert people.public is not None
    assert sum(client.num_examples for client in people.clients) == len(people.train)
    public, train = people.table.public, people.table.train
    assert public is not None
    assert len(people.public) == len(public) == 9
    assert len(train) == 36
    assert public_examples(made.recipe, people) is people.public


def test_the_server_reads_another_source_without_its_classes(folder: Path) -> None:
    chosen = recipe(
        folder, "server.fraction=0", f"server.source={folder}/public.csv", "server.text=sentence", "server.limit=7"
    )
    made = setup.experiment(chosen, traces=folder / "traces")
    assert made.population.public is None
    found = public_examples(made.recipe, made.population)
    assert found is not None
    assert len(found) == 7
    state = rounds.first_state(made.algorithm(), 0, made.server_site(made.algorithm()))
    assert state.alignment["alignment/steps"] == 2


def test_a_site_of_the_server_follows_from_the_round_and_has_no_budget(folder: Path) -> None:
    made = setup.experiment(recipe(folder), traces=folder / "traces")
    method = made.algorithm()
    state = method.init(rounds.generator(0, 0))
    server = made.server_site(method)
    assert server is not None
    refined = [tensors.digest(method.refine(state, server(number)).emulator) for number in (1, 2, 1)]  # type: ignore[attr-defined]
    assert refined[0] == refined[2] != refined[1]
    profile = server(1).profile
    assert (profile.client_id, profile.name, profile.num_examples) == (SERVER_ID, "server", 9)
    assert profile.memory_bytes > 2**60


def test_nothing_is_loaded_for_a_method_that_does_not_train_on_the_server(folder: Path) -> None:
    made = setup.experiment(replace(recipe(folder), server=replace(recipe(folder).server)), traces=folder / "traces")
    fedit = replace(made.recipe.algorithm, name="fedit", options={})
    assert made.server_site(made.algorithm(fedit, dry=True)) is None
    assert not {"server", "adapted"} & made.__dict__.keys()


def test_a_server_without_data_says_so_when_it_is_to_train(folder: Path) -> None:
    chosen = recipe(folder, "server.fraction=0", "algorithm.pre_steps=0", "algorithm.align_steps=0")
    made = setup.experiment(chosen, traces=folder / "traces")
    site = made.server.site(1)
    assert site.profile.num_examples == len(NoExamples()) == 0
    state = made.algorithm().init(rounds.generator(0, 0))
    names = frozenset(made.adapted.spec.head)
    site.model.load(Task(Plan(SERVER_ID, {}, names), tensors.select(state.adapter, names)))
    with pytest.raises(TrainingError, match="must have examples to train on, got none"):
        site.model.fit(names)
