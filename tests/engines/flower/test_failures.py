"""What goes wrong between machines, with real processes: kills, full disks, a cut network, memory that runs out."""

import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedpilot import checkpoint
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.engines.flower import deployment
from fedpilot.engines.flower.timing import Timing
from fedpilot.errors import FedpilotError
from fedpilot.record import RunDirectory
from tests.engines.flower.deployed import (
    CLIENTS,
    Place,
    adapter,
    benchmark,
    gone,
    in_process,
    kept_environment,
    kill,
    make_place,
    processes_of,
)

pytestmark = pytest.mark.slow

faults: Any = benchmark("faults")
PATIENT = Timing(timeout_s=120.0, reconnect_s=120.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("failures"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with kept_environment():
        yield


def failures(path: Path) -> list[list[int]]:
    """Clients that failed, by round."""
    lines: list[Any] = RunDirectory.open(path).lines()
    return [[entry["client_id"] for entry in line["failures"]] for line in lines[1:]]


class StoppedError(Exception):
    """The server's own process is gone, in a test whose process it is."""


def served_until(place: Place, path: Path, recipe: Any, moment: float) -> bool:
    """Serves until so many seconds after the first round's line; whether the run was killed before its end."""
    due: list[float] = []

    def stop_in_time(text: str) -> None:
        if text.startswith("round 0"):
            due.append(time.monotonic() + moment)
            threading.Timer(moment, lambda: kill(processes_of(path))).start()

    try:
        deployment.serve(place.serving(path, recipe, timing=PATIENT), stop_in_time)
    except FedpilotError:
        return True
    return False


def test_a_server_killed_at_any_moment_goes_on_to_the_same_bits(place: Place, tmp_path: Path) -> None:
    rng, recipe, path = random.Random(1), place.recipe("fedex-lora", rounds=6), tmp_path / "run"
    kills = 0
    with place.nodes():
        for start in range(4):
            if not served_until(place, path, recipe if start == 0 else None, rng.uniform(0.5, 8.0)):
                break
            kills += 1
            assert gone(path)
            for folder in (path / "checkpoints").glob("round-[0-9]*"):
                checkpoint.read(folder)  # whole, or it raises
        else:
            deployment.serve(place.serving(path, None, timing=PATIENT), lambda text: None)
    assert kills >= 1
    assert failures(path) == [[]] * 6  # all took part, as in the run that is compared
    assert adapter(path) == in_process(recipe, tmp_path / "here")


def kill_when_asked(trainer: list[int], within: float = 120.0) -> None:
    """Kills a stopped trainer once a task waits at its socket, which is the path among its arguments."""
    words = Path(f"/proc/{trainer[0]}/cmdline").read_text().split("\0")
    path = next(word for word in words if word.endswith("/trainer"))
    deadline = time.monotonic() + within
    while Path("/proc/net/unix").read_text().split().count(path) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # the listener is one, whoever waits another
    kill(trainer)


def test_a_node_killed_in_the_middle_of_its_task_fails_and_comes_back_with_what_it_remembered(
    place: Place, tmp_path: Path
) -> None:
    path, recipe, killed = tmp_path / "run", place.recipe("flora", rounds=5), []

    def kill_the_trainer(text: str) -> None:
        if text.startswith("round 1") and not killed:
            killed.extend(processes_of(place.folder / "node-Oslo", "flower.node"))
            os.kill(killed[0], signal.SIGSTOP)  # the next task reaches it and waits
            threading.Thread(target=kill_when_asked, args=(killed,)).start()

    with place.nodes() as folders:
        deployment.serve(place.serving(path, recipe, timing=PATIENT), kill_the_trainer)
    assert [1] in failures(path)[1:3]
    assert failures(path)[-1] == []
    lines: list[Any] = RunDirectory.open(path).lines()
    reasons = [entry["reason"] for line in lines for entry in line["failures"]]
    assert all("the trainer must answer" in reason for reason in reasons), reasons
    assert all(line["aggregated"] for line in lines[1:])
    assert list(folders[1].glob("*/Oslo/base-*"))  # what it holds of the base's changes is on its disk


def test_a_node_that_is_started_anew_between_rounds_leaves_no_trace_in_the_bits(place: Place, tmp_path: Path) -> None:
    path, recipe = tmp_path / "run", place.recipe("fedex-lora", rounds=4)
    with place.node(0), place.node(2):
        first = place.node(1)
        first.__enter__()
        ended: list[bool] = []

        def end_it(text: str) -> None:
            if text.startswith("round 2") and not ended:
                kill(processes_of(place.folder / "node-Oslo"))
                ended.append(gone(place.folder / "node-Oslo"))
                again.__enter__()

        again = place.node(1)
        try:
            deployment.serve(place.serving(path, recipe, timing=replace(PATIENT, ahead=1)), end_it)
        finally:
            for context in (first, again) if ended else (first,):
                context.__exit__(None, None, None)
    assert ended == [True]
    if failures(path) == [[]] * 4:
        assert adapter(path) == in_process(recipe, tmp_path / "here")
    else:  # the kill met its task; then it fails in that round only
        assert sum(map(len, failures(path))) == 1


def test_a_server_with_a_full_disk_ends_with_the_reason_and_goes_on_when_there_is_room(
    place: Place, tmp_path: Path
) -> None:
    assert os.geteuid() == 0, "a small disk is mounted, which takes root; run make slow as root"
    disk, recipe = tmp_path / "disk", place.recipe("fedex-lora", rounds=4)
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:

        def fill(text: str) -> None:
            if text.startswith("round 1"):
                with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
                    while file.write(b"\0" * 4096):
                        pass

        with place.nodes():
            with pytest.raises(FedpilotError, match=r"No space left on device|must end by itself|must run"):
                deployment.serve(place.serving(disk / "run", recipe, timing=PATIENT), fill)
            assert gone(disk)
            (disk / "filler").unlink()
            deployment.serve(place.serving(disk / "run", None, timing=PATIENT), lambda text: None)
        assert adapter(disk / "run") == in_process(recipe, tmp_path / "here")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_node_that_cannot_write_fails_with_the_reason_and_takes_part_again_when_it_can(
    place: Place, tmp_path: Path
) -> None:
    path, recipe, pids = tmp_path / "run", place.recipe("fedex-lora", rounds=5), []
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def limit(text: str) -> None:
        if text.startswith("round 1"):
            pids.extend(processes_of(place.folder / "node-Rome", "flower.node"))
            resource.prlimit(pids[0], resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
        if text.startswith("round 3"):
            resource.prlimit(pids[0], resource.RLIMIT_FSIZE, unlimited)

    with place.nodes():
        deployment.serve(place.serving(path, recipe, timing=PATIENT), limit)
    lines: list[Any] = RunDirectory.open(path).lines()
    reasons = [entry["reason"] for line in lines for entry in line["failures"]]
    assert reasons
    assert all("must be written, got" in reason for reason in reasons), reasons
    assert {entry["client_id"] for line in lines for entry in line["failures"]} == {CLIENTS.index("Rome")}
    assert failures(path)[-1] == []


def test_a_network_cut_of_thirty_seconds_costs_its_node_a_round_at_most_and_nobody_else_anything(
    tmp_path: Path,
) -> None:
    assert faults.can_cut(), "network namespaces take root, and iproute2, which make network installs"
    with faults.links(1) as (link,):
        (tmp_path / "place").mkdir()
        place = make_place(tmp_path / "place", (link.server,))
        path, recipe, cuts = tmp_path / "run", place.recipe("fedit", rounds=12), []

        def cut(text: str) -> None:
            if text.startswith("round 2") and not cuts:
                cuts.append(threading.Thread(target=link.cut, args=(30.0,)))
                cuts[0].start()

        inside = tuple(link.command([]))
        with place.node(0), place.node(1), place.node(2, host=link.server, inside=inside):
            serving = place.serving(path, recipe, host="0.0.0.0", timing=Timing(timeout_s=20.0, reconnect_s=20.0))
            deployment.serve(serving, cut)
        cuts[0].join()
        lines: list[Any] = RunDirectory.open(path).lines()
        assert len(lines) == 13
        assert {client for missed in failures(path) for client in missed} <= {2}
        assert failures(path)[-1] == []  # it is back
        assert all({0, 1} <= {upload["client_id"] for upload in line["uploads"]} for line in lines[1:])


def test_a_node_that_runs_out_of_memory_is_planned_for_with_less_and_the_rounds_go_on(
    place: Place, tmp_path: Path
) -> None:
    """Oslo's trainer may take no more than it has: its plan, which fits what it reported, does not fit any more."""
    recipe = place.recipe("fed-pilot", rounds=14)
    options = {"ig_examples": 4, "refresh_every": 100}
    recipe = replace(recipe, algorithm=AlgorithmSettings("fed-pilot", options))
    path, pids = tmp_path / "run", []

    def limit(text: str) -> None:
        if text.startswith("round 1"):
            pids.extend(processes_of(place.folder / "node-Oslo", "flower.node"))
            status = Path(f"/proc/{pids[0]}/status").read_text()
            (size,) = [1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:")]
            resource.prlimit(pids[0], resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

    with place.nodes():
        deployment.serve(place.serving(path, recipe, timing=PATIENT), limit)
    lines: list[Any] = RunDirectory.open(path).lines()
    short = [line["round"] for line in lines if 1 in [entry["client_id"] for entry in line["failures"]]]
    assert short
    margins = [line["margins"].get("1", 1.0) for line in lines]
    assert margins == sorted(margins)
    assert margins[-1] > 1.25
    peaks = [plan["peak_bytes"] for line in lines for plan in line["plans"] if plan["client_id"] == 1]
    assert peaks[-1] < peaks[0]
    after = [line for line in lines if line["round"] > short[-1]]
    assert after  # it delivers a smaller plan, or nothing fits and it is left out
    assert all(len(line["uploads"]) + len(line["left_out"]) == 3 for line in after)
    assert all(line["aggregated"] for line in lines[1:])


def test_a_few_random_faults_lose_nothing(tmp_path: Path) -> None:
    tally = faults.faulty_run(tmp_path, rounds=6, faults=6, seed=3, limit_s=1500.0)
    assert sum(tally.faults.values()) >= 4
    assert tally.checked > 0
    assert tally.corrupted == []
    assert tally.lost(tmp_path / "run") == []
    assert [line["round"] for line in RunDirectory.open(tmp_path / "run").lines()] == list(range(7))
