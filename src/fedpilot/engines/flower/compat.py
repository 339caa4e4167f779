"""What is needed of Flower 1.41 beyond its public modules; everything that a new version can break is here.

Run as a module it is Flower's own SuperLink or SuperNode with two differences:

- The SuperLink serves its Fleet API to everybody and all else to this machine only. Flower has its Control and Runtime
  APIs on the same port and, unless accounts are set up, lets whoever reaches it start an app, that is run code on the
  server and on all nodes.
- The SuperNode looks for messages every ``FEDPILOT_POLL_S`` seconds instead of every 3, and does tasks in a thread of
  its own, by the app that is installed: Flower would start a process for each and run in it what the server sent.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import io
import ipaddress
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fedpilot.engines.flower import machine
from fedpilot.errors import ClientError

CONNECTION = "fedpilot"  # name in Flower's config.toml
POLL = "FEDPILOT_POLL_S"
OPEN_TO_ALL = ("/v1/fleet/",)
VERSIONS = "fedpilot-versions"  # header of all answers

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}
"""Nothing is reported, looked up or installed."""


def environment(home: Path, poll_s: float) -> dict[str, str]:
    """This process's environment with a Flower home of its own and short waits.

    Args:
        home: Flower's files of this run or node.
        poll_s: Between two looks for work.
    """
    beside = str(Path(sys.executable).parent)  # where flower-superexec is
    return {
        **os.environ,
        **QUIET,
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(min(max(poll_s, 0.05), 60.0)),
        POLL: str(poll_s),
        "PATH": os.pathsep.join([beside, os.environ.get("PATH", "")]),
    }


def is_loopback(host: str | None) -> bool:
    """Whether a peer is on this machine."""
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI middleware: from other machines, only the Fleet API, whose callers prove who they are, can be reached.

    Args:
        app: What it guards.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes on or answers 403."""
        peer = scope.get("client")
        closed = scope["type"] in ("http", "websocket") and not str(scope.get("path", "")).startswith(OPEN_TO_ALL)
        here = scope.get("server")
        near = peer is not None and (is_loopback(peer[0]) or (here is not None and peer[0] == here[0]))
        if scope["type"] == "http":
            send = _with_versions(send)
        if closed and not near:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"only this machine may do that"})
            return
        await self._app(scope, receive, send)


def _with_versions(send: Any) -> Any:
    """Says with each answer what the server runs, so that a node with another version is told so."""

    async def told(message: Any) -> None:
        if message["type"] == "http.response.start":
            header = (VERSIONS.encode(), versions().encode())
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return told


@cache
def versions() -> str:
    """What both sides of a deployment must have alike."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("fedpilot", "flwr"))


def superlink() -> None:
    """Flower's SuperLink behind the gate."""
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    theirs = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(Gate), *theirs())
    flower_superlink()


def supernode(port: int) -> None:
    """Flower's SuperNode with shorter waits, and the app in a thread of it.

    Args:
        port: Of its own API on this machine.
    """
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    poll_s = float(os.environ[POLL])
    # Its loop sleeps 3 s where there is no message, and half a second at a time until there is an answer.
    waits = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, poll_s)))
    setattr(start_client_internal, "time", waits)  # noqa: B010  # not a name that it exports
    threading.Thread(target=_work, args=(f"127.0.0.1:{port}", poll_s), daemon=True).start()
    flower_supernode()


def _work(address: str, poll_s: float) -> None:
    """Does a SuperNode's tasks, one after the other, by the installed app; code that a server sends is never run."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    client: Any = None
    while True:
        try:
            if client is None:
                versions = RuntimeVersionHttpInterceptor(component_name="SuperExec")
                client = RuntimeHttpClient.from_server_address(
                    server_address=address, insecure=True, root_certificates=None, interceptors=[versions]
                )
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            if found.HasField("task") and found.token:
                _do_task(address, found.token)
                continue
        except Exception as error:  # the SuperNode is starting or stopping, or a task came to nothing
            logging.getLogger(__name__).warning("no task could be done: %s", error)
            client = None
        time.sleep(poll_s)


def _do_task(address: str, token: str) -> None:
    """One message to the app and its reply back, as Flower's process for a message does it."""
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

    from fedpilot.engines.flower.client_app import app

    proofs: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
        RuntimeTokenHttpInterceptor(token),
    ]
    client = RuntimeHttpClient.from_server_address(
        server_address=address, insecure=True, root_certificates=None, interceptors=proofs
    )
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    context, ended, details = None, SubStatus.FAILED, "the task could not be read"
    try:
        message, context, _, _ = pull_task_input(client)
        try:
            reply, ended, details = app(message, context), SubStatus.COMPLETED, ""
        except Exception as error:  # whatever it is, the server is told
            details = f"{type(error).__name__}: {error}"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, details), reply_to=message)
        push_message(client, reply, context)
    finally:
        push_task_output(client=client, context=context, sub_status=ended, details=details)
        heartbeat.stop()
        client.close()


# --- messages that are larger than they may be ----------------------------------------------------------------------

_MOST_BYTES: ContextVar[int | None] = ContextVar("most_bytes", default=None)

MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, TypeError)
"""Beside ``ValueError``, what Flower's reading of a malformed message may end with."""


def pulled(grid: Any, message_id: str, most_bytes: int) -> Any:
    """The answer to a message, or ``None`` where there is none yet.

    Flower takes a message apart into objects and puts it together from what came, however large: an array may name the
    same chunk of zeros a million times. Here neither more is pulled than may come, nor more put together.

    Args:
        grid: Flower's.
        message_id: Of the question.
        most_bytes: Largest array to take; half a megabyte more is taken of all else.

    Raises:
        ClientError: What came is larger, or is no message.
    """
    _bound_arrays()
    meter = _metered(grid)
    meter.seen, meter.most = 0, most_bytes + BESIDE
    token = _MOST_BYTES.set(most_bytes)
    try:
        return next(iter(grid.pull_messages([message_id])), None)
    except (ValueError, *MALFORMED) as error:
        raise ClientError(
            f"an answer must be a whole message, got {type(error).__name__}: {str(error)[:200]}"
        ) from error
    finally:
        _MOST_BYTES.reset(token)
        meter.most = None


BESIDE = 34 * 2**20
"""Bytes of a message beside its array: the manifest above all."""


class _Meter:
    """Counts what a grid pulls, and stops it."""

    def __init__(self, pull: Any) -> None:
        self._pull = pull
        self.seen, self.most = 0, cast(int | None, None)

    def __call__(self, request: Any) -> Any:
        from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

        response = self._pull(request)
        self.seen += len(response.object_content)
        if self.most is not None and self.seen > self.most:
            raise ObjectPullError(request.object_id, f"an answer must be at most {self.most} bytes, got more")
        return response


def _metered(grid: Any) -> _Meter:
    """The meter of a grid over HTTP; any other grid is in this process already."""
    client = getattr(grid, "_runtime_client", None)
    if client is None:
        return _Meter(None)
    if not isinstance(client.PullObject, _Meter):
        client.PullObject = _Meter(client.PullObject)
    return cast(_Meter, client.PullObject)


def _bound_arrays() -> None:
    """Makes Flower's arrays refuse to grow beyond the bound of the moment."""
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_children_ids_from_object_content

    arrays: Any = Array
    inflate = arrays.inflate.__func__
    if hasattr(inflate, "bounded"):
        return

    def bounded(cls: Any, content: bytes, children: Any = None) -> Any:
        most = _MOST_BYTES.get()
        if most is not None:
            order = json.loads(get_object_body(content, cls))["arraychunk_ids"]
            sizes = [len(children[name].data) for name in get_object_children_ids_from_object_content(content)]
            total = sum(sizes[index] for index in order)
            if total > most:
                raise ValueError(f"an array must be at most {most} bytes, got {total}")
        return inflate(cls, content, children)

    bounded.bounded = True  # type: ignore[attr-defined]
    arrays.inflate = classmethod(bounded)


# --- the Control API ------------------------------------------------------------------------------------------------


class Control:
    """Flower's Control API of a SuperLink on this machine.

    Args:
        address: Host and port.
        ca: Its authority's certificate.
    """

    def __init__(self, address: str, ca: Path) -> None:
        from flwr.cli.typing import SuperLinkConnection
        from flwr.cli.utils import init_http_client_from_connection

        self.address = address
        trusted = str(ca.resolve())
        connection = SuperLinkConnection(name=CONNECTION, address=address, root_certificates=trusted, insecure=False)
        with contextlib.redirect_stdout(io.StringIO()):  # it says which connection it uses
            self._client = init_http_client_from_connection(connection)

    def register(self, public_key: bytes, name: str) -> int:
        """Lets the owner of a key in; the number of its node.

        Args:
            public_key: An EC key as Flower writes it, see `key_bytes`.
            name: For people.
        """
        from flwr.proto.control_pb2 import RegisterNodeRequest

        return int(self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def unregister(self, node_id: int) -> None:
        """Lets a node in no more: its next request is refused, whatever it is doing."""
        import httpx
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        # A node that never came: Flower notes that it is gone, then stumbles over the time that it was last seen.
        with contextlib.suppress(httpx.HTTPStatusError):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def connected(self) -> dict[str, bool]:
        """Name of each key that is let in -> whether its node is connected."""
        from flwr.proto.control_pb2 import ListNodesRequest

        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {node.name: node.status == "online" for node in nodes if node.status != "unregistered"}

    def start(self, app: Path, config: dict[str, str | int | float | bool]) -> int:
        """Starts an app; its run's number."""
        from flwr.cli.build import build_fab_from_disk
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a library that Flower uses
            content = build_fab_from_disk(app)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(config))
        return int(self._client.StartRun(request).run_id)

    def status(self, run_id: int) -> tuple[str, str]:
        """Status and, where it has ended, how: ``("finished", "completed")``; the second is details where it failed."""
        from flwr.proto.control_pb2 import ListRunsRequest

        run = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]
        return run.status.status, run.status.sub_status

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()


def idle_question(key: Any, now: datetime.datetime) -> tuple[str, dict[str, str], bytes]:
    """Path, headers and content of a node's request that changes nothing: to be activated, with no heartbeat.

    Args:
        key: The node's private key.
        now: What its clock says.
    """
    from base64 import b64encode

    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
    from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

    public, when = public_key_to_bytes(key.public_key()), now.isoformat()
    headers = {
        "content-type": PROTOBUF_MEDIA_TYPE,
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode("ascii"),
        TIMESTAMP_HEADER: when,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, when.encode("ascii"))).decode("ascii"),
    }
    content = ActivateNodeRequest(public_key=public, heartbeat_interval=-1.0).SerializeToString()
    return "/v1/fleet/activate-node", headers, content


def knows(answer: Any) -> bool | None:
    """Whether a server that was asked `idle_question` knows the key; ``None`` where it did not look."""
    from flwr.supercore.error import ApiErrorCode, FlowerError

    error = FlowerError.from_json(answer.text)
    if error is not None and error.code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return True
    if error is not None and error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return False
    return None


def clock_tolerance() -> tuple[float, float]:
    """Seconds that a node's clock may be behind the server's, and ahead of it."""
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    return float(TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE), float(SYSTEM_TIME_TOLERANCE)


def key_bytes(public_key: Path) -> bytes:
    """A node's public key file as the SuperLink registers it.

    Raises:
        ValueError: It is no EC key in OpenSSH's form.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = load_ssh_public_key(public_key.read_bytes())
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(f"{public_key} must hold an EC key; make one with fedpilot certs")
    return bytes(public_key_to_bytes(key))


def main(arguments: Sequence[str]) -> None:
    """``superlink`` or ``supernode``, with Flower's own options behind it."""
    machine.follow_parent()
    sys.argv = [f"flower-{arguments[0]}", *arguments[1:]]
    if arguments[0] == "superlink":
        superlink()
    else:
        supernode(int(arguments[arguments.index("--port") + 1]))


if __name__ == "__main__":
    main(sys.argv[1:])
