"""The run directory: what is written, what is refused, and what a full disk leaves behind."""

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpilot import checkpoint
from fedpilot.errors import ConfigError, RecordError
from fedpilot.manifest import check_same_run, differences, manifest
from fedpilot.record import RunDirectory
from fedpilot.rounds import RoundRecord
from fedpilot.runs import train
from fedpilot.stopping import EarlyStop, Goal
from fedpilot.types import BaseDelta, ClientProfile, Deployment, ModelSpec, Plan, Site, Task, Tensors, Upload

CLIENTS = (ClientProfile(1, 10, 1000), ClientProfile(2, 30, 1000))


@dataclass(frozen=True)
class Score:
    mean: float
    norms: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Rich:
    """A state with everything that a state may hold."""

    adapter: Tensors
    scores: Mapping[int, Score] = field(default_factory=dict)
    nested: Mapping[str, Mapping[int, tuple[float, ...]]] = field(default_factory=dict)
    history: tuple[Score | None, ...] = ()
    blocks: frozenset[int] = frozenset()
    count: int = 0
    ratio: float = 0.0
    on: bool = False
    name: str = ""
    nothing: Tensors | None = None


def rich() -> Rich:
    wide = torch.arange(12.0).reshape(3, 4)
    return Rich(
        adapter={"a": wide, "view": wide[:2], "turned": wide.T, "half": torch.tensor([1.5, -0.0]).bfloat16()},
        scores={3: Score(0.1, {"n": torch.tensor(2.0)}), -1: Score(math.inf)},
        nested={"x": {0: (1.0, 2.5)}, "": {}},
        history=(Score(0.3), None),
        blocks=frozenset({5, 1}),
        count=10**20,
        ratio=0.1 + 0.2,
        on=True,
        name="größer",
        nothing=None,
    )


@dataclass(frozen=True)
class Other:
    adapter: Tensors


@dataclass(frozen=True)
class Counting:
    """The state is a tensor that grows by one a round; clients have nothing to do."""

    spec: ModelSpec = field(default_factory=lambda: ModelSpec({}, {}, 0, 1.0))

    def init(self, rng: np.random.Generator) -> Rich:
        return Rich({"x": torch.zeros(3)})

    def plan(self, state: Rich, cohort: Sequence[ClientProfile], rng: np.random.Generator) -> list[Plan]:
        return [Plan(client.client_id, {}, frozenset({"x"})) for client in cohort]

    def distribute(self, state: Rich, plan: Plan) -> Task:
        return Task(plan, state.adapter)

    def local_update(self, task: Task, site: Site) -> Upload:
        raise AssertionError("the tests' engine makes the uploads")

    def aggregate(self, state: Rich, uploads: Iterable[Upload]) -> Rich:
        *_, last = (upload.tensors["x"] for upload in uploads)
        return Rich({"x": last})

    def deploy(self, state: Rich) -> Deployment:
        return Deployment(state.adapter, BaseDelta(1, steps=({"base.weight": torch.zeros(2, 1)},)))


class Plus:
    """An engine whose clients add one; it holds nothing between rounds."""

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload]:
        return (Upload(t.plan.client_id, 10, {"x": t.tensors["x"] + 1}, {"loss": 1 / round}) for t in tasks)


ACCURACY = (0.1, 0.5, 0.7, 0.6, 0.7, 0.65, 0.9)


def evaluate(deployment: Deployment) -> dict[str, float]:
    """Peaks in round 2, and in round 6 again."""
    return {"accuracy": ACCURACY[int(deployment.tensors["x"][0])]}


def started(path: Path, **config: Any) -> RunDirectory:
    return RunDirectory.create(path, manifest(config, seed=3, dtype="float32"))


def trained(path: Path, num_rounds: int = 4, **settings: Any) -> RunDirectory:
    directory = started(path)
    train(Counting(), Plus(), CLIENTS, evaluate, directory, num_rounds=num_rounds, **settings)
    return directory


def resumed(directory: RunDirectory, num_rounds: int, **settings: Any) -> Any:
    return train(Counting(), Plus(), CLIENTS, evaluate, directory, num_rounds=num_rounds, **settings)


# --- manifest -----------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_ran(tmp_path: Path) -> None:
    found = RunDirectory.open(started(tmp_path / "run", rank=8, source=Path("data")).path).manifest
    assert found["seed"] == 3
    assert found["config"] == {"rank": 8, "source": "data"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == sys.version.split()[0]
    assert set(found) >= {"run_id", "started", "commit", "dirty", "num_threads", "dtype"}


def test_a_directory_with_a_run_or_with_files_is_not_overwritten(tmp_path: Path) -> None:
    started(tmp_path / "run")
    with pytest.raises(RecordError, match="with a run in it; resume it or choose another"):
        started(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RecordError, match="with files in it; choose another"):
        started(tmp_path / "mine")


def test_resuming_refuses_a_changed_configuration_and_lists_the_keys(tmp_path: Path) -> None:
    path = started(tmp_path / "run", training={"learning_rate": 0.1, "epochs": 1}, rank=8).path
    now = manifest({"training": {"learning_rate": 0.2, "epochs": 1}, "ranks": [4]}, seed=4, dtype="float32")
    with pytest.raises(RecordError, match="put them back, or start a run in another directory") as caught:
        check_same_run(path, RunDirectory.open(path).manifest, now)
    for line in ("seed: 3 -> 4", "training.learning_rate: 0.1 -> 0.2", "rank: 8 -> absent", "ranks: absent -> [4]"):
        assert line in str(caught.value)
    assert "epochs" not in str(caught.value)


def test_what_a_recipe_leaves_to_us_may_have_been_decided_at_the_start(tmp_path: Path) -> None:
    path = started(tmp_path / "run", run={"workers": 2, "device": "auto"}).path
    check_same_run(
        path,
        RunDirectory.open(path).manifest,
        manifest({"run": {"workers": "auto", "device": "auto"}}, seed=3, dtype="float32"),
    )
    with pytest.raises(RecordError, match=r"run\.workers: 2 -> 1"):
        check_same_run(
            path,
            RunDirectory.open(path).manifest,
            manifest({"run": {"workers": 1, "device": "auto"}}, seed=3, dtype="float32"),
        )


def test_resuming_with_another_version_is_said_and_not_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = started(tmp_path / "run").path
    now = manifest({}, seed=3, dtype="float32") | {"num_threads": 99}
    check_same_run(path, RunDirectory.open(path).manifest, now)
    assert "num_threads" in caplog.text
    assert "-> 99" in caplog.text


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"manifest.json must exist, got no such file; start a run"):
        RunDirectory.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RecordError, match=r"manifest.json must be JSON"):
        RunDirectory.open(tmp_path)


def test_equal_values_do_not_differ() -> None:
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == []


# --- metrics.jsonl ------------------------------------------------------------------------------------------------


def test_a_line_a_round_and_one_before_the_first(tmp_path: Path) -> None:
    lines = trained(tmp_path / "run").lines()
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["metrics"]["accuracy"] for line in lines] == [0.1, 0.5, 0.7, 0.6, 0.7]
    assert lines[2]["uploads"][0] == {"client_id": 1, "num_examples": 10, "bytes_up": 12, "metrics": {"loss": 0.5}}
    assert lines[2]["bytes_down"] == 24


def test_numbers_that_are_not_finite_are_null_and_read_as_nan(tmp_path: Path) -> None:
    directory = started(tmp_path / "run")
    directory.append(RoundRecord(round=1, metrics={"loss": math.nan, "gap": math.inf}))
    assert json.loads((directory.path / "metrics.jsonl").read_text())["metrics"] == {"loss": None, "gap": None}
    assert math.isnan(directory.history()[0]["loss"])


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run")
    with (directory.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 5, "metr')
    assert len(directory.lines()) == 5
    resumed(directory, 6)
    assert [line["round"] for line in directory.lines()] == [0, 1, 2, 3, 4, 5, 6]


def test_a_broken_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run")
    file = directory.path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], lines[2][:20] + b"\n", *lines[3:]]))
    with pytest.raises(RecordError, match=r"metrics.jsonl line 3 must be JSON"):
        resumed(directory, 5)


def test_lines_after_the_checkpoint_are_cut_when_the_run_goes_on(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run", num_rounds=3)
    directory.append(RoundRecord(round=4, metrics={"accuracy": 0.0}))  # as if killed ahead of the checkpoint
    resumed(directory, 5)
    assert [line["metrics"]["accuracy"] for line in directory.lines()] == list(ACCURACY[:6])


# --- states -------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    directory = started(tmp_path / "run")
    kept = {7: {"opt": {"m": torch.tensor([[1.0], [2.0]])}}}
    directory.save_checkpoint(12, rich(), kept)
    found = directory.load_checkpoint(Rich({}))
    assert found is not None
    assert found.round == 12
    assert same(found.state, rich())
    assert same(found.kept, kept)


def test_keys_that_look_alike_stay_apart() -> None:
    found: dict[str, torch.Tensor] = {}
    tree = checkpoint.encode({1: torch.ones(1), "1": torch.zeros(2)}, found, "x")
    assert same(checkpoint.decode(tree, found, {}), {1: torch.ones(1), "1": torch.zeros(2)})


@pytest.mark.parametrize("value", [{"a": [1, 2]}, {(1, 2): 3}, {"a": np.zeros(2)}, object()])
def test_what_a_checkpoint_cannot_hold_is_refused_by_its_place(value: object) -> None:
    with pytest.raises(RecordError, match=r"state.* must be a frozen dataclass, mapping"):
        checkpoint.encode(value, {}, "state")


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run")
    assert [folder.name for folder in directory.checkpoints()] == ["round-0003", "round-0004"]
    assert [entry.name for entry in (directory.path / "checkpoints").iterdir() if entry.name.startswith(".")] == []


def test_checkpoints_may_be_rare_and_the_last_round_has_one(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run", num_rounds=5, checkpoint_every=3)
    assert [folder.name for folder in directory.checkpoints()] == ["round-0003", "round-0005"]
    shutil.rmtree(directory.checkpoints()[-1])
    assert resumed(directory, 5).state.adapter["x"].tolist() == [5.0, 5.0, 5.0]
    assert [line["round"] for line in directory.lines()] == [0, 1, 2, 3, 4, 5]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


DAMAGE = {
    "bit flipped in tensors": (flip_a_bit, "tensors.safetensors", "must have SHA-256"),
    "tensors cut short": (cut, "tensors.safetensors", "must have SHA-256"),
    "tensors gone": (Path.unlink, "tensors.safetensors", "must exist, got no such file"),
    "values cut short": (cut, "values.json", "must be whole, got JSONDecodeError"),
    "values gone": (Path.unlink, "values.json", "must exist, got no such file"),
    "a digit changed in values": (
        lambda file: file.write_text(file.read_text().replace('"round": 4', '"round": 3')),
        "values.json",
        "must have SHA-256",
    ),
    "of another run": (
        lambda file: shutil.copytree(file.parents[3] / "other/checkpoints/round-0004", file.parent, dirs_exist_ok=True),
        "values.json",
        "must belong to run",
    ),
}


@pytest.mark.parametrize(("damage", "name", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_refused_and_an_intact_one_is_offered(
    damage: Any, name: str, reason: str, tmp_path: Path
) -> None:
    trained(tmp_path / "other")
    directory = trained(tmp_path / "run")
    newest, earlier = directory.path / "checkpoints/round-0004", directory.path / "checkpoints/round-0003"
    damage(newest / name)
    with pytest.raises(RecordError) as caught:
        resumed(directory, 6)
    assert str(caught.value).startswith(f"{newest / name} {reason}")
    assert str(caught.value).endswith(f"{earlier} is intact: delete {newest} and resume to go on from there")

    shutil.rmtree(newest)  # what the message says
    assert resumed(directory, 6).state.adapter["x"].tolist() == [6.0, 6.0, 6.0]


def test_where_no_checkpoint_is_intact_the_message_says_so(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run")
    for folder in directory.checkpoints():
        flip_a_bit(folder / "tensors.safetensors")
    with pytest.raises(RecordError, match="no earlier checkpoint is intact: restore one from a copy, or start over"):
        resumed(directory, 5)


def test_checkpoints_that_are_gone_though_rounds_are_recorded_are_missed(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run")
    shutil.rmtree(directory.path / "checkpoints")
    with pytest.raises(RecordError, match=r"must hold the state after a recorded round, got none .* to round 4; rest"):
        resumed(directory, 5)


def test_a_state_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run")
    with pytest.raises(RecordError, match="state must be made of Other, got Rich; resume with its own algorithm"):
        directory.load_checkpoint(Other({}))


def test_a_state_whose_fields_have_changed_is_refused(tmp_path: Path) -> None:
    found: dict[str, torch.Tensor] = {}
    tree = checkpoint.encode(Other({}), found, "state")
    with pytest.raises(RecordError, match=r"Other must have fields \['adapter'\], got \['mean', 'norms'\]"):
        checkpoint.decode(tree, found, {"Other": Score})


# --- adapters -----------------------------------------------------------------------------------------------------


def test_last_and_best_adapters_are_saved_with_their_round(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run", best=Goal("accuracy"))
    last, facts = directory.load_adapter("last")
    assert (facts, last.tensors["x"].tolist()) == ({"round": 4, "metrics": {"accuracy": 0.7}}, [4.0, 4.0, 4.0])
    best, facts = directory.load_adapter("best")  # round 4 is as good and later: round 2 stays
    assert (facts["round"], best.tensors["x"].tolist()) == (2, [2.0, 2.0, 2.0])
    assert best.base_delta.version == 1
    assert best.base_delta.steps[0]["base.weight"].shape == (2, 1)
    assert len(list((directory.path / "adapters" / "last").iterdir())) == 2


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run")
    [file] = (directory.path / "adapters" / "last").glob("*.safetensors")
    flip_a_bit(file)
    with pytest.raises(RecordError, match=r"must have SHA-256 .*; resume the run to write it again"):
        directory.load_adapter("last")
    resumed(directory, 4)
    assert directory.load_adapter("last")[1]["round"] == 4
    with pytest.raises(RecordError, match=r"best/values.json must exist, got no such file"):
        directory.load_adapter("best")


# --- a full disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """Lets this process write no file beyond so many bytes: the system's own error, not a mock's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def intact(directory: RunDirectory, round: int) -> bool:
    found = directory.load_checkpoint(Rich({}))
    leftovers = [entry for entry in (directory.path / "checkpoints").iterdir() if entry.name.startswith(".")]
    return found is not None and found.round == round and not leftovers


def test_a_disk_that_fills_up_under_a_checkpoint_leaves_the_earlier_one(tmp_path: Path, full_disk: Any) -> None:
    directory = trained(tmp_path / "run")
    full_disk(5000)
    with pytest.raises(RecordError, match=r"round-0005 must be written, got .*; free space") as caught:
        directory.save_checkpoint(5, Rich({"x": torch.zeros(4000)}), {})
    assert "File too large" in str(caught.value)
    assert intact(directory, 4)


def test_a_disk_that_fills_up_under_the_metrics_stops_the_run_and_a_resume_mends_them(
    tmp_path: Path, full_disk: Any
) -> None:
    directory = trained(tmp_path / "run", num_rounds=3)
    full_disk((directory.path / "metrics.jsonl").stat().st_size + 100)
    with pytest.raises(RecordError, match=r"metrics.jsonl must be written, got .*File too large"):
        directory.append(RoundRecord(round=4, metrics={"accuracy": 0.7}))
    full_disk(resource.RLIM_INFINITY)
    resumed(directory, 5)
    assert [line["round"] for line in directory.lines()] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["fsync", "rename", "replace"])
def test_an_error_of_the_disk_at_any_step_leaves_the_earlier_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = trained(tmp_path / "run")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os." + name, fail)
        with pytest.raises(RecordError, match="No space left on device"):
            directory.save_checkpoint(5, rich(), {})
    assert intact(directory, 4)
    with monkeypatch.context() as broken:
        broken.setattr("os." + name, fail)
        if name != "rename":
            with pytest.raises(RecordError, match="No space left on device"):
                directory.save_adapter("last", Deployment({"x": torch.ones(9)}), {"round": 5})
    assert directory.load_adapter("last")[1]["round"] == 4


# --- train --------------------------------------------------------------------------------------------------------


def test_early_stop_ends_the_run_and_a_resume_does_not_go_on(tmp_path: Path) -> None:
    directory = started(tmp_path / "run")
    stop = EarlyStop(Goal("accuracy"), patience=3)
    outcome = resumed(directory, 6, early_stop=stop)
    assert (outcome.round, outcome.stopped_early) == (5, True)
    again = resumed(directory, 6, early_stop=stop)
    assert (again.round, again.stopped_early) == (5, True)
    assert len(directory.lines()) == 6


def test_an_unknown_metric_is_refused_before_the_first_round(tmp_path: Path) -> None:
    directory = started(tmp_path / "run")
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        resumed(directory, 4, best=Goal("acuracy"))
    assert [line["round"] for line in directory.lines()] == [0]


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    outcome = resumed(trained(tmp_path / "run"), 4)
    assert (outcome.round, outcome.stopped_early) == (4, False)


def test_curves_have_each_round_once_after_a_resume(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run", num_rounds=3)
    shutil.rmtree(directory.checkpoints()[-1])  # as if killed ahead of it: round 3 is done again
    # TensorBoard reads files in the order of their names: the second, and then a number without leading zeros.
    time.sleep(1.01)
    resumed(directory, 4)
    events = EventAccumulator(str(directory.path / "tensorboard"))
    events.Reload()
    curve = events.Scalars("evaluation/accuracy")
    assert [event.step for event in curve] == [0, 1, 2, 3, 4]
    assert [round(event.value, 4) for event in curve] == list(ACCURACY[:5])
    assert [round(event.value, 4) for event in events.Scalars("training/loss")] == [1.0, 0.5, 0.3333, 0.25]


def test_tensors_are_written_under_their_own_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer with a temporary file of a random name leaves it behind when it is killed in between."""
    seen: list[list[str]] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(sorted(p.name for p in tmp_path.iterdir())), fsync(fd)))
    monkeypatch.setattr("safetensors.torch.serialize_file", None)  # safetensors' own writer is not to be called
    checkpoint.write_tensors(tmp_path / "a", {"x": torch.ones(2, 3)})
    assert seen == [["a"]]
