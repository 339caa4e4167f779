"""A run that is killed with SIGKILL, again and again, ends with the bits of one that never was.

Runs are children of one driver process (this file, run as a module) that has torch loaded and forks for each of them.
"""

import functools
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpilot import lora, tensors
from fedpilot.engines.in_process import InProcess
from fedpilot.manifest import manifest
from fedpilot.record import Checkpoint, RunDirectory
from fedpilot.runs import train
from fedpilot.stopping import Goal
from fedpilot.types import ClientProfile, Deployment, ModelSpec, Plan, Site, Task, Tensors, Upload
from tests import toy

ROOT = Path(__file__).parent.parent
POPULATION = tuple(ClientProfile(k, 4 + k, 1000) for k in range(5))
KILL_SEED = 20
NUM_ROUNDS = 30


@dataclass(frozen=True)
class Memory:
    """What the server remembers of a client."""

    visits: int
    last_loss: float


@dataclass(frozen=True)
class WanderingState:
    adapter: Tensors
    velocity: Tensors = field(default_factory=dict)
    of_client: Mapping[int, Memory] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wandering:
    """Uses everything that a checkpoint must bring back: momentum, memories, drawn ranks, what clients keep."""

    spec: ModelSpec

    def init(self, rng: np.random.Generator) -> WanderingState:
        return WanderingState(lora.init(self.spec, dict.fromkeys(self.spec.modules, 4), rng))

    def plan(self, state: WanderingState, cohort: Sequence[ClientProfile], rng: np.random.Generator) -> list[Plan]:
        names = frozenset(lora.shapes(self.spec, dict.fromkeys(self.spec.modules, 1)))
        return [Plan(c.client_id, dict.fromkeys(self.spec.modules, int(rng.integers(1, 5))), names) for c in cohort]

    def distribute(self, state: WanderingState, plan: Plan) -> Task:
        return Task(plan, lora.truncate(state.adapter, plan.ranks))

    def local_update(self, task: Task, site: Site) -> Upload:
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        drift = site.kept.get("drift", {}).get("head.bias", torch.zeros(3)) * 0.5 + 0.01
        site.kept["drift"] = {"head.bias": drift}
        uploaded = dict(site.model.read())
        uploaded["head.bias"] = uploaded["head.bias"] + drift
        return Upload(site.profile.client_id, site.profile.num_examples, uploaded, metrics)

    def aggregate(self, state: WanderingState, uploads: Iterable[Upload]) -> WanderingState:
        mean, of_client, ranks = tensors.HolderMean(), dict(state.of_client), state.ranks
        for upload in uploads:
            mean.add(toy.pad(upload.tensors, 4), upload.num_examples)
            visits = of_client[upload.client_id].visits + 1 if upload.client_id in of_client else 1
            of_client[upload.client_id] = Memory(visits, upload.metrics["loss"])
            ranks = (*ranks, upload.tensors["blocks.0.linear.lora_A"].shape[0])
        step = tensors.subtract(mean.result(), state.adapter)
        velocity = tensors.add(tensors.scale(state.velocity, 0.5), step) if state.velocity else step
        adapter = tensors.add(state.adapter, tensors.scale(velocity, 0.5))
        return WanderingState(adapter, velocity, of_client, ranks[-6:])

    def deploy(self, state: WanderingState) -> Deployment:
        return Deployment(state.adapter)


def evaluate(deployment: Deployment) -> dict[str, float]:
    """Loss on examples that no client has."""
    model = toy.ToyModel(40, 999)
    plan = Plan(0, dict.fromkeys(toy.spec().modules, 4), frozenset())
    model.load(Task(plan, deployment.tensors))
    with torch.no_grad():
        return {"loss": float(torch.nn.functional.cross_entropy(model.net(model.x), model.y))}


@functools.cache
def now() -> Mapping[str, object]:
    """The manifest of all runs, made ahead of the forks: it asks git."""
    return manifest({"rounds": NUM_ROUNDS}, seed=11, dtype="float32")


def run(path: Path, on_training: Callable[[], None]) -> None:
    """Starts the run, or goes on with it."""

    def site_for(client_id: int, round: int) -> Site:
        on_training()
        profile = POPULATION[client_id]
        return Site(profile, toy.ToyModel(profile.num_examples, 1000 * round + client_id, lr=0.1))

    started = (path / "manifest.json").exists()
    directory = RunDirectory.open(path) if started else RunDirectory.create(path, now())
    algorithm = Wandering(toy.spec())
    goal = Goal("loss", higher_is_better=False)
    engine = InProcess(algorithm, site_for)
    train(algorithm, engine, POPULATION, evaluate, directory, num_rounds=NUM_ROUNDS, cohort_size=3, best=goal)


# --- the driver's side --------------------------------------------------------------------------------------------


def watch_disk(before: Callable[[], None]) -> None:
    """Calls ``before`` ahead of each operation that makes something durable, visible or gone."""

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before()
            return operation(*args, **kwargs)

        return call

    os.fsync = lambda _: None  # what a killed process wrote is safe with the kernel: no need to wait for the disk
    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, watched(getattr(os, name)))
    shutil.rmtree = watched(shutil.rmtree)


def name_phases(phase: mmap.mmap) -> None:
    """Notes in shared memory what the run is doing, and how many such things it has begun, up to what a byte holds."""

    def noted(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            phase[:16], phase[16] = name.encode().ljust(16), min(phase[16] + 1, 255)
            result = method(*args, **kwargs)
            phase[:16] = b"between".ljust(16)
            return result

        return call

    for owner, method in (
        (RunDirectory, "append"),
        (RunDirectory, "save_checkpoint"),
        (RunDirectory, "save_adapter"),
        (RunDirectory, "rewind"),
        (toy.ToyModel, "fit"),
    ):
        setattr(owner, method, noted(getattr(owner, method), method))


def forget(part: str) -> None:
    """Loads checkpoints without what clients keep, or without a field of the state."""
    load = RunDirectory.load_checkpoint

    def load_less(self: RunDirectory, template: WanderingState) -> Checkpoint[WanderingState] | None:
        found = load(self, template)
        assert found is not None
        return replace(found, kept={}) if part == "kept" else replace(found, state=replace(found.state, **{part: {}}))

    RunDirectory.load_checkpoint = load_less  # type: ignore[method-assign,assignment]


def child(command: Mapping[str, Any], phase: mmap.mmap) -> None:
    """One run: slowed down, or killed by itself ahead of its n-th disk operation."""
    operations = 0

    def before() -> None:
        nonlocal operations
        operations += 1
        if operations == command.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(command.get("sleep", 0.0))

    if "forget" in command:
        forget(command["forget"])
    name_phases(phase)
    watch_disk(before)
    run(Path(command["path"]), lambda: time.sleep(3 * command.get("sleep", 0.0)))


def kill_in(pid: int, phase: mmap.mmap, count: int, delay_s: float) -> None:
    """Kills the run that long after its ``count``-th phase began: counted, so that slow machines do not kill sooner."""
    while phase[16] < count and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(1e-4)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)


def serve() -> None:
    """For each line of stdin a run in a child: how it ended and what it was doing."""
    torch.set_num_threads(1)
    now()
    phase = mmap.mmap(-1, 17)
    for line in sys.stdin:
        command = json.loads(line)
        phase[:16], phase[16] = b"starting".ljust(16), 0
        if (pid := os.fork()) == 0:
            try:
                child(command, phase)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(1)
            os._exit(0)
        if "kill_in" in command:
            kill_in(pid, phase, *command["kill_in"])
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), bytes(phase[:16]).decode().strip(), flush=True)


# --- the tests' side ----------------------------------------------------------------------------------------------


class Driver:
    """Asks the driver process for runs."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def run(self, path: Path, **command: Any) -> tuple[int, str]:
        """Exit code (negative: the signal) and the phase in which the run ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"path": str(path), **command}) + "\n")
        self.process.stdin.flush()
        code, _, phase = self.process.stdout.readline().strip().partition(" ")
        return int(code), phase


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.test_resume"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Driver(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def uninterrupted(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert driver.run(path) == (0, "between")
    return path


def timeless(value: object) -> object:
    """The value without anything named ``seconds``, at any depth."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key != "seconds"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def outcome(path: Path) -> dict[str, object]:
    """Everything that must be equal to the bit; times left out."""
    directory = RunDirectory.open(path)
    found = directory.load_checkpoint(Wandering(toy.spec()).init(np.random.default_rng(0)))
    assert found is not None
    last, last_facts = directory.load_adapter("last")
    best, best_facts = directory.load_adapter("best")
    return {
        "last": (tensors.digest(last.tensors), last_facts),
        "best": (tensors.digest(best.tensors), best_facts),
        "velocity": tensors.digest(found.state.velocity),
        "memory": (found.state.of_client, found.state.ranks),
        "kept": {k: tensors.digest(kept["drift"]) for k, kept in found.kept.items()},
        "lines": [timeless(line) for line in directory.lines()],
        "files": sorted(
            str(file.relative_to(path)) for file in path.rglob("*") if "tensorboard" not in str(file.relative_to(path))
        ),
    }


def test_twenty_kills_at_random_moments_change_no_bit(driver: Driver, uninterrupted: Path, tmp_path: Path) -> None:
    moments = random.Random(KILL_SEED)
    path, phases = tmp_path / "run", []
    while len(phases) < 20:
        code, phase = driver.run(path, kill_in=(moments.randrange(13), moments.uniform(0.0, 0.005)), sleep=0.001)
        assert code == -signal.SIGKILL, f"the run ended by itself after {len(phases)} kills; make it longer"
        phases.append(phase)
    assert driver.run(path) == (0, "between")
    assert outcome(path) == outcome(uninterrupted)
    assert len(set(phases)) >= 3, phases


def test_a_kill_ahead_of_any_disk_operation_changes_no_bit(driver: Driver, uninterrupted: Path, tmp_path: Path) -> None:
    path, phases = tmp_path / "run", set()
    # Twice: from nothing, then with rounds on record. Resuming takes 8 operations, a round 20.
    for operation in (*range(1, 25), 50, *range(1, 30)):
        code, phase = driver.run(path, die_at=operation)
        assert code == -signal.SIGKILL
        phases.add(phase)
    assert phases >= {"append", "save_checkpoint", "save_adapter", "rewind"}
    assert driver.run(path) == (0, "between")
    assert outcome(path) == outcome(uninterrupted)


def test_a_finished_run_that_is_resumed_stays_as_it_is(driver: Driver, uninterrupted: Path) -> None:
    before = outcome(uninterrupted)
    assert driver.run(uninterrupted)[0] == 0
    assert outcome(uninterrupted) == before


def test_what_a_client_keeps_and_all_of_the_state_decide_the_outcome(
    driver: Driver, uninterrupted: Path, tmp_path: Path
) -> None:
    """The other way round: resume without a part of the checkpoint and the adapter is another one."""
    for part in ("kept", "velocity"):
        path = tmp_path / part
        assert driver.run(path, die_at=150)[0] == -signal.SIGKILL
        assert driver.run(path, forget=part)[0] == 0
        assert outcome(path)["last"] != outcome(uninterrupted)["last"]


if __name__ == "__main__":
    serve()
