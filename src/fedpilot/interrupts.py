"""Ctrl-C: once asks for an end after the round, twice stops now."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SAID = b"\nstopping after this round; Ctrl-C again stops now\n"


@contextmanager
def after_the_round(said: bytes = SAID) -> Iterator[Callable[[], bool]]:
    """Whether to end after the round, as a function; inside, a second SIGINT raises `KeyboardInterrupt`.

    Where SIGINT is ignored, as in a shell's background, it stays so. Python allows this in its main thread only.

    Args:
        said: What the first SIGINT writes to standard error.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        os.write(2, said)  # not a stream, which may be in the middle of a line

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
