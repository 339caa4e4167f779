"""A run over Flower's grid: who takes part, and a recipe's rounds with them."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from flwr.serverapp import Grid

from fedpilot import checkpoint, jobs
from fedpilot.comparison import Comparison
from fedpilot.config.population import Population, num_steps
from fedpilot.config.recipe import Recipe
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.config.setup import Experiment
from fedpilot.engines.flower.engine import HELLO_S, FlowerEngine, Node, Nodes, settings_of
from fedpilot.engines.flower.status import Board
from fedpilot.engines.flower.storage import node_secret
from fedpilot.engines.flower.timing import Timing
from fedpilot.engines.flower.trainer import base_digest
from fedpilot.errors import ConfigError
from fedpilot.jobs import Job, Watch
from fedpilot.rounds import Observer
from fedpilot.types import Algorithm

logger = logging.getLogger(__name__)

ROSTER = "nodes.json"


class Entry(TypedDict):
    """A client's line in the roster."""

    client_id: int
    facts: dict[str, Any] | None


@dataclass(frozen=True)
class Waiting:
    """Whom a run starts with.

    Attributes:
        nodes: Fewest clients; ``None`` for all that the recipe divides its data among.
        seconds: Most seconds until so many are there.
    """

    nodes: int | None = None
    seconds: float = 600.0


def run(
    grid: Grid,
    job: Job,
    waiting: Waiting,
    timing: Timing,
    watch: Watch = jobs.unwatched,
    *,
    read_test: bool = True,
    keys: Mapping[int, str] | None = None,
    noted: bool = False,
    noise_folder: Path | None = None,
) -> Comparison | None:
    """Waits for the nodes, then runs what is left of the job.

    Args:
        grid: Flower's.
        job: The run.
        waiting: For whom, and how long.
        timing: How long is waited for what in a round.
        watch: Who watches.
        read_test: As in `jobs.run`.
        keys: Node -> name of its key, which must be its client's; ``None`` where nodes have no keys.
        noted: Whether the run notes what it is doing, for ``fedpilot status``, instead of being watched.
        noise_folder: Where the secret is that the server's noise follows from; ``None`` for the recipe's seed, which
            every node knows.

    Returns:
        As `jobs.run`.

    Raises:
        ConfigError: Not enough nodes came; the message says who was refused and why.
        FedpilotError: As `jobs.run`.
    """
    carrier = _Carrier(grid, job, timing, keys, noted)
    key = None if noise_folder is None else node_secret(noise_folder)
    job = replace(job, experiment=carrier.meet(waiting), engine_for=carrier.engine_for, noise_key=key)
    return jobs.run(job, carrier.board if noted else watch, read_test=read_test)


class _Carrier:
    """The connection of one job to its nodes."""

    def __init__(
        self, grid: Grid, job: Job, timing: Timing, keys: Mapping[int, str] | None, noted: bool = False
    ) -> None:
        self._noted = noted
        self._grid, self._job, self._timing, self._keys = grid, job, timing, keys
        self._names: Mapping[int, str] = {}
        self._digest = base_digest(job.experiment.adapted)
        self._nodes = Nodes(grid, self._settings(None), self._unfit, timing.poll_s)

    def board(self, method: str, last_round: int) -> AbstractContextManager[Observer]:
        """Who notes down what a method's run does."""
        return nullcontext(Board(self._job.path, method, last_round, lambda: self._nodes.refused))

    def meet(self, waiting: Waiting) -> Experiment:
        """Waits for the nodes; the experiment with their clients for a population.

        Raises:
            ConfigError: Not enough came.
        """
        experiment = self._job.experiment
        file = self._job.path / ROSTER
        if file.exists():
            entries: dict[str, Entry] = json.loads(file.read_bytes())
            self._names = {entry["client_id"]: name for name, entry in entries.items()}
            self._wait(lambda nodes: entries.keys() <= nodes.keys(), len(entries), waiting.seconds)
        else:
            divided = [client.name for client in experiment.population.clients]
            entries = roster(self._first(waiting.nodes or len(divided), waiting.seconds), divided)
            self._names = {entry["client_id"]: name for name, entry in entries.items()}
            checkpoint.write_file(file, (json.dumps(entries, indent=2) + "\n").encode())
        met = replace(experiment, population=_population(experiment.population, experiment.recipe, entries))
        met.__dict__["adapted"] = experiment.adapted  # where cached_property keeps it
        return met

    def engine_for(self, settings: AlgorithmSettings, method: Algorithm[Any]) -> FlowerEngine:
        """The engine of one method's run."""
        run_id = str(self._job.directory.manifest["run_id"])
        told = self._settings(settings)
        # A baseline's clients remember apart from the method's.
        run = f"{run_id}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
        spec = method.spec
        return FlowerEngine(self._grid, self._nodes, self._names, told, run, spec.scale, self._timing, spec.modules)

    def _settings(self, method: AlgorithmSettings | None) -> str:
        experiment = self._job.experiment
        described = None if method is None else (method.name, method.options)
        return settings_of(experiment.recipe.resolved(), experiment.population.table.label_names, described)

    def _first(self, wanted: int, seconds: float) -> Mapping[str, Node]:
        found = self._wait(lambda nodes: len(nodes) >= wanted, wanted, seconds)
        if len(found) < wanted:
            refused = "".join(f"; {name} was refused: {reason}" for name, reason in self._nodes.refused.items())
            came = ", ".join(sorted(found)) or "nobody"
            raise ConfigError([f"{wanted} nodes must join within {seconds:.0f} s, got {len(found)} ({came}){refused}"])
        return found

    def _wait(self, enough: Callable[[Mapping[str, Node]], bool], wanted: int, seconds: float) -> Mapping[str, Node]:
        recipe = self._job.recipe
        board = Board(self._job.path, recipe.algorithm.name, recipe.run.rounds, lambda: self._nodes.refused)

        def noticed(nodes: Mapping[str, Node]) -> bool:
            if self._noted:
                board.waiting(wanted, list(nodes))
            return enough(nodes)

        return self._nodes.wait(noticed, seconds, loading_s=HELLO_S)

    def _unfit(self, node: Node) -> str | None:
        if self._keys is not None and node.name != self._keys.get(node.node_id):
            return f"name must be that of its key, {self._keys.get(node.node_id)!r}, got {node.name!r}"
        if node.facts.get("base") != self._digest:
            return "base model must have the server's weights, bit for bit, got others; give the node the same files"
        if self._names and node.name not in self._names.values():
            return f"name must be one that the run began with, got {node.name!r}; it can join the next run"
        return None


def roster(found: Mapping[str, Node], divided: Sequence[str]) -> dict[str, Entry]:
    """Name -> client and what its node said, for the whole run.

    Where all nodes hold parts of the recipe's data, the recipe's own clients, those that did not come too; else those
    that came, numbered by name.
    """
    if set(found) <= set(divided) and all(node.facts.get("partition") is not None for node in found.values()):
        names: Sequence[str] = divided
    else:
        names = sorted(found)
    return {
        name: {"client_id": client_id, "facts": dict(found[name].facts) if name in found else None}
        for client_id, name in enumerate(names)
    }


def _population(people: Population, recipe: Recipe, entries: Mapping[str, Entry]) -> Population:
    """The clients as their nodes described them."""
    given = {client.name: client for client in people.clients}
    clients, parts, tiers = [], [], []
    for name, entry in entries.items():
        client_id, facts = entry["client_id"], entry["facts"]
        own = name in given and given[name].client_id == client_id
        client = replace(given[name] if own else people.clients[0], client_id=client_id, name=name)
        if facts is not None:
            examples, budget = facts["num_examples"], facts["memory_bytes"]
            steps = num_steps(examples, recipe.training)
            client = replace(client, num_examples=examples, memory_bytes=budget, num_steps=steps)
        clients.append(client)
        parts.append(people.parts[client_id] if own else np.zeros(0, dtype=np.int64))
        tiers.append(people.tiers[client_id] if own else "node")
    return replace(people, clients=tuple(clients), parts=tuple(parts), tiers=tuple(tiers))
