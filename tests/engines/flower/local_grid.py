"""A Flower grid that calls the real app in this process; messages take Flower's own way into bytes and back."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity


def travelled(message: Message) -> tuple[Message, int]:
    """The message after its way through bytes, and how many."""
    objects = {key: inner.deflate() for key, inner in get_all_nested_objects(message).items()}
    size = sum(map(len, objects.values()))
    return inflate_object_from_contents(message.object_id, objects), size


@dataclass
class LocalGrid(Grid):
    """Nodes are numbers; each answers when its reply is first asked for, unless it is told to be late or gone.

    Attributes:
        app: What runs on the nodes.
        configs: Node -> its configuration.
        around: Called with node and message; what it returns is the reply, instead of the app's where not ``None``.
    """

    app: ClientApp
    configs: dict[int, Mapping[str, Any]]
    around: Callable[[int, Message], Message | None] = lambda node_id, message: None
    silent: set[int] = field(default_factory=set)
    sent: list[tuple[int, Message]] = field(default_factory=list)
    pulled: list[str] = field(default_factory=list)
    wire_bytes: int = 0

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._count = itertools.count()
        self._waiting: dict[str, tuple[int, Message]] = {}
        self._states: dict[int, RecordDict] = {}

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.configs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            arrived, size = travelled(message)
            self.wire_bytes += size
            ids.append(f"message-{next(self._count)}")
            self._waiting[ids[-1]] = (message.metadata.dst_node_id, arrived)
            self.sent.append((message.metadata.dst_node_id, arrived))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [reply for message_id in message_ids for reply in self._reply(message_id)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def _reply(self, message_id: str) -> list[Message]:
        node_id, message = self._waiting[message_id]
        if node_id in self.silent or node_id not in self.configs:
            return []
        del self._waiting[message_id]
        self.pulled.append(message_id)
        state = self._states.setdefault(node_id, RecordDict())
        context = Context(1, node_id, dict(self.configs[node_id]), state, {})
        try:
            reply = self.around(node_id, message) or self.app(message, context)
        except Exception as error:  # as Flower's own process does
            reply = Message(Error(2, f"{type(error)}:<{error}>"), reply_to=message)
        arrived, size = travelled(reply)
        self.wire_bytes += size
        time.sleep(0)
        return [arrived]
