"""Worker processes of a recipe: the same run, on several cores."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpilot import jobs
from fedpilot.config import setup
from fedpilot.config.population import load_population
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.config.setup import Experiment
from fedpilot.data import few_widths
from fedpilot.engines.workers import Pool
from fedpilot.errors import ConfigError
from fedpilot.memory import MemoryProfile
from fedpilot.startup import Parent

pytestmark = pytest.mark.usefixtures("traced_once")

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.toml"


def recipe(**run: Any) -> Recipe:
    read = load_recipe(RECIPE, ["data.test_limit=16"])
    return replace(read, run=replace(read.run, **run), baseline=None)


def test_a_run_in_worker_processes_is_the_run_in_one_process_to_the_bit(tmp_path: Path) -> None:
    lines = []
    for workers in (1, 2):
        job = jobs.start(recipe(workers=workers, kept="disk"), tmp_path / str(workers))
        jobs.run(job)
        lines.append(job.directory.lines())
        if job.experiment.pool is not None:
            job.experiment.pool.close()
    for one, two in zip(*lines, strict=True):
        assert two["metrics"] == one["metrics"]
        assert [upload["client_id"] for upload in two["uploads"]] == [upload["client_id"] for upload in one["uploads"]]
        for ours, theirs in zip(one["uploads"], two["uploads"], strict=True):
            assert theirs["metrics"]["loss"] == ours["metrics"]["loss"]
    adapters = []
    for workers in (1, 2):
        (file,) = (tmp_path / str(workers) / "adapters" / "last").glob("*.safetensors")
        adapters.append(file.read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(("autocast", "few"), [("float32", False), ("bf16", True)])
def test_batches_have_few_widths_where_each_shape_costs_code(autocast: str, few: bool) -> None:
    asked = replace(recipe(), training=replace(recipe().training, autocast=autocast))  # type: ignore[arg-type]
    people = load_population(asked)
    assert people.train.widths == people.examples[0].widths == (few_widths(people.train.longest) if few else ())
    assert people.test.widths == (few_widths(people.test.longest) if few else ())


def test_the_number_of_workers_is_measured_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup.experiment(recipe(workers="auto", threads=1))
    assert made.recipe.run.workers == 1  # one thread leaves nothing to choose
    assert made.pool is None
    asked = []

    def two(pool: Any, *rest: object) -> int:
        asked.append(pool.count)
        return 2

    monkeypatch.setattr(setup, "faster_workers", two)
    monkeypatch.setattr(setup, "threads", lambda recipe: 2)
    made = setup.experiment(recipe(workers="auto"))
    assert asked == [2]
    assert made.recipe.run.workers == 2
    assert made.pool is not None


def test_what_workers_import_is_begun_with_a_run_that_may_have_them_and_with_no_other() -> None:
    begun = {
        (str(workers), passes): setup.experiment(
            recipe(workers=workers, clients_per_pass=passes, threads=2), trains=True
        )
        for workers, passes in ((2, "auto"), (1, "auto"), ("auto", 3))
    }
    assert {key: made.parent is not None for key, made in begun.items()} == {
        ("2", "auto"): True,
        ("1", "auto"): False,
        ("auto", 3): False,
    }
    assert setup.experiment(recipe(workers=2)).parent is None
    pool, parent = begun["2", "auto"].pool, begun["2", "auto"].parent
    assert pool is not None
    assert parent is not None
    pool.close()
    assert parent.process.returncode is not None


@pytest.mark.parametrize(
    ("workers", "trains", "deadline", "begun"),
    [(2, True, False, True), (2, False, False, False), (2, True, True, False), (1, True, False, False)],
)
def test_workers_set_themselves_up_while_memory_is_traced_unless_something_they_need_is_to_be_measured(
    workers: int, trains: bool, deadline: bool, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    profile = Experiment.profile

    def traced(made: Experiment, *args: Any) -> MemoryProfile:
        order.append("traced")
        return profile(made, *args)

    monkeypatch.setattr(Pool, "start", lambda pool: order.append("started"))
    monkeypatch.setattr(Experiment, "profile", traced)
    asked = recipe(workers=workers)
    if deadline:
        asked = replace(asked, clients=replace(asked.clients, deadline_s=(1e9,) * len(asked.clients.memory)))
    made = setup.experiment(asked, trains=trains)
    assert ("started" in order) == begun
    assert order.index("traced") == begun
    if made.parent is not None:
        made.parent.close()


def test_a_process_that_imports_already_serves_a_run_with_workers_and_ends_where_there_are_none() -> None:
    parents = [Parent(), Parent()]
    served = setup.experiment(recipe(workers=2), trains=True, parent=parents[0])
    assert served.parent is parents[0]
    alone = setup.experiment(recipe(workers=1), trains=True, parent=parents[1])
    assert alone.parent is None
    assert parents[1].process.returncode is not None
    parents[0].close()


def test_bf16_products_are_said(caplog: pytest.LogCaptureFixture) -> None:
    for autocast in ("float32", "bf16"):
        asked = replace(recipe(), training=replace(recipe().training, autocast=autocast))  # type: ignore[arg-type]
        with caplog.at_level("INFO"):
            setup.experiment(asked)
        assert ("matrix products are bf16" in caplog.text) == (autocast == "bf16")


def test_several_workers_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup.experiment(recipe(workers=1))
    monkeypatch.setattr(setup, "device_of", lambda recipe: "cuda")
    with pytest.raises(ConfigError, match=r"run.workers must be 1 on a GPU, which clients share by turns, got 2"):
        setup._with_workers(replace(made, recipe=recipe(workers=2)))


def test_the_number_of_clients_in_a_pass_follows_the_device_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup.experiment(recipe())
    assert made.recipe.run.clients_per_pass == 1
    assert made.together is None
    given = setup.experiment(recipe(clients_per_pass=3, workers="auto", threads=2))
    assert (given.recipe.run.clients_per_pass, given.recipe.run.workers) == (3, 1)
    assert given.pool is None
    assert given.together is not None
    assert given.together.clients_per_pass == 3
    torch.set_num_threads(1)
    monkeypatch.setattr(setup, "device_of", lambda recipe: "cuda")
    for run, count in (({}, 8), ({"clients_per_pass": 1}, 1), ({"engine": "flower"}, 1)):
        chosen = setup._with_passes(replace(made, recipe=recipe(**run))).recipe.run.clients_per_pass
        assert chosen == count


def test_several_clients_in_a_pass_are_for_this_process_alone() -> None:
    for elsewhere in ({"workers": 2}, {"engine": "flower-simulation"}):
        with pytest.raises(ValueError, match="clients_per_pass must be 1 where clients do not train in this process"):
            recipe(clients_per_pass=2, **elsewhere)


def test_a_run_records_how_many_trained_together_and_is_the_run_of_one_by_one(tmp_path: Path) -> None:
    jobs_done, read = [], recipe()
    alike = {
        "model": replace(read.model, dropout=0.0),
        "clients": replace(read.clients, memory=(2**30,), tiers=("large",)),
    }
    for count in (1, 3):
        job = jobs.start(replace(recipe(clients_per_pass=count), **alike), tmp_path / str(count))
        jobs.run(job)
        jobs_done.append(job)
    for count, job in zip((1, 3), jobs_done, strict=True):
        assert job.directory.manifest["config"]["run"]["clients_per_pass"] == count  # type: ignore[index]
    for one_by_one, together in zip(*(job.directory.lines()[1:] for job in jobs_done), strict=True):
        for ours, theirs in zip(together["uploads"], one_by_one["uploads"], strict=True):
            assert ours["metrics"]["clients_in_pass"] >= 1
            assert ours["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=1e-5)
    shared = [up["metrics"]["clients_in_pass"] for line in jobs_done[1].directory.lines()[1:] for up in line["uploads"]]
    assert shared == [2.0] * 8  # four clients, at most three at a time


def test_what_is_remembered_counts_in_predicted_memory() -> None:
    made = setup.experiment(recipe())
    more = replace(made, recipe=replace(made.recipe, training=replace(made.recipe.training, cache_bytes=12345)))
    assert more.profile().overhead_bytes - made.profile().overhead_bytes == 12345
    assert torch.get_num_threads() == 1
