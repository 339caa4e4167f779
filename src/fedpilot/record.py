"""The run directory: what a run was, what happened in each round, and how it goes on after a stop.

    manifest.json               versions, commit, seed, resolved configuration
    metrics.jsonl               one line a round; numbers that are not finite are null
    population.json             names, tiers, budgets and examples of the clients
    report.html                 all of it for people, at the end
    tensorboard/                the same as curves
    checkpoints/round-0007/     the state after round 7; the last two are kept
    adapters/last, best/        what a user takes home

Nothing of it is ever pickled, and nothing is ever half there.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeAlias, cast

import torch

from fedpilot import checkpoint
from fedpilot.attachments import ATTACHMENTS
from fedpilot.errors import RecordError
from fedpilot.rounds import RoundRecord
from fedpilot.types import Deployment, State, Tensors

KEPT_CHECKPOINTS = 2

Kept: TypeAlias = Mapping[int, Mapping[str, Tensors]]
"""Client -> name -> tensors that it keeps between rounds."""


@dataclass(frozen=True)
class Checkpoint(Generic[State]):
    """Everything that a resumed run needs."""

    round: int
    state: State
    kept: Kept


@dataclass(frozen=True)
class RunDirectory:
    """One run on disk. Make it with `create` or `open`."""

    path: Path
    manifest: Mapping[str, object]

    @classmethod
    def create(cls, path: Path, manifest: Mapping[str, object]) -> "RunDirectory":
        """A new run.

        Raises:
            RecordError: The directory holds a run, or anything else.
        """
        if (path / "manifest.json").exists():
            raise RecordError(f"run directory must be new, got {path} with a run in it; resume it or choose another")
        if path.exists() and not path.is_dir():
            raise RecordError(f"run directory must be a directory, got the file {path}; choose another name")
        if path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise RecordError(f"run directory must be new or empty, got {path} with files in it; choose another")
        with checkpoint.writing(path):
            path.mkdir(parents=True, exist_ok=True)
            checkpoint.write_file(path / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
        return cls(path, manifest)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """A run that is there.

        Raises:
            RecordError: There is none.
        """
        file = path / "manifest.json"
        try:
            found = json.loads(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RecordError(f"{file} must exist, got no such file; start a run in {path} first") from error
        except ValueError as error:
            raise RecordError(f"{file} must be JSON, got {error}; restore it from a copy") from error
        return cls(path, found)

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return cast(int, self.manifest["seed"])

    # metrics.jsonl

    def append(self, record: RoundRecord) -> None:
        """Adds the round's line, on the disk when this returns.

        Raises:
            RecordError: It cannot be written.
        """
        file = self.path / "metrics.jsonl"
        line = json.dumps(strict(asdict(record)), allow_nan=False)
        with checkpoint.writing(file), file.open("ab") as stream:
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def lines(self) -> list[dict[str, object]]:
        """The recorded rounds in order; a last line that a stop tore apart is not among them.

        Raises:
            RecordError: A line in the middle is not JSON.
        """
        return list(self.each_line())

    def each_line(self) -> Iterator[dict[str, object]]:
        """`lines`, one after the other: a long record of many clients does not fit into memory at once.

        Raises:
            RecordError: As `lines`.
        """
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        with file.open("rb") as stream:
            for number, text in enumerate(stream, start=1):
                if not text.endswith(b"\n"):
                    return  # torn
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise RecordError(
                        f"{file} line {number} must be JSON, got {error}; "
                        "restore the file from a copy, or delete it and give up the history"
                    ) from error
                yield row

    def rewind(self, last_round: int) -> None:
        """Cuts the lines after a round and a torn one, at once, and removes what a stop left half written.

        Raises:
            RecordError: It cannot be written.
        """
        kept = [json.dumps(line).encode() + b"\n" for line in self.lines() if cast(int, line["round"]) <= last_round]
        with checkpoint.writing(self.path / "metrics.jsonl"):
            checkpoint.write_file(self.path / "metrics.jsonl", b"".join(kept))
            checkpoint.sweep(self.path / "checkpoints")

    def history(self) -> list[dict[str, float]]:
        """Metrics of each round from 0; null reads as NaN."""
        rows = [cast(dict[str, float | None], line["metrics"]) for line in self.lines()]
        return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]

    # checkpoints

    def save_checkpoint(self, round: int, state: object, kept: Kept) -> None:
        """Writes the state after a round and drops all but the last two.

        Raises:
            RecordError: It cannot be written; earlier ones are untouched.
        """
        facts = {"run_id": self.manifest["run_id"], "round": round}
        folder = self.path / "checkpoints" / f"round-{round:04d}"
        checkpoint.save(folder, facts, {"state": state, "kept": kept})
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            checkpoint.remove(old)

    def checkpoints(self) -> list[Path]:
        """Folders of checkpoints, oldest first."""
        folders = (self.path / "checkpoints").glob("round-[0-9]*")
        return sorted(folders, key=lambda folder: int(folder.name.removeprefix("round-")))

    def load_checkpoint(self, template: State) -> Checkpoint[State] | None:
        """The newest checkpoint; ``None`` where the run never came to write one.

        Args:
            template: A state of the same class, as the algorithm's ``init`` makes it.

        Raises:
            RecordError: It is damaged, of another run, or gone though rounds are recorded.
        """
        folders = self.checkpoints()
        if not folders:
            if done := [line["round"] for line in self.lines() if line["round"] != 0]:
                raise RecordError(
                    f"{self.path / 'checkpoints'} must hold the state after a recorded round, got none though "
                    f"{self.path / 'metrics.jsonl'} goes to round {done[-1]}; restore the folder from a copy, "
                    "or start over in another directory"
                )
            return None
        newest = folders[-1]
        try:
            round, trees, found = self._read_checkpoint(newest)
        except RecordError as error:
            raise RecordError(f"{error}; {self._way_out(newest, folders[:-1])}") from error
        state = checkpoint.decode(trees["state"], found, checkpoint.classes_of(type(template)))
        if type(state) is not type(template):
            raise RecordError(
                f"{newest} must hold a {type(template).__name__}, got {type(state).__name__}; "
                "resume with the algorithm that ran"
            )
        return Checkpoint(round, state, cast(Kept, checkpoint.decode(trees["kept"], found, {})))

    def _read_checkpoint(self, folder: Path) -> tuple[int, dict[str, object], dict[str, torch.Tensor]]:
        """Round, trees and tensors of a checkpoint that is whole and of this run."""
        facts, trees, found = checkpoint.read(folder)
        if facts["run_id"] != self.manifest["run_id"]:
            raise RecordError(
                f"{folder / checkpoint.VALUES_FILE} must belong to run {self.manifest['run_id']}, "
                f"got run {facts['run_id']}"
            )
        return cast(int, facts["round"]), trees, found

    def _way_out(self, damaged: Path, earlier: Sequence[Path]) -> str:
        """What to do about a damaged checkpoint: the newest earlier one that is whole, and how to use it."""
        for folder in reversed(earlier):
            try:
                self._read_checkpoint(folder)
            except RecordError:
                continue
            return f"{folder} is intact: delete {damaged} and resume to go on from there"
        return "no earlier checkpoint is intact: restore one from a copy, or start over in another directory"

    # adapters

    def save_adapter(self, name: str, deployment: Deployment, facts: Mapping[str, object]) -> None:
        """Replaces ``adapters/<name>`` at once: the values file names the tensor file that it goes with.

        Raises:
            RecordError: It cannot be written; the old one is untouched.
        """
        folder = self.path / "adapters" / name
        found: dict[str, torch.Tensor] = {}
        tree = checkpoint.encode(deployment, found, "deployment")
        temporary = folder / ".tensors.part"
        with checkpoint.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sha256 = checkpoint.write_tensors(temporary, found)
            file = folder / f"{sha256[:16]}.safetensors"
            os.replace(temporary, file)
            body = {**facts, "tensors": file.name, "tensors_sha256": sha256, "deployment": tree}
            checkpoint.write_values(folder / checkpoint.VALUES_FILE, body)
            for old in folder.glob("*.safetensors"):
                if old != file:
                    old.unlink()

    def load_adapter(self, name: str) -> tuple[Deployment, Mapping[str, object]]:
        """The deployment and the facts that it was saved with.

        Raises:
            RecordError: It is absent or damaged.
        """
        folder = self.path / "adapters" / name
        try:
            body = checkpoint.read_values(folder / checkpoint.VALUES_FILE)
            found = checkpoint.read_tensors(folder / str(body.pop("tensors")), str(body.pop("tensors_sha256")))
        except RecordError as error:
            raise RecordError(f"{error}; resume the run to write it again, or take another adapter") from error
        tree = body.pop("deployment")
        classes = checkpoint.classes_of(Deployment) | {cls.__qualname__: cls for cls in ATTACHMENTS.values()}
        return cast(Deployment, checkpoint.decode(tree, found, classes)), body


def strict(value: object) -> object:
    """The value with null for what JSON cannot say: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value
