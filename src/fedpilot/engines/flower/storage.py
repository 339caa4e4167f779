"""What a node remembers on its disk: what its client keeps between rounds, and how its base has changed.

A folder for each run and client name, so that a restarted node goes on where it was. Versions are never changed, only
added and at last removed: a server that was killed and repeats a round finds what its node had before that round.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from fedpilot import base_deltas, checkpoint
from fedpilot.errors import ClientError, RecordError
from fedpilot.types import BaseDelta, Tensors

SECRET = "secret.key"
SECRET_BYTES = 32

VERSIONS = 3
"""Versions that stay; a server that repeats a round needs the last but one."""


def node_secret(folder: Path) -> bytes:
    """The secret of a node or a server, which its noise follows from; made at its first use, for its owner alone.

    Args:
        folder: The node's.

    Raises:
        RecordError: The file is damaged, or cannot be written.
    """
    file = folder / SECRET
    if not file.exists():
        with checkpoint.writing(file):
            folder.mkdir(parents=True, exist_ok=True)
            made = folder / f"{SECRET}.{os.getpid()}"
            made.unlink(missing_ok=True)
            descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as written:
                written.write(os.urandom(SECRET_BYTES))
                written.flush()
                os.fsync(written.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(made, file)
            made.unlink()
            checkpoint.sync_folder(folder)
    secret = file.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise RecordError(f"{file} must hold {SECRET_BYTES} bytes, got {len(secret)}; restore it, or delete it")
    return secret


class MissingBaseError(ClientError):
    """The node does not hold the base that it is known to have; it must be sent whole."""


class Storage:
    """A client's folder on its node.

    Args:
        root: The node's folder.
        run: Of the run.
        name: The client's name.
    """

    def __init__(self, root: Path, run: str, name: str) -> None:
        self.path = root / _plain(run) / _plain(name)
        self._base: BaseDelta | None = None

    def kept(self, round: int, exchange: int = 1) -> dict[str, Tensors]:
        """What the client kept after the last exchange before this one; empty where it keeps nothing.

        A round that a server repeats begins with its first exchange, which sees nothing of the round.

        Raises:
            RecordError: The newest version is damaged.
        """
        found = [number for number in self._numbers("kept") if number < round + (exchange > 1)]
        if not found:
            return {}
        return dict(cast(Mapping[str, Tensors], self._read("kept", found[-1])))

    def keep(self, round: int, kept: Mapping[str, Tensors]) -> None:
        """Writes what the client keeps after a round, at once.

        Raises:
            RecordError: It cannot be written.
        """
        if kept or self._numbers("kept"):
            self._write("kept", round, kept)

    def based(self, base: BaseDelta) -> BaseDelta:
        """The whole change of the base after a download, as a log that is one snapshot; it is remembered.

        Args:
            base: What travelled: steps after version ``base.since``, or all.

        Raises:
            MissingBaseError: What travelled goes on from a version that is not here.
            RecordError: It cannot be written.
        """
        if base.version == 0:
            return BaseDelta()
        if self._base is not None and base.since == base.version == self._base.version:
            return self._base  # the same tensors, so that the model sees that nothing has changed
        held: Tensors = {}
        if base.since > 0 and base.since >= base.snapshot_version:
            if base.since not in self._numbers("base"):
                raise MissingBaseError(f"base of version {base.since} must be on this node, got none; send it whole")
            held = cast(Tensors, self._read("base", base.since))
        total = base_deltas.replayed(held, base)
        if base.since != base.version:
            self._write("base", base.version, total)
        self._base = BaseDelta(base.version, total, base.version, (), base.version)
        return self._base

    def _folder(self, kind: str, number: int) -> Path:
        return self.path / f"{kind}-{number:06d}"

    def _numbers(self, kind: str) -> list[int]:
        return sorted(int(folder.name.rpartition("-")[2]) for folder in self.path.glob(f"{kind}-*"))

    def _read(self, kind: str, number: int) -> object:
        _, trees, tensors = checkpoint.read(self._folder(kind, number))
        return checkpoint.decode(trees["value"], tensors, {})

    def _write(self, kind: str, number: int, value: object) -> None:
        """Adds a version; those of a future that a server has taken back go first, the oldest at last."""
        with checkpoint.writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(self.path)
        for later in self._numbers(kind):
            if later >= number:
                checkpoint.remove(self._folder(kind, later))
        checkpoint.save(self._folder(kind, number), {}, {"value": value})
        for old in self._numbers(kind)[:-VERSIONS]:
            checkpoint.remove(self._folder(kind, old))


def _plain(name: str) -> str:
    """The name as the name of a folder; another one for each name."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}", name):
        return name
    return f"-{name.encode().hex()[:200]}"
