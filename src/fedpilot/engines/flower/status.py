"""What a served run is doing: the run notes it down beside its record, anybody on the server can read it.

The notes are a small file that is replaced at once, at most once a second; what is older than a round is in the record.
Who is connected is asked of the SuperLink itself where that runs.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpilot import checkpoint, jobs
from fedpilot.engines.flower.compat import Control
from fedpilot.errors import FedpilotError
from fedpilot.exchange import UploadRecord
from fedpilot.record import RunDirectory
from fedpilot.rounds import RoundRecord
from fedpilot.types import Failure, LeftOut, Plan

HOME, NOTES, SERVER, OUTCOME, ROSTER = ".flower", "progress.json", "server.json", "outcome.json", "nodes.json"
EVERY_S = 1.0
RECENT = 5
"""Rounds whose mean time is what the next ones are expected to take."""


# --- written by the run -------------------------------------------------------------------------------------------


@dataclass
class Board:
    """Where a run notes what it is doing; an observer of its rounds.

    Attributes:
        path: The run directory.
        method: That is running.
        last_round: Of its run.
        refused: Says who is there and cannot take part, with the reason.
    """

    path: Path
    method: str = ""
    last_round: int = 0
    refused: Callable[[], Mapping[str, str]] = dict
    _facts: dict[str, Any] = field(default_factory=dict)
    _written: float = 0.0

    def waiting(self, wanted: int, there: Sequence[str]) -> None:
        """The run waits for nodes to begin."""
        self._note({"phase": "waiting for nodes", "wanted": wanted, "there": sorted(there)})

    def round_started(self, round: int, plans: Sequence[Plan], left_out: Sequence[LeftOut]) -> None:
        """The round is planned."""
        self._facts = {
            "phase": "training",
            "round": round,
            "since": time.time(),
            "asked": [plan.client_id for plan in plans],
            "left_out": {str(entry.client_id): entry.reason for entry in left_out},
            "done": [],
            "failed": {},
        }
        self._note({}, at_once=True)

    def client_done(self, round: int, result: UploadRecord | Failure) -> None:
        """A client's result is in."""
        if isinstance(result, Failure):
            self._facts["failed"][str(result.client_id)] = result.reason
        else:
            self._facts["done"].append(result.client_id)
        self._note({"phase": "training"})

    def round_done(self, record: RoundRecord) -> None:
        """The round is evaluated."""
        self._note({"phase": "between rounds"}, at_once=True)

    def _note(self, facts: Mapping[str, Any], *, at_once: bool = False) -> None:
        self._facts |= facts
        if not at_once and time.monotonic() - self._written < EVERY_S:
            return
        self._written = time.monotonic()
        told = {"method": self.method, "last_round": self.last_round, "refused": dict(self.refused()), **self._facts}
        checkpoint.write_file(self.path / HOME / NOTES, json.dumps(told).encode())


def note_server(path: Path, address: str, ca: Path) -> None:
    """Says which process serves the run, and where its SuperLink is asked.

    Args:
        path: The run directory.
        address: Host and port on this machine.
        ca: Its authority's certificate.
    """
    told = {"pid": os.getpid(), "began": _began(os.getpid()), "address": address, "ca": str(ca.resolve())}
    checkpoint.write_file(path / HOME / SERVER, json.dumps(told).encode())


# --- read by anybody on the server --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """One client of a run.

    Attributes:
        name: Of it.
        connected: Whether its node is there; ``None`` where nobody can say.
        doing: In the round at hand: ``training``, ``done``, ``failed``, ``left out``, or nothing.
        reason: Why it failed or was left out, then or, where nothing is said of it now, the last time.
        budget_bytes: That it reported.
        margin: What its budget is divided by because it ran out of memory.
        rounds: In which its upload counted.
        failures: Rounds in which it failed.
        last_round: Of its last upload; 0 where it never delivered.
    """

    name: str
    connected: bool | None
    doing: str
    reason: str
    budget_bytes: int | None
    margin: float
    rounds: int
    failures: int
    last_round: int


@dataclass(frozen=True)
class Status:
    """A run at this moment.

    Attributes:
        state: ``running``, ``done``, ``failed`` or ``stopped``.
        phase: What it is doing, or why it ended.
        method: That is running.
        round: The round at hand, or the last one.
        last_round: Of the run.
        recorded: Last round on record; -1 where there is none.
        metrics: Of the last round that was evaluated.
        seconds: Since the round at hand began.
        left_s: Expected until the end; ``None`` where no round has ended yet.
        clients: All of them.
        refused: Nodes that are there and may not take part, with the reason.
    """

    state: str
    phase: str
    method: str
    round: int
    last_round: int
    recorded: int
    metrics: Mapping[str, float | None]
    seconds: float | None
    left_s: float | None
    clients: tuple[Client, ...]
    refused: Mapping[str, str]


def read(path: Path) -> Status:
    """The status of the run in a directory.

    Raises:
        FedpilotError: There is none.
    """
    home = path / HOME
    notes, server = _json(home / NOTES), _json(home / SERVER)
    if not server:
        raise FedpilotError(f"{path} must be the directory of a run that was served, got none; see fedpilot serve")
    alive = _began(int(server["pid"])) == server["began"]
    state, phase = _state(home, alive, str(notes.get("phase", "starting")))
    directory = RunDirectory.open(path) if (path / "manifest.json").exists() else None
    lines = [] if directory is None else directory.lines()
    recorded = int(str(lines[-1]["round"])) if lines else -1
    last_round = int(notes.get("last_round", 0)) or (0 if directory is None else jobs.recipe_of(path).run.rounds)
    working = alive and "since" in notes and int(notes.get("round", 0)) > recorded
    since = time.time() - float(notes["since"]) if working else None
    return Status(
        state=state,
        phase=phase,
        method=str(notes.get("method", "")),
        round=int(notes["round"]) if working else max(recorded, 0),
        last_round=last_round,
        recorded=recorded,
        metrics=next((line["metrics"] for line in reversed(lines) if line["metrics"]), {}),  # type: ignore[misc]
        seconds=since,
        left_s=_left(lines, last_round - recorded, since) if alive else None,
        clients=_clients(path, lines, notes if working else {}, _connected(server) if alive else None),
        refused=dict(notes.get("refused", {})) if alive else {},
    )


def _state(home: Path, alive: bool, phase: str) -> tuple[str, str]:
    outcome = _json(home / OUTCOME)
    if alive and not (home / OUTCOME).exists():
        return "running", phase
    if not (home / OUTCOME).exists():
        return "stopped", "the server was ended; go on with fedpilot serve --resume"
    if not outcome:
        return "done", "all rounds are done"
    return "failed", "; ".join(outcome.get("problems") or [str(outcome.get("error"))])


def _left(lines: Sequence[Mapping[str, Any]], rounds: int, since: float | None) -> float | None:
    times = [float(line["seconds"]["total"]) for line in lines if line["round"] and "total" in line["seconds"]]
    if not times:
        return None
    usual = sum(times[-RECENT:]) / len(times[-RECENT:])
    return max(usual * rounds - (since or 0.0), 0.0)


def _clients(
    path: Path, lines: Sequence[Mapping[str, Any]], notes: Mapping[str, Any], connected: Mapping[str, bool] | None
) -> tuple[Client, ...]:
    roster = _json(path / ROSTER)
    names = {int(entry["client_id"]): name for name, entry in roster.items()}
    uploads: dict[int, list[int]] = {client_id: [] for client_id in names}
    troubles: dict[int, list[str]] = {client_id: [] for client_id in names}
    failures = dict.fromkeys(names, 0)
    for line in lines:
        for upload in line["uploads"]:
            uploads[upload["client_id"]].append(int(line["round"]))
        for entry in (*line["failures"], *line["left_out"]):
            troubles[entry["client_id"]].append(str(entry["reason"]))
        for entry in line["failures"]:
            failures[entry["client_id"]] += 1
    margins = lines[-1].get("margins", {}) if lines else {}
    result = []
    for client_id, name in sorted(names.items()):
        doing, reason = _doing(client_id, notes)
        facts = roster[name]["facts"] or {}
        missed = not uploads[client_id] or uploads[client_id][-1] != (lines[-1]["round"] if lines else 0)
        last_trouble = troubles[client_id][-1] if troubles[client_id] and missed else ""
        result.append(
            Client(
                name=name,
                connected=None if connected is None else connected.get(name, False),
                doing=doing,
                reason=reason or last_trouble,
                budget_bytes=facts.get("memory_bytes"),
                margin=float(margins.get(str(client_id), 1.0)),
                rounds=len(uploads[client_id]),
                failures=failures[client_id],
                last_round=max(uploads[client_id], default=0),
            )
        )
    return tuple(result)


def _doing(client_id: int, notes: Mapping[str, Any]) -> tuple[str, str]:
    for key, word in (("failed", "failed"), ("left_out", "left out")):
        if str(client_id) in notes.get(key, {}):
            return word, str(notes[key][str(client_id)])
    if client_id in notes.get("done", ()):
        return "done", ""
    return ("training", "") if client_id in notes.get("asked", ()) else ("", "")


def _connected(server: Mapping[str, Any]) -> Mapping[str, bool] | None:
    """Who is connected, of the SuperLink; ``None`` where it does not say."""
    try:
        control = Control(str(server["address"]), Path(str(server["ca"])))
    except Exception:  # Flower's errors of a connection are of many kinds, and a status must not end with them
        return None
    try:
        return control.connected()
    except Exception:
        return None
    finally:
        control.close()


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    return dict(found)


def _began(pid: int) -> str | None:
    """When a process began, in ticks of the machine; ``None`` where there is none: numbers come round again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
