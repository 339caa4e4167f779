"""Ctrl-C, sent as a real signal: within this process, and to the commands in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedpilot import interrupts, tensors
from fedpilot.record import RunDirectory
from tests.test_cli import RECIPE, save_data, save_model


@pytest.fixture
def heeded() -> Iterator[None]:
    """SIGINT as in a terminal's foreground; a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_the_first_signal_asks_and_the_second_stops(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts.after_the_round() as halt:
        assert not halt()
        os.kill(os.getpid(), signal.SIGINT)
        assert halt()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this round" in capfd.readouterr().err


def test_where_the_signal_is_ignored_it_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.after_the_round() as halt:
            os.kill(os.getpid(), signal.SIGINT)
            assert not halt()
    finally:
        signal.signal(signal.SIGINT, before)


# --- real processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 30 short rounds, without its baseline."""
    folder = tmp_path_factory.mktemp("toy")
    save_model(folder / "model")
    save_data(folder / "data.csv")
    text = RECIPE.format(folder=folder, memory='["1 GiB", "1 GiB", "1 GiB"]').replace("rounds = 3", "rounds = 30")
    (folder / "toy.toml").write_text(text.partition("[baseline]")[0])
    return folder


def start(*arguments: str) -> subprocess.Popen[str]:
    """A command in a session of its own, as a terminal's foreground job has SIGINT: not ignored."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedpilot", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rounds(path: Path) -> int:
    file = path / "metrics.jsonl"
    return len(file.read_text().splitlines()) - 1 if file.exists() else -1


def press(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: a terminal sends it to the whole foreground group."""
    os.killpg(process.pid, signal.SIGINT)


def alive_in(session: int) -> list[str]:
    """Processes of a session that are there and not merely unburied."""
    listed = subprocess.run(["ps", "-eo", "sid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [row.split(None, 2) for row in listed.splitlines()]
    return [row[2] for row in rows if int(row[0]) == session and not row[1].startswith("Z")]


@pytest.fixture(scope="module")
def whole(toy: Path) -> str:
    """Digest of the run that nobody stops."""
    subprocess.run(
        [sys.executable, "-m", "fedpilot", "run", str(toy / "toy.toml"), "--out", str(toy / "whole")], check=True
    )
    return digest(toy / "whole")


def digest(path: Path) -> str:
    return tensors.digest(RunDirectory.open(path).load_adapter("last")[0].tensors)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_ctrl_c_stopped_goes_on_to_the_same_bits(
    toy: Path, whole: str, tmp_path: Path, times: int, workers: str
) -> None:
    path = tmp_path / "run"
    process = start("run", str(toy / "toy.toml"), "--out", str(path), "--set", f"run.workers={workers}")
    wait_for(lambda: rounds(path) >= 2, process)
    for _ in range(times):
        press(process)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "stopping after this round; Ctrl-C again stops now" in output
    assert f"Go on with: fedpilot run --resume {path}" in " ".join(output.split())
    assert alive_in(process.pid) == []
    done = rounds(path)
    assert 2 <= done < 30
    if times == 1:
        newest = sorted((path / "checkpoints").iterdir())[-1].name
        assert newest == f"round-{done:04}"
    again = subprocess.run(
        [sys.executable, "-m", "fedpilot", "run", "--resume", str(path)], text=True, capture_output=True
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert digest(path) == whole


@pytest.mark.slow
def test_ctrl_c_before_the_first_round_stops_at_once(toy: Path, tmp_path: Path) -> None:
    process = start("run", str(toy / "toy.toml"), "--out", str(tmp_path / "run"))
    assert process.stdout is not None
    assert "loading data" in process.stdout.readline()
    press(process)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_comparison_that_ctrl_c_stopped_goes_on_with_the_same_command(toy: Path, tmp_path: Path, times: int) -> None:
    folder = tmp_path / "comparison"
    command = ["compare", str(toy / "toy.toml"), "--algorithms", "fed-pilot,fedit", "--seeds", "1", "--workers", "2"]
    command += ["--out", str(folder), "--set", "run.rounds=40"]
    process = start(*command)
    paths = [folder / method / "seed-0" for method in ("fed-pilot", "fedit")]
    wait_for(lambda: all(rounds(path) >= 1 for path in paths), process)
    for _ in range(times):
        press(process)
        time.sleep(0.3)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "every finished round is on disk. Go on with the same command" in " ".join(output.split())
    ps = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert not [row for row in ps.splitlines() if "compare-worker" in row and str(folder) in row]
    done = [rounds(path) for path in paths]
    assert min(done) >= 1
    again = subprocess.run([sys.executable, "-m", "fedpilot", *command, "--json"], text=True, capture_output=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads(again.stdout)
    assert [rounds(path) for path in paths] == [40, 40]


def test_a_late_ctrl_c_does_not_disturb_a_command_that_is_done() -> None:
    late = "import atexit, os, signal, sys; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); "
    code = late + "from fedpilot.cli import main; sys.argv = ['fedpilot', '--version']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fedpilot ")
