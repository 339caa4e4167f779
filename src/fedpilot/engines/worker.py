"""The program of worker processes: a parent that sets the workplace up once, and the workers that it forks.

Run by `fedpilot.engines.workers` with the number of a socket as its argument. The parent never trains, so that
torch has no threads yet when it forks: workers share its base model and data until they write to them.
"""

import contextlib
import gc
import importlib
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from fedpilot import startup
from fedpilot.engines.in_process import carry
from fedpilot.engines.wire import Receiver, Sender
from fedpilot.types import Algorithm, Site, Task, Tensors


class Workplace(Protocol):
    """What a worker process works with; further methods can be called by `Pool.call`."""

    def site(self, client_id: int, round: int) -> Site:
        """The client's site."""


def main() -> None:
    """Runs until the engine is gone; without Python's own end, which takes a second to go through all modules."""
    code = 1
    try:
        _parent()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _parent() -> None:
    """Imports and sets up, then forks workers and buries them as the engine asks, until the engine is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine's process decides
    control = socket.socket(fileno=int(sys.argv[1]))
    orders = Connection(os.dup(control.fileno()))
    torch.set_num_threads(1)
    startup.without_bitsandbytes()
    alive: set[int] = set()
    gc.disable()  # looking at what stays for good takes time now, and memory later: pages that are written are copied
    for module in sys.argv[2:]:
        importlib.import_module(module)
    try:
        path, make, threads = pickle.loads(orders.recv_bytes())
        sys.path[:] = path
        try:
            workplace: Workplace = pickle.loads(make)()
        except Exception as error:
            orders.send_bytes(_raised(error))
            return
        orders.send_bytes(pickle.dumps(("ready", None)))
        gc.freeze()
        gc.enable()
        while True:
            order, pid = pickle.loads(orders.recv_bytes())
            if order == "fork":
                alive.add(_fork(control, orders, workplace, threads))
            else:
                orders.send_bytes(pickle.dumps(("buried", os.waitpid(pid, 0)[1])))
                alive.discard(pid)
    except (EOFError, ConnectionError):
        pass
    finally:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _fork(control: socket.socket, orders: Connection, workplace: Workplace, threads: int) -> int:
    """A new worker; the engine gets its number and the other end of its socket."""
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ours.close()
            control.close()
            orders.close()
            torch.set_num_threads(threads)
            _serve(Connection(theirs.detach()), workplace)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    theirs.close()
    orders.send_bytes(pickle.dumps(("forked", pid)))
    socket.send_fds(control, [b"."], [ours.fileno()])
    ours.close()
    return pid


def _serve(connection: Connection, workplace: Workplace) -> None:
    receiver = Receiver()
    while True:
        try:
            name, args = receiver.unpack(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        method: Callable[..., object] = getattr(workplace, name) if name else partial(_carried, workplace)
        try:
            answer = Sender().pack(("done", method(*args)))
        except Exception as error:
            answer = Sender().pack(pickle.loads(_raised(error)))
        connection.send_bytes(answer)
        del args, answer


def _carried(
    workplace: Workplace, algorithm: Algorithm[Any], round: int, task: Task, kept: dict[str, Tensors]
) -> object:
    return carry(algorithm, workplace.site, round, task, kept)


def _raised(error: Exception) -> bytes:
    """The error as a message; its traceback goes along as a note, for it does not cross by itself."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker process:\n{trace}")
    notes = error.__notes__
    error = error.with_traceback(None)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return pickle.dumps(("raised", (error, notes)))
