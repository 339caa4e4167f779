"""What processes of fedpilot's own do before they import much: the command line, and what workers are forked from."""

import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection

_hidden = False

WORKPLACE = "fedpilot.config.workplace"
"""What worker processes import."""

# Ctrl-C in a terminal reaches every process; the engine's decides, also while this one is importing.
_PROGRAM = "import signal; signal.signal(2, signal.SIG_IGN); from fedpilot.engines.worker import main; main()"


def without_bitsandbytes() -> None:
    """Hides bitsandbytes from PEFT, which imports it where it is installed: a sixth to a quarter of a start, for layers
    that we do not make.

    Not for a process that is somebody else's: PEFT and transformers remember that it is not there, also after
    `unhidden` has brought it back for our own 4 bits.
    """
    global _hidden
    if "bitsandbytes" not in sys.modules:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # an import finds nothing
        _hidden = True


def unhidden() -> None:
    """Lets bitsandbytes be imported again where we have hidden it."""
    global _hidden
    if _hidden:
        _hidden = False
        sys.modules.pop("bitsandbytes", None)


class Parent:
    """A process for workers to be forked from, which imports while nobody knows yet what they will work with.

    It is here and not with the engine so that the command line can start it before it imports much itself: the two
    import side by side.

    Args:
        modules: What it imports at once.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self.process = subprocess.Popen(
                # forking beside torch's idle threads is meant: they hold no locks before anything was trained
                [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _PROGRAM, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self.socket = ours
        self.connection = Connection(os.dup(ours.fileno()))
        self.close = weakref.finalize(self, _drop, self.process, self.connection, ours)


def _drop(process: "subprocess.Popen[bytes]", connection: Connection, control: socket.socket) -> None:
    connection.close()
    control.close()
    process.kill()
    process.wait()
