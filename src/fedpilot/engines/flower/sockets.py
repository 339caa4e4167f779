"""A node's trainer behind a Unix socket, and how the short-lived Flower process speaks to it.

A frame is the lengths of its head and its payload, the head as JSON, and the payload. Nothing is ever unpickled. The
socket lies in a folder that only its owner can enter.
"""

import json
import logging
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedpilot.errors import ClientError

if TYPE_CHECKING:  # the caller is a short-lived process that needs no torch
    from fedpilot.engines.flower.trainer import Trainer

logger = logging.getLogger(__name__)

LENGTHS = struct.Struct("!QQ")
MOST_HEAD_BYTES = 64 * 2**20
START_S = 120.0
"""Most seconds that a trainer may take to start."""


def send(connection: socket.socket, head: Mapping[str, str], payload: bytes | bytearray | memoryview = b"") -> None:
    """Writes a frame."""
    text = json.dumps(head).encode()
    connection.sendall(LENGTHS.pack(len(text), len(payload)))
    connection.sendall(text)
    if payload:  # the other side may have answered and gone
        connection.sendall(payload)


def receive(connection: socket.socket) -> tuple[dict[str, str], bytearray]:
    """Reads a frame.

    Raises:
        ClientError: The other side ended, or what it sent is no frame.
    """
    head_bytes, payload_bytes = LENGTHS.unpack(_exactly(connection, LENGTHS.size))
    if head_bytes > MOST_HEAD_BYTES:
        raise ClientError(f"head of a frame must be at most {MOST_HEAD_BYTES} bytes, got {head_bytes}")
    head = json.loads(bytes(_exactly(connection, head_bytes)))
    if not isinstance(head, dict) or not all(isinstance(value, str) for value in head.values()):
        raise ClientError("head of a frame must be an object of texts, got something else")
    return head, _exactly(connection, payload_bytes)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    """So many bytes; grows as they come, whatever size was claimed."""
    found = bytearray()
    while len(found) < size:
        part = connection.recv(min(size - len(found), 2**20))
        if not part:
            raise ClientError(f"the trainer must answer, got the end after {len(found)} of {size} bytes; see its log")
        found += part
    return found


def ask(
    path: Path, head: Mapping[str, str], payload: bytes | bytearray | memoryview = b""
) -> tuple[dict[str, str], bytearray]:
    """One question and its answer.

    Raises:
        ClientError: No trainer listens there, or it ended without an answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            _connect(connection, path)
        except OSError as error:
            raise ClientError(
                f"a trainer must listen at {path}, got {error}; start the node with fedpilot join"
            ) from error
        try:
            send(connection, head, payload)
            return receive(connection)
        except OSError as error:  # it ended with the question unread
            raise ClientError(f"the trainer must answer, got {error}; see its log") from error


def _connect(connection: socket.socket, path: Path) -> None:
    """Connects to a trainer; one that is just being started is waited for."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            return connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def serve(trainer: "Trainer", path: Path) -> None:
    """Answers one question after the other until the process ends."""
    from fedpilot.engines.flower.codec import Packed

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        logger.info("trainer listens at %s", path)
        while True:
            connection, _ = listener.accept()
            with connection:
                try:
                    head, payload = receive(connection)
                    if head["op"] == "describe":
                        send(connection, {"answer": trainer.describe(head["settings"])})
                    elif head["op"] == "note":
                        send(connection, {"manifest": trainer.note(head["settings"], head["manifest"])})
                    else:
                        answer = trainer.update(
                            head["settings"], Packed(head["manifest"], payload), head.get("note", "")
                        )
                        send(connection, {"manifest": answer.manifest}, answer.payload)
                except (ClientError, OSError, KeyError, ValueError, MemoryError) as error:
                    logger.warning("a question went unanswered: %s", error)
                    _tell(connection, error)


def _tell(connection: socket.socket, error: Exception) -> None:
    """Says why there is no answer, if anybody still listens."""
    try:
        kind = {"kind": "memory"} if isinstance(error, MemoryError) else {}
        send(connection, {"error": str(error) or type(error).__name__, **kind})
    except OSError:
        logger.warning("whoever asked has gone")
