"""What Flower runs on a node for each message: it hands the message to the node's trainer and the answer back.

On a deployed node the trainer is another process that stays (``trainer-socket`` in the node's configuration): this
one lives for one message, imports neither torch nor a model, and is gone. Without it, in a simulation, the trainer is
in the worker itself and stays with it, one model for all of its clients; what these remember is in the folder that
``FEDPILOT_NODE_FOLDER`` names.
"""

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpilot.engines.flower import messages, sockets
from fedpilot.errors import ClientError

if TYPE_CHECKING:
    from fedpilot.engines.flower.trainer import Loader, Trainer

FOLDER, SOCKET = "FEDPILOT_NODE_FOLDER", "trainer-socket"

app = ClientApp()


def describe(message: Message, context: Context) -> Message:
    """Says what the node is."""
    settings = messages.text_of(message.content, "settings")
    socket = context.node_config.get(SOCKET)
    if socket is None:
        described = _trainer(int(context.node_config["partition-id"])).describe(settings)
    else:
        found, _ = _asked(Path(str(socket)), {"op": "describe", "settings": settings})
        described = found["answer"]
    return Message(messages.answer(described), reply_to=message)


def update(message: Message, context: Context) -> Message:
    """Does a task."""
    settings = messages.text_of(message.content, "settings")
    manifest = messages.text_of(message.content, "manifest")
    payload = messages.payload_of(message.content)
    socket = context.node_config.get(SOCKET)
    if socket is None:
        from fedpilot.engines.flower.codec import Packed

        done = _trainer(int(context.node_config["partition-id"])).update(settings, Packed(manifest, payload))
        return Message(messages.carried(done.manifest, done.payload), reply_to=message)
    asked = {"op": "update", "settings": settings, "manifest": manifest}
    found, result = _asked(Path(str(socket)), asked, payload)
    return Message(messages.carried(found["manifest"], result), reply_to=message)


app.query("describe")(describe)
app.train("update")(update)


def _asked(socket: Path, head: dict[str, str], payload: bytes = b"") -> tuple[dict[str, str], bytearray]:
    found, result = sockets.ask(socket, head, payload)
    if "error" in found:
        raise ClientError(found["error"])
    return found, result


@cache
def _trainer(partition: int) -> "Trainer":
    from fedpilot.engines.flower.trainer import NodeOptions, Trainer

    return Trainer(NodeOptions(Path(os.environ[FOLDER]), partition=partition), _loader())


@cache
def _loader() -> "Loader":
    from fedpilot.engines.flower.trainer import Loader

    return Loader()
