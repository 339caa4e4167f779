"""What processes of fedpilot's own do before they import much: the command line, and what workers are forked from."""

import sys


def without_bitsandbytes() -> None:
    """Hides bitsandbytes from PEFT, which imports it where it is installed: a quarter of a start, for layers that we
    do not make. `unhidden` takes that back where 4 bits are asked for.

    Not for a process that is somebody else's, who may want PEFT to know it.
    """
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # an import finds nothing


def unhidden() -> None:
    """Lets bitsandbytes be imported again."""
    if sys.modules.get("bitsandbytes", sys) is None:
        del sys.modules["bitsandbytes"]
