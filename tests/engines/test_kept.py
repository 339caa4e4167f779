"""What clients keep, in memory and on disk."""

import os
from pathlib import Path

import pytest
import torch

from fedpilot.engines.kept import DiskKept, KeptStore, MemoryKept
from fedpilot.errors import RecordError


def kept(number: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"gate/0": {"bank.lora_A": torch.full((2, 3), number), "x": torch.tensor(number)}, "count": {}}


def number(store: KeptStore, client_id: int) -> float | None:
    found = store.get(client_id)
    return found["gate/0"]["x"].item() if found else None


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_client_gets_what_it_kept_last_and_nobody_elses(on_disk: bool, tmp_path: Path) -> None:
    store: KeptStore = DiskKept(tmp_path / "kept") if on_disk else MemoryKept()
    assert store.get(7) == {}
    store.put(7, 1, kept(1.0))
    store.put(77, 1, kept(2.0))
    store.put(7, 2, kept(3.0))
    assert (number(store, 7), number(store, 77), number(store, 777)) == (3.0, 2.0, None)
    assert torch.equal(store.get(7)["gate/0"]["bank.lora_A"], torch.full((2, 3), 3.0))
    store.put(7, 3, {})
    assert store.get(7) == {}


@pytest.mark.parametrize("left", [0, 5, 100])
def test_a_damaged_file_is_an_error_that_names_it(left: int, tmp_path: Path) -> None:
    store = DiskKept(tmp_path / "kept")
    store.put(7, 1, kept(1.0))
    [file] = (tmp_path / "kept").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(RecordError, match=f"{file} must be whole, got"):
        store.get(7)


def test_what_a_caller_does_with_it_does_not_change_the_store() -> None:
    store = MemoryKept()
    store.put(1, 1, kept(1.0))
    store.get(1).pop("gate/0")
    assert number(store, 1) == 1.0


def test_another_store_on_the_folder_sees_what_was_written(tmp_path: Path) -> None:
    DiskKept(tmp_path).put(100_123, 4, kept(4.0))
    assert number(DiskKept(tmp_path), 100_123) == 4.0
    assert files(tmp_path) == ["100/100123.4.safetensors"]


def test_a_run_that_goes_back_forgets_later_rounds(tmp_path: Path) -> None:
    store = DiskKept(tmp_path)
    store.rewind(0)
    store.committed(0)
    for round in (1, 2, 3):
        store.put(5, round, kept(round))
        store.put(6, 3, kept(30.0))
    again = DiskKept(tmp_path)
    again.rewind(2)
    assert (number(again, 5), number(again, 6)) == (2.0, None)
    again.rewind(0)
    assert files(tmp_path) == []


def test_only_what_a_checkpoint_can_need_stays_on_the_disk(tmp_path: Path) -> None:
    store = DiskKept(tmp_path)
    store.rewind(0)
    for round in range(1, 8):
        store.put(5, round, kept(round))
        if round % 2 == 0:
            store.committed(round)  # after 2, 4 and 6; the last two are kept
    assert files(tmp_path) == [f"0/5.{round}.safetensors" for round in (4, 5, 6, 7)]
    store.rewind(4)
    assert number(store, 5) == 4.0


def test_after_going_back_nothing_is_removed_before_two_checkpoints_are_known(tmp_path: Path) -> None:
    store = DiskKept(tmp_path)
    store.rewind(0)
    for round in (1, 2, 3):
        store.put(5, round, kept(round))
        store.committed(round)
    again = DiskKept(tmp_path)
    again.rewind(3)
    again.put(5, 4, kept(4.0))  # the checkpoint of round 2 may still be there, should that of round 3 be found broken
    assert files(tmp_path)[-3:] == [f"0/5.{round}.safetensors" for round in (2, 3, 4)]


def test_a_half_written_file_is_not_seen(tmp_path: Path) -> None:
    store = DiskKept(tmp_path)
    store.put(5, 1, kept(1.0))
    (tmp_path / "0" / ".5.2.safetensors.part").write_bytes(b"\x00")
    assert number(store, 5) == 1.0
    store.rewind(1)
    assert os.listdir(tmp_path / "0") == ["5.1.safetensors"]
