"""A client's side of secure sums over notes, and what carries notes between it and the server."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from fedpilot import tensors
from fedpilot.errors import SecureSumError, UploadError
from fedpilot.privacy import client_dp, notes
from fedpilot.privacy.notes import Layout, Note
from fedpilot.privacy.primitives import Random
from fedpilot.privacy.secure_aggregation import Client, SecureSum
from fedpilot.privacy.secure_settings import SecureAggregation
from fedpilot.types import Engine, Failure, Task, Tensors, Upload

MASKED = "masked"
"""Name of the one tensor of a masked upload: the vector, as signed integers."""


@runtime_checkable
class Carrier(Protocol):
    """Carries the four trips of a secure sum; does not think."""

    def ask(self, round: int, asked: Mapping[int, str]) -> Iterator[tuple[int, str | Failure]]:
        """A note to each client, and its answer; in the clients' order."""

    def masked(self, round: int, tasks: Iterable[tuple[Task, str]], most_bytes: int) -> Iterator[Upload | Failure]:
        """Tasks with a note each; the uploads' one tensor, `MASKED`, has at most so many bytes; in the tasks' order."""


class Participant:
    """A client in secure sums. Its secrets are those of one attempt at a round and are in memory alone.

    Args:
        settings: Of the run, from the client's own recipe: what the threshold must be is not the server's to say.
        clip: Norm that an update is clipped to, quantisation included; ``None`` for none.
        random: Draws secrets.
    """

    def __init__(self, settings: SecureAggregation, clip: float | None = None, random: Random = os.urandom) -> None:
        self._settings, self._clip, self._random = settings, clip, random
        self._session = ""
        self._client: Client | None = None
        self._agreed: SecureSum | None = None
        self._layout = Layout({}, False, 1)

    def answer(self, client_id: int, round: int, text: str) -> str:
        """The answer to a note of trip 1, 2 or 4.

        Raises:
            SecureSumError: The note is late, replayed, malformed, or asks for what would give a client away.
        """
        note = Note(text)
        if note.stage == "advertise":
            return self._advertise(client_id, round, note)
        client = self._current(client_id, round, note)
        if note.stage == "share":
            return self._share(client, note)
        if note.stage == "unmask":
            return self._unmask(client, note)
        raise SecureSumError(f"a note must be of a known stage, got {str(note.stage)[:80]!r}; refuse it")

    def mask(self, round: int, text: str, task: Task, upload: Upload) -> Upload:
        """Trip 3: the upload with its update under masks, and nothing else that says something of its data.

        Raises:
            SecureSumError: As `answer`.
            UploadError: The update is not of the layout, or beyond its bound.
        """
        note = Note(text)
        client = self._current(upload.client_id, round, note)
        if note.stage != "mask" or self._agreed is None:
            raise SecureSumError("an input must be masked after keys are shared, got asked at another stage; refuse it")
        weight = upload.num_examples if self._layout.by_examples else 1
        change = self._clipped(client_dp.change(upload, task.tensors), self._agreed)
        self._client, masked = self._agreed.mask(client, note.box(), change, weight)
        signed = masked.vector.view(f"<i{self._agreed.numbers.bits // 8}")
        vector = torch.from_numpy(signed.astype(signed.dtype.newbyteorder("=")))
        return replace(upload, tensors={MASKED: vector}, metrics=client_dp.public(upload.metrics))

    def _current(self, client_id: int, round: int, note: Note) -> Client:
        """The secrets of this attempt."""
        client = self._client
        if client is None or (client.client_id, client.round, self._session) != (client_id, round, note.session):
            raise SecureSumError(
                f"a note must belong to the attempt whose keys client {client_id} sent last, got one of another, late "
                "or replayed, or the client was started again since; start the round over"
            )
        return client

    def _advertise(self, client_id: int, round: int, note: Note) -> str:
        if not isinstance(note.session, str) or not note.session:
            raise SecureSumError("a note must name its session, got none; refuse it")
        self._session, self._agreed = note.session, None
        self._client, keys = SecureSum.advertise(client_id, round, self._random)
        return notes.written("advertise", self._session, notes.of_keys(keys))

    def _share(self, client: Client, note: Note) -> str:
        roster, layout = note.roster(), note.layout()
        agreed = self._settings.agreed(layout.shapes, len(roster), layout.max_weight)
        self._client, letters = agreed.share(client, roster, self._random)
        self._agreed, self._layout = agreed, layout
        return notes.written("share", self._session, notes.of_letters(letters))

    def _unmask(self, client: Client, note: Note) -> str:
        if self._agreed is None:
            raise SecureSumError("a round must be unmasked once, at its end, got asked before; refuse the server")
        self._client, answer = self._agreed.unmask(client, note.request())
        return notes.written("unmask", self._session, notes.of_unmasking(answer))

    def _clipped(self, change: Tensors, agreed: SecureSum) -> Tensors:
        """Within the clip, also after each entry is moved to the grid, by half a step at most."""
        if self._clip is None:
            return change
        count = sum(tensor.numel() for tensor in change.values())
        room = self._clip - agreed.numbers.step / 2 * math.sqrt(count)
        if room <= 0:
            raise UploadError(
                f"clip must exceed what quantisation adds, {self._clip - room:.3g}, got {self._clip:g}; take 64 bits, "
                "or a smaller bound"
            )
        norm = tensors.norm(change)
        return change if norm <= room else tensors.scale(change, room / norm)


class InMemory:
    """Carries notes within this process; tasks go over any engine, and each upload is masked as soon as it is there.

    Args:
        engine: Of the run.
        participant: Makes a client's side.
    """

    def __init__(self, engine: Engine, participant: Callable[[], Participant]) -> None:
        self._engine, self._make = engine, participant
        self._participants: dict[int, Participant] = {}

    def ask(self, round: int, asked: Mapping[int, str]) -> Iterator[tuple[int, str | Failure]]:
        """See `Carrier`."""
        for client_id, text in asked.items():
            participant = self._participants.setdefault(client_id, self._make())
            try:
                yield client_id, participant.answer(client_id, round, text)
            except SecureSumError as error:
                yield client_id, Failure(client_id, str(error))

    def masked(self, round: int, tasks: Iterable[tuple[Task, str]], most_bytes: int) -> Iterator[Upload | Failure]:
        """See `Carrier`."""
        waiting: dict[int, tuple[Task, str]] = {}

        def sent() -> Iterator[Task]:
            for task, text in tasks:
                waiting[task.plan.client_id] = task, text
                yield task
                del task  # one at a time

        for result in self._engine.exchange(round, sent()):
            task, text = waiting.pop(result.client_id)
            if isinstance(result, Failure):
                yield result
                continue
            try:
                yield self._participants[result.client_id].mask(round, text, task, result)
            except (SecureSumError, UploadError) as error:
                yield Failure(result.client_id, str(error))


def vector_of(upload: Upload, agreed: SecureSum) -> "np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]":
    """The masked vector of an upload as it is summed.

    Raises:
        SecureSumError: There is none, or it is of another kind.
    """
    found = upload.tensors.get(MASKED)
    dtype = torch.int32 if agreed.numbers.bits == 32 else torch.int64
    if found is None or len(upload.tensors) > 1 or found.dtype != dtype or found.shape != (agreed.numbers.num_entries,):
        raise SecureSumError(
            f"a masked upload must be one vector of {agreed.numbers.num_entries} {dtype}, got "
            f"{[(name[:40], tuple(t.shape), t.dtype) for name, t in list(upload.tensors.items())[:2]]}; drop it"
        )
    return found.numpy().view(agreed.numbers.dtype.newbyteorder("="))
