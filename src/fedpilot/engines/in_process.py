"""The engine of a simulation: every client in this process, one after the other."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from fedpilot.engines.kept import HoldsStore, KeptStore
from fedpilot.errors import ClientError
from fedpilot.types import Algorithm, Failure, Site, Task, Tensors, Upload

SiteFor: TypeAlias = Callable[[int, int], Site]
"""``(client_id, round)`` -> the client's site."""


class InProcess(HoldsStore):
    """Runs each task at its client's site.

    What a site keeps between rounds lives in the engine's store and is handed to the client's next site. A client that
    fails keeps what it had before the round.

    Args:
        algorithm: Its ``local_update`` runs on the client.
        site_for: Sets up data, learning rate and the client's own randomness, all of them functions of the two
            numbers, so that a resumed run repeats them.
        store: Holds what clients keep; in memory, and so in checkpoints, where left out.
    """

    def __init__(self, algorithm: Algorithm[Any], site_for: SiteFor, store: KeptStore | None = None) -> None:
        super().__init__(store)
        self._algorithm = algorithm
        self._site_for = site_for

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        """Results in the tasks' order; a task is read when its client's turn has come, and forgotten after it.

        An upload's metric ``seconds`` is set to those of its whole local update: loading, scoring and training.

        Raises:
            Exception: Whatever a client raises that is not a `ClientError`, with a note that names client and round.
        """
        return map(partial(self._carry, round), tasks)  # map, not a loop: no variable keeps the last task alive

    def _carry(self, round: int, task: Task) -> Upload | Failure:
        client_id = task.plan.client_id
        result, kept = carry(self._algorithm, self._site_for, round, task, self.store.get(client_id))
        if kept is not None:
            self.store.put(client_id, round, kept)
        return result


def carry(
    algorithm: Algorithm[Any], site_for: SiteFor, round: int, task: Task, kept: dict[str, Tensors]
) -> tuple[Upload | Failure, dict[str, Tensors] | None]:
    """One client's turn: its result, and what it keeps from now on; ``None`` where it failed and that stays.

    Raises:
        Exception: Whatever the client raises that is not a `ClientError`, with a note that names client and round.
    """
    client_id, started = task.plan.client_id, time.perf_counter()
    try:
        site = site_for(client_id, round)
        site.kept = kept
        upload = algorithm.local_update(task, site)
        if site.release is not None:
            upload = site.release(task, upload)
    except ClientError as error:
        return Failure(client_id, str(error)), None
    except Exception as error:
        error.add_note(f"raised by client {client_id} in round {round}")
        raise
    return replace(upload, metrics={**upload.metrics, "seconds": time.perf_counter() - started}), site.kept
