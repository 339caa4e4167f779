"""The engine of a simulation: every client in this process, one after the other."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fedpilot.errors import ClientError
from fedpilot.types import Algorithm, Failure, Site, Task, Tensors, Upload


class InProcess:
    """Runs each task at its client's site.

    What a site keeps between rounds lives here, is handed to the client's next site, and goes into checkpoints. A
    client that fails keeps what it had before the round.

    Args:
        algorithm: Its ``local_update`` runs on the client.
        site_for: ``(client_id, round)`` -> the client's site; sets up data, learning rate and the client's own
            randomness, all of them functions of the two numbers, so that a resumed run repeats them.
    """

    def __init__(self, algorithm: Algorithm[Any], site_for: Callable[[int, int], Site]) -> None:
        self._algorithm = algorithm
        self._site_for = site_for
        self._kept: dict[int, dict[str, Tensors]] = {}

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        """Results in the tasks' order; a task is read when its client's turn has come, and forgotten after it.

        An upload's metric ``seconds`` is set to those of its whole local update: loading, scoring and training.

        Raises:
            Exception: Whatever a client raises that is not a `ClientError`, with a note that names client and round.
        """
        return map(partial(self._carry, round), tasks)  # map, not a loop: no variable keeps the last task alive

    def snapshot(self) -> Mapping[int, Mapping[str, Tensors]]:
        """Client -> what it keeps, for a checkpoint."""
        return {client_id: dict(kept) for client_id, kept in self._kept.items()}

    def restore(self, kept: Mapping[int, Mapping[str, Tensors]]) -> None:
        """Puts a snapshot back."""
        self._kept = {client_id: dict(of_client) for client_id, of_client in kept.items()}

    def _carry(self, round: int, task: Task) -> Upload | Failure:
        client_id, started = task.plan.client_id, time.perf_counter()
        try:
            site = self._site_for(client_id, round)
            site.kept = dict(self._kept.get(client_id, {}))
            upload = self._algorithm.local_update(task, site)
        except ClientError as error:
            return Failure(client_id, str(error))
        except Exception as error:
            error.add_note(f"raised by client {client_id} in round {round}")
            raise
        if site.kept:
            self._kept[client_id] = site.kept
        else:
            self._kept.pop(client_id, None)
        return replace(upload, metrics={**upload.metrics, "seconds": time.perf_counter() - started})
