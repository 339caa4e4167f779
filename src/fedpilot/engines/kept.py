"""Where an engine holds what its clients keep between rounds: in memory, or on disk for large populations."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from fedpilot import checkpoint
from fedpilot.errors import RecordError
from fedpilot.types import Tensors

CLIENTS_IN_A_FOLDER = 1000
CHECKPOINTS = 2  # a run directory keeps so many, and a resumed run may start from any of them


class KeptStore(Protocol):
    """Client -> what it keeps: name -> tensors."""

    def get(self, client_id: int) -> dict[str, Tensors]:
        """What the client kept last; empty where it keeps nothing."""

    def put(self, client_id: int, round: int, kept: Mapping[str, Tensors]) -> None:
        """Replaces what the client keeps, after a round."""


class HoldsStore:
    """What `runs.train` asks of an engine that has a store.

    Args:
        store: Holds what clients keep; in memory, and so in checkpoints, where ``None``.
    """

    def __init__(self, store: KeptStore | None) -> None:
        self.store: KeptStore = MemoryKept() if store is None else store

    def snapshot(self) -> Mapping[int, Mapping[str, Tensors]]:
        """Client -> what it keeps, for a checkpoint; empty where that is on the disk already."""
        return self.store.snapshot() if isinstance(self.store, MemoryKept) else {}

    def restore(self, kept: Mapping[int, Mapping[str, Tensors]]) -> None:
        """Puts a snapshot back."""
        if isinstance(self.store, MemoryKept):
            self.store.restore(kept)

    def rewind(self, round: int) -> None:
        """Forgets what clients kept after the round, where that is not in checkpoints."""
        if isinstance(self.store, DiskKept):
            self.store.rewind(round)

    def committed(self, round: int) -> None:
        """A checkpoint of the round is on the disk."""
        if isinstance(self.store, DiskKept):
            self.store.committed(round)


class MemoryKept:
    """All of it in memory, and in checkpoints."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[str, Tensors]] = {}

    def get(self, client_id: int) -> dict[str, Tensors]:
        """As `KeptStore.get`."""
        return dict(self._kept.get(client_id, {}))

    def put(self, client_id: int, round: int, kept: Mapping[str, Tensors]) -> None:
        """As `KeptStore.put`."""
        if kept:
            self._kept[client_id] = dict(kept)
        else:
            self._kept.pop(client_id, None)

    def snapshot(self) -> Mapping[int, Mapping[str, Tensors]]:
        """Client -> what it keeps, for a checkpoint."""
        return {client_id: dict(kept) for client_id, kept in self._kept.items()}

    def restore(self, kept: Mapping[int, Mapping[str, Tensors]]) -> None:
        """Puts a snapshot back."""
        self._kept = {client_id: dict(of_client) for client_id, of_client in kept.items()}


class DiskKept:
    """One file a client and round, written whole or not at all; memory does not grow with the population.

    Checkpoints hold none of it. They agree with the store because a file is never changed: a run that goes on after
    round r drops the files of later rounds (`rewind`), and files are removed only when no checkpoint that is left can
    need them (`committed`).

    Args:
        folder: Made where it is not there yet; belongs to one run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._committed: list[int] = []

    def get(self, client_id: int) -> dict[str, Tensors]:
        """As `KeptStore.get`.

        Raises:
            RecordError: The file is damaged.
        """
        versions = self._versions(client_id)
        if not versions:
            return {}
        path = self._path(client_id, versions[-1])
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise RecordError(f"{path} must be whole, got {error}; restore it from a copy, or start over") from error
        kept: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in found.items():
            owner, _, own = name.partition("\n")
            kept.setdefault(owner, {})[own] = tensor
        return {**kept}

    def put(self, client_id: int, round: int, kept: Mapping[str, Tensors]) -> None:
        """As `KeptStore.put`."""
        versions = self._versions(client_id)
        if not kept and not versions:
            return
        path = self._path(client_id, round)
        with checkpoint.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flat = {
                f"{name}\n{own}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensors in kept.items()
                for own, tensor in tensors.items()
            }
            checkpoint.write_file(path, to_bytes(flat))
            self._drop_old(client_id, [*(version for version in versions if version != round), round])

    def rewind(self, round: int) -> None:
        """Forgets what was kept after the round; the first round of a fresh run is preceded by round 0."""
        self._committed = [round]
        if round <= 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        for path in self._files():
            if path.name.startswith(".") or int(path.name.split(".")[1]) > round:
                path.unlink()

    def committed(self, round: int) -> None:
        """A checkpoint of the round is on the disk."""
        self._committed = [*self._committed, round][-CHECKPOINTS:]

    def _drop_old(self, client_id: int, versions: list[int]) -> None:
        """Removes all but the newest version that the oldest checkpoint can need, and those after it."""
        if len(self._committed) < CHECKPOINTS:
            return  # after a resume it is not known yet which checkpoints are left
        needed = max((version for version in versions if version <= self._committed[0]), default=-1)
        for version in versions:
            if version < needed:
                self._path(client_id, version).unlink()

    def _path(self, client_id: int, round: int) -> Path:
        return self._folder / str(client_id // CLIENTS_IN_A_FOLDER) / f"{client_id}.{round}.safetensors"

    def _versions(self, client_id: int) -> list[int]:
        """Rounds after which the client kept something, ascending."""
        parent = self._path(client_id, 0).parent
        if not parent.is_dir():
            return []
        names = (name.split(".") for name in os.listdir(parent))
        return sorted(int(parts[1]) for parts in names if parts[0] == str(client_id))

    def _files(self) -> Iterator[Path]:
        return (path for path in self._folder.glob("*/*") if path.is_file())
