"""The engine of a simulation on several cores: worker processes that share one base model, crash-isolated.

Two processes of one thread beat one of two on short batches, whose matrix products are too small to be worth sharing;
and a client that is killed takes no other down. Results are those of `InProcess` with as many threads, bit for bit.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fedpilot.engines.kept import HoldsStore, KeptStore
from fedpilot.engines.wire import Receiver, Sender
from fedpilot.engines.worker import Workplace
from fedpilot.startup import Parent
from fedpilot.types import Algorithm, Failure, Task, Upload

AHEAD = 2  # tasks that may be under way or waiting to be read, for each worker


@dataclass(eq=False)
class _Worker:
    """A worker process and what it is at: position and client of its task."""

    pid: int
    connection: Connection
    sender: Sender = field(default_factory=Sender)
    receiver: Receiver = field(default_factory=Receiver)
    position: int = -1
    client_id: int = -1


class Pool:
    """Worker processes of one workplace; engines and evaluations take turns on them.

    The processes start with the first piece of work, or with `start`; a worker that dies is replaced.

    Args:
        make: Makes the workplace, once for all workers; is pickled, so it must be importable, and must not train.
        count: Worker processes.
        threads: Threads of each.
        parent: To fork them from; ``None`` for a process that has imported nothing yet.
    """

    def __init__(
        self, make: Callable[[], Workplace], count: int, *, threads: int = 1, parent: Parent | None = None
    ) -> None:
        self.count = count
        self._make, self._threads, self._parent = make, threads, parent
        self._forge: _Forge | None = None
        self._idle: list[_Worker] = []

    def start(self) -> None:
        """Starts the processes, which set themselves up while the caller goes on; needs not be called."""
        if self._forge is None:
            parent, self._parent = self._parent or Parent(), None
            self._forge = _Forge(parent, self._make, self._threads)

    def close(self) -> None:
        """Ends all processes at once."""
        for worker in self._idle:
            worker.connection.close()
        self._idle.clear()
        if self._parent is not None:
            self._parent.close()
            self._parent = None
        if self._forge is not None:
            self._forge.close()
            self._forge = None

    def call(self, method: str, arguments: Sequence[tuple[object, ...]]) -> list[Any]:
        """Calls a method of the workplace once for each tuple of arguments, on as many workers at a time.

        Returns:
            Results in the arguments' order.

        Raises:
            Exception: What the method raises; `RuntimeError` where a worker dies on it.
        """
        results: dict[int, Any] = {}
        left = list(enumerate(arguments))[::-1]
        with self.working() as busy:
            while left or busy:
                while left and len(busy) < self.count:
                    position, args = left.pop()
                    busy.send(position, position, (method, args), None)
                for position, _, answer, died in busy.receive():
                    if died:
                        raise RuntimeError(f"{method} must not end its worker process, got one that {died}")
                    results[position] = answer
        return [results[position] for position in range(len(arguments))]

    def pids(self) -> list[int]:
        """Numbers of the worker processes that wait for work."""
        return [worker.pid for worker in self._idle]

    @contextlib.contextmanager
    def working(self) -> Iterator["_Busy"]:
        """The workers that are at work; those that still are at the end are ended: nobody reads what they do."""
        busy = _Busy(self)
        try:
            yield busy
        finally:
            for worker in busy.workers.values():
                self.bury(worker, kill=True)

    def take(self) -> _Worker:
        """A worker that waits, or a new one."""
        if self._idle:
            return self._idle.pop()
        for _ in range(2):  # the process that forks may itself have been killed since: then another one
            self.start()
            assert self._forge is not None
            try:
                return self._forge.worker()
            except (EOFError, ConnectionError):
                self.close()
        raise RuntimeError("worker processes must start, got none; see what they printed")

    def give_back(self, worker: _Worker) -> None:
        """The worker waits."""
        self._idle.append(worker)

    def bury(self, worker: _Worker, *, kill: bool) -> str:
        """Ends what is left of a worker; how it died, in words."""
        worker.connection.close()
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
        if self._forge is None:
            return "was closed"
        try:
            return self._forge.bury(worker.pid)
        except (EOFError, ConnectionError):  # the forge is gone too
            self.close()
            return "died with the process that started it; see whether memory ran out"


class _Busy:
    """Workers at work."""

    def __init__(self, pool: Pool) -> None:
        self.workers: dict[Connection, _Worker] = {}
        self._pool = pool

    def __len__(self) -> int:
        return len(self.workers)

    def send(
        self, position: int, client_id: int, message: tuple[str, tuple[object, ...]], parts: Sequence[object] | None
    ) -> None:
        """Gives a worker that waits something to do."""
        worker = self._pool.take()
        self.workers[worker.connection] = worker
        worker.position, worker.client_id = position, client_id
        with contextlib.suppress(ConnectionError):  # it died while it waited: receiving says so
            worker.connection.send_bytes(worker.sender.pack(message, parts))

    def receive(self) -> Iterator[tuple[int, int, Any, str]]:
        """Waits; then position, client, answer, and of a worker that died how that was.

        Raises:
            Exception: What a worker raised.
        """
        for ready in wait(list(self.workers)):
            worker = self.workers.pop(ready)  # type: ignore[call-overload]
            try:
                kind, answer = worker.receiver.unpack(worker.connection.recv_bytes())
            except (EOFError, ConnectionError):
                yield worker.position, worker.client_id, None, self._pool.bury(worker, kill=False)
                continue
            self._pool.give_back(worker)
            if kind == "raised":
                raise _error(answer)
            yield worker.position, worker.client_id, answer, ""


class Workers(HoldsStore):
    """Carries tasks to worker processes and results back, in the tasks' order.

    A worker that dies makes its client a `Failure`; a new one takes its place. What clients keep goes to the worker
    with the task and comes back with the result.

    Args:
        algorithm: Its ``local_update`` runs on the client; crosses to each worker once.
        pool: The processes.
        store: Holds what clients keep; in memory, and so in checkpoints, where left out.
    """

    def __init__(self, algorithm: Algorithm[Any], pool: Pool, store: KeptStore | None = None) -> None:
        super().__init__(store)
        self.pool = pool
        self._algorithm = algorithm

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        """Results in the tasks' order; no more than twice as many tasks as workers are read ahead.

        Raises:
            Exception: Whatever a client raises that is not a `ClientError`, with a note that names client and round.
        """
        queue = iter(tasks)
        results: dict[int, Upload | Failure] = {}
        handed = given = 0
        more = True
        with _one_thread(), self.pool.working() as busy:
            while more or busy or results:
                while more and len(busy) < self.pool.count and handed - given < AHEAD * self.pool.count:
                    task = next(queue, None)
                    if task is None:
                        more = False
                        break
                    client_id, base = task.plan.client_id, task.base_delta
                    message = ("", (self._algorithm, round, task, self.store.get(client_id)))
                    busy.send(handed, client_id, message, [self._algorithm, base.snapshot, *base.steps])
                    handed += 1
                    del task, message, base
                if given in results:
                    given += 1
                    yield results.pop(given - 1)
                    continue
                for position, client_id, answer, died in busy.receive() if busy else ():
                    results[position] = self._result(client_id, round, answer, died)

    def _result(self, client_id: int, round: int, answer: Any, died: str) -> Upload | Failure:
        if died:
            return Failure(client_id, f"the client's process must live to the end of its task, got one that {died}")
        result: Upload | Failure = answer[0]
        if answer[1] is not None:
            self.store.put(client_id, round, answer[1])
        return result


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """This process computes with one thread in the body: two would wait for each other where workers hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _error(answer: tuple[Exception, Sequence[str]]) -> Exception:
    """The error that a process raised, with its notes."""
    error, notes = answer
    error.__notes__ = list(notes)
    return error


class _Forge:
    """The process that worker processes are forked from."""

    def __init__(self, parent: Parent, make: Callable[[], Workplace], threads: int) -> None:
        self._socket, self._connection, self._ready = parent.socket, parent.connection, False
        parent.close.detach()
        self.close = weakref.finalize(self, _end, parent.process, parent.connection, parent.socket)
        order = (sys.path, pickle.dumps(make), threads)
        with contextlib.suppress(ConnectionError):  # it is gone: asking for a worker says so
            self._connection.send_bytes(pickle.dumps(order))

    def worker(self) -> _Worker:
        """A new worker; waits until the workplace is set up.

        Raises:
            Exception: What setting up raised.
        """
        if not self._ready:
            kind, answer = self._receive()
            if kind == "raised":
                raise _error(answer)
            self._ready = True
        self._connection.send_bytes(pickle.dumps(("fork", 0)))
        pid = self._receive()[1]
        _, sockets, _, _ = socket.recv_fds(self._socket, 1, 1)
        return _Worker(pid, Connection(sockets[0]))

    def bury(self, pid: int) -> str:
        """How a worker died, in words."""
        self._connection.send_bytes(pickle.dumps(("bury", pid)))
        code = os.waitstatus_to_exitcode(self._receive()[1])
        if code >= 0:
            return f"ended with exit code {code}"
        hint = "; see whether memory ran out" if -code == signal.SIGKILL else ""
        return f"was ended by signal {signal.Signals(-code).name}{hint}"

    def _receive(self) -> Any:
        return pickle.loads(self._connection.recv_bytes())


def _end(process: "subprocess.Popen[bytes]", connection: Connection, control: socket.socket) -> None:
    connection.close()
    control.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
