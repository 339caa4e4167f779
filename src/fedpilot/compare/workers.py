"""Runs of a comparison in processes of one thread each, several at once.

A worker gets its run as one line of JSON on its standard input, and ends when that input does: it never outlives the
process that started it. Its run directory is all that it writes, so killing it costs at most the round it was in.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from fedpilot import interrupts, jobs
from fedpilot.compare.study import Member
from fedpilot.config.recipe import read_recipe
from fedpilot.errors import PlanError, TrainingError
from fedpilot.stopping import Halted

POLL_S = 0.2
GRACE_S = 10.0
COMMAND = "compare-worker"
HALTED = 75
"""Exit code of a worker that ended after a round because it was asked to."""
REFUSED = 76
"""Exit code of a worker whose run cannot be done as it is asked for."""
OWN = (PlanError, TrainingError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What ends a run by its own settings and numbers; a signal, memory or a disk may do better next time."""


class Refusal(str):
    """A problem that would come again, because it is the run's own."""


class Watcher(Protocol):
    """Sees how the runs of a comparison go."""

    def started(self, member: Member) -> None:
        """Its process runs."""

    def round_done(self, member: Member, line: Mapping[str, object]) -> None:
        """A line came to its record; also those of before, when it is resumed."""

    def ended(self, member: Member, problem: str | None) -> None:
        """Its process ended, well or with a problem."""

    def tick(self) -> None:
        """Some time went by."""


@dataclass
class _Running:
    """A worker and how far its record was read."""

    member: Member
    process: subprocess.Popen[bytes]
    log: Path
    offset: int = 0
    rest: bytes = field(default=b"")

    def new_lines(self) -> list[Mapping[str, object]]:
        file = self.member.path / "metrics.jsonl"
        if not file.exists():
            return []
        with file.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) < self.offset:  # a resumed run has cut lines
                self.offset, self.rest = 0, b""
            stream.seek(self.offset)
            text = self.rest + stream.read()
            self.offset = stream.tell()
        *complete, self.rest = text.split(b"\n")
        lines = []
        for row in complete:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(row))
        return lines


def run_members(
    members: Sequence[Member],
    *,
    workers: int,
    traces: Path,
    logs: Path,
    watcher: Watcher,
    halt: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Runs what is not done; a run that fails does not stop the others.

    Args:
        members: The runs, in the order in which they are started.
        workers: How many at once.
        traces: Folder of memory profiles that they share.
        logs: Folder for what the processes say on standard error.
        watcher: Sees how they go.
        halt: Whether runs are to end after their rounds, and no more to begin.

    Returns:
        Label -> what went wrong, for those that failed; a `Refusal` where it would again.

    Raises:
        Halted: They did.
    """
    waiting = [member for member in members if not member.done()]
    running: list[_Running] = []
    problems: dict[str, str] = {}
    halted = False
    try:
        while running or (waiting and not halted):
            if halt() and not halted:
                halted = True
                for worker in running:
                    worker.process.send_signal(signal.SIGINT)
            while waiting and not halted and len(running) < workers:
                running.append(_start(waiting.pop(0), traces, logs))
                watcher.started(running[-1].member)
            time.sleep(POLL_S)
            for worker in list(running):
                code = worker.process.poll()
                for line in worker.new_lines():
                    watcher.round_done(worker.member, line)
                if code is not None:
                    running.remove(worker)
                    _close(worker)
                    if halted and code != 0:  # it goes on next time, or fails again
                        waiting.append(worker.member)
                        continue
                    problem = None if code == 0 else _problem(worker, code)
                    if problem is not None:
                        problems[worker.member.label] = problem
                    watcher.ended(worker.member, problem)
            watcher.tick()
    finally:
        _stop(running)
    if waiting:
        raise Halted
    return problems


def _start(member: Member, traces: Path, logs: Path) -> _Running:
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{member.path.parent.name}-{member.path.name}.txt"
    job = {
        "recipe": member.recipe.resolved(),
        "path": str(member.path.resolve()),
        "traces": str(traces.resolve()),
        "read_test": member.read_test,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedpilot", COMMAND],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which stops its workers itself
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code tells
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    return _Running(member, process, log)


def _stop(running: Sequence[_Running]) -> None:
    for worker in running:
        _signal(worker, signal.SIGTERM)
    for worker in running:
        try:
            worker.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            _signal(worker, signal.SIGKILL)
            worker.process.wait()
        _close(worker)


def _signal(worker: _Running, number: signal.Signals) -> None:
    """To the worker and whatever it started; each worker leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, number)


def _close(worker: _Running) -> None:
    assert worker.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        worker.process.stdin.close()


def _problem(worker: _Running, code: int) -> str:
    """The last thing that a worker said, and how it ended."""
    said = [line for line in worker.log.read_text(errors="replace").splitlines() if line.strip()]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    last = f": {said[-1].removeprefix('error: ')}" if said else ""
    text = f"{how}{last} (all of it in {worker.log})"
    return Refusal(text) if code in (2, REFUSED) else text  # 2: its recipe is wrong


# --- in the worker's process --------------------------------------------------------------------------------------


def work(begun: Callable[[Path], None]) -> None:
    """Reads a run from standard input and does it.

    Args:
        begun: Called with the run directory once it is there.
    """
    try:
        with interrupts.after_the_round(b"") as halt:
            _work(begun, halt)
    except OWN as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(REFUSED)


def _work(begun: Callable[[Path], None], halt: Callable[[], bool]) -> None:
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    path, traces = Path(job["path"]), Path(job["traces"])
    if (path / "manifest.json").exists():
        made = jobs.resume(path, traces=traces)
    else:
        made = jobs.start(read_recipe(job["recipe"], "recipe"), path, traces=traces)
    begun(made.path)
    if halt():  # asked while it was getting ready
        sys.exit(HALTED)
    try:
        jobs.run(replace(made, halt=halt), read_test=job["read_test"])
    except Halted:
        sys.exit(HALTED)


def _die_with_parent() -> None:
    while os.read(0, 2**12):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    os._exit(3)
