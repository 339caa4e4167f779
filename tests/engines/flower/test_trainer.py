"""A node's trainer: what it says of itself, its own data, and what goes wrong on it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpilot import jobs, lora
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.engines.flower import codec
from fedpilot.engines.flower.codec import NodeFailure, Packed, Stamp
from fedpilot.engines.flower.trainer import Loader, NodeOptions, Trainer, base_digest
from fedpilot.errors import ClientError
from fedpilot.types import Plan, Task, Upload
from tests.engines.flower.recipes import RECIPE
from tests.test_cli import save_data, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    save_model(folder / "model")
    save_data(folder / "data.csv")
    (folder / "toy.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def loader() -> Loader:
    return Loader()


def told(recipe: Recipe, labels: tuple[str, ...] = ("bad", "good")) -> str:
    tables = json.loads(json.dumps(recipe.resolved(), default=str))
    return json.dumps({"recipe": tables, "labels": labels, "method": {"name": "fedit", "options": {}}})


def stamp(**changes: Any) -> Stamp:
    return replace(Stamp("run", 1, 4, "t", 8.0), **changes)


def task_for(trainer: Trainer, settings: str, client_id: int = 4) -> Task:
    """A task that trains all pairs and the head of the trainer's model."""
    adapted = trainer._load(settings).adapted
    spec = adapted.spec
    ranks = dict.fromkeys(spec.modules, 2)
    start = lora.init(spec, ranks, np.random.default_rng(0))
    return Task(Plan(client_id, ranks, frozenset(start)), start)


def answered(trainer: Trainer, settings: str, task: Task, stamp: Stamp) -> Upload | NodeFailure:
    return codec.decode_answer(trainer.update(settings, codec.encode_task(task, stamp)), stamp, most_bytes=10**6)


def test_a_node_says_what_it_is(folder: Path, loader: Loader, tmp_path: Path) -> None:
    trainer = Trainer(NodeOptions(tmp_path, partition=1), loader)
    facts = json.loads(trainer.describe(told(load_recipe(folder / "toy.toml"))))
    assert (facts["name"], facts["partition"], facts["memory_bytes"]) == ("Oslo", 1, 2**30)
    assert facts["num_examples"] == 12  # a fifth of all is the server's
    assert facts["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(facts["base"]) == 64
    again = Trainer(NodeOptions(tmp_path, name="other", partition=1, memory_bytes=5), loader)
    assert json.loads(again.describe(told(load_recipe(folder / "toy.toml"))))["name"] == "other"
    measured = Trainer(NodeOptions(tmp_path, partition=1, memory_bytes=0), loader)
    assert json.loads(measured.describe(told(load_recipe(folder / "toy.toml"))))["memory_bytes"] > 2**20


def test_a_node_with_a_file_of_its_own_trains_on_all_its_rows_under_the_servers_classes(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("text,label\n" + "".join(f"word{n} good,good\n" for n in range(7)))  # one class of two, no city
    trainer = Trainer(NodeOptions(tmp_path / "node", "mine", data=str(file)))
    settings = told(load_recipe(folder / "toy.toml"))
    facts = json.loads(trainer.describe(settings))
    assert (facts["name"], facts["partition"], facts["num_examples"]) == ("mine", None, 7)
    assert trainer._load(settings).people.table.train.labels.tolist() == [1] * 7
    result = answered(trainer, settings, task_for(trainer, settings), stamp())
    assert isinstance(result, Upload)
    assert (result.client_id, result.num_examples) == (4, 7)
    assert result.metrics["steps"] == 2.0


def test_a_class_that_the_server_does_not_know_keeps_a_node_out(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("text,label\na b,good\nc d,ugly\n")
    trainer = Trainer(NodeOptions(tmp_path / "node", "mine", data=str(file)))
    facts = json.loads(trainer.describe(told(load_recipe(folder / "toy.toml"))))
    assert "'ugly'" in facts["error"]


def test_a_part_that_the_recipe_does_not_have_keeps_a_node_out(folder: Path, loader: Loader, tmp_path: Path) -> None:
    trainer = Trainer(NodeOptions(tmp_path, partition=3), loader)
    facts = json.loads(trainer.describe(told(load_recipe(folder / "toy.toml"))))
    assert facts["error"].startswith("partition must be below 3, got 3")


def test_the_model_is_loaded_once_for_all_rounds_and_clients(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpilot.engines.flower import trainer as module

    built: list[object] = []
    build = module.build_model

    def counted(*arguments: Any, **options: Any) -> Any:
        built.append(arguments)
        return build(*arguments, **options)

    monkeypatch.setattr(module, "build_model", counted)
    loader, settings = Loader(), told(load_recipe(folder / "toy.toml"))
    for partition in (0, 1):
        trainer = Trainer(NodeOptions(tmp_path, partition=partition), loader)
        trainer.describe(settings)
        task = task_for(trainer, settings)
        for round in (1, 2):
            assert isinstance(answered(trainer, settings, task, stamp(round=round)), Upload)
    assert len(built) == 1


def test_what_goes_wrong_comes_back_as_a_failure_with_its_cause(
    folder: Path, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(NodeOptions(tmp_path, partition=0), loader)
    settings = told(load_recipe(folder / "toy.toml"))
    task = task_for(trainer, settings)

    def fail_with(error: BaseException) -> NodeFailure:
        def fail(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("fedpilot.engines.flower.trainer.carry", fail)
            result = answered(trainer, settings, task, stamp())
        assert isinstance(result, NodeFailure)
        return result

    assert fail_with(torch.OutOfMemoryError("2 GiB")) == NodeFailure("memory", "2 GiB")
    assert fail_with(MemoryError()) == NodeFailure("memory", "MemoryError")
    assert fail_with(ZeroDivisionError("a bug")) == NodeFailure("error", "ZeroDivisionError: a bug")
    at_another_scale = answered(trainer, settings, task, stamp(scale=1.0))
    assert at_another_scale == NodeFailure("client", "scale must be 8.0 here, got 1.0; use the server's recipe")


def test_a_task_that_cannot_be_read_is_refused(folder: Path, loader: Loader, tmp_path: Path) -> None:
    trainer = Trainer(NodeOptions(tmp_path, partition=0), loader)
    with pytest.raises(ClientError, match="manifest must be JSON"):
        trainer.update(told(load_recipe(folder / "toy.toml")), Packed("no manifest", b""))


def test_another_base_model_has_another_digest(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(folder / "toy.toml")
    job = jobs.start(recipe, tmp_path / "run")
    adapted = job.experiment.adapted
    pristine = base_digest(adapted)
    ranks = dict.fromkeys(adapted.spec.modules, 2)
    start = lora.init(adapted.spec, ranks, np.random.default_rng(0))
    adapted.load(Task(Plan(0, ranks, frozenset(start)), start))
    assert base_digest(adapted) == pristine  # adapters and head do not count
    with torch.no_grad():
        next(iter(adapted.base.parameters())).view(-1)[0] += 1
    assert base_digest(adapted) != pristine
