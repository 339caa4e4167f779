import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpilot import jobs
from fedpilot.commands import compare as command
from fedpilot.compare import figures, report, study, tuning, workers
from fedpilot.compare.figures import MethodFigures, Point, RunFigures
from fedpilot.compare.study import Member, Study
from fedpilot.compare.workers import Watcher
from fedpilot.config import setup
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.errors import ConfigError, PlanError, RecordError, TrainingError
from fedpilot.memory import MemoryProfile
from fedpilot.record import RunDirectory
from fedpilot.stopping import Goal
from tests.test_cli import fedpilot, save_data, save_model

pytestmark = pytest.mark.usefixtures("traced_once")

TINY = Path(__file__).parent.parent / "recipes" / "tiny.toml"
ACCURACY = Goal("accuracy")

RECIPE = """
[run]
name = "toy"
rounds = 3

[model]
source = "model"
rank = 2
max_length = 8

[data]
source = "data.csv"
validation_fraction = 0.2

[partition]
kind = "column"
column = "city"

[clients]
memory = ["1 GiB"]
flops_per_second = [1e9]

[training]
learning_rate = 0.01
batch_size = 4
max_steps = 2

[algorithm]
name = "fed-pilot"
ig_examples = 4

[evaluation]
patience = 2

[baseline]
name = "fedit"

[methods.lower]
name = "fedit"
set = ["training.learning_rate=0.001"]

[methods.mean]
name = "fed-pilot"
ig_examples = 4
temporal_mean = 0.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare")
    save_model(path / "model")
    save_data(path / "data.csv")
    (path / "toy.toml").write_text(RECIPE)
    return path


def toy_recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "toy.toml", overrides)


# --- the command, on real weights and data --------------------------------------------------------------------------

COMMAND = ("compare", str(TINY), "--algorithms", "fed-pilot,hetlora", "--seeds", "2", "--workers", "2")


def runs_of(folder: Path) -> dict[str, list[int]]:
    """Run -> its recorded rounds."""
    return {
        f"{method}/{seed}": [line["round"] for line in RunDirectory.open(folder / method / f"seed-{seed}").lines()]  # type: ignore[misc]
        for method in ("fed-pilot", "hetlora")
        for seed in (0, 1)
        if (folder / method / f"seed-{seed}" / "manifest.json").exists()
    }


def workers_left(folder: Path) -> list[int]:
    """`workers_of` once they had time to end: a worker's own children have their signal, but nobody waits for them."""
    deadline = time.monotonic() + 30
    while (found := workers_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def workers_of(folder: Path) -> list[int]:
    """Processes at work whose output goes into the folder's logs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(os.readlink(process / "fd" / "1")).startswith(str(folder.resolve())):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """A comparison that Ctrl-C stopped when its first run had done a round."""
    folder = tmp_path_factory.mktemp("interrupted") / "comparison"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpilot", *COMMAND, "--workers", "1", "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    deadline = time.monotonic() + 300
    while not any(1 in rounds for rounds in runs_of(folder).values()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    return folder, output, process.returncode


@pytest.fixture(scope="module")
def finished(interrupted: tuple[Path, str, int]) -> tuple[Path, str]:
    """The same after it was resumed, with a report of what was there before."""
    folder = interrupted[0]
    partial = fedpilot(*COMMAND, "--out", str(folder), "--report-only")
    assert partial.exit_code == 0, partial.output
    assert "Not finished: " in partial.output
    result = fedpilot(*COMMAND, "--out", str(folder), "--target", "0.5")
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_ctrl_c_ends_the_workers_and_says_how_to_go_on(interrupted: tuple[Path, str, int]) -> None:
    folder, output, code = interrupted
    assert code == 1
    assert f"Go on with the same command; the folder is {folder}" in output
    assert "Traceback" not in output
    assert workers_left(folder) == []


def test_a_resumed_comparison_does_what_is_missing_and_nothing_twice(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    assert runs_of(folder) == {f"{name}/{seed}": [0, 1, 2] for name in ("fed-pilot", "hetlora") for seed in (0, 1)}
    before = {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    again = fedpilot(*COMMAND, "--out", str(folder))
    assert "4 runs of 4 done before" in again.output
    assert {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")} == before


def test_all_methods_of_a_seed_have_the_same_clients_and_steps(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    configs = [
        RunDirectory.open(folder / method / f"seed-{seed}").manifest["config"]
        for seed in (0, 1)
        for method in ("fed-pilot", "hetlora")
    ]
    for one, other in ((0, 1), (2, 3)):
        for section in ("model", "data", "partition", "clients", "training", "evaluation"):
            assert configs[one][section] == configs[other][section]  # type: ignore[index]
    assert [config["partition"]["seed"] for config in configs] == [0, 0, 1, 1]  # type: ignore[index]
    assert {config["data"]["seed"] for config in configs} == {0}  # type: ignore[index]


def test_the_report_says_the_same_on_the_screen_in_markdown_and_in_json(finished: tuple[Path, str]) -> None:
    folder, output = finished
    found = json.loads((folder / "comparison.json").read_text())
    page = (folder / "comparison.md").read_text()
    for name, method in found["methods"].items():
        runs = [
            [line["metrics"]["accuracy"] for line in RunDirectory.open(folder / name / f"seed-{seed}").lines()]  # type: ignore[index]
            for seed in (0, 1)
        ]
        scores = [sum(values[1:]) / 2 for values in runs]
        assert method["over_seeds"]["score"]["mean"] == pytest.approx(np.mean(scores))
        assert method["over_seeds"]["score"]["sd"] == pytest.approx(np.std(scores, ddof=1))
        cell = f"{np.mean(scores):.4f} ± {np.std(scores, ddof=1):.4f}"
        assert cell in output
        assert cell in page
        assert method["over_seeds"]["test"]["mean"] == pytest.approx(np.mean([values[-1] for values in runs]))
        assert method["over_seeds"]["peak_share"]["mean"] <= 1
    assert "leads" in found["paired_test"]["words"]
    assert found["paired_test"]["words"] in output
    for name in ("accuracy-rounds.png", "accuracy-bytes.png", "blocks.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"![{name}]({name})" in page


def test_a_changed_recipe_is_refused_with_the_difference(finished: tuple[Path, str]) -> None:
    result = fedpilot(*COMMAND, "--out", str(finished[0]), "--set", "training.learning_rate=1e-2")
    assert result.exit_code == 1
    assert "training.learning_rate: 0.002 -> 0.01" in result.output


def test_runs_of_before_a_setting_was_known_are_the_same_runs(finished: tuple[Path, str]) -> None:
    file = finished[0] / "hetlora" / "seed-1" / "manifest.json"
    kept = file.read_text()
    manifest = json.loads(kept)
    del manifest["config"]["model"]["quantisation"]
    file.write_text(json.dumps(manifest))
    try:
        again = fedpilot(*COMMAND, "--out", str(finished[0]))
        other = fedpilot(*COMMAND, "--out", str(finished[0]), "--set", "model.quantisation=int8")
    finally:
        file.write_text(kept)
    assert "4 runs of 4 done before" in again.output
    assert other.exit_code == 1
    assert "model.quantisation: None -> int8" in other.output


def run_here(
    members: Sequence[Member],
    *,
    workers: int,
    traces: Path,
    logs: Path,
    watcher: Watcher,
    halt: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """`workers.run_members` without processes, whose start takes longer than these runs."""
    for member in members:
        if not member.done():
            made = jobs.start(member.recipe, member.path, traces=traces)
            jobs.run(replace(made, halt=halt), read_test=member.read_test)
    return {}


def test_a_search_chooses_on_validation_data_and_all_runs_of_the_method_take_what_it_chose(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_in_processes", run_here)
    out = tmp_path / "out"
    options = ["--algorithms", "fedit", "--seeds", "1", "--out", str(out), "--set", "evaluation.on=validation"]
    search = ["--tune", "training.learning_rate=1e-6,0.02", "--tune-rounds", "2"]
    result = fedpilot("compare", str(folder / "toy.toml"), *options, *search)
    assert result.exit_code == 0, result.output

    tries = [RunDirectory.open(path) for path in sorted((out / "tune" / "fedit").iterdir())]
    assert [run.path.name for run in tries] == ["learning_rate=0.02", "learning_rate=1e-6"]
    assert all(run.manifest["config"]["evaluation"]["on"] == "validation" for run in tries)  # type: ignore[index]
    assert not any((run.path / "test.json").exists() for run in tries)
    scores = [np.mean([line["metrics"]["accuracy"] for line in run.lines()[1:]]) for run in tries]  # type: ignore[index]
    best = tries[1] if scores[1] >= scores[0] else tries[0]  # of equals the first that was asked for
    chosen = tomllib.loads((out / "tuned.toml").read_text())["methods"]["fedit"]["set"]
    member = RunDirectory.open(out / "fedit" / "seed-0")
    assert chosen == [f"training.{best.path.name}"]
    assert f"{chosen[0]} is at the edge of what was tried and best for fedit" in result.output
    assert (
        member.manifest["config"]["training"]["learning_rate"]  # type: ignore[index]
        == best.manifest["config"]["training"]["learning_rate"]  # type: ignore[index]
    )
    assert json.loads((out / "fedit" / "seed-0" / "test.json").read_text())["round"] == 3

    again = fedpilot("compare", str(folder / "toy.toml"), *options)  # without --tune: what was chosen holds
    assert again.exit_code == 0, again.output
    assert "1 run of 1 done before" in again.output
    other = fedpilot("compare", str(folder / "toy.toml"), *options, "--tune", "training.learning_rate=1", *search[2:])
    assert other.exit_code == 1
    assert "must come from this search" in other.output


def test_a_further_form_of_a_methods_outcome_has_rows_of_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_in_processes", run_here)
    options = ("--algorithms", "mean,fed-pilot", "--seeds", "1", "--out", str(tmp_path / "out"))
    result = fedpilot("compare", str(folder / "toy.toml"), *options)
    assert result.exit_code == 0, result.output

    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    newest, plain = found["forms"]["mean, newest"]["runs"]["0"], found["methods"]["fed-pilot"]["runs"]["0"]
    assert newest["points"] == plain["points"][1:]  # the mean changes what is deployed, not what clients go on from
    assert (newest["score"], newest["test"]) == (plain["score"], plain["test"])
    assert newest["score"] != found["methods"]["mean"]["runs"]["0"]["score"]
    assert list(found["forms"]) == ["mean, newest"]
    assert "mean, newest" in found["equal"]["rounds"]["values"]
    assert "| mean, newest |" in (tmp_path / "out" / "comparison.md").read_text()
    assert found["paired_test"]["best"] in ("mean", "fed-pilot")

    page = (tmp_path / "out" / "report.html").read_text()
    shown = dict(re.findall(r'<th scope="row">([^<]+)</th><td>1</td><td>3</td><td>([^<]+)</td>', page))
    assert shown["mean, newest"] == shown["fed-pilot"] != shown["mean"]
    assert "Accuracy, newest" in page


def failing(problems: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets runs fail so, by their label; the others are done."""

    def run(members: Sequence[Member], **options: Any) -> dict[str, str]:
        run_here([member for member in members if member.label not in problems], **options)
        return {member.label: problems[member.label] for member in members if member.label in problems}

    monkeypatch.setattr(command, "run_in_processes", run)


def test_a_method_is_tuned_when_all_its_tries_are_made_and_the_same_command_makes_a_missing_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = ["compare", str(folder / "toy.toml"), "--algorithms", "fedit,lower", "--seeds", "1", "--out", str(out)]
    search = ["--tune", "training.learning_rate=1e-6,0.02", "--tune-rounds", "1"]
    killed = {"fedit learning_rate=0.02": "killed by signal 9"}
    failing({**killed, "lower learning_rate=0.02": workers.Refusal("exit code 76: it cannot")}, monkeypatch)
    result = fedpilot(*options, *search)
    output = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "fedit failed: its search lacks fedit learning_rate=0.02, which the same command tries again" in output
    assert tomllib.loads((out / "tuned.toml").read_text())["methods"].keys() == {"lower"}
    assert (out / "lower" / "seed-0").exists()
    assert not (out / "fedit").exists()

    failing({}, monkeypatch)
    result = fedpilot(*options, *search)
    assert result.exit_code == 0, result.output
    assert (out / "tune" / "fedit" / "learning_rate=0.02" / "manifest.json").exists()
    assert not (out / "tune" / "lower" / "learning_rate=0.02").exists()
    assert tomllib.loads((out / "tuned.toml").read_text())["methods"].keys() == {"fedit", "lower"}
    assert (out / "fedit" / "seed-0").exists()


@pytest.mark.parametrize(
    ("script", "own"),
    [("kill -9 $$", False), ("exit 1", False), ("exit 2", True), (f"exit {workers.REFUSED}", True)],
)
def test_a_problem_is_a_runs_own_or_may_be_the_machines(
    members: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, own: bool
) -> None:
    monkeypatch.setattr(workers.subprocess, "Popen", stand_in(script))
    places = {"traces": tmp_path / "traces", "logs": tmp_path / "logs"}
    (problem,) = workers.run_members(members[:1], workers=1, watcher=Notes(), **places).values()
    assert isinstance(problem, workers.Refusal) is own


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (PlanError("it cannot"), True),
        (TrainingError("the loss must be finite"), True),
        (MemoryError("full"), False),
        (RecordError("no space left"), False),
    ],
)
def test_a_worker_says_by_its_exit_code_that_its_run_is_at_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, ended: bool
) -> None:
    def work(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(workers, "_work", work)
    with pytest.raises(SystemExit if ended else type(error)) as raised:
        workers.work(lambda path: None)
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == workers.REFUSED
        assert capsys.readouterr().err == f"error: {error}\n"


def test_a_run_that_fails_is_named_at_the_end_and_the_exit_code_tells(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.subprocess, "Popen", stand_in('echo "error: no space left"; exit 1'))
    result = fedpilot(
        "compare", str(folder / "toy.toml"), "--algorithms", "fedit", "--seeds", "1", "--out", str(tmp_path / "out")
    )
    assert result.exit_code == 1
    last = " ".join(result.output.split("written to")[1].split())
    assert "fedit seed-0 failed: exit code 1: no space left" in last


# --- what cannot be compared says so before anything runs -------------------------------------------------------------


def refused(folder: Path, algorithms: str, *options: str) -> str:
    out = folder / "refused"
    result = fedpilot("compare", str(folder / "toy.toml"), "--algorithms", algorithms, "--out", str(out), *options)
    assert result.exit_code == 2, result.output
    assert not list(out.rglob("manifest.json"))
    return " ".join(result.output.split())


def test_unknown_methods_are_all_named_with_what_was_meant(folder: Path) -> None:
    output = refused(folder, "fed-pilto,lowr,fedit,fedit")
    assert "got 'fed-pilto'; did you mean 'fed-pilot'?" in output
    assert "got 'lowr'; did you mean 'lower'?" in output
    assert "must name each method once, got 'fedit' 2 times" in output


def test_a_method_that_cannot_run_is_named_with_its_reason_before_any_starts(folder: Path) -> None:
    output = refused(folder, "fed-pilot,fedit,lower", "--set", "clients.memory=[1000]", "--seeds", "1")
    assert output.count("must train everything with participation 'all'") == 2
    assert "method 'fedit': " in output
    assert "method 'lower': " in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tune", "learning_rate=1,2", "--tune-rounds", "1"), "--tune must be section.key=v1,v2,..."),
        (("--tune", "data.seed=1,2", "--tune-rounds", "1"), "--tune must leave what all methods share"),
        (("--tune", "training.learning_rate=1,2"), "--tune-rounds must be given with --tune"),
        (
            ("--tune", "training.learning_rate=1", "--tune-rounds", "1", "--set", "data.validation_fraction=0"),
            "data.validation_fraction must be above 0 to tune",
        ),
        (("--tune", "training.learning_rate=-1", "--tune-rounds", "1"), "training.learning_rate must be positive"),
    ],
)
def test_a_search_that_cannot_be_is_refused(folder: Path, options: Sequence[str], message: str) -> None:
    assert message in refused(folder, "fedit", *options)


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    with study.alone(tmp_path), pytest.raises(RecordError, match="one comparison at a time"), study.alone(tmp_path):
        pass
    with study.alone(tmp_path):
        pass


# --- which runs there are -------------------------------------------------------------------------------------------


def test_a_method_is_its_section_or_the_recipes_own_or_an_algorithm_with_its_defaults(folder: Path) -> None:
    made = study.study(toy_recipe(folder), ["lower", "fed-pilot", "fedit", "hetlora"], 1, folder / "none")
    lower, own, plain, _ = (member.recipe for member in made.members())
    assert (lower.algorithm.name, lower.training.learning_rate) == ("fedit", 0.001)
    assert (own.algorithm.options, own.training.learning_rate) == ({"ig_examples": 4}, 0.01)
    assert plain.algorithm.options == {}
    assert all(member.recipe.baseline is None for member in made.members())
    assert all(member.recipe.evaluation.patience is None for member in made.members())  # the same rounds for all


def test_the_first_seed_of_every_method_comes_before_the_second_of_any(folder: Path) -> None:
    made = study.study(toy_recipe(folder, "run.seed=7"), ["lower", "fedit"], 2, Path("x"))
    assert [(member.method, member.seed) for member in made.members()] == [
        *(("lower", 7), ("fedit", 7)),
        *(("lower", 8), ("fedit", 8)),
    ]
    assert made.members()[3].path == Path("x/fedit/seed-8")


def test_what_was_measured_for_a_comparison_is_measured_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(folder, "clients.deadline_s=[60]", "clients.flops_per_second=[]")
    made, _ = study.check(study.study(recipe, ["fedit", "hetlora"], 1, tmp_path))
    speeds = {member.recipe.clients.flops_per_second for member in made.members()}
    assert len(speeds) == 1
    assert speeds != {()}

    def measured_again(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(setup, "_with_speed", measured_again)
    again, _ = study.check(study.study(recipe, ["fedit", "hetlora", "lower"], 1, tmp_path))
    assert {member.recipe.clients.flops_per_second for member in again.members()} == speeds


def test_traces_are_kept_in_the_folder_and_read_from_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study.study(toy_recipe(folder), ["fedit", "hetlora"], 1, tmp_path)
    _, plans = study.check(made)
    assert len(list((tmp_path / "traces").iterdir())) == 1

    def traced_again(*arguments: object, **options: object) -> MemoryProfile:
        raise AssertionError("traced again")

    monkeypatch.setattr(setup, "profile_of", traced_again)
    assert study.check(made)[1] == plans


# --- workers ----------------------------------------------------------------------------------------------------------


class Notes:
    """A watcher that writes down what it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None]] = []
        self.most = self.now = 0

    def started(self, member: Member) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def round_done(self, member: Member, line: Mapping[str, object]) -> None:
        self.seen.append((member.label, f"round {line['round']}"))

    def ended(self, member: Member, problem: str | None) -> None:
        self.now -= 1
        self.seen.append((member.label, problem))

    def tick(self) -> None:
        pass


def stand_in(script: str) -> Callable[..., subprocess.Popen[bytes]]:
    """Instead of a worker, a shell script with the run's path in $RUN."""
    popen = subprocess.Popen

    def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen(["sh", "-c", f"read -r job; {script}"], **options)

    return start


@pytest.fixture
def members(folder: Path, tmp_path: Path) -> list[Member]:
    return study.study(toy_recipe(folder), ["fedit", "lower"], 2, tmp_path / "runs").members()


def test_a_crashed_worker_is_reported_with_its_last_words_and_the_others_go_on(
    members: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'case "$job" in *lower/seed-0*) echo warning; echo "out of memory" >&2; kill -9 $$;; esac'
    monkeypatch.setattr(workers.subprocess, "Popen", stand_in(script))
    notes = Notes()
    problems = workers.run_members(members, workers=2, traces=tmp_path, logs=tmp_path / "logs", watcher=notes)
    log = tmp_path / "logs" / "lower-seed-0.txt"
    assert problems == {"lower seed-0": f"killed by signal 9: out of memory (all of it in {log})"}
    assert sorted(label for label, _ in notes.seen) == sorted(member.label for member in members)
    assert notes.most == 2


def test_workers_end_when_something_goes_wrong_in_the_parent(
    members: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.subprocess, "Popen", stand_in("sleep 600"))

    class Broken(Notes):
        def tick(self) -> None:
            raise RuntimeError("no screen")

    with pytest.raises(RuntimeError, match="no screen"):
        workers.run_members(members, workers=2, traces=tmp_path, logs=tmp_path / "logs", watcher=Broken())
    assert workers_left(tmp_path / "logs") == []


def test_a_worker_does_not_outlive_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import threading, time; from fedpilot.compare import workers; "
        "threading.Thread(target=workers._die_with_parent, daemon=True).start(); print('up', flush=True); "
        "time.sleep(600)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    assert worker.stdin is not None
    worker.stdout.readline()
    worker.stdin.close()
    assert worker.wait(30) == 3
    worker.stdout.close()


# --- figures ----------------------------------------------------------------------------------------------------------


def line(
    round: int,
    accuracy: float | None = None,
    *,
    seconds: Sequence[float | None] = (),
    down: int = 0,
    left_out: int = 0,
    facts: Mapping[str, float] | None = None,
) -> dict[str, object]:
    plans = [
        {"client_id": k, "peak_bytes": 40 + k, "budget_bytes": 50, "seconds": s, "trained": [1]}
        for k, s in enumerate(seconds)
    ]
    return {
        "round": round,
        "plans": plans,
        "left_out": [{"client_id": 9}] * left_out,
        "uploads": [],
        "failures": [],
        "bytes_down": down,
        "bytes_up": down // 2,
        "metrics": {} if accuracy is None else {"accuracy": accuracy},
        "facts": facts or {},
        "seconds": {"total": 2.0} if round else {},
    }


LINES = [
    line(0, 0.1),
    line(1, seconds=(3.0, 5.0), down=100, facts={"aggregation_error": 0.2}),
    line(2, 0.4, seconds=(2.0,), down=60, left_out=1, facts={"aggregation_error": 0.4}),
    line(3, 0.5, seconds=(), down=0, left_out=2),
    line(4, 0.7, seconds=(1.0,), down=40, facts={"aggregation_error": 0.6}),
]


def test_a_runs_figures_are_what_its_lines_say() -> None:
    found = figures.run_figures(LINES, ACCURACY, rounds=4, last=2, target=0.5)
    assert (found.round, found.done, found.rounds_to_target) == (4, True, 3)
    assert found.score == pytest.approx(0.6)
    assert (found.bytes_down, found.bytes_up) == (200, 100)
    assert found.peak_share == pytest.approx(41 / 50)
    assert found.left_out_share == pytest.approx(3 / 7)
    assert found.client_seconds == 5 + 2 + 0 + 1
    assert found.wall_seconds == 8
    assert found.aggregation_error == pytest.approx(0.4)
    assert [point.round for point in found.points] == [0, 2, 3, 4]
    assert found.points[1] == Point(2, 240, 7.0, 0.4)


def test_a_run_that_goes_on_has_no_score_and_one_without_speeds_no_seconds() -> None:
    found = figures.run_figures(LINES[:3], ACCURACY, rounds=4, last=2)
    assert (found.done, found.score) == (False, None)
    unknown = figures.run_figures([line(0, 0.1), line(1, 0.2, seconds=(1.0, None))], ACCURACY, rounds=1, last=1)
    assert unknown.client_seconds is None
    assert figures.run_figures([], ACCURACY, rounds=1, last=1).round == 0


def test_a_lower_target_is_reached_from_above() -> None:
    lines = [line(0, 3.0), line(1, 2.0), line(2, 1.0)]
    goal = Goal("accuracy", higher_is_better=False)
    assert figures.run_figures(lines, goal, rounds=2, last=1, target=2.0).rounds_to_target == 1


def a_run(score: float, total_bytes: int, *, rounds: int = 4, done: bool = True) -> RunFigures:
    """A run that rises in a straight line to its score, over its bytes."""
    points = tuple(
        Point(round, total_bytes * round // rounds, float(round), score * round / rounds) for round in range(rounds + 1)
    )
    return RunFigures(
        rounds if done else rounds // 2, done, score if done else None, None, None, total_bytes, 0, 0.9, 0.0, 0,
        float(rounds), 1.0, None, points if done else points[: rounds // 2 + 1],
    )  # fmt: skip


def a_method(name: str, *runs: RunFigures) -> MethodFigures:
    return MethodFigures(name, dict(enumerate(runs)), max(len(runs), 2))


def test_at_equal_bytes_is_read_at_the_smallest_total_of_a_method_that_finished() -> None:
    cheap = a_method("cheap", a_run(0.5, 100), a_run(0.7, 100))
    dear = a_method("dear", a_run(0.8, 400), a_run(0.8, 400))
    nobody = a_method("nobody", a_run(0.1, 0), a_run(0.1, 0))
    half = a_method("half", a_run(0.9, 20, done=False), a_run(0.9, 20, done=False))
    found = figures.at_equal([dear, cheap, nobody, half], "bytes", rounds=4, last=1)
    assert found is not None
    assert (found.set_by, found.limit) == ("cheap", 100)
    assert found.values["cheap"].mean == pytest.approx(0.6)  # its own score
    assert found.values["dear"].mean == pytest.approx(0.2)  # a quarter of the way, interpolated
    assert "half" not in found.values  # has not come so far


def test_at_equal_rounds_is_the_score() -> None:
    methods = [a_method("a", a_run(0.5, 10), a_run(0.6, 10)), a_method("b", a_run(0.9, 99), a_run(0.8, 50))]
    found = figures.at_equal(methods, "rounds", rounds=4, last=2)
    assert found is not None
    assert {name: value.mean for name, value in found.values.items()} == pytest.approx({"a": 0.55, "b": 0.85})
    assert figures.at_equal([a_method("c", a_run(0.1, 1, done=False))], "rounds", rounds=4, last=2) is None


def test_the_end_of_a_curve_is_the_mean_of_its_last_evaluations() -> None:
    run = figures.run_figures(LINES, ACCURACY, rounds=4, last=2)
    end, between, at, in_bytes = (
        figures.read_off(run, axis, limit, rounds=4, last=2)
        for axis, limit in (("rounds", 4), ("rounds", 3), ("rounds", 2), ("bytes", 300))
    )
    assert end == in_bytes == figures.Reading(*[pytest.approx(0.6)] * 3)
    assert between == figures.Reading(*map(pytest.approx, (0.5, 0.4, 0.6)))  # halfway from round 2 to the end
    assert at == figures.Reading(0.4, 0.4, 0.4)  # evaluated there, so nothing lies between
    assert figures.read_off(run, "rounds", 5, rounds=4, last=2) is None


def test_the_paired_test_is_scipys_over_the_differences_of_the_best_two() -> None:
    from scipy import stats

    a, b, c = (0.61, 0.66, 0.64), (0.60, 0.62, 0.63), (0.2, 0.9, 0.1)
    methods = [a_method(name, *(a_run(score, 10) for score in scores)) for name, scores in zip("bac", (b, a, c))]  # noqa: B905
    found = figures.paired_test(methods, ACCURACY)
    assert found is not None
    assert (found.best, found.second) == ("a", "b")
    expected = stats.ttest_rel(a, b)
    assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert "3 seeds are few" in found.words("accuracy")
    lower = figures.paired_test(methods, Goal("loss", higher_is_better=False))
    assert lower is not None
    assert (lower.best, lower.second) == ("c", "b")
    assert list(lower.differences.values()) == pytest.approx([0.4, -0.28, 0.53])  # how much better the lower is


def test_the_best_is_held_against_each_other_where_the_cheaper_of_the_two_ends() -> None:
    from scipy import stats

    best = a_method("best", a_run(0.8, 400), a_run(0.9, 400))
    cheap = a_method("cheap", a_run(0.5, 100), a_run(0.7, 100))
    dear = a_method("dear", a_run(0.6, 800), a_run(0.5, 800))
    nobody = a_method("nobody", a_run(0.1, 0), a_run(0.1, 0))
    half = a_method("half", a_run(0.9, 20, done=False), a_run(0.9, 20, done=False))
    found = figures.leads([cheap, nobody, best, dear, half], ACCURACY, rounds=4, last=1)
    by = {(lead.other, lead.axis): lead for lead in found}
    assert {other for other, _ in by} == {"cheap", "dear", "nobody"}
    assert by["cheap", "rounds"].differences == pytest.approx({0: 0.3, 1: 0.2})
    assert by["cheap", "bytes"].limit == 100  # where cheap ends; best is a quarter of the way
    assert by["cheap", "bytes"].differences == pytest.approx({0: 0.2 - 0.5, 1: 0.225 - 0.7})
    assert by["dear", "bytes"].limit == 400  # where best ends; dear is half way
    assert by["dear", "bytes"].differences == pytest.approx({0: 0.8 - 0.3, 1: 0.9 - 0.25})
    assert by["dear", "bytes"].p == pytest.approx(stats.ttest_rel((0.8, 0.9), (0.3, 0.25)).pvalue)
    assert ("nobody", "bytes") not in by
    losses = figures.leads([best, dear], Goal("loss", higher_is_better=False), rounds=4, last=1)
    assert losses[0].differences == pytest.approx({0: 0.2, 1: 0.4})  # dear leads, by as much as it is lower
    assert figures.leads([best], ACCURACY, rounds=4, last=1) == ()
    better = a_method("cheap, newest", a_run(0.9, 100), a_run(0.9, 100))
    held = figures.leads([cheap, best], ACCURACY, rounds=4, last=1, forms=[better])  # a form never leads
    assert [lead.other for lead in held if lead.axis == "rounds"] == ["cheap, newest", "cheap"]
    assert held[0].differences == pytest.approx({0: -0.1, 1: 0.0})


def test_a_lead_that_hangs_on_the_line_between_two_evaluations_says_so() -> None:
    best = a_method("best", a_run(0.8, 400), a_run(0.9, 400))
    cheap = a_method("cheap", a_run(0.3, 150), a_run(0.3, 150))  # best: .2 and .4, or .225 and .45, around its end
    weak = a_method("weak", a_run(0.1, 150), a_run(0.2, 150))
    found = figures.leads([best, cheap, weak], ACCURACY, rounds=4, last=1)
    by = {lead.other: lead for lead in found if lead.axis == "bytes"}
    assert by["cheap"].within == pytest.approx((0.2125 - 0.3, 0.425 - 0.3))
    assert by["weak"].within == pytest.approx((0.2125 - 0.15, 0.425 - 0.15))
    assert (by["cheap"].settled, by["weak"].settled) == (False, True)
    losses = figures.leads([best, cheap], Goal("loss", higher_is_better=False), rounds=4, last=1)
    (lead,) = (lead for lead in losses if lead.axis == "bytes")  # cheap leads; it is the lower one
    assert lead.within == pytest.approx((0.2125 - 0.3, 0.425 - 0.3))
    assert all(lead.settled for lead in losses if lead.axis == "rounds")


def test_one_seed_or_no_spread_gives_no_p_value() -> None:
    one = [MethodFigures(name, {0: a_run(score, 10)}, 1) for name, score in (("a", 0.5), ("b", 0.4))]
    same = [a_method("a", a_run(0.5, 1), a_run(0.5, 1)), a_method("b", a_run(0.25, 1), a_run(0.25, 1))]
    but_for_rounding = [a_method("a", a_run(0.3, 1), a_run(0.4, 1)), a_method("b", a_run(0.1, 1), a_run(0.2, 1))]
    for methods in (one, same, but_for_rounding):
        found = figures.paired_test(methods, ACCURACY)
        assert found is not None
        assert (found.t, found.p) == (None, None)
        assert "at least two seeds that differ" in found.words("accuracy")
    assert figures.paired_test(one[:1], ACCURACY) is None


def test_a_score_that_is_not_a_number_comes_last() -> None:
    broken, good = a_method("broken", a_run(math.nan, 1), a_run(0.9, 1)), a_method("good", a_run(0.1, 1), a_run(0.1, 1))
    assert [method.name for method in figures.ranking([broken, good], ACCURACY)] == ["good", "broken"]


def test_block_shares_count_sampled_clients_of_a_tier() -> None:
    tiers = ["low", "high", "high"]
    lines = [
        {"plans": [{"client_id": 1, "trained": [0, 2]}], "left_out": [{"client_id": 0}]},
        {"plans": [{"client_id": 2, "trained": [2]}], "left_out": []},
    ]
    found = figures.block_shares(lines, tiers.__getitem__, ["low", "high", "other"], 3)
    assert found[:2].tolist() == [[0, 0, 0], [0.5, 0, 1]]
    assert np.isnan(found[2]).all()


def test_a_band_is_the_mean_and_spread_where_all_seeds_were_evaluated() -> None:
    found = figures.band(
        a_method("a", a_run(0.4, 40), replace(a_run(0.8, 80), points=a_run(0.8, 80).points[:3])), "bytes"
    )
    assert found is not None
    assert found.x == (0, 15, 30)
    assert found.y == pytest.approx((0.0, 0.15, 0.3))
    assert found.sd == pytest.approx((0.0, 0.1 / math.sqrt(2), 0.2 / math.sqrt(2)))
    assert figures.band(a_method("a"), "bytes") is None


# --- the report of nothing, and of a search that failed --------------------------------------------------------------


def test_a_report_of_a_folder_without_runs_says_so(folder: Path, tmp_path: Path) -> None:
    made = study.study(toy_recipe(folder), ["fedit", "lower"], 2, tmp_path)
    found = report.read(made)
    assert [path.name for path in report.write(found)] == ["comparison.json", "comparison.md"]
    assert "Not finished: fedit, lower" in (tmp_path / "comparison.md").read_text()
    assert json.loads((tmp_path / "comparison.json").read_text())["paired_test"] is None


def test_a_method_whose_tries_all_failed_is_chosen_nothing_for(folder: Path, tmp_path: Path) -> None:
    made: Study = study.study(toy_recipe(folder), ["fedit"], 1, tmp_path)
    search = tuning.parse(["training.learning_rate=1,2"], 2, made, None)
    assert [member.path.name for member in tuning.tries(made, search)] == ["learning_rate=1", "learning_rate=2"]
    assert tuning.choose(made, search) == {}


def test_a_grid_is_every_combination(folder: Path) -> None:
    made = study.study(toy_recipe(folder), ["fedit"], 1, Path("x"))
    search = tuning.parse(["training.learning_rate=1,2", "model.rank=2,4,8"], 2, made, None)
    assert len(search.candidates()) == 6
    assert search.candidates()[5] == ("training.learning_rate=2", "model.rank=8")


def test_a_folder_that_was_moved_goes_on(folder: Path, tmp_path: Path) -> None:
    made = study.study(toy_recipe(folder), ["fedit"], 1, tmp_path / "a")
    recipe = made.members()[0].recipe
    moved = replace(made, path=tmp_path / "b").members()[0].recipe
    assert recipe == moved
    shutil.rmtree(tmp_path / "a", ignore_errors=True)


def test_an_unknown_method_of_a_recipe_is_an_error_of_its_own(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--algorithms must name a method, got none"):
        study.study(toy_recipe(folder), [], 1, folder)
