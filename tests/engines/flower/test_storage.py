"""What a node remembers: by client and run, whole or not at all, as it was before a round that is repeated."""

import json
from pathlib import Path

import pytest
import torch

from fedpilot import base_deltas, tensors
from fedpilot.engines.flower import codec
from fedpilot.engines.flower.storage import VERSIONS, MissingBaseError, Storage
from fedpilot.errors import RecordError
from fedpilot.types import BaseDelta, Plan, Task
from tests.engines.flower.mutations import STAMP


def kept_of(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"drift": {"head/bias": torch.full((3,), value)}}


def value_of(storage: Storage, round: int) -> float | None:
    kept = storage.kept(round)
    return float(kept["drift"]["head/bias"][0]) if kept else None


def test_a_repeated_round_finds_what_was_kept_before_it(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "run", "a client")
    assert storage.kept(1) == {}
    storage.keep(1, kept_of(1.0))
    storage.keep(2, kept_of(2.0))
    assert [value_of(storage, round) for round in (1, 2, 3)] == [None, 1.0, 2.0]
    storage.keep(2, kept_of(20.0))  # the server was killed, and round 2 came again
    assert [value_of(storage, round) for round in (2, 3)] == [1.0, 20.0]


def test_a_future_that_was_taken_back_is_forgotten(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "run", "a")
    for round in (1, 2, 3):
        storage.keep(round, kept_of(round))
    storage.keep(2, kept_of(20.0))
    assert value_of(storage, 9) == 20.0


def test_old_versions_go_and_another_client_or_run_sees_nothing(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "run", "a")
    for round in range(1, 9):
        storage.keep(round, kept_of(round))
    assert len(list(storage.path.iterdir())) == VERSIONS
    assert value_of(Storage(tmp_path, "run", "a"), 9) == 8.0  # after a restart
    assert Storage(tmp_path, "run", "b").kept(9) == {}
    assert Storage(tmp_path, "other", "a").kept(9) == {}


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "Zürich", "x" * 500])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "node", "run", name)
    storage.keep(1, kept_of(1.0))
    assert storage.path.resolve().parent == (tmp_path / "node" / "run").resolve()
    assert [path.name for path in tmp_path.iterdir()] == ["node"]


def test_what_a_client_keeps_no_more_is_not_found_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "run", "a")
    storage.keep(1, {})
    assert not storage.path.exists()
    storage.keep(2, kept_of(2.0))
    storage.keep(3, {})
    assert storage.kept(4) == {}


def test_damage_on_the_disk_is_an_error_and_not_a_guess(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "run", "a")
    storage.keep(1, kept_of(1.0))
    (file,) = storage.path.glob("kept-*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RecordError, match="must have SHA-256"):
        storage.kept(2)


def log_of(steps: int) -> BaseDelta:
    log = BaseDelta()
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(1, 6, generator=generator), torch.randn(7, 1, generator=generator)
        log = base_deltas.extended(log, base_deltas.pair("m", b, a))
    return log


def sent(log: BaseDelta, since: int) -> BaseDelta:
    """The log as it arrives at a client that has a version."""
    plan = Plan(2, {"m": 1}, frozenset({"m.lora_A"}))
    task = Task(plan, {"m.lora_A": torch.ones(1, 6)}, base_deltas.since(log, since))
    return codec.decode_task(codec.encode_task(task, STAMP), lambda fresh, ranks: {})[1].base_delta


def test_a_base_that_came_in_steps_has_the_servers_bits_also_after_a_restart(tmp_path: Path) -> None:
    held = 0
    for version in (0, 1, 2, 2, 7, 8):
        log = log_of(version)
        based = Storage(tmp_path, "run", "a").based(sent(log, held))  # a new object each time: the disk remembers
        assert tensors.digest(base_deltas.total(based)) == tensors.digest(base_deltas.total(log))
        held = version


def test_an_unchanged_base_is_the_same_object_so_that_the_model_is_left_alone(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "run", "a")
    first = storage.based(sent(log_of(2), 0))
    assert storage.based(sent(log_of(2), 2)) is first


def test_a_base_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(MissingBaseError, match="base of version 2 must be on this node, got none"):
        Storage(tmp_path, "run", "a").based(sent(log_of(3), 2))


def test_a_base_of_a_future_that_was_taken_back_is_not_used(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "run", "a")
    storage.based(sent(log_of(1), 0))
    other = base_deltas.extended(log_of(1), {"m.weight": torch.ones(7, 6)})
    storage.based(sent(other, 1))
    again = storage.based(sent(log_of(2), 1))
    assert tensors.digest(base_deltas.total(again)) == tensors.digest(base_deltas.total(log_of(2)))


def test_the_manifest_of_a_base_names_what_is_sent_only() -> None:
    plan = Plan(2, {"m": 1}, frozenset({"m.lora_A"}))
    task = Task(plan, {"m.lora_A": torch.ones(1, 6)}, base_deltas.since(log_of(3), 2))
    body = json.loads(codec.encode_task(task, STAMP).manifest)["body"]
    assert [len(step) for step in body["base"]["steps"]] == [2]
