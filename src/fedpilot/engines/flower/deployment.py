"""The processes of a deployment: the server's SuperLink with its run, and a node's SuperNode with its trainer."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedpilot import checkpoint
from fedpilot.config.recipe import Recipe
from fedpilot.engines.flower import certificates, compat, machine, status
from fedpilot.engines.flower.compat import Control
from fedpilot.engines.flower.server_app import HOME, OUTCOME, RECIPE, STOP
from fedpilot.engines.flower.timing import Timing
from fedpilot.engines.flower.trainer import NodeOptions
from fedpilot.errors import ConfigError, FedpilotError
from fedpilot.stopping import Halted

logger = logging.getLogger(__name__)

Say = Callable[[str], None]

START_S, STOP_S, LOOK_S = 180.0, 10.0, 0.5
SHORTEST_REST_S, LONGEST_REST_S = 1.0, 30.0

APP = """\
[project]
name = "fedpilot-run"
version = "1.0.0"
description = "Hands over to the installed fedpilot"
license = { text = "Apache-2.0" }
dependencies = []

[tool.flwr.app]
publisher = "fedpilot"

[tool.flwr.app.components]
serverapp = "fedpilot_run.server:app"
clientapp = "fedpilot_run.client:app"

[tool.flwr.app.config]
run-dir = ""
"""


# --- the server ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Serving:
    """A run that is served.

    Attributes:
        path: The run directory; one with a run in it is gone on with.
        recipe: Of a new run; ``None`` to go on.
        certificates: Folder that `certificates.make` wrote.
        host: Address that nodes reach; ``0.0.0.0`` for all of this machine's.
        port: Of it.
        nodes: Fewest clients to start with; ``None`` for all of the recipe's.
        wait_s: Most seconds until they are there.
        poll_s: Between two looks for work in Flower's processes.
        timing: How long is waited for what in a round.
    """

    path: Path
    recipe: Recipe | None
    certificates: Path
    host: str = "0.0.0.0"
    port: int = 8000
    nodes: int | None = None
    wait_s: float = 600.0
    poll_s: float = 0.5
    timing: Timing = field(default_factory=Timing)


def serve(serving: Serving, say: Say, halt: Callable[[], bool] = lambda: False) -> None:
    """Runs the recipe with whoever may join, to the end; stops what it started.

    Args:
        serving: The run.
        say: Gets what happens, line by line.
        halt: Whether to end after a round, although the run is not over.

    Raises:
        Halted: It was asked to end.
        ConfigError: Certificates or nodes are missing, or certificates have ended.
        FedpilotError: The run failed, with its reason.
    """
    known = certificates.public_keys(serving.certificates)
    absent = [
        name
        for name in (certificates.CA, certificates.SERVER, certificates.SERVER_KEY)
        if not (serving.certificates / name).exists()
    ]
    if absent or not known:
        lacking = ", ".join(absent) or "the key of any node"
        raise ConfigError([f"{serving.certificates} must hold certificates and keys, lacks {lacking}; fedpilot certs"])
    certificates.check_dates(serving.certificates)
    _check_port(serving.host, serving.port)
    home = _home(serving)
    with _superlink(serving, home) as process:
        control = Control(f"127.0.0.1:{serving.port}", serving.certificates / certificates.CA)
        try:
            keys = {name: control.register(compat.key_bytes(path), name) for name, path in known.items()}
            _tell(serving, home, keys)
            status.note_server(serving.path, control.address, serving.certificates / certificates.CA)
            say(f"listening on {serving.host}:{serving.port}; may join: {', '.join(known)}")
            run_id = control.start(home / "app", {"run-dir": str(serving.path.resolve())})
            _watch(_Served(serving, home, process, control, run_id, keys), say, halt)
        finally:
            control.close()
    _judge(home)


def _home(serving: Serving) -> Path:
    """Flower's own folder of the run, with the app that hands over to the installed package."""
    home = serving.path / HOME
    for name in ("app", "flwr"):
        shutil.rmtree(home / name, ignore_errors=True)
    (home / "app" / "fedpilot_run").mkdir(parents=True)
    home.chmod(0o700)
    (home / "flwr").mkdir()
    (home / "app" / "pyproject.toml").write_text(APP)
    (home / "app" / "fedpilot_run" / "__init__.py").write_text("")
    for role in ("server", "client"):
        module = f"from fedpilot.engines.flower.{role}_app import app\n\n__all__ = ['app']\n"
        (home / "app" / "fedpilot_run" / f"{role}.py").write_text(module)
    for name in (OUTCOME, STOP):
        (home / name).unlink(missing_ok=True)
    if serving.recipe is not None:
        checkpoint.write_file(home / RECIPE, serving.recipe.to_toml().encode())
    return home


def _tell(serving: Serving, home: Path, keys: Mapping[str, int]) -> None:
    """Writes what the process of the run needs to know."""
    told = {"nodes": serving.nodes, "wait_s": serving.wait_s, "timing": asdict(serving.timing), "keys": keys}
    checkpoint.write_file(home / "settings.json", json.dumps(told).encode())


@contextmanager
def _superlink(serving: Serving, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Flower's server, up and answering; gone at the end with all that it started."""
    folder = serving.certificates.resolve()
    command = [
        *(sys.executable, "-m", "fedpilot.engines.flower.compat", "superlink"),
        *("--host", serving.host, "--port", str(serving.port), "--enable-supernode-auth"),
        *("--ssl-ca-certfile", str(folder / certificates.CA)),
        *("--ssl-certfile", str(folder / certificates.SERVER)),
        *("--ssl-keyfile", str(folder / certificates.SERVER_KEY)),
        "--disable-runtime-dependency-installation",
    ]
    os.environ["FLWR_HOME"] = str(home / "flwr")  # for what this process uses of Flower
    os.environ.update(compat.QUIET)
    environment = compat.environment(home / "flwr", serving.poll_s)
    with started(command, environment, home / "superlink.log") as process:
        deadline = time.monotonic() + START_S
        while not _answers(serving.port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise FedpilotError(
                    f"the SuperLink must listen on port {serving.port} within {START_S:.0f} s, got "
                    f"{_last_line(home / 'superlink.log')}; free the port or see {home / 'superlink.log'}"
                )
            time.sleep(0.1)
        yield process


@dataclass
class _Served:
    """A run that is going on; ``keys`` are the names that are let in, with the numbers of their nodes."""

    serving: Serving
    home: Path
    process: subprocess.Popen[bytes]
    control: Control
    run_id: int
    keys: dict[str, int]


def _watch(served: _Served, say: Say, halt: Callable[[], bool]) -> None:
    """Says what happens until the run has ended, and lets nobody in whose key is taken away meanwhile."""
    serving, home, process = served.serving, served.home, served.process
    said = _lines(serving.path)
    looked = time.monotonic()
    while not (home / OUTCOME).exists():
        time.sleep(LOOK_S)
        lines = _lines(serving.path)
        for line in lines[len(said) :]:
            say(line)
        said = lines
        if halt():
            if not lines:  # nothing is on record: there is no round to wait for
                raise KeyboardInterrupt
            (home / STOP).touch()
        _revoke(served, say)
        if process.poll() is not None:
            raise FedpilotError(f"the SuperLink must run, got exit code {process.returncode}; see {home}")
        if time.monotonic() - looked > STOP_S:
            looked = time.monotonic()
            state, how = served.control.status(served.run_id)
            if state == "finished" and not (home / OUTCOME).exists():
                raise FedpilotError(f"the run must end by itself, got {state}:{how}; see {home / 'superlink.log'}")
    for line in _lines(serving.path)[len(said) :]:
        say(line)


def _revoke(served: _Served, say: Say) -> None:
    """Shuts out the nodes whose public keys are gone from the certificates."""
    known = certificates.public_keys(served.serving.certificates)
    for name in sorted(served.keys.keys() - known.keys()):
        served.control.unregister(served.keys.pop(name))
        say(f"{name} is shut out: its key was revoked")


def _judge(home: Path) -> None:
    outcome = json.loads((home / OUTCOME).read_bytes())
    if outcome.get("halted"):
        raise Halted
    if outcome.get("problems"):
        raise ConfigError(outcome["problems"])
    if "error" in outcome:
        raise FedpilotError(str(outcome["error"]))


def _lines(path: Path) -> list[str]:
    """The recorded rounds, a line each."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    result = []
    for text in file.read_text().split("\n")[:-1]:
        line = json.loads(text)
        metrics = ", ".join(f"{k} {v:.4f}" for k, v in line["metrics"].items() if "/" not in k and v is not None)
        failed = f", {len(line['failures'])} failed" if line["failures"] else ""
        seconds = line["seconds"].get("total", 0.0)
        result.append(f"round {line['round']}: {metrics}; {len(line['uploads'])} uploads{failed}; {seconds:.1f} s")
        result[-1] += "".join(f"\n  {entry['client_id']}: {entry['reason']}" for entry in line["failures"])
    return result


# --- a node -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joining:
    """A node.

    Attributes:
        server: Host and port of the SuperLink.
        ca: The authority's certificate.
        key: The node's private key.
        options: Its data and its budget.
        poll_s: Between two looks for messages.
    """

    server: str
    ca: Path
    key: Path
    options: NodeOptions
    poll_s: float = 0.5


def join(joining: Joining, say: Say, *, stop: Callable[[], bool] = lambda: False) -> None:
    """Keeps a trainer and a SuperNode running until it is told to stop; starts again what ends.

    Raises:
        ConfigError: A file is missing.
    """
    missing = [str(path) for path in (joining.ca, joining.key) if not path.is_file()]
    if missing:
        raise ConfigError([f"{name} must be a file; copy it from the server's certificates" for name in missing])
    folder = joining.options.folder
    (folder / "flwr").mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    place = Path(tempfile.mkdtemp(prefix="fedpilot-"))  # the path of a socket is short
    environment = compat.environment(folder / "flwr", joining.poll_s)
    described = {**asdict(joining.options), "folder": str(folder.resolve())}
    commands = {
        "trainer": [
            sys.executable,
            "-m",
            "fedpilot.engines.flower.node",
            str(place / "trainer"),
            json.dumps(described),
        ],
        "supernode": [
            *(sys.executable, "-m", "fedpilot.engines.flower.compat", "supernode"),
            *("--superlink", joining.server, "--root-certificates", str(joining.ca.resolve())),
            *("--auth-supernode-private-key", str(joining.key.resolve())),
            *("--isolation", "process", "--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", f'trainer-socket="{place / "trainer"}"'),
        ],
    }
    try:
        with contextlib.ExitStack() as stack:
            kept = [
                stack.enter_context(_Kept(name, command, environment, folder / f"{name}.log", say))
                for name, command in commands.items()
            ]
            say(f"joining {joining.server}; what it does is in {folder}/supernode.log and trainer.log")
            while not stop():
                for one in kept:
                    one.look()
                time.sleep(LOOK_S)
    finally:
        shutil.rmtree(place, ignore_errors=True)


class _Kept:
    """A process that is started again whenever it ends, after a rest that grows while it keeps ending."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path, say: Say) -> None:
        self._name, self._command, self._environment, self._log, self._say = name, command, environment, log, say
        self._rest, self._since, self._ended = SHORTEST_REST_S, time.monotonic(), 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Kept":
        self._start()
        return self

    def look(self) -> None:
        """Starts it again where it has ended and rested."""
        if self._process is not None and self._process.poll() is not None:
            lived = time.monotonic() - self._since
            self._rest = SHORTEST_REST_S if lived > LONGEST_REST_S else min(2 * self._rest, LONGEST_REST_S)
            self._say(
                f"{self._name} ended with {self._process.returncode}: {_last_line(self._log)}; "
                f"again in {self._rest:.0f} s"
            )
            self._process, self._ended = None, time.monotonic()
        if self._process is None and time.monotonic() - self._ended > self._rest:
            self._start()

    def _start(self) -> None:
        self._since = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=dict(self._environment), stdout=log, stderr=log, start_new_session=True
            )

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            end(self._process)


# --- processes ----------------------------------------------------------------------------------------------------


@contextmanager
def started(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is ended with its group."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=dict(environment), stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to end, and makes its group and all that it started end where they do not.

    Flower starts a run's server app in a group of its own, which outlives the SuperLink and the helper between them.
    """
    if process.poll() is not None:
        return  # its number may be another process's by now; its helpers follow it
    family = machine.descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    # Waited for without being reaped, so that the group's number stays its own until the group is ended.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for number, when in family.items():
        if machine.begun(number) == when:  # not another one of that number
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError([f"{host}:{port} must be a free port of this machine, got: {error}"]) from error


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing in its log"
