"""Worker processes of a recipe: the same run, on several cores."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpilot import jobs
from fedpilot.config import setup
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.errors import ConfigError

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.toml"


def recipe(**run: Any) -> Recipe:
    read = load_recipe(RECIPE)
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


def test_several_workers_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup.experiment(recipe(workers=1))
    monkeypatch.setattr(setup, "device_of", lambda recipe: "cuda")
    with pytest.raises(ConfigError, match=r"run.workers must be 1 on a GPU, which clients share by turns, got 2"):
        setup._with_workers(replace(made, recipe=recipe(workers=2)))


def test_what_is_remembered_counts_in_predicted_memory() -> None:
    made = setup.experiment(recipe())
    more = replace(made, recipe=replace(made.recipe, training=replace(made.recipe.training, cache_bytes=12345)))
    assert more.profile().overhead_bytes - made.profile().overhead_bytes == 12345
    assert torch.get_num_threads() == 1
