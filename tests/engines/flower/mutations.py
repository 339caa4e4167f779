"""Messages that are wrong in all the ways that a seeded generator comes up with, and what must hold for each."""

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

import torch

from fedpilot.engines.flower import codec
from fedpilot.engines.flower.codec import NodeFailure, Packed, Stamp
from fedpilot.errors import UploadError
from fedpilot.exchange import Layout, check_upload
from fedpilot.types import Upload

STAMP = Stamp("run", 3, 2, "t1", 1.5)
LAYOUT: Layout = {
    "m.lora_A": ((3, 4), torch.float32),
    "m.lora_B": ((5, 3), torch.float32),
    "n.lora_A": ((1, 7), torch.bfloat16),
}
MOST_BYTES = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in LAYOUT.values())

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 8, 2**31, 2**63, 2**200, -(2**200), 0.5, -0.0, 1e308, 10**400),
    *(
        "",
        "nan",
        "inf",
        "float32",
        "bf16",
        "float64",
        "uint8",
        "upload",
        "task",
        "failure",
        "m.lora_A",
        "\ud800",
        "a\0b",
    ),
    *([], {}, [[]], [0], [[0, 0]], {"a": 1}, "x" * 5000, [1] * 40, [2**40, 2**40]),
)


def upload(generator: random.Random) -> Upload:
    """A good upload: its pair may be of a smaller rank."""
    rank = generator.randint(1, 3)
    noise = torch.Generator().manual_seed(generator.randrange(2**31))
    tensors = {
        "m.lora_A": torch.randn(rank, 4, generator=noise),
        "m.lora_B": torch.randn(5, rank, generator=noise),
        "n.lora_A": torch.randn(1, 7, generator=noise).bfloat16(),
    }
    return Upload(2, generator.randint(1, 50), tensors, {"loss": generator.random(), "steps": 4.0})


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def with_value(document: Any, generator: random.Random, change: Callable[[Any], Any]) -> Any:
    """The document with one value changed."""
    place = generator.choice(places(document)[1:])
    owner = document
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = change(owner[place[-1]])
    return document


def changed_value(value: Any, generator: random.Random) -> Any:
    """Another value near the old one, or a hostile one."""
    if isinstance(value, int) and generator.random() < 0.5:
        return value + generator.choice((-1, 1, 2, 100, -(10**6)))
    if isinstance(value, list) and value and generator.random() < 0.5:
        return generator.choice(([*value, value[0]], value[1:], value[::-1], value * 3))
    if isinstance(value, dict) and value and generator.random() < 0.5:
        return {key: item for key, item in value.items() if key != generator.choice(list(value))}
    return generator.choice(HOSTILE)


def mutated(good: Packed, generator: random.Random) -> Packed:
    """The message with one to three things wrong; sometimes its hash is made right again, as a liar would."""
    manifest, payload = good.manifest, bytearray(good.payload)
    for _ in range(generator.randint(1, 3)):
        kind = generator.randrange(7)
        if kind < 3:
            try:
                document = json.loads(manifest)
            except (ValueError, RecursionError):
                continue
            if isinstance(document, dict | list) and document:
                document = with_value(document, generator, lambda value: changed_value(value, generator))
                manifest = json.dumps(document)
        elif kind == 3 and manifest:
            at = generator.randrange(len(manifest))
            manifest = (
                manifest[:at] + generator.choice(("", "]", '"', "9", "[[[[", "NaN", "\\ud800")) + manifest[at + 1 :]
            )
        elif kind == 4 and payload:
            payload[generator.randrange(len(payload))] ^= 1 << generator.randrange(8)
        elif kind == 5:
            payload = generator.choice((payload[: len(payload) // 2], payload + b"\0" * 4, bytearray(), payload * 2))
        elif payload:
            at = generator.randrange(len(payload) // 4) * 4
            payload[at : at + 4] = generator.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff"))
    if generator.random() < 0.5:
        manifest = honest(manifest, payload)
    return Packed(manifest, bytes(payload))


def honest(manifest: str, payload: bytearray) -> str:
    """The manifest with the payload's true size and hash, where it is still a manifest."""
    try:
        document = json.loads(manifest)
    except (ValueError, RecursionError):
        return manifest
    if isinstance(document, dict):
        document |= {"sha256": hashlib.sha256(payload).hexdigest(), "num_bytes": len(payload)}
    return json.dumps(document)


def judged(packed: Packed) -> str:
    """``refused``, ``failure`` or ``accepted``; what is accepted must be finite, as planned and as its manifest says.

    Raises:
        AssertionError: Something was accepted that should not have been.
        Exception: Whatever is not a refusal is a crash.
    """
    try:
        answer = codec.decode_answer(packed, STAMP, most_bytes=MOST_BYTES)
        if isinstance(answer, NodeFailure):
            return "failure"
        check_upload(answer, LAYOUT)
    except UploadError as error:
        str(error).encode()  # a reason that cannot be written to a log is a crash too
        return "refused"
    again = codec.encode_upload(answer, STAMP)
    said, meant = json.loads(packed.manifest), json.loads(again.manifest)
    assert bytes(again.payload) == bytes(packed.payload)
    assert said["sha256"] == meant["sha256"]
    assert said["body"]["tensors"] == meant["body"]["tensors"]
    assert said["body"]["num_examples"] == answer.num_examples
    assert dict(said["body"]["metrics"]) == dict(meant["body"]["metrics"])
    return "accepted"


def attempt(generator: random.Random) -> str:
    """One wrong message, judged."""
    return judged(mutated(codec.encode_upload(upload(generator), STAMP), generator))
