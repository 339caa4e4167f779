"""A recipe over Flower's messages and the real app has the bits of the run in process."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from flwr.app import Message

from fedpilot import base_deltas, jobs, tensors
from fedpilot.algorithms import ALGORITHMS
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.engines.flower import client_app, sockets
from fedpilot.engines.flower.running import Waiting, run
from fedpilot.engines.flower.timing import Timing
from fedpilot.engines.flower.trainer import NodeOptions, Trainer
from fedpilot.errors import ConfigError
from fedpilot.jobs import Job
from tests.engines.flower.local_grid import LocalGrid
from tests.engines.flower.recipes import METHODS, OTHERS, RECIPE
from tests.test_cli import save_data, save_model

QUICK = Timing(timeout_s=0.0, reconnect_s=0.0, poll_s=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flower")
    save_model(folder / "model")
    save_data(folder / "data.csv")
    (folder / "toy.toml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def node_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the nodes of a test remember; their trainers are new ones."""
    monkeypatch.setenv(client_app.FOLDER, str(tmp_path / "nodes"))
    client_app._trainer.cache_clear()
    yield
    client_app._trainer.cache_clear()


def recipe_of(folder: Path, name: str = "fedit", rounds: int = 2) -> Recipe:
    recipe = load_recipe(folder / "toy.toml", [f"run.rounds={rounds}"])
    return replace(recipe, algorithm=replace(recipe.algorithm, name=name, options={**METHODS, **OTHERS}[name]))


def grid_of(count: int = 3, **options: Any) -> LocalGrid:
    """Nodes whose numbers say nothing about their clients."""
    return LocalGrid(client_app.app, {1000 - 7 * k: {"partition-id": k} for k in range(count)}, **options)


def start(recipe: Recipe, path: Path, folder: Path) -> Job:
    return jobs.start(recipe, path, traces=folder / "traces")


def resumed(path: Path, folder: Path) -> Job:
    return jobs.resume(path, traces=folder / "traces")


def over_flower(job: Job, grid: LocalGrid | None = None) -> Job:
    run(grid or grid_of(), job, Waiting(seconds=0), QUICK)
    return job


def adapter(job: Job) -> str:
    """Of what is deployed: pairs, head and changes of the base."""
    deployed = job.directory.load_adapter("last")[0]
    return tensors.digest(deployed.tensors) + tensors.digest(base_deltas.total(deployed.base_delta))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_final_adapter_is_bit_equal_in_process_and_over_flower(name: str, folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, name)
    here, there = start(recipe, tmp_path / "here", folder), over_flower(start(recipe, tmp_path / "there", folder))
    jobs.run(here)
    assert adapter(here) == adapter(there)
    for one, other in zip(here.directory.lines(), there.directory.lines(), strict=True):
        for key in ("metrics", "plans", "bytes_down", "bytes_up"):
            assert one[key] == other[key]
        assert not other["failures"]


def test_a_killed_server_goes_on_to_the_same_bits_though_nodes_have_done_part_of_the_round(
    folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder, "fedex-lora", rounds=3)
    whole = over_flower(start(recipe, tmp_path / "whole", folder))
    grid = grid_of()

    def kill_server(node_id: int, message: Message) -> None:
        if message.metadata.group_id == "3" and node_id == 986:
            raise KeyboardInterrupt

    grid.around = kill_server
    with pytest.raises(KeyboardInterrupt):
        over_flower(start(recipe, tmp_path / "killed", folder), grid)
    again = over_flower(resumed(tmp_path / "killed", folder))
    assert adapter(again) == adapter(whole)


def test_a_server_that_is_killed_between_the_exchanges_of_a_round_goes_on_to_the_same_bits(
    folder: Path, tmp_path: Path
) -> None:
    """Nodes that have done the first exchange, or both, do the round again from what they had before it."""
    recipe = recipe_of(folder, "fedaf")
    whole = over_flower(start(recipe, tmp_path / "whole", folder))
    grid, seen = grid_of(), list[int]()

    def kill_server(node_id: int, message: Message) -> None:
        if message.metadata.group_id == "2":
            seen.append(node_id)
            if len(seen) == 5:  # three nodes, and then the first two of the second exchange
                raise KeyboardInterrupt

    grid.around = kill_server
    with pytest.raises(KeyboardInterrupt):
        over_flower(start(recipe, tmp_path / "killed", folder), grid)
    assert seen[:2] == seen[3:]
    again = over_flower(resumed(tmp_path / "killed", folder))
    assert adapter(again) == adapter(whole)


def test_a_node_that_lost_its_disk_gets_the_whole_base_and_the_run_keeps_its_bits(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, "fedex-lora", rounds=3)
    whole = over_flower(start(recipe, tmp_path / "whole", folder))
    grid = grid_of()

    def lose(node_id: int, message: Message) -> None:
        if message.metadata.group_id == "3" and node_id == 993 and not lost:
            lost.append(node_id)
            shutil.rmtree(tmp_path / "nodes")
            client_app._trainer.cache_clear()

    lost: list[int] = []
    grid.around = lose
    job = over_flower(start(recipe, tmp_path / "run", folder), grid)
    assert lost == [993]
    assert not job.directory.lines()[3]["failures"]
    assert adapter(job) == adapter(whole)


def test_too_few_nodes_are_an_error_that_names_who_came_and_who_was_refused(folder: Path, tmp_path: Path) -> None:
    grid = grid_of()
    grid.configs[5] = {"partition-id": 0}  # a second node that says it is the same client
    del grid.configs[986]
    with pytest.raises(ConfigError, match=r"3 nodes must join within 0 s, got 2 \(Bern, Oslo\).*name must be its own"):
        over_flower(start(recipe_of(folder), tmp_path / "run", folder), grid)


def test_a_client_whose_node_never_came_fails_by_name_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    job = start(recipe_of(folder), tmp_path / "run", folder)
    run(grid_of(2), job, Waiting(nodes=2, seconds=0), QUICK)
    for line in job.directory.lines()[1:]:
        reason = "node 'Rome' must be connected, got none within 0 s"
        assert line["failures"] == [{"client_id": 2, "reason": reason}]
        assert len(line["uploads"]) == 2  # type: ignore[arg-type]


def test_the_servers_plans_are_for_the_budgets_that_nodes_report(folder: Path, tmp_path: Path) -> None:
    job = over_flower(start(recipe_of(folder), tmp_path / "run", folder))
    roster = json.loads((job.path / "nodes.json").read_text())
    assert {name: entry["client_id"] for name, entry in roster.items()} == {"Bern": 0, "Oslo": 1, "Rome": 2}
    assert all(entry["facts"]["memory_bytes"] == 2**30 for entry in roster.values())
    assert all(len(entry["facts"]["base"]) == 64 for entry in roster.values())


def test_nodes_with_files_of_their_own_take_part_under_their_names_through_their_trainers_sockets(
    folder: Path, tmp_path: Path
) -> None:
    configs: dict[int, dict[str, Any]] = {}
    with TemporaryDirectory(prefix="fp") as place:
        for node_id, (name, rows) in enumerate({"zoo": 5, "alps": 9}.items(), start=70):
            file = tmp_path / f"{name}.csv"
            file.write_text("text,label\n" + "".join(f"word{n} bad,bad\n" for n in range(rows)))
            socket = Path(place) / name / "trainer"
            trainer = Trainer(NodeOptions(tmp_path / name, name, data=str(file), memory_bytes=2**30))
            threading.Thread(target=sockets.serve, args=(trainer, socket), daemon=True).start()
            configs[node_id] = {client_app.SOCKET: str(socket)}
        job = start(recipe_of(folder), tmp_path / "run", folder)
        run(LocalGrid(client_app.app, configs), job, Waiting(nodes=2, seconds=0), QUICK, keys={70: "zoo", 71: "alps"})
    roster = json.loads((job.path / "nodes.json").read_text())
    assert {name: entry["client_id"] for name, entry in roster.items()} == {"alps": 0, "zoo": 1}
    for line in job.directory.lines()[1:]:
        uploads: Any = line["uploads"]
        assert [(upload["client_id"], upload["num_examples"]) for upload in uploads] == [(0, 9), (1, 5)]
        assert [upload["metrics"]["steps"] for upload in uploads] == [2.0, 2.0]
        assert not line["failures"]


def test_a_node_under_another_name_than_its_keys_is_refused(folder: Path, tmp_path: Path) -> None:
    keys = {1000: "Bern", 993: "Bern", 986: "Rome"}  # the second says that it is Oslo
    job = start(recipe_of(folder), tmp_path / "run", folder)
    with pytest.raises(
        ConfigError, match=r"got 2 \(Bern, Rome\); Oslo was refused: name must be that of its key, 'Bern'"
    ):
        run(grid_of(), job, Waiting(seconds=0), QUICK, keys=keys)


def test_another_base_model_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpilot.engines.flower.running.base_digest", lambda adapted: "other")
    with pytest.raises(ConfigError, match="base model must have the server's weights, bit for bit"):
        over_flower(start(recipe_of(folder), tmp_path / "run", folder))
