"""A run over many faults: nodes killed, the server killed, the network cut, at random moments of at least 30 rounds.

    python benchmarks/faults.py                          # 50 faults over 32 rounds; needs root and iproute2 for cuts
    python benchmarks/faults.py --faults 6 --rounds 6 --folder /tmp/faults

A server and four nodes as real processes over TLS, each node in a network namespace of its own; MiniLM-L3, FedIT. A
supervisor starts again what has ended, as systemd would. A fault kills (SIGKILL) the whole of a node or of the server,
or one of their processes, or takes a node's link down for 2 to 30 s. After each server kill every checkpoint is read
and its hashes are checked, and what was on record is held against the record at the end. A round is done when its
checkpoint is on the disk; a line that a kill left without one is written again. Accuracy is the mean of the last five
rounds, beside that of fault-free runs in process with three seeds, which have the bits of fault-free deployments.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpilot import checkpoint, jobs
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.config.schema import ByteSize
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.engines.flower import certificates
from fedpilot.engines.flower.deployment import free_port
from fedpilot.errors import RecordError
from fedpilot.record import RunDirectory

CLIENTS = ("amazon", "movie", "nyt", "tweets")
KINDS = {"node": 5, "server": 3, "cut": 4}
"""Kind of a fault -> how often, in relation."""
LAST = 5


def recipe_of(rounds: int, seed: int = 0) -> Recipe:
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "tiny.toml")
    return replace(
        recipe,
        run=replace(recipe.run, rounds=rounds, seed=seed),
        clients=replace(recipe.clients, memory=(ByteSize(2**30),), tiers=()),
        evaluation=replace(recipe.evaluation, aggregation_error=False),
        algorithm=AlgorithmSettings("fedit"),
        baseline=None,
    )


# --- the network --------------------------------------------------------------------------------------------------


def can_cut() -> bool:
    """Whether this process may make network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and _ip("netns", "list") == 0


def _ip(*arguments: str) -> int:
    return subprocess.run(["ip", *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode


@dataclass(frozen=True)
class Link:
    """A node's own network: a namespace, and a pair of interfaces to this machine.

    Attributes:
        number: Of the node, below 50.
        tag: Distinguishes processes that make links at the same time.
    """

    number: int
    tag: int

    @property
    def name(self) -> str:
        """Of the namespace and of the interface on this side."""
        return f"fp{self.tag}n{self.number}"

    @property
    def server(self) -> str:
        """Address that the node reaches this machine by."""
        return f"10.{200 + self.tag // 250 % 50}.{self.tag % 250}.{4 * self.number + 1}"

    @property
    def inside(self) -> str:
        """Address of the node."""
        return f"{self.server.rpartition('.')[0]}.{4 * self.number + 2}"

    def up(self) -> None:
        """Makes the network."""
        there = ("netns", "exec", self.name, "ip")
        for arguments in (
            ("netns", "add", self.name),
            ("link", "add", self.name, "type", "veth", "peer", "name", "fp0", "netns", self.name),
            ("addr", "add", f"{self.server}/30", "dev", self.name),
            ("link", "set", self.name, "up"),
            (*there, "addr", "add", f"{self.inside}/30", "dev", "fp0"),
            (*there, "link", "set", "fp0", "up"),
            (*there, "link", "set", "lo", "up"),
        ):
            if _ip(*arguments):
                raise SystemExit(f"ip {' '.join(arguments)} must succeed; are you root, and is iproute2 there?")

    def cut(self, seconds: float) -> None:
        """No packet passes for so long."""
        _ip("link", "set", self.name, "down")
        time.sleep(seconds)
        _ip("link", "set", self.name, "up")

    def command(self, command: Sequence[str]) -> list[str]:
        """Runs a command in the network."""
        return ["ip", "netns", "exec", self.name, *command]

    def down(self) -> None:
        """Takes the network away."""
        _ip("link", "del", self.name)
        _ip("netns", "del", self.name)


@contextmanager
def links(count: int) -> Iterator[list[Link]]:
    """A network for each node, gone afterwards; none where there may be none."""
    made = [Link(number, os.getpid() % 10_000) for number in range(count)] if can_cut() else []
    try:
        for link in made:
            link.up()
        yield made
    finally:
        for link in made:
            link.down()


# --- processes ----------------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """A command that is started again whenever it ends, as systemd does it.

    Attributes:
        command: To run.
        marker: Text that is in the command line or in the environment of all of its processes.
        log: Its output.
    """

    command: list[str]
    marker: str
    log: Path
    starts: int = 0
    done: bool = False
    _process: subprocess.Popen[bytes] | None = None

    def look(self) -> None:
        """Starts it where it has ended; exit code 0 ends it for good."""
        if self._process is not None and self._process.poll() is not None:
            self.done = self._process.returncode == 0
            self._process = None
        if self._process is None and not self.done:
            self.starts += 1
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def processes(self) -> list[int]:
        """All of it, helpers too."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal():
                    told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    found += [int(entry.name)] if self.marker.encode() in told else []
        return [pid for pid in found if pid != os.getpid()]

    def kill(self, pids: Sequence[int]) -> None:
        """At once."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """For good."""
        self.done = True
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        self.kill(self.processes())


# --- what happens -------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What was done to the run, and what was found."""

    faults: Counter[str] = field(default_factory=Counter)
    corrupted: list[str] = field(default_factory=list)
    checked: int = 0
    rewritten: int = 0
    recorded: dict[int, str] = field(default_factory=dict)  # round that had a checkpoint -> its line

    def inspect(self, path: Path) -> None:
        """Reads all that a dead server has left, and remembers which rounds were done."""
        newest = -1
        for folder in (path / "checkpoints").glob("round-[0-9]*"):
            self.checked += 1
            try:
                checkpoint.read(folder)
                newest = max(newest, int(folder.name.removeprefix("round-")))
            except RecordError as error:
                self.corrupted.append(str(error))
        if not (path / "manifest.json").exists():
            return
        for line in RunDirectory.open(path).lines():
            number = int(str(line["round"]))
            if number <= newest:
                self.recorded[number] = json.dumps(line)
            else:
                self.rewritten += 1

    def lost(self, path: Path) -> list[int]:
        """Rounds that were done and are not in the record as they were."""
        now = {int(str(line["round"])): json.dumps(line) for line in RunDirectory.open(path).lines()}
        return [number for number, line in self.recorded.items() if now.get(number) != line]


def fedpilot(*arguments: object) -> list[str]:
    """A command of this installation."""
    return [sys.executable, "-m", "fedpilot", *map(str, arguments)]


def rounds_done(path: Path) -> int:
    """Rounds on record."""
    file = path / "metrics.jsonl"
    return max(file.read_bytes().count(b"\n") - 1, 0) if file.exists() else 0


def faulty_run(folder: Path, rounds: int, faults: int, seed: int, limit_s: float) -> Tally:
    """Serves the recipe to its end while faults are done to it."""
    rng, tally, run = random.Random(seed), Tally(), folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(recipe_of(rounds).to_toml())
    with links(len(CLIENTS)) as networks:
        hosts = [link.server for link in networks]
        certificates.make(folder / "certs", hosts, CLIENTS)
        port = free_port()
        options = ("--certs", folder / "certs", "--address", f"0.0.0.0:{port}", "--timeout", 40, "--poll", 0.2)
        begin = fedpilot("serve", folder / "recipe.toml", "--out", run, *options)
        server = Kept(begin, str(run), folder / "server.log")
        nodes = [_node(folder, number, networks, port) for number in range(len(CLIENTS))]
        deadline = time.monotonic() + limit_s
        due = 0.0
        try:
            while not server.done:
                if time.monotonic() > deadline:
                    raise SystemExit(f"the run must end within {limit_s:.0f} s, got to round {rounds_done(run)}")
                for one in (server, *nodes):
                    one.look()
                wanted = faults * (rounds_done(run) + 1) / rounds
                if rounds_done(run) and sum(tally.faults.values()) < min(wanted, faults) and time.monotonic() > due:
                    _fault(rng, tally, server, nodes, networks, run)
                    due = time.monotonic() + rng.uniform(0.5, 6.0)
                if (run / "manifest.json").exists():
                    server.command = fedpilot("serve", "--resume", run, *options)
                time.sleep(0.2)
            tally.inspect(run)
        finally:
            for one in (server, *nodes):
                one.end()
    return tally


def _node(folder: Path, number: int, networks: Sequence[Link], port: int) -> Kept:
    name = CLIENTS[number]
    host = networks[number].server if networks else "127.0.0.1"
    home = folder / f"node-{name}"
    keys = ("--ca", folder / "certs" / "ca.crt", "--key", folder / "certs" / "nodes" / name)
    command = fedpilot("join", f"{host}:{port}", *keys, "--folder", home, "--partition", number, "--poll", 0.2)
    return Kept(networks[number].command(command) if networks else command, str(home), home.with_suffix(".log"))


def _fault(
    rng: random.Random, tally: Tally, server: Kept, nodes: Sequence[Kept], networks: Sequence[Link], run: Path
) -> None:
    """One fault at this moment."""
    kinds = {kind: often for kind, often in KINDS.items() if kind != "cut" or networks}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    number = rng.randrange(len(nodes))
    if kind == "cut":
        seconds = rng.choice([2.0, 5.0, 10.0, 30.0])
        said = f"cut {CLIENTS[number]} off for {seconds:.0f} s"
    else:
        chosen = server if kind == "server" else nodes[number]
        pids = chosen.processes()
        if not pids:
            return  # it is being started again
        whole = rng.random() < 0.5
        said = f"kill {'all' if whole else 'one'} of {kind if kind == 'server' else CLIENTS[number]}"
    print(f"{time.strftime('%H:%M:%S')} round {rounds_done(run)}: {said}", flush=True)
    tally.faults[kind] += 1
    if kind == "cut":
        threading.Thread(target=networks[number].cut, args=(seconds,)).start()
        return
    chosen.kill(pids if whole else [rng.choice(pids)])
    if kind == "server":
        _wait_for_end(chosen)
        tally.inspect(run)


def _wait_for_end(server: Kept) -> None:
    """What a killed process leaves of the server ends by itself; what does not is ended, as systemd would."""
    deadline = time.monotonic() + 60
    while server.processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    server.kill(server.processes())


def accuracy(lines: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean and spread over the last rounds."""
    values = [float(line["metrics"]["accuracy"]) for line in lines[-LAST:]]
    return statistics.mean(values), statistics.pstdev(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--folder", type=Path, help="a new folder to keep all in")
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds for the whole")
    parser.add_argument("--fault-free", type=int, default=3, help="runs without faults to compare with")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fedpilot-faults-"))
    print(f"{platform.platform()}, load {os.getloadavg()[0]:.1f}; cuts: {'yes' if can_cut() else 'no'}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and whatever was started is ended
    began = time.monotonic()
    tally = faulty_run(folder, options.rounds, options.faults, options.seed, options.limit)
    lines = RunDirectory.open(folder / "run").lines()
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.faults.items()))
    failures = sum(len(line["failures"]) for line in lines)  # type: ignore[arg-type, misc]
    print(
        f"{sum(tally.faults.values())} faults ({counts}) over {len(lines) - 1} rounds, {time.monotonic() - began:.0f} s"
    )
    print(f"checkpoints read after server kills: {tally.checked}, corrupted: {len(tally.corrupted)}")
    print(f"rounds that were done: {len(tally.recorded)}, lost: {len(tally.lost(folder / 'run'))}")
    print(f"lines without a checkpoint, written again: {tally.rewritten}; clients that failed in a round: {failures}")
    mean, spread = accuracy(lines)
    print(f"accuracy, mean of the last {LAST} rounds: {mean:.4f} (spread {spread:.4f})", flush=True)
    for seed in range(options.fault_free):
        job = jobs.start(recipe_of(options.rounds, seed), folder / f"fault-free-{seed}")
        jobs.run(job)
        mean, spread = accuracy(job.directory.lines())
        print(f"  without faults, seed {seed}: {mean:.4f} (spread {spread:.4f})", flush=True)


if __name__ == "__main__":
    main()
