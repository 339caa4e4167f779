"""The engine of a simulation: every client in this process, one after the other or, if alike, several in one pass."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

from fedpilot.engines import passes
from fedpilot.engines.kept import HoldsStore, KeptStore
from fedpilot.engines.passes import JoiningModel, Turn
from fedpilot.errors import ClientError
from fedpilot.types import Algorithm, Failure, FitsTogether, Site, Task, Tensors, Upload

SiteFor: TypeAlias = Callable[[int, int], Site]
"""``(client_id, round)`` -> the client's site."""

AHEAD = 4
"""Passes whose tasks are read ahead: plans that are alike need not stand beside each other."""


class InProcess(HoldsStore):
    """Runs each task at its client's site.

    What a site keeps between rounds lives in the engine's store and is handed to the client's next site. A client that
    fails keeps what it had before the round.

    Args:
        algorithm: Its ``local_update`` runs on the client.
        site_for: Sets up data, learning rate and the client's own randomness, all of them functions of the two
            numbers, so that a resumed run repeats them.
        store: Holds what clients keep; in memory, and so in checkpoints, where left out.
        together: Trains clients that are alike in one pass; ``None`` for each by itself. An upload's metric
            ``clients_in_pass`` then says how many trained together, and 1 that a client did by itself.
    """

    def __init__(
        self,
        algorithm: Algorithm[Any],
        site_for: SiteFor,
        store: KeptStore | None = None,
        together: FitsTogether | None = None,
    ) -> None:
        super().__init__(store)
        self._algorithm = algorithm
        self._site_for = site_for
        self._together = together

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        """Results in the tasks' order; a task is read when its client's turn has come, and forgotten after it.

        With passes of several clients, the tasks of a few passes are read ahead. An upload's metric ``seconds`` is set
        to those of its whole local update: loading, scoring and training, of a pass the client's share.

        Raises:
            Exception: Whatever a client raises that is not a `ClientError`, with a note that names client and round.
        """
        if self._together is not None:
            return self._in_passes(self._together, round, iter(tasks))
        return map(partial(self._carry, round), tasks)  # map, not a loop: no variable keeps the last task alive

    def _in_passes(self, together: FitsTogether, round: int, tasks: Iterator[Task]) -> Iterator[Upload | Failure]:
        while ahead := list(islice(tasks, AHEAD * together.clients_per_pass)):
            sites = [self._site(round, task) for task in ahead]
            results: dict[int, Upload | Failure] = {}
            for group in _groups(together, ahead, sites):
                chosen = [(ahead[position], site) for position in group if (site := sites[position]) is not None]
                if len(chosen) > 1:
                    results |= zip(group, self._carry_together(together, round, chosen), strict=True)
                else:
                    results |= {position: _with_pass(self._carry(round, ahead[position]), 1) for position in group}
            yield from (results.pop(position) for position in range(len(ahead)))

    def _site(self, round: int, task: Task) -> Site | None:
        """The client's site; ``None`` where it cannot be had, which the client's turn brings to light again."""
        try:
            return self._site_for(task.plan.client_id, round)
        except Exception:
            return None

    def _carry(self, round: int, task: Task) -> Upload | Failure:
        client_id = task.plan.client_id
        result, kept = carry(self._algorithm, self._site_for, round, task, self.store.get(client_id))
        if kept is not None:
            self.store.put(client_id, round, kept)
        return result

    def _carry_together(
        self, together: FitsTogether, round: int, clients: Sequence[tuple[Task, Site]]
    ) -> Iterator[Upload | Failure]:
        """The turns of clients that are alike."""
        kept = [self.store.get(task.plan.client_id) for task, _ in clients]
        works = [
            partial(_joining, self._algorithm, site, round, task, own)
            for (task, site), own in zip(clients, kept, strict=True)
        ]
        for (task, _), turn in zip(clients, passes.run(works, together), strict=True):
            result, now_kept = turn.result
            if now_kept is not None:
                self.store.put(task.plan.client_id, round, now_kept)
            yield _with_pass(result, turn.pass_size, turn.seconds)


def _joining(
    algorithm: Algorithm[Any], site: Site, round: int, task: Task, kept: dict[str, Tensors], turn: Turn
) -> tuple[Upload | Failure, dict[str, Tensors] | None]:
    """A client's turn among those of its pass."""
    site.model = JoiningModel(site.model, turn)
    return carry(algorithm, lambda client_id, round: site, round, task, kept)


def _groups(together: FitsTogether, tasks: Sequence[Task], sites: Sequence[Site | None]) -> list[list[int]]:
    """Positions of the tasks of each pass, as evenly full as can be; a client that must be by itself is one."""
    alike: dict[Hashable, list[int]] = {}
    for position, (task, site) in enumerate(zip(tasks, sites, strict=True)):
        likeness = None if site is None else together.likeness(site.model, task)
        alike.setdefault(("by itself", position) if likeness is None else ("alike", likeness), []).append(position)
    groups: list[list[int]] = []
    for positions in alike.values():
        site = sites[positions[0]]
        most = 1 if site is None else together.room(site.model, tasks[positions[0]])
        count = -(-len(positions) // most)
        groups += [positions[start::count] for start in range(count)]
    return groups


def _with_pass(result: Upload | Failure, clients: int, seconds: float | None = None) -> Upload | Failure:
    """The result with the number of clients that trained together, and its own seconds where that is not one."""
    if isinstance(result, Failure):
        return result
    own = {} if seconds is None else {"seconds": seconds}
    return replace(result, metrics={**result.metrics, **own, "clients_in_pass": float(clients)})


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
