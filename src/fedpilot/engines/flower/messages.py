"""Flower's messages: what is in them, on both sides."""

import hashlib
import json

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedpilot.errors import ClientError

DESCRIBE, UPDATE, NOTE = "query.describe", "train.update", "query.note"
PACKED = "fedpilot.packed"  # says that an array is plain bytes, not a saved numpy array


def question(settings: str) -> RecordDict:
    """Content of a query."""
    return RecordDict({"config": ConfigRecord({"settings": settings})})


def answer(described: str) -> RecordDict:
    """Content of a query's reply."""
    return RecordDict({"config": ConfigRecord({"node": described})})


def carried(manifest: str, payload: bytes | bytearray | memoryview, settings: str = "", note: str = "") -> RecordDict:
    """Content of a task or of its reply: the payload as one array of bytes, the manifest beside it.

    Args:
        manifest: Of the payload.
        payload: Bytes.
        settings: Of the run, for a task.
        note: Of a secure sum, for a task whose upload is to be masked.
    """
    array = Array("uint8", (len(payload),), PACKED, bytes(payload))
    return RecordDict(
        {
            "arrays": ArrayRecord({"payload": array}),
            "config": ConfigRecord({"manifest": manifest, "settings": settings, "note": note}),
        }
    )


def failed(manifest: str, cause: str, reason: str) -> RecordDict:
    """Content of a reply to a task that the trainer could not answer itself; as `codec.encode_failure` has it.

    Args:
        manifest: Of the task.
        cause: One of `codec.CAUSES`.
        reason: One printable line.
    """
    task = json.loads(manifest)
    kept = {key: task[key] for key in ("format", "run", "round", "client_id", "task", "scale")}
    nothing = {"num_bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    body = {"cause": cause, "reason": "".join(letter if letter.isprintable() else " " for letter in reason)}
    return carried(json.dumps({**kept, **nothing, "kind": "failure", "body": body}), b"")


def text_of(content: RecordDict, key: str) -> str:
    """A text in a message.

    Raises:
        ClientError: It is not there.
    """
    config = content.config_records.get("config")
    value = None if config is None else config.get(key)
    if not isinstance(value, str):
        raise ClientError(f"a message must hold the text {key!r}, got {type(value).__name__}; install the same version")
    return value


def payload_of(content: RecordDict) -> bytes:
    """The array of bytes in a message.

    Raises:
        ClientError: It is not there, or something else is.
    """
    arrays = content.array_records.get("arrays")
    array = None if arrays is None else arrays.get("payload")
    if array is None or array.stype != PACKED or array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
        raise ClientError("a message must hold one packed array of bytes, got none; install the same version")
    data: bytes = array.data
    return data


def tables_of(text: str) -> dict[str, object]:
    """JSON of an object.

    Raises:
        ClientError: It is something else.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ClientError(f"a node's answer must be JSON, got {str(error)[:80]}") from error
    if not isinstance(found, dict):
        raise ClientError(f"a node's answer must be a JSON object, got {type(found).__name__}")
    return found
