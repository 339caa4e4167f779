"""What the commands ``certs``, ``serve`` and ``join`` do; `cli` holds their options."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from fedpilot.errors import ConfigError, FedpilotError

if TYPE_CHECKING:
    from fedpilot.engines.flower.deployment import Say


def require() -> None:
    """Says how to get Flower.

    Raises:
        FedpilotError: It is not installed.
    """
    try:
        import cryptography  # noqa: F401
        import flwr  # noqa: F401
    except ImportError as error:
        raise FedpilotError(f"Flower must be installed, got: {error}; pip install 'fedpilot[flower]'") from error


def certs(
    folder: Path, hosts: Sequence[str], nodes: Sequence[str], days: int, say: "Say", revoked: Sequence[str] = ()
) -> None:
    """Makes what is missing of a federation's certificates and keys, or revokes keys."""
    require()
    from fedpilot.engines.flower import certificates

    if revoked:
        for path in certificates.revoke(folder, revoked):
            say(f"revoked; the public key is kept as {path}")
        return
    written = certificates.make(folder, hosts, nodes, days)
    for path in written:
        say(f"written {path}")
    if not written:
        say(f"{folder} has all of it already")
    say("ca.crt goes to every node; nodes/NAME goes to that node alone; all else stays on the server")


@dataclass(frozen=True)
class Where:
    """Options of ``serve``: directories and address."""

    out: Path | None
    resume: Path | None
    certificates: Path
    address: str


def serve(
    recipe: Path | None,
    overrides: Sequence[str],
    where: Where,
    nodes: int | None,
    wait_s: float,
    timeout_s: float,
    poll_s: float,
    say: "Say",
) -> Path:
    """Runs a recipe with the nodes that join; the run directory."""
    require()
    from fedpilot import interrupts, jobs
    from fedpilot.config.recipe import load_recipe
    from fedpilot.engines.flower.deployment import Serving
    from fedpilot.engines.flower.deployment import serve as run
    from fedpilot.engines.flower.timing import Timing
    from fedpilot.stopping import Halted

    settings = None if recipe is None else load_recipe(recipe, overrides)
    if settings is None:
        assert where.resume is not None, "the options were checked"
        path = where.resume
        jobs.recipe_of(path)  # there is a run
    else:
        settings = replace(settings, run=replace(settings.run, engine="flower"))  # for the record
        path = where.out or jobs.free_path(Path(settings.run.out), settings.run.name)
        if (path / "manifest.json").exists():
            raise FedpilotError(f"run directory must be new, got {path} with a run in it; resume it or choose another")
    host, port = host_and_port(where.address)
    timing = Timing(timeout_s=timeout_s, reconnect_s=min(30.0, timeout_s))
    say(f"run directory {path}")
    serving = Serving(path, settings, where.certificates, host, port, nodes, wait_s, poll_s, timing)
    try:
        with ended_by_signals(), interrupts.after_the_round() as halt:
            run(serving, say, halt)
    except (KeyboardInterrupt, Halted):
        begun = (path / "manifest.json").exists()
        how = f"Go on with: fedpilot serve --resume {path}" if begun else "Nothing was begun"
        say(f"stopped; every finished round is on disk. {how}")
        raise SystemExit(1) from None
    say(f"done; take the adapter home: fedpilot export {path} my-adapter")
    return path


@dataclass(frozen=True)
class What:
    """Options of ``join``: what the node has."""

    name: str | None = None
    data: Path | None = None
    partition: int | None = None
    memory: str | None = None
    model: str | None = None


def join(server: str, ca: Path, key: Path, folder: Path, what: What, poll_s: float, say: "Say") -> None:
    """Takes part until it is told to stop."""
    require()
    from fedpilot.config.schema import parse_bytes
    from fedpilot.engines.flower.deployment import Joining
    from fedpilot.engines.flower.deployment import join as run
    from fedpilot.engines.flower.trainer import NodeOptions

    host_and_port(server)
    data = what.data
    if (data is None) == (what.partition is None):
        raise ConfigError(["a node must have --data, its own file, or --partition, its part of the recipe's data"])
    if data is not None and not data.is_file():
        raise ConfigError([f"--data must be a file, got {data}"])
    budget = what.memory or ("auto" if data is not None else "recipe")
    try:
        memory_bytes = {"recipe": None, "auto": 0}[budget] if budget in ("recipe", "auto") else parse_bytes(budget)
    except ValueError as error:
        raise ConfigError([f"--memory must be auto, recipe, or {error}, got {budget!r}"]) from error
    own = None if data is None else str(data.resolve())
    name = what.name or (key.name if data is not None else None)
    options = NodeOptions(folder, name, own, what.partition, memory_bytes, what.model)
    with ended_by_signals():
        run(Joining(server, ca, key, options, poll_s), say)


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of ``host:port``.

    >>> host_and_port("[::1]:8000")
    ('::1', 8000)

    Raises:
        ConfigError: It is something else.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError([f"address must be host:port, got {address!r}; for example fl.example.org:8000"])
    return host.removeprefix("[").removesuffix("]"), int(port)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, so that everything started is stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
