"""Tasks and uploads as bytes: a JSON manifest beside one packed array, and back without trusting either.

The payload is the bytes of all tensors, one behind the other, without gaps. The manifest says what they are: name,
dtype, shape and offset of each, the payload's size and SHA-256, the round, the client, the task that is answered, the
scale of the model's pairs, and what a task or an upload holds besides tensors. Tensors that the client draws itself are
listed and do not travel; of the base's changes only those travel that the client lacks. Nothing is ever unpickled, and
nothing is allocated before its size is checked against what was received.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn, TypeAlias

import torch

from fedpilot import attachments, base_deltas
from fedpilot.errors import ClientError, PlanError, UploadError
from fedpilot.types import Attachment, BaseDelta, Fresh, Plan, Task, Tensors, Upload

FORMAT = 2
MOST_MANIFEST_BYTES = 32 * 2**20
MOST_DIMENSIONS = 8
LONGEST_REASON = 4096
KEYS = ("format", "kind", "run", "round", "client_id", "task", "scale", "num_bytes", "sha256", "body")
PLAN = (
    *("ranks", "trainable", "whole", "scored", "blocks", "checkpointed"),
    *("micro_batch", "values", "peak_bytes", "seconds", "attachment", "sends"),
)

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

Cause: TypeAlias = Literal["client", "base", "memory", "error"]
"""Why a node failed: the method said so, it lacks the base's version, it ran out of memory, or anything else."""
CAUSES: tuple[Cause, ...] = ("client", "base", "memory", "error")

Draw: TypeAlias = Callable[[Fresh, Mapping[str, int]], Tensors]
"""Fresh and the plan's ranks -> the drawn tensors, see `lora.fresh`."""

Json: TypeAlias = Mapping[str, object]
Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Packed:
    """What travels.

    Attributes:
        manifest: JSON.
        payload: Bytes of the tensors, in the manifest's order.
    """

    manifest: str
    payload: Buffer

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire, the carrier's own left out."""
        return len(self.manifest.encode()) + len(self.payload)


@dataclass(frozen=True)
class Stamp:
    """What an answer must agree with.

    Attributes:
        run: Of the whole run; another run's answers are refused.
        round: From 1.
        client_id: The client.
        task: A number that only this task has, so that no answer counts twice or for another task.
        scale: Factor on ``B @ A``, which both sides must have.
    """

    run: str
    round: int
    client_id: int
    task: str
    scale: float


@dataclass(frozen=True)
class NodeFailure:
    """A node's answer that it did not deliver."""

    cause: Cause
    reason: str


# --- tasks --------------------------------------------------------------------------------------------------------


def encode_task(task: Task, stamp: Stamp) -> Packed:
    """The task without what the client draws itself or has already.

    Raises:
        ClientError: A tensor is of a dtype that does not travel.
    """
    plan, base = task.plan, base_deltas.travelling(task.base_delta)
    names = list(task.tensors)
    position = {name: index for index, name in enumerate(names)}
    drawn = frozenset[str]() if task.fresh is None else task.fresh.names
    writer = _Writer()
    entries = [writer.listed(name, tensor, travels=name not in drawn) for name, tensor in task.tensors.items()]
    parts = base.steps if base.since == base.snapshot_version else (base.snapshot,)
    steps = [[writer.listed(name, t, travels=True) for name, t in step.items()] for step in parts]
    extra = [writer.listed(name, tensor, travels=True) for name, tensor in task.extra.items()]
    body = {
        "tensors": entries,
        "plan": {
            "ranks": [[module, rank] for module, rank in plan.ranks.items()],
            "trainable": sorted(position[name] for name in plan.trainable if name in position),
            "whole": sorted(name for name in plan.trainable if name not in position),  # weights of the base itself
            "scored": sorted(position[name] for name in plan.scored),
            "blocks": None if plan.blocks is None else list(plan.blocks),
            "checkpointed": sorted(plan.checkpointed),
            "micro_batch": plan.micro_batch,
            "values": [[block, float(value)] for block, value in plan.values.items()],
            "peak_bytes": plan.peak_bytes,
            "seconds": plan.seconds,
            "attachment": None if plan.attachment is None else attachments.to_table(plan.attachment),
            "sends": [[name, list(shape)] for name, shape in plan.sends.items()],
        },
        "base": {"version": base.version, "since": base.since, "folded": base.snapshot_version, "steps": steps},
        "fresh": None if task.fresh is None else {"seed": task.fresh.seed, "rank": task.fresh.rank},
        "extra": extra,
        "exchange": task.exchange,
    }
    return writer.packed("task", stamp, body)


def decode_task(packed: Packed, draw: Draw, *, most_bytes: int = sys.maxsize) -> tuple[Stamp, Task]:
    """The task as the server had it, but for its base: `BaseDelta` holds what travelled, for `base_deltas.replayed`.

    Args:
        packed: What came.
        draw: Makes the tensors that did not travel.
        most_bytes: Largest payload to take.

    Raises:
        ClientError: The parts contradict each other.
    """
    reader = _Reader(packed, "task", most_bytes, ClientError)
    stamp = reader.stamp()
    reader.keys(reader.body, "tensors", "plan", "base", "fresh", "extra", "exchange")
    listed = reader.entries(reader.list_of(reader.body, "tensors"), may_be_drawn=True)
    base = reader.mapping(reader.body, "base")
    steps = [reader.entries(step) for step in reader.lists_of(base, "steps")]
    beside = reader.entries(reader.list_of(reader.body, "extra"))
    exchange = reader.integer(reader.body.get("exchange"), "exchange", 1, 2)
    plan = _read_plan(reader, reader.mapping(reader.body, "plan"), stamp.client_id, [entry.name for entry in listed])
    drawn = [entry.name for entry in listed if entry.offset is None]
    fresh = _read_fresh(reader, drawn)
    log = _read_base(reader, base)
    sent = reader.tensors([*listed, *(entry for step in steps for entry in step), *beside], split=len(listed))
    made = {} if fresh is None else draw(fresh, plan.ranks)
    whole: dict[str, torch.Tensor] = {}
    for entry in listed:
        tensor = sent.first.get(entry.name, made.get(entry.name))
        if tensor is None or tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            reader.refuse(f"drawn tensor {entry.name} must have shape {entry.shape} and dtype {entry.dtype}")
        whole[entry.name] = tensor
    changes, taken = [], 0
    for step in steps:
        changes.append({entry.name: sent.rest[taken + i] for i, entry in enumerate(step)})
        taken += len(step)
    extra = {entry.name: sent.rest[taken + i] for i, entry in enumerate(beside)}
    return stamp, Task(plan, whole, _with_steps(reader, log, changes), fresh, extra, exchange)


def _read_plan(reader: "_Reader", plan: Json, client_id: int, names: Sequence[str]) -> Plan:
    reader.keys(plan, *PLAN)

    def chosen(key: str) -> frozenset[str]:
        positions = [reader.integer(item, key, 0, len(names) - 1) for item in reader.list_of(plan, key)]
        return frozenset(names[position] for position in positions)

    def maybe(key: str) -> int | None:
        value = plan.get(key)
        return None if value is None else reader.integer(value, key, 1)

    ranks: dict[str, int] = {}
    for module, rank in reader.pairs_of(plan, "ranks"):
        ranks[reader.text(module, "ranks")] = reader.integer(rank, "ranks", 1)
    whole = frozenset(reader.text(name, "whole") for name in reader.list_of(plan, "whole"))
    blocks = plan.get("blocks")
    seconds = plan.get("seconds")
    return Plan(
        client_id=client_id,
        ranks=ranks,
        trainable=chosen("trainable") | whole,
        blocks=None if blocks is None else tuple(reader.integer(b, "blocks", 0) for b in reader.as_list(blocks)),
        checkpointed=frozenset(reader.integer(b, "checkpointed", 0) for b in reader.list_of(plan, "checkpointed")),
        micro_batch=maybe("micro_batch"),
        scored=chosen("scored"),
        values={reader.integer(b, "values", 0): reader.number(v, "values") for b, v in reader.pairs_of(plan, "values")},
        peak_bytes=maybe("peak_bytes"),
        seconds=None if seconds is None else reader.number(seconds, "seconds"),
        attachment=_read_attachment(reader, plan),
        sends=_read_sends(reader, plan),
    )


def _read_sends(reader: "_Reader", plan: Json) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of what comes back beside the trained tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in reader.pairs_of(plan, "sends"):
        found[reader.text(name, "sends")] = reader.shape(shape)
    return found


def _read_attachment(reader: "_Reader", plan: Json) -> Attachment | None:
    """The attachment by its name and hyper-parameters: no class but the known ones is ever made."""
    if plan.get("attachment") is None:
        return None
    try:
        return attachments.from_table(reader.mapping(plan, "attachment"))
    except PlanError as error:
        reader.refuse(str(error))


def _read_fresh(reader: "_Reader", drawn: Sequence[str]) -> Fresh | None:
    found = reader.body.get("fresh")
    if found is None:
        if drawn:
            reader.refuse(f"every tensor must travel where nothing is drawn, {drawn[0]} does not")
        return None
    table = reader.mapping(reader.body, "fresh")
    reader.keys(table, "seed", "rank")
    seed, rank = reader.integer(table.get("seed"), "seed", 0, 2**64 - 1), reader.integer(table.get("rank"), "rank", 1)
    return Fresh(seed, rank, frozenset(drawn))


def _read_base(reader: "_Reader", base: Json) -> BaseDelta:
    reader.keys(base, "version", "since", "folded", "steps")
    version = reader.integer(base.get("version"), "version", 0)
    since = reader.integer(base.get("since"), "since", 0, version)
    folded = reader.integer(base.get("folded"), "folded", since, version)
    if folded not in (since, version):
        reader.refuse(f"folded must be {since}, what is there, or {version}, all of it, got {folded}")
    return BaseDelta(version, {}, folded, (), since)


def _with_steps(reader: "_Reader", log: BaseDelta, changes: Sequence[Tensors]) -> BaseDelta:
    """The log with what travelled: steps after ``since``, or their sum."""
    whole = log.since < log.snapshot_version
    expected = 1 if whole else log.version - log.since
    if len(changes) != expected:
        reader.refuse(f"base of version {log.version} must come in {expected} parts, got {len(changes)}")
    return replace(log, snapshot=changes[0]) if whole else replace(log, steps=tuple(changes))


# --- notes --------------------------------------------------------------------------------------------------------


def encode_note(text: str, stamp: Stamp) -> Packed:
    """A small message of a secure sum, or its answer."""
    return _Writer().packed("note", stamp, {"text": text})


def decode_note(packed: Packed, expected: Stamp | None = None) -> tuple[Stamp, str | NodeFailure]:
    """A note, or why there is none.

    Args:
        packed: What came.
        expected: Stamp of the question; ``None`` on the side that is asked.

    Raises:
        UploadError: It answers another question, or its parts contradict each other.
    """
    reader = _Reader(packed, None, 0, UploadError)
    found = reader.expected(expected) if expected is not None else reader.stamp()
    reader.tensors([], split=0)
    if reader.kind == "failure":
        return found, _read_failure(reader)
    if reader.kind != "note":
        reader.refuse(f"kind must be note or failure, got {_short(reader.kind)}")
    reader.keys(reader.body, "text")
    text = reader.body.get("text")
    if not isinstance(text, str):
        reader.refuse(f"a note must be text, got {_short(type(text).__name__)}")
    return found, text


def _read_failure(reader: "_Reader") -> NodeFailure:
    reader.keys(reader.body, "cause", "reason")
    cause = reader.body.get("cause")
    if cause not in CAUSES:
        reader.refuse(f"cause must be one of {', '.join(CAUSES)}, got {_short(cause)}")
    return NodeFailure(cause, reader.text(reader.body.get("reason"), "reason", LONGEST_REASON))


# --- uploads ------------------------------------------------------------------------------------------------------


def encode_upload(upload: Upload, stamp: Stamp) -> Packed:
    """The upload.

    Raises:
        ClientError: A tensor is of a dtype that does not travel.
    """
    writer = _Writer()
    body = {
        "tensors": [writer.listed(name, tensor, travels=True) for name, tensor in upload.tensors.items()],
        "num_examples": int(upload.num_examples),
        "metrics": [[name, _plain(value)] for name, value in upload.metrics.items()],
    }
    return writer.packed("upload", stamp, body)


def encode_failure(failure: NodeFailure, stamp: Stamp) -> Packed:
    """A node's answer that it did not deliver."""
    reason = "".join(letter if letter.isprintable() else " " for letter in failure.reason[:LONGEST_REASON])
    return _Writer().packed("failure", stamp, {"cause": failure.cause, "reason": reason})


def decode_answer(packed: Packed, expected: Stamp, *, most_bytes: int) -> Upload | NodeFailure:
    """A node's answer to a task.

    Args:
        packed: What came.
        expected: The task's stamp.
        most_bytes: Largest payload to take: an upload is never larger than the tensors that went down to be trained,
            and what the plan sends beside them.

    Raises:
        UploadError: It answers another task, or its parts contradict each other.
    """
    reader = _Reader(packed, None, most_bytes, UploadError)
    found = reader.expected(expected)
    if reader.kind == "failure":
        reader.tensors([], split=0)
        return _read_failure(reader)
    if reader.kind != "upload":
        reader.refuse(f"kind must be upload or failure, got {_short(reader.kind)}")
    reader.keys(reader.body, "tensors", "num_examples", "metrics")
    listed = reader.entries(reader.list_of(reader.body, "tensors"))
    metrics: dict[str, float] = {}
    for metric, value in reader.pairs_of(reader.body, "metrics"):
        metrics[reader.text(metric, "metrics")] = reader.number(value, "metrics", finite=False)
    num_examples = reader.integer(reader.body.get("num_examples"), "num_examples", 0)
    tensors = reader.tensors(listed, split=len(listed)).first
    return Upload(found.client_id, num_examples, tensors, metrics)


def _plain(value: float) -> float | str:
    """The number as strict JSON has it: what is not finite becomes text."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


# --- writing ------------------------------------------------------------------------------------------------------


class _Writer:
    """Lists tensors and lays their bytes one behind the other."""

    def __init__(self) -> None:
        self._payload = bytearray()

    def listed(self, name: str, tensor: torch.Tensor, *, travels: bool) -> list[object]:
        """The tensor's line: name, dtype, shape, offset."""
        if tensor.dtype not in NAMES:
            known = ", ".join(DTYPES)
            raise ClientError(f"dtype of {name} must be one of {known}, got {tensor.dtype}; convert it before sending")
        offset = len(self._payload) if travels else None
        if travels:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._payload += flat.view(torch.uint8).numpy().data
        return [name, NAMES[tensor.dtype], list(tensor.shape), offset]

    def packed(self, kind: str, stamp: Stamp, body: Json) -> Packed:
        """Manifest and payload."""
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "run": stamp.run,
            "round": stamp.round,
            "client_id": stamp.client_id,
            "task": stamp.task,
            "scale": stamp.scale,
            "num_bytes": len(self._payload),
            "sha256": hashlib.sha256(self._payload).hexdigest(),
            "body": body,
        }
        text = json.dumps(manifest, allow_nan=False, separators=(",", ":"))
        return Packed(text, self._payload)


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None
    num_bytes: int


@dataclass(frozen=True)
class _Read:
    """Tensors of the first list by name, and those of the rest in their order."""

    first: dict[str, torch.Tensor]
    rest: list[torch.Tensor]


class _Reader:
    """Checked access to a manifest; whatever is not as it must be is refused with a reason."""

    def __init__(self, packed: Packed, kind: str | None, most_bytes: int, error: type[ClientError]) -> None:
        self._error, self._payload = error, packed.payload
        if len(packed.manifest) > MOST_MANIFEST_BYTES:
            self.refuse(f"manifest must be at most {MOST_MANIFEST_BYTES} bytes, got {len(packed.manifest)}")
        try:
            document = json.loads(packed.manifest, object_pairs_hook=self._once, parse_constant=self._constant)
        except (ValueError, RecursionError) as problem:
            self.refuse(f"manifest must be JSON, got {_short(str(problem))}")
        if not isinstance(document, dict):
            self.refuse(f"manifest must be a JSON object, got {_short(document)}")
        self._document: Json = document
        if document.get("format") != FORMAT:
            self.refuse(f"format must be {FORMAT}, got {_short(document.get('format'))}; install the same version")
        self.kind = document.get("kind")
        if kind is not None and self.kind != kind:
            self.refuse(f"kind must be {kind}, got {_short(self.kind)}")
        claimed = self.integer(document.get("num_bytes"), "num_bytes", 0)
        if claimed > most_bytes:
            self.refuse(f"payload must be at most {most_bytes} bytes, got a claim of {claimed}")
        if claimed != len(packed.payload):
            self.refuse(f"payload must be the claimed {claimed} bytes, got {len(packed.payload)}")
        self.keys(document, *KEYS)
        self.body: Json = self.mapping(document, "body")

    def refuse(self, problem: str) -> NoReturn:
        """Raises the reader's error."""
        raise self._error(f"what was sent must be whole and be its manifest's: {problem}")

    def stamp(self) -> Stamp:
        """Run, round, client, task and scale."""
        document = self._document
        return Stamp(
            run=self.text(document.get("run"), "run"),
            round=self.integer(document.get("round"), "round", 0),
            client_id=self.integer(document.get("client_id"), "client_id", 0),
            task=self.text(document.get("task"), "task"),
            scale=self.number(document.get("scale"), "scale"),
        )

    def expected(self, expected: Stamp) -> Stamp:
        """The stamp, where it is the expected one."""
        found = self.stamp()
        for name in ("run", "round", "client_id", "task", "scale"):
            if getattr(found, name) != getattr(expected, name):
                self.refuse(f"{name} must be {getattr(expected, name)!r}, got {_short(getattr(found, name))}")
        return found

    # values

    def keys(self, table: Json, *names: str) -> None:
        """Refuses a table with other keys."""
        if table.keys() != set(names):
            self.refuse(f"keys must be {', '.join(names)}, got {_short(sorted(table))}")

    def integer(self, value: object, key: str, lowest: int, highest: int = 2**63 - 1) -> int:
        """An integer within bounds."""
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            self.refuse(f"{key} must be an integer from {lowest} to {highest}, got {_short(value)}")
        return value

    def number(self, value: object, key: str, *, finite: bool = True) -> float:
        """A float; also the text of one that is not finite where that is allowed."""
        if not finite and value in ("nan", "inf", "-inf"):
            return float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(f"{key} must be a number, got {_short(value)}")
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if not math.isfinite(result):
            self.refuse(f"{key} must be a finite number, got {_short(value)}")
        return result

    def text(self, value: object, key: str, longest: int = 1024) -> str:
        """A string that is not too long."""
        if not isinstance(value, str) or len(value) > longest or not value.isprintable():
            self.refuse(f"{key} must be printable text of at most {longest} characters, got {_short(value)}")
        return value

    def mapping(self, table: Json, key: str) -> Json:
        """An object."""
        value = table.get(key)
        if not isinstance(value, dict):
            self.refuse(f"{key} must be an object, got {_short(value)}")
        return value

    def as_list(self, value: object) -> Sequence[object]:
        """A list."""
        if not isinstance(value, list):
            self.refuse(f"a list must be there, got {_short(value)}")
        return value

    def list_of(self, table: Json, key: str) -> Sequence[object]:
        """The list under a key."""
        return self.as_list(table.get(key))

    def lists_of(self, table: Json, key: str) -> Iterable[Sequence[object]]:
        """A list of lists."""
        return [self.as_list(item) for item in self.list_of(table, key)]

    def pairs_of(self, table: Json, key: str) -> Iterable[tuple[object, object]]:
        """A list of pairs, no first twice."""
        seen: set[object] = set()
        for pair in self.lists_of(table, key):
            if len(pair) != 2 or isinstance(pair[0], list | dict) or pair[0] in seen:
                self.refuse(f"{key} must be pairs with distinct first entries, got {_short(pair)}")
            seen.add(pair[0])
            yield pair[0], pair[1]

    # tensors

    def entries(self, lines: Sequence[object], *, may_be_drawn: bool = False) -> list[_Entry]:
        """The lines of tensors, names distinct."""
        result = [self._entry(self.as_list(line), may_be_drawn) for line in lines]
        if len({entry.name for entry in result}) != len(result):
            self.refuse("names of tensors must be distinct, got one twice")
        return result

    def shape(self, value: object) -> tuple[int, ...]:
        """The sizes of a tensor."""
        sizes = tuple(self.integer(size, "shape", 1) for size in self.as_list(value)[: MOST_DIMENSIONS + 1])
        if len(sizes) > MOST_DIMENSIONS:
            self.refuse(f"shape must have at most {MOST_DIMENSIONS} axes, got more")
        return sizes

    def _entry(self, line: Sequence[object], may_be_drawn: bool) -> _Entry:
        if len(line) != 4:
            self.refuse(f"a tensor's line must be name, dtype, shape, offset, got {_short(line)}")
        name, dtype, shape, offset = line
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self.refuse(f"dtype must be one of {', '.join(DTYPES)}, got {_short(dtype)}")
        sizes = self.shape(shape)
        num_bytes = math.prod(sizes) * DTYPES[dtype].itemsize
        if num_bytes > 2**62:
            self.refuse(f"shape must be one that memory can hold, got {_short(list(sizes))}")
        if offset is None and may_be_drawn:
            return _Entry(self.text(name, "name"), DTYPES[dtype], sizes, None, num_bytes)
        return _Entry(self.text(name, "name"), DTYPES[dtype], sizes, self.integer(offset, "offset", 0), num_bytes)

    def tensors(self, entries: Sequence[_Entry], *, split: int) -> _Read:
        """The tensors, after their layout and the payload's hash are checked; each is a copy of its own."""
        end = 0
        for entry in entries:
            if entry.offset is None:
                continue
            if entry.offset != end:
                self.refuse(f"offset of {entry.name} must be {end}, the end of the one before, got {entry.offset}")
            end += entry.num_bytes
        if end != len(self._payload):
            self.refuse(f"tensors must fill the payload of {len(self._payload)} bytes, got {end}")
        sha256 = hashlib.sha256(self._payload).hexdigest()
        if sha256 != self._document.get("sha256"):
            self.refuse(f"sha256 must be the payload's, {sha256}, got {_short(self._document.get('sha256'))}")
        view = memoryview(self._payload)
        first = {entry.name: _tensor(view, entry) for entry in entries[:split] if entry.offset is not None}
        return _Read(first, [_tensor(view, entry) for entry in entries[split:]])

    # JSON

    def _once(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key twice in one object")
        return table

    def _constant(self, name: str) -> NoReturn:
        raise ValueError(f"{name} is not strict JSON")


def _tensor(view: memoryview, entry: _Entry) -> torch.Tensor:
    assert entry.offset is not None, "only tensors that travelled are read"
    owned = bytearray(view[entry.offset : entry.offset + entry.num_bytes])  # aligned, writable, the tensor's own
    return torch.frombuffer(owned, dtype=entry.dtype).reshape(entry.shape)


def _short(value: object) -> str:
    """The value for a message, however long it is."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
