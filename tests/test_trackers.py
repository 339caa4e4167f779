import importlib.util
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpilot import trackers
from fedpilot.config.recipe import read_recipe
from fedpilot.config.sections import RunSettings
from fedpilot.errors import ConfigError
from fedpilot.trackers import LANDMARK, Place, TrackerName, Values, flat, opened

CONFIG: Mapping[str, object] = {"run": {"seed": 3, "rounds": 4}, "data": {"source": "toy.csv", "columns": ["city"]}}


def place(path: Path, done: int = 0) -> Place:
    path.mkdir(exist_ok=True)
    return Place(path, "0123456789abcdef", CONFIG, done)


def curves(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def stopped(names: Sequence[TrackerName], place: Place, rounds: Sequence[Values]) -> None:
    """A run that somebody stops after some rounds."""
    with opened(names, place) as write:
        for round, values in enumerate(rounds):
            write(round, values)
        raise KeyboardInterrupt


class Broken:
    """Fails in its second round, as a full disk would make it."""

    def __init__(self, place: Place) -> None:
        self.closed = False

    def write(self, round: int, values: Values) -> None:
        if round == 2:
            raise OSError("no space left on device\nsecond line")

    def close(self, *, finished: bool) -> None:
        raise AssertionError("a tracker that failed is left alone")


def refuse(place: Place) -> trackers.Tracker:
    raise RuntimeError("the store is locked")


def test_a_run_is_tracked_by_tensorboard_unless_it_says_otherwise() -> None:
    assert RunSettings().trackers == ("tensorboard",)


def test_every_tracker_that_a_recipe_may_name_can_be_opened() -> None:
    assert set(trackers.TRACKERS) == set(TrackerName.__args__)  # type: ignore[attr-defined]


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r'run.trackers must be one of "tensorboard", "mlflow", "wandb"'):
        read_recipe({"run": {"trackers": ["tensorbord"]}, "model": {}, "data": {}}, "x.toml")


def test_a_tracker_without_its_library_is_refused_by_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("mlflow", "wandb") else find(name))
    with pytest.raises(ConfigError) as caught:
        trackers.check(["tensorboard", "wandb", "mlflow"])
    assert caught.value.problems == (
        "run.trackers must name installed trackers, got 'wandb' without its library; pip install 'fedpilot[wandb]'",
        "run.trackers must name installed trackers, got 'mlflow' without its library; pip install 'fedpilot[mlflow]'",
    )


def test_tensorboard_has_each_round_once_after_a_resume(tmp_path: Path) -> None:
    with opened(["tensorboard"], place(tmp_path)) as write:
        for round in range(4):
            write(round, {"evaluation/accuracy": 0.25 * round})
    with opened(["tensorboard"], place(tmp_path, done=2)) as write:
        write(3, {"evaluation/accuracy": 0.9})
    assert curves(tmp_path, "evaluation/accuracy") == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.9)]


def test_a_tracker_that_fails_is_said_once_and_the_others_get_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    openers: dict[str, Callable[[Place], trackers.Tracker]] = {"mlflow": Broken, "wandb": refuse}
    monkeypatch.setattr(trackers, "TRACKERS", {**trackers.TRACKERS, **openers})
    with caplog.at_level(logging.WARNING), opened(["mlflow", "wandb", "tensorboard"], place(tmp_path)) as write:
        for round in range(4):
            write(round, {"seconds/total": 1.5})
    assert [record.getMessage() for record in caplog.records] == [
        "tracker wandb failed and gets nothing more of this run; the run goes on: the store is locked",
        "tracker mlflow failed and gets nothing more of this run; the run goes on: no space left on device",
    ]
    assert curves(tmp_path, "seconds/total") == [(round, 1.5) for round in range(4)]


def test_the_error_of_a_run_passes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(["tensorboard"], place(tmp_path), [{"evaluation/loss": 2.0}])
    assert curves(tmp_path, "evaluation/loss") == [(0, 2.0)]


def test_a_configuration_is_flat_text() -> None:
    assert flat(CONFIG) == {"run.seed": "3", "run.rounds": "4", "data.source": "toy.csv", "data.columns": "['city']"}


@pytest.mark.slow
def test_mlflow_keeps_a_resumed_run_as_one_with_each_round_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    values = {"evaluation/accuracy/Łódź & co": 0.1, "x": float("nan")}
    with pytest.raises(KeyboardInterrupt):
        stopped(["mlflow"], place(tmp_path), [{LANDMARK: 10.0 * round, **values} for round in range(4)])
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedpilot").experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["KILLED"]
    with opened(["mlflow"], place(tmp_path, done=2)) as write:
        for round in (3, 4):
            write(round, {LANDMARK: 10.0 * round})
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)
    assert run.data.params == flat(CONFIG)
    steps = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, LANDMARK)]
    assert steps == [(round, 10.0 * round) for round in range(5)]
    assert "evaluation/accuracy/Łódź _ co" in run.data.metrics
    assert not caplog.records


def records(file: Path) -> Iterator[bytes]:
    """The records of a W&B file so far: behind 7 bytes chunks of checksum, length and type, in blocks of 32 KiB."""
    raw, at = file.read_bytes(), 7
    while at + 7 <= len(raw):
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        assert kind == 1, "small records are whole"
        if at + 7 + length > len(raw):
            return
        yield raw[at + 7 : at + 7 + length]
        at += 7 + length


@pytest.mark.slow
def test_weights_and_biases_writes_offline_into_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with opened(["wandb"], place(tmp_path / "run")) as write:
        for round in range(3):
            write(round, {"evaluation/accuracy": 0.25 * round, LANDMARK: 7.0})
    assert not caplog.records
    from wandb.proto import wandb_internal_pb2

    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-0123456789abcdef.wandb")
    deadline = time.monotonic() + 60
    found: list[dict[str, str]] = []
    while len(found) < 3 and time.monotonic() < deadline:  # its service, another process, writes when it gets to it
        every = [wandb_internal_pb2.Record.FromString(data) for data in records(file)]
        rows = [record.history.item for record in every if record.WhichOneof("record_type") == "history"]
        found = [{"/".join(item.nested_key) or item.key: item.value_json for item in row} for row in rows]
        time.sleep(0.1)
    assert [row["evaluation/accuracy"] for row in found] == ["0", "0.25", "0.5"]
