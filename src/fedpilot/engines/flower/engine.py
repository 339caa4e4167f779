"""The engine over Flower's grid: tasks go out as messages, answers come back in the tasks' order.

A client is known by the name that its node reports, not by Flower's number for the node, which is another one after
each start. A round's tasks are sent ahead up to a bound; answers stay with the SuperLink until their turn has come, so
that the server holds one at a time.
"""

import json
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedpilot import base_deltas, tensors
from fedpilot.engines.flower import codec, compat, messages
from fedpilot.engines.flower.codec import NodeFailure, Packed, Stamp
from fedpilot.engines.flower.timing import Timing
from fedpilot.errors import ClientError
from fedpilot.types import Failure, OutOfMemory, Task, Upload

logger = logging.getLogger(__name__)

HELLO_S = 600.0
"""Most seconds that a node may take to load its data and model."""

AGAIN_S = 30.0
"""Seconds until a node that could not take part is asked again."""


@dataclass(frozen=True)
class Node:
    """A node that said what it is; see `trainer.Trainer.describe`."""

    node_id: int
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its client."""
        return str(self.facts.get("name", ""))

    @property
    def error(self) -> str | None:
        """Why it cannot take part; ``None`` where it can."""
        found = self.facts.get("error")
        return None if found is None else str(found)


class Nodes:
    """Who is connected, by name; asks each new node once what it is.

    Args:
        grid: Flower's.
        settings: What the nodes are told of the run, JSON.
        accept: Says why a node that could take part must not; ``None`` where it may.
        poll_s: Between two looks.
    """

    def __init__(
        self, grid: Grid, settings: str, accept: Callable[[Node], str | None] | None = None, poll_s: float = 0.1
    ) -> None:
        self._grid, self._settings, self._accept, self._poll_s = grid, settings, accept, poll_s
        self._asked: dict[int, tuple[str, float]] = {}  # node -> its question and when it was asked
        self._known: dict[int, Node] = {}
        self._again: dict[int, float] = {}  # refused node -> when it is asked again: what was wrong may be mended
        self.refused: dict[str, str] = {}

    def look(self) -> Mapping[str, Node]:
        """Name -> node, of all that are connected and may take part; does not wait for those that are new."""
        online = set(self._grid.get_node_ids())
        due = {node_id for node_id, when in self._again.items() if time.monotonic() > when}
        self._again = {node_id: when for node_id, when in self._again.items() if node_id not in due}
        self._known = {node_id: node for node_id, node in self._known.items() if node_id in online - due}
        self._asked = {node_id: entry for node_id, entry in self._asked.items() if node_id in online}
        for node_id in sorted(online - self._known.keys() - self._asked.keys()):
            message = Message(messages.question(self._settings), node_id, messages.DESCRIBE, ttl=HELLO_S)
            message_id = pushed(self._grid, message)
            if message_id is not None:
                self._asked[node_id] = (message_id, time.monotonic())
        for node_id, (message_id, asked) in list(self._asked.items()):
            try:
                reply = compat.pulled(self._grid, message_id, 0)
            except ClientError as error:
                del self._asked[node_id]
                self._refuse(Node(node_id, {"name": f"node {node_id}"}), str(error))
                continue
            if reply is not None:
                del self._asked[node_id]
                self._take(node_id, reply)
            elif time.monotonic() - asked > HELLO_S:
                del self._asked[node_id]  # asked again at the next look
        return {node.name: node for node in self._known.values() if node.error is None}

    def wait(
        self, enough: Callable[[Mapping[str, Node]], bool], seconds: float, *, loading_s: float = 0.0
    ) -> Mapping[str, Node]:
        """Looks until there are enough nodes or the time is up.

        Args:
            enough: Says so of the nodes by name.
            seconds: Most to wait.
            loading_s: Most to wait beyond that for nodes that are there and have not answered yet: they load a model.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = self.look()
            over = time.monotonic() - deadline
            if enough(found) or (over > 0 and (not self._asked or over > loading_s)):
                return found
            time.sleep(self._poll_s)

    def _take(self, node_id: int, reply: Message) -> None:
        try:
            if reply.has_error():
                raise ClientError(error_of(reply))
            facts = _checked(messages.tables_of(messages.text_of(reply.content, "node")))
        except ClientError as error:
            facts = {"name": f"node {node_id}", "error": str(error)}
        node = Node(node_id, facts)
        twin = next((other for other in self._known.values() if other.name == node.name and other.error is None), None)
        problem = node.error
        if problem is None and twin is not None:
            problem = f"name must be its own, got {node.name!r}, which node {twin.node_id} has; give --name"
        if problem is None and self._accept is not None:
            problem = self._accept(node)
        if problem is not None:
            self._refuse(node, problem)
            return
        logger.info("node %s is there: %s", node.name, {k: v for k, v in facts.items() if k != "base"})
        self.refused.pop(node.name, None)
        self._known[node_id] = node

    def _refuse(self, node: Node, problem: str) -> None:
        logger.warning("node %s cannot take part: %s", node.name, problem)
        self.refused[node.name] = problem
        self._again[node.node_id] = time.monotonic() + AGAIN_S
        self._known[node.node_id] = Node(node.node_id, {**node.facts, "error": problem})


@dataclass
class Wire:
    """What travelled, Flower's own envelopes left out.

    Attributes:
        down: Bytes of manifests and payloads to nodes.
        up: Bytes from nodes.
        seconds: Of the server's own work: ``encode``, ``push``, ``pull`` and ``decode``; looks that find nothing count
            as ``pull``.
    """

    down: int = 0
    up: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the ``with`` body."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def __str__(self) -> str:
        spent = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.seconds.items())
        return f"{self.down} bytes down, {self.up} up; {spent}"


@dataclass(frozen=True)
class _Sent:
    """A task on its way; ``task`` is kept only where it might have to be sent again with the whole base."""

    stamp: Stamp
    client_id: int
    message_id: str = ""
    most_bytes: int = 0
    pushed: float = 0.0
    wait_s: float = 0.0
    task: Task | None = None
    note: str = ""
    failure: str | None = None


@dataclass
class FlowerEngine:
    """Carries tasks to nodes.

    What clients keep is on their nodes' disks: the engine has nothing to put into a checkpoint.

    Attributes:
        grid: Flower's.
        nodes: Who is connected.
        names: Client -> its name.
        settings: What goes with each task, JSON; see `trainer.Trainer.update`.
        run: Of the run directory.
        scale: Of the model's pairs.
        timing: How long is waited for what.
        modules: Adapted module -> (out, in), for methods that train whole weights.
        wire: Counts what travelled in the newest round.
    """

    grid: Grid
    nodes: Nodes
    names: Mapping[int, str]
    settings: str
    run: str
    scale: float
    timing: Timing = field(default_factory=Timing)
    modules: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    wire: Wire = field(default_factory=Wire)
    _patience: float = 0.0
    _round: int = 0

    def exchange(self, round: int, tasks: Iterable[Task]) -> Iterator[Upload | Failure]:
        """Results in the tasks' order.

        An upload's metrics get ``round_trip_seconds``, from sending the task to having its answer; what that is above
        ``seconds`` is the engine's own and the wait for answers before it.
        """
        self._begin(round)
        return self._exchanged(round, map(_unmasked, tasks), None)

    def masked(self, round: int, tasks: Iterable[tuple[Task, str]], most_bytes: int) -> Iterator[Upload | Failure]:
        """As `participant.Carrier.masked`; a round's clients that are absent were waited for by its first trip."""
        return self._exchanged(round, tasks, most_bytes)

    def ask(self, round: int, asked: Mapping[int, str]) -> Iterator[tuple[int, str | Failure]]:
        """As `participant.Carrier.ask`: all are asked, then answers are looked for until the time is up."""
        if round != self._round:
            self._begin(round)
        sent = [self._send_note(round, client_id, text) for client_id, text in asked.items()]
        for one in sent:
            yield one.client_id, self._receive_note(one)

    def _begin(self, round: int) -> None:
        self._round, self.wire = round, Wire()
        self._patience = time.monotonic() + self.timing.reconnect_s  # for all absent clients of a round together

    def _exchanged(
        self, round: int, tasks: Iterable[tuple[Task, str]], most_bytes: int | None
    ) -> Iterator[Upload | Failure]:
        waiting: deque[_Sent] = deque()
        ahead = iter(tasks)
        while True:
            while len(waiting) < self.timing.ahead and (entry := next(ahead, None)) is not None:
                waiting.append(self._send(round, *entry, most_bytes))
                del entry  # the SuperLink has it
            if not waiting:
                logger.info("round %d on the wire: %s", round, self.wire)
                return
            yield self._receive(waiting.popleft())

    def _send_note(self, round: int, client_id: int, text: str) -> _Sent:
        stamp = Stamp(self.run, round, client_id, uuid.uuid4().hex, self.scale)
        node = self._node(client_id)
        if node is None:
            return _Sent(stamp, client_id, failure=self._absent(client_id))
        packed = codec.encode_note(text, stamp)
        content = messages.carried(packed.manifest, b"", self.settings)
        wait_s = self.timing.note_s
        message_id = pushed(self.grid, Message(content, node.node_id, messages.NOTE, ttl=wait_s, group_id=str(round)))
        if message_id is None:
            return _Sent(stamp, client_id, failure="the SuperLink must take the note, got a refusal; see its log")
        self.wire.down += packed.num_bytes + len(self.settings.encode())
        return _Sent(stamp, client_id, message_id, 0, time.monotonic(), wait_s)

    def _receive_note(self, sent: _Sent) -> str | Failure:
        if sent.failure is not None:
            return Failure(sent.client_id, sent.failure)
        try:
            reply = self._reply(sent)
            packed = Packed(messages.text_of(reply.content, "manifest"), b"")
            self.wire.up += packed.num_bytes
            _, answer = codec.decode_note(packed, sent.stamp)
        except ClientError as error:
            return Failure(sent.client_id, str(error))
        return Failure(sent.client_id, answer.reason) if isinstance(answer, NodeFailure) else answer

    def _absent(self, client_id: int) -> str:
        name, seconds = self.names.get(client_id, "?"), self.timing.reconnect_s
        return f"node {name!r} must be connected, got none within {seconds:.0f} s"

    def _send(self, round: int, task: Task, note: str = "", most_bytes: int | None = None) -> _Sent:
        client_id = task.plan.client_id
        stamp = Stamp(self.run, round, client_id, uuid.uuid4().hex, self.scale)
        node = self._node(client_id)
        if node is None:
            return _Sent(stamp, client_id, failure=self._absent(client_id))
        wait_s = self.timing.wait_s(task.plan)
        with self.wire.phase("encode"):
            packed = codec.encode_task(task, stamp)
            content = messages.carried(packed.manifest, packed.payload, self.settings, note)
        message = Message(content, node.node_id, messages.UPDATE, ttl=wait_s, group_id=str(round))
        with self.wire.phase("push"):
            message_id = pushed(self.grid, message)
        if message_id is None:
            return _Sent(stamp, client_id, failure="the SuperLink must take the task, got a refusal; see its log")
        self.wire.down += packed.num_bytes + len(self.settings.encode()) + len(note)
        return _Sent(
            stamp,
            client_id,
            message_id,
            self._most_bytes(task) if most_bytes is None else most_bytes,
            time.monotonic(),
            wait_s,
            task if task.base_delta.version else None,
            note,
        )

    def _most_bytes(self, task: Task) -> int:
        """An upload is never larger than what is trained, weights that are trained whole, and what is sent beside."""
        trained = task.plan.trainable
        whole = (shape for module, shape in self.modules.items() if base_deltas.weight_name(module) in trained)
        sizes = [*map(math.prod, whole), *map(math.prod, task.plan.sends.values())]
        return tensors.num_bytes(tensors.only(task.tensors, trained)) + 4 * sum(sizes)

    def _node(self, client_id: int) -> Node | None:
        """The client's node; waits for one that is not there."""
        name = self.names.get(client_id, "")
        found = self.nodes.look()
        if name not in found:
            found = self.nodes.wait(lambda nodes: name in nodes, max(0.0, self._patience - time.monotonic()))
        return found.get(name)

    def _receive(self, sent: _Sent) -> Upload | Failure:
        if sent.failure is not None:
            return Failure(sent.client_id, sent.failure)
        try:
            reply = self._reply(sent)
            packed = Packed(messages.text_of(reply.content, "manifest"), messages.payload_of(reply.content))
            self.wire.up += packed.num_bytes
            with self.wire.phase("decode"):
                answer = codec.decode_answer(packed, sent.stamp, most_bytes=sent.most_bytes)
        except ClientError as error:
            return Failure(sent.client_id, str(error))
        if isinstance(answer, Upload):
            return replace(answer, metrics={**answer.metrics, "round_trip_seconds": time.monotonic() - sent.pushed})
        return self._failed(sent, answer)

    def _failed(self, sent: _Sent, answer: NodeFailure) -> Upload | Failure:
        if answer.cause == "memory":
            return OutOfMemory(sent.client_id, answer.reason)
        if answer.cause != "base" or sent.task is None or sent.task.base_delta.since == 0:
            return Failure(sent.client_id, answer.reason)
        logger.warning("client %d has lost its base: %s", sent.client_id, answer.reason)
        whole = replace(sent.task, base_delta=base_deltas.since(sent.task.base_delta, 0))
        most_bytes = sent.most_bytes if sent.note else None
        return self._receive(self._send(sent.stamp.round, whole, sent.note, most_bytes))

    def _reply(self, sent: _Sent) -> Message:
        """The answer; later ones are never asked for.

        Raises:
            ClientError: It does not come in time, or says that it is none.
        """
        deadline = sent.pushed + sent.wait_s
        while True:
            late = time.monotonic() > deadline
            with self.wire.phase("pull"):
                found: Message | None = compat.pulled(self.grid, sent.message_id, sent.most_bytes)
            if found is not None and found.has_error():
                raise ClientError(error_of(found))
            if found is not None:
                return found
            if late:
                raise ClientError(f"an answer must come within {sent.wait_s:.0f} s, got none")
            time.sleep(self.timing.poll_s)


def _unmasked(task: Task) -> tuple[Task, str]:
    """A task without a note; a generator would keep the last one alive."""
    return task, ""


def _checked(facts: Mapping[str, object]) -> Mapping[str, object]:
    """What a node says of itself, where it can be planned with.

    Raises:
        ClientError: It cannot.
    """
    name = facts.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable():
        raise ClientError("name of a node must be printable text of at most 200 characters; give --name")
    if "error" in facts:
        return {"name": name, "error": str(facts["error"])[:1000]}
    for key in ("num_examples", "memory_bytes"):
        value = facts.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
            raise ClientError(f"{key} of node {name} must be a positive integer, got {str(value)[:80]}")
    return facts


def pushed(grid: Grid, message: Message) -> str | None:
    """Sends a message; its number, or ``None`` where the SuperLink did not take it."""
    message_id: str | None = next(iter(grid.push_messages([message])), None)
    return message_id


def error_of(message: Message) -> str:
    """Flower's error of a message, as a sentence."""
    error = message.error
    meant = {
        1: "the node could not load the app",
        2: "the node raised an error",
        3: "the task's message was lost",
        4: "the node's answer was lost",
        5: "the node went away",
        8: "the node's process died",
    }.get(error.code, f"error {error.code}")
    return f"{meant}: {(error.reason or 'no reason given')[:1000]}"


def settings_of(
    recipe: Mapping[str, Any], labels: Iterable[str], method: tuple[str, Mapping[str, Any]] | None = None
) -> str:
    """What nodes are told of a run: the recipe, the classes of the server's data, and the method that is running."""
    told: dict[str, Any] = {"recipe": json.loads(json.dumps(recipe, default=str)), "labels": list(labels)}
    if method is not None:
        told["method"] = {"name": method[0], "options": json.loads(json.dumps(dict(method[1]), default=str))}
    return json.dumps(told)
