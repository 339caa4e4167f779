"""The process of a node's trainer: ``python -m fedpilot.engines.flower.node SOCKET OPTIONS``."""

import json
import logging
import sys
from pathlib import Path

from fedpilot.engines.flower import machine, sockets
from fedpilot.engines.flower.trainer import NodeOptions, Trainer


def main(socket: str, options: str) -> None:
    """Answers at the socket until the process is ended."""
    machine.follow_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    described = json.loads(options)
    sockets.serve(Trainer(NodeOptions(**{**described, "folder": Path(described["folder"])})), Path(socket))


if __name__ == "__main__":
    main(*sys.argv[1:])
