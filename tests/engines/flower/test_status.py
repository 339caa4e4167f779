"""What a served run notes down, and what is read off it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedpilot import checkpoint, jobs
from fedpilot.config.recipe import load_recipe
from fedpilot.engines.flower import client_app, messages, status
from fedpilot.engines.flower.running import Waiting, run
from fedpilot.engines.flower.status import Board
from fedpilot.engines.flower.timing import Timing
from fedpilot.errors import ConfigError, FedpilotError
from fedpilot.jobs import Job
from fedpilot.types import Failure, LeftOut, Plan
from tests.engines.flower.local_grid import LocalGrid
from tests.engines.flower.recipes import RECIPE
from tests.test_cli import fedpilot, save_data, save_model

QUICK = Timing(timeout_s=0.0, reconnect_s=0.0, poll_s=0.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds in which Oslo's node runs out of memory in the first; its server is this process."""
    folder = tmp_path_factory.mktemp("status")
    save_model(folder / "model")
    save_data(folder / "data.csv")
    (folder / "toy.toml").write_text(RECIPE)
    recipe = load_recipe(folder / "toy.toml", ["run.rounds=3"])
    recipe = replace(recipe, algorithm=replace(recipe.algorithm, options={"participation": "exclusive"}))
    job = jobs.start(recipe, folder / "run", traces=folder / "traces")

    def short_of_memory(node_id: int, message: Message) -> Message | None:
        if node_id == 993 and message.metadata.group_id == "1":
            manifest = messages.text_of(message.content, "manifest")
            return Message(messages.failed(manifest, "memory", "the kernel ended it"), reply_to=message)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(client_app.FOLDER, str(folder / "nodes"))
        client_app._trainer.cache_clear()
        noted(job, LocalGrid(client_app.app, {1000 - 7 * k: {"partition-id": k} for k in range(3)}, short_of_memory))
        client_app._trainer.cache_clear()
    return folder / "run"


def noted(job: Job, grid: LocalGrid) -> None:
    (job.path / status.HOME).mkdir(exist_ok=True)
    status.note_server(job.path, "127.0.0.1:1", job.path / "ca.crt")
    run(grid, job, Waiting(seconds=0), QUICK, noted=True)


def test_a_run_is_shown_with_its_clients_failures_and_margins(served: Path) -> None:
    found = status.read(served)
    assert (found.state, found.phase, found.method) == ("running", "between rounds", "fedit")
    assert (found.round, found.last_round, found.recorded) == (3, 3, 3)
    assert found.metrics.keys() >= {"accuracy", "loss"}
    assert found.left_s == 0.0
    clients = {client.name: client for client in found.clients}
    assert clients["Bern"].rounds == clients["Rome"].rounds == 3
    assert clients["Oslo"].failures == 1
    assert clients["Oslo"].margin > 1.25
    assert clients["Bern"].margin == 1.0
    assert clients["Bern"].budget_bytes == 2**30
    assert all(client.connected is None for client in found.clients)  # no SuperLink listens here


def test_who_ran_out_of_memory_is_planned_for_anew_and_the_margin_is_on_record(served: Path) -> None:
    lines = [json.loads(line) for line in (served / "metrics.jsonl").read_text().splitlines()]
    (failure,) = lines[1]["failures"]
    assert failure == {"client_id": 1, "reason": "the kernel ended it"}
    (first,) = [plan for plan in lines[1]["plans"] if plan["client_id"] == 1]
    margin = lines[1]["margins"]["1"]
    assert margin == pytest.approx(1.25 * 2**30 / first["peak_bytes"])
    # Everything does not fit four fifths of what everything needs, and this method trains everything or nothing.
    for line in lines[2:]:
        (left,) = line["left_out"]
        assert left["client_id"] == 1
        assert len(line["uploads"]) == 2
        assert line["margins"] == {"1": margin}


def test_the_round_at_hand_is_shown_while_it_goes_on(served: Path, tmp_path: Path) -> None:
    path = _copied(served, tmp_path)
    board = Board(path, "fedit", 5, lambda: {"zoo": "name must be that of its key"})
    plans = [Plan(client_id, {}, frozenset()) for client_id in (0, 1)]
    board.round_started(4, plans, [LeftOut(2, "nothing fits")])
    board._written = 0.0
    board.client_done(4, Failure(1, "gone"))
    found = status.read(path)
    assert (found.phase, found.round, found.recorded) == ("training", 4, 3)
    assert found.seconds is not None
    assert found.seconds >= 0
    assert found.left_s is not None
    assert found.left_s > 0
    doing = {client.name: (client.doing, client.reason) for client in found.clients}
    assert doing["Bern"] == ("training", "")
    assert doing["Oslo"] == ("failed", "gone")
    assert doing["Rome"] == ("left out", "nothing fits")
    assert found.refused == {"zoo": "name must be that of its key"}


def test_notes_are_written_at_most_once_a_second_but_at_a_rounds_start_and_end(tmp_path: Path) -> None:
    (tmp_path / status.HOME).mkdir()
    board = Board(tmp_path, "fedit", 5)
    board.round_started(1, [Plan(0, {}, frozenset())], [])
    board.client_done(1, Failure(0, "gone"))
    assert json.loads((tmp_path / status.HOME / status.NOTES).read_text())["failed"] == {}


@pytest.mark.parametrize(
    ("outcome", "state", "phase"),
    [
        (None, "stopped", "serve --resume"),
        ({}, "done", "all rounds are done"),
        ({"error": "disk full", "problems": []}, "failed", "disk full"),
        ({"error": "", "problems": ["3 nodes must join"]}, "failed", "3 nodes must join"),
    ],
)
def test_a_run_whose_server_has_ended_is_done_failed_or_stopped(
    served: Path, tmp_path: Path, outcome: dict[str, Any] | None, state: str, phase: str
) -> None:
    path = _copied(served, tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    server = json.loads((path / status.HOME / status.SERVER).read_text())
    checkpoint.write_file(path / status.HOME / status.SERVER, json.dumps(server | {"pid": ended.pid}).encode())
    if outcome is not None:
        checkpoint.write_file(path / status.HOME / status.OUTCOME, json.dumps(outcome).encode())
    found = status.read(path)
    assert found.state == state
    assert phase in found.phase
    assert found.left_s is None
    assert all(client.doing == "" for client in found.clients)


def test_another_process_under_the_servers_number_is_not_the_server(served: Path, tmp_path: Path) -> None:
    path = _copied(served, tmp_path)
    server = json.loads((path / status.HOME / status.SERVER).read_text())
    assert server["pid"] == os.getpid()
    checkpoint.write_file(path / status.HOME / status.SERVER, json.dumps(server | {"began": "1"}).encode())
    assert status.read(path).state == "stopped"


def test_a_folder_without_a_served_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FedpilotError, match="must be the directory of a run that was served"):
        status.read(tmp_path)


def test_who_waits_for_nodes_says_for_how_many_and_who_is_there(served: Path, tmp_path: Path) -> None:
    recipe = load_recipe(served.parent / "toy.toml")
    job = jobs.start(recipe, tmp_path / "run", traces=served.parent / "traces")
    with pytest.raises(ConfigError, match="3 nodes must join"):
        noted(job, LocalGrid(client_app.app, {}))
    notes = json.loads((tmp_path / "run" / status.HOME / status.NOTES).read_text())
    assert (notes["phase"], notes["wanted"], notes["there"]) == ("waiting for nodes", 3, [])


def test_the_command_shows_a_table_or_json(served: Path) -> None:
    shown = fedpilot("status", str(served))
    assert shown.exit_code == 0, shown.output
    assert "round 3 of 3" in shown.output
    assert "Oslo" in shown.output
    told = json.loads(fedpilot("status", str(served), "--json").output)
    assert [client["name"] for client in told["clients"]] == ["Bern", "Oslo", "Rome"]
    assert fedpilot("status", str(served.parent)).exit_code == 1


def _copied(served: Path, folder: Path) -> Path:
    """The run, of which a test changes a part."""
    return Path(shutil.copytree(served, folder / "run"))
