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

from fedpilot.engines.flower import machine, messages, sockets
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
    note = messages.text_of(message.content, "note")
    socket = context.node_config.get(SOCKET)
    if socket is None:
        from fedpilot.engines.flower.codec import Packed

        done = _trainer(int(context.node_config["partition-id"])).update(settings, Packed(manifest, payload), note)
        return Message(messages.carried(done.manifest, done.payload), reply_to=message)
    asked = {"op": "update", "settings": settings, "manifest": manifest, "note": note}
    killed = machine.oom_kills()
    try:
        found, result = _asked(Path(str(socket)), asked, payload)
    except ClientError as error:
        if not isinstance(error, RanOutError) and machine.oom_kills() == killed:
            raise
        reason = f"the trainer ran out of memory and was ended or could not read its task: {error}"
        return Message(messages.failed(manifest, "memory", reason), reply_to=message)
    return Message(messages.carried(found["manifest"], result), reply_to=message)


def note(message: Message, context: Context) -> Message:
    """Answers a note of a secure sum; its secrets are in the trainer's memory."""
    settings = messages.text_of(message.content, "settings")
    manifest = messages.text_of(message.content, "manifest")
    socket = context.node_config.get(SOCKET)
    if socket is None:
        answer = _trainer(int(context.node_config["partition-id"])).note(settings, manifest)
    else:
        found, _ = _asked(Path(str(socket)), {"op": "note", "settings": settings, "manifest": manifest})
        answer = found["manifest"]
    return Message(messages.carried(answer, b""), reply_to=message)


app.query("describe")(describe)
app.query("note")(note)
app.train("update")(update)


class RanOutError(ClientError):
    """The trainer had not even the memory to read its task."""


def _asked(socket: Path, head: dict[str, str], payload: bytes = b"") -> tuple[dict[str, str], bytearray]:
    found, result = sockets.ask(socket, head, payload)
    if "error" in found:
        raise (RanOutError if found.get("kind") == "memory" else ClientError)(found["error"])
    return found, result


@cache
def _trainer(partition: int) -> "Trainer":
    from fedpilot.engines.flower.trainer import NodeOptions, Trainer

    return Trainer(NodeOptions(Path(os.environ[FOLDER]), partition=partition, noise="seeded"), _loader())


@cache
def _loader() -> "Loader":
    from fedpilot.engines.flower.trainer import Loader

    return Loader()
