"""What processes of fedpilot's own do before they import much: the command line, and what workers are forked from."""

import sys

_hidden = False


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
