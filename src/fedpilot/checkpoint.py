"""States as files: tensors in safetensors, the rest in JSON, both under SHA-256; nothing is ever unpickled.

A value is a frozen dataclass, a mapping with str or int keys, a tuple, a frozenset, a tensor, a scalar or None, nested
at will. A folder of it is there whole or not at all, whenever the process or the machine stops.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import cast, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from fedpilot.errors import RecordError

TENSORS_FILE, VALUES_FILE = "tensors.safetensors", "values.json"

# --- values <-> JSON and tensors ----------------------------------------------------------------------------------


def encode(value: object, tensors: dict[str, torch.Tensor], path: str) -> object:
    """The value as JSON; its tensors go into ``tensors`` under names that begin with ``path``.

    >>> encode({"step": 3, "pair": (0.5, None)}, {}, "state")
    {'mapping': [['step', 3], ['pair', {'tuple': [0.5, None]}]]}

    Raises:
        RecordError: Some part is of another type.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        name = path
        while name in tensors:  # keys 1 and "1" of one mapping
            name += "'"
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # safetensors wants no views
        return {"tensor": name}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"mapping": [[key, encode(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]}
    if isinstance(value, frozenset):
        return {"frozenset": [encode(item, tensors, path) for item in sorted(value)]}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: encode(getattr(value, f.name), tensors, f"{path}/{f.name}") for f in fields(value)}
        return {"dataclass": type(value).__qualname__, "fields": parts}
    raise RecordError(
        f"{path} must be a frozen dataclass, mapping with str or int keys, tuple, tensor, scalar or None, "
        f"got {type(value).__name__}; keep only these in a state"
    )


def decode(tree: object, tensors: Mapping[str, torch.Tensor], classes: Mapping[str, type]) -> object:
    """The value that `encode` took apart; its dataclasses are among ``classes``, by qualified name.

    Raises:
        RecordError: A dataclass is unknown or has other fields now.
    """
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"mapping": list(items)}:
            return {key: decode(item, tensors, classes) for key, item in items}
        case {"tuple": list(items)}:
            return tuple(decode(item, tensors, classes) for item in items)
        case {"frozenset": list(items)}:
            return frozenset(decode(item, tensors, classes) for item in items)
        case {"dataclass": str(name), "fields": dict(parts)} if name in classes:
            names = {f.name for f in fields(classes[name])}
            if names == parts.keys():
                return classes[name](**{key: decode(part, tensors, classes) for key, part in parts.items()})
            raise RecordError(f"{name} must have fields {sorted(parts)}, got {sorted(names)}; use the version that ran")
    kind = tree.get("dataclass", tree)
    raise RecordError(f"state must be made of {', '.join(sorted(classes))}, got {kind}; resume with its own algorithm")


def classes_of(cls: type) -> dict[str, type]:
    """The dataclass and those that its annotations name, at any depth, by qualified name."""
    found: dict[str, type] = {}

    def visit(hint: object) -> None:
        if isinstance(hint, type) and is_dataclass(hint) and hint.__qualname__ not in found:
            found[hint.__qualname__] = hint
            for inner in get_type_hints(hint).values():
                visit(inner)
        for argument in get_args(hint):
            visit(argument)

    visit(cls)
    return found


# --- files that are whole or absent -------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Makes the folder's list of names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says what could not be written and what to do.

    Raises:
        RecordError: In place of the error of the disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RecordError(
            f"{path} must be written, got {error}; free space or mend the disk, then resume: "
            "what was written before it is untouched"
        ) from error


def write_file(path: Path, data: bytes) -> None:
    """Replaces the file at once: readers see the old bytes or the new, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_values(path: Path, body: Mapping[str, object]) -> None:
    """JSON with its own hash, replaced at once."""
    write_file(path, json.dumps({"sha256": _body_sha256(body), "body": body}).encode())


def read_values(path: Path) -> dict[str, object]:
    """The body that `write_values` wrote.

    Raises:
        RecordError: The file is absent or not as it was written.
    """
    try:
        document = json.loads(path.read_bytes())
        body, expected = cast(dict[str, object], document["body"]), document["sha256"]
    except FileNotFoundError as error:
        raise RecordError(f"{path} must exist, got no such file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} must be whole, got {type(error).__name__} ({error})") from error
    if (found := _body_sha256(body)) != expected:
        raise RecordError(f"{path} must have SHA-256 {expected}, got {found}")
    return body


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes and flushes the tensors; returns the file's SHA-256.

    Not by safetensors' own writer, whose temporary file of a random name would outlive a kill.
    """
    data = to_bytes(dict(tensors))
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """The tensors of the file.

    Raises:
        RecordError: The file is absent or not as it was written.
    """
    if not path.is_file():
        raise RecordError(f"{path} must exist, got no such file")
    if (found := file_sha256(path)) != sha256:
        raise RecordError(f"{path} must have SHA-256 {sha256}, got {found}")
    return dict(load_file(path))


def save(folder: Path, facts: Mapping[str, object], values: Mapping[str, object]) -> None:
    """Writes a new folder under another name and renames it when all of it is on the disk.

    Args:
        folder: Must not exist.
        facts: JSON that is stored beside the values.
        values: Name -> what `encode` takes.

    Raises:
        RecordError: It cannot be written; nothing is left of it.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    tensors: dict[str, torch.Tensor] = {}
    trees = {name: encode(value, tensors, name) for name, value in values.items()}
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            sha256 = write_tensors(temporary / TENSORS_FILE, tensors)
            write_values(temporary / VALUES_FILE, {**facts, "tensors_sha256": sha256, "values": trees})
            sync_folder(temporary)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
    except RecordError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(folder: Path) -> tuple[dict[str, object], dict[str, object], dict[str, torch.Tensor]]:
    """Facts, trees by name, and tensors of a folder that `save` wrote; `decode` puts a tree together.

    Raises:
        RecordError: A file is absent or not as it was written.
    """
    facts = read_values(folder / VALUES_FILE)
    tensors = read_tensors(folder / TENSORS_FILE, str(facts.pop("tensors_sha256")))
    return facts, cast(dict[str, object], facts.pop("values")), tensors


def remove(folder: Path) -> None:
    """Removes a folder such that a stop on the way leaves no half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def sweep(parent: Path) -> None:
    """Removes what a stop left half written or half removed in a folder."""
    for leftover in parent.glob(".*.part"):
        shutil.rmtree(leftover)


def _body_sha256(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()
