"""A deployment of real processes for tests: a server in the test's own process, nodes that join it."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from fedpilot import jobs, tensors
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.engines.flower import certificates, deployment
from fedpilot.engines.flower.deployment import Serving
from fedpilot.record import RunDirectory
from tests.engines.flower.recipes import METHODS, RECIPE
from tests.test_cli import save_data, save_model

CLIENTS = ("Bern", "Oslo", "Rome")
NODE = """
import sys
from pathlib import Path
from fedpilot.engines.flower import commands
server, ca, key, folder, partition, memory = sys.argv[1:]
say = lambda text: print(text, flush=True)
what = commands.What(None, None, int(partition), memory or None)
commands.join(server, Path(ca), Path(key), Path(folder), what, 0.2, say)
"""


@dataclass(frozen=True)
class Place:
    """A folder with a recipe, its data and its certificates, and a port.

    Attributes:
        folder: Of it all.
        port: Of the server.
    """

    folder: Path
    port: int

    @property
    def certs(self) -> Path:
        return self.folder / "certs"

    def recipe(self, name: str = "fedit", **run: int) -> Recipe:
        recipe = load_recipe(self.folder / "toy.toml")
        recipe = replace(recipe, run=replace(recipe.run, **run))
        return replace(recipe, algorithm=replace(recipe.algorithm, name=name, options=METHODS[name]))

    def serving(self, path: Path, recipe: Recipe | None, **options: object) -> Serving:
        serving = Serving(path, recipe, self.certs, "127.0.0.1", self.port, wait_s=300, poll_s=0.2)
        return replace(serving, **options)  # type: ignore[arg-type]

    @contextmanager
    def node(
        self,
        partition: int,
        *,
        key: Path | None = None,
        ca: Path | None = None,
        host: str = "127.0.0.1",
        memory: str = "",
        inside: tuple[str, ...] = (),
    ) -> Iterator[Path]:
        """A joined node; its folder.

        Args:
            partition: Which client.
            key: Its key; its own where left out.
            ca: The authority that it trusts; the server's where left out.
            host: That it reaches the server by.
            memory: Its budget; the recipe's where left out.
            inside: Command that its own is given to.
        """
        name = CLIENTS[partition]
        folder = self.folder / f"node-{name}"
        files = [ca or self.certs / "ca.crt", key or self.certs / "nodes" / name, folder]
        command = [sys.executable, "-c", NODE, f"{host}:{self.port}", *map(str, files), str(partition), memory]
        folder.mkdir(exist_ok=True)
        with (folder / "join.log").open("ab") as log:
            process = subprocess.Popen([*inside, *command], stdout=log, stderr=log, start_new_session=True)
        try:
            yield folder
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)

    @contextmanager
    def nodes(self) -> Iterator[list[Path]]:
        """All of them."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.node(k)) for k in range(len(CLIENTS))]


def make_place(folder: Path, hosts: tuple[str, ...] = ()) -> Place:
    """A place with a key for each client.

    Args:
        folder: To make it in.
        hosts: Addresses that nodes reach the server by, beside this machine's own.
    """
    save_model(folder / "model")
    save_data(folder / "data.csv")
    (folder / "toy.toml").write_text(RECIPE)
    certificates.make(folder / "certs", hosts, CLIENTS)
    return Place(folder, deployment.free_port())


@contextmanager
def kept_environment() -> Iterator[None]:
    """The environment is as before at the end."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def benchmark(name: str) -> ModuleType:
    """A script of the folder benchmarks; a package of that name may be installed by others."""
    file = Path(__file__).parents[3] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"fedpilot_benchmark_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    return module


def adapter(path: Path) -> str:
    """Digest of what a run came to."""
    return tensors.digest(RunDirectory.open(path).load_adapter("last")[0].tensors)


def in_process(recipe: Recipe, path: Path) -> str:
    """Digest of what the recipe comes to without Flower."""
    jobs.run(jobs.start(recipe, path))
    return adapter(path)


def processes_of(folder: Path, word: str = "") -> list[int]:
    """Processes with a path of the folder among their arguments or in their environment, as Flower's own have it.

    Args:
        folder: Of a run or of a node.
        word: That must be in the command line.
    """
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal():
                command = (entry / "cmdline").read_bytes()
                told = command + (entry / "environ").read_bytes()
                found += [int(entry.name)] if str(folder).encode() in told and word.encode() in command else []
    return [pid for pid in found if pid not in (os.getpid(), os.getppid())]


def kill(pids: list[int]) -> None:
    """At once, as a power cut does."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def gone(folder: Path) -> bool:
    """Whether nothing of a folder runs any more; Flower's helpers look for their parent every few seconds."""
    deadline = time.monotonic() + 60
    while processes_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
