"""A node's trainer: one base model in memory for all rounds, one client's data, and tasks one after the other.

It knows nothing of Flower: a message goes in as a `codec.Packed` with the settings that it is to be done by, and one
comes out. On a deployed node it lives in a process of its own and is spoken to over a Unix socket (`sockets`), because
Flower starts a new process for each message; in a simulation it lives in the worker.
"""

import gc
import json
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch

import fedpilot
from fedpilot import lora
from fedpilot.config import setup
from fedpilot.config.clients import Clients
from fedpilot.config.population import Population, load_population
from fedpilot.config.recipe import Recipe, read_recipe
from fedpilot.config.schema import ByteSize
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.data.partition import PartitionSettings
from fedpilot.engines.flower import codec, machine
from fedpilot.engines.flower.codec import NodeFailure, Packed, Stamp
from fedpilot.engines.flower.storage import MissingBaseError, Storage, node_secret
from fedpilot.engines.in_process import carry
from fedpilot.errors import ClientError, FedpilotError
from fedpilot.model import AdaptedModel, build_model
from fedpilot.privacy.client_dp import keyed
from fedpilot.privacy.participant import Participant
from fedpilot.tensors import digest
from fedpilot.types import Algorithm, ClientProfile, Failure, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeOptions:
    """What a node's operator says.

    Attributes:
        folder: What the node remembers is in it.
        name: The client's stable name; ``None`` to take that of its part of the recipe's data.
        data: Its own data file; ``None`` for a part of the recipe's data.
        partition: Which part; ``None`` where it has a file.
        memory_bytes: Its budget; ``None`` for the recipe's, ``0`` to measure what is free.
        model: Its own copy of the base model; ``None`` for the recipe's source.
        noise: Whether noise that protects its client follows from a ``secret`` in its folder, or is ``seeded`` by the
            recipe, in a simulation, where a run is to repeat and nobody is protected.
    """

    folder: Path
    name: str | None = None
    data: str | None = None
    partition: int | None = None
    memory_bytes: int | None = None
    model: str | None = None
    noise: Literal["secret", "seeded"] = "secret"


@dataclass(frozen=True)
class _Parts:
    """A recipe's parts on this machine."""

    recipe: Recipe
    people: Population
    adapted: AdaptedModel
    digest: str


class Loader:
    """Loads data and model once for a recipe; clients of one worker share them."""

    def __init__(self) -> None:
        self._held: tuple[object, _Parts] | None = None

    def __call__(self, settings: str, data: str | None, model: str | None) -> _Parts:
        """The parts of the settings' recipe, with a data file or a model of the node's own."""
        found = json.loads(settings)
        key = (json.dumps([found["recipe"], found["labels"]], sort_keys=True), data, model)
        if self._held is None or self._held[0] != key:
            self._held = None  # two models might not fit
            self._held = key, _load(found["recipe"], tuple(found["labels"]), data, model)
        return self._held[1]


def _load(tables: Mapping[str, Any], labels: tuple[str, ...], data: str | None, model: str | None) -> _Parts:
    recipe = read_recipe(tables, "the server's recipe")
    if model is not None:
        recipe = replace(recipe, model=replace(recipe.model, source=model))
    if data is not None:
        recipe = _on_own_data(recipe, data, labels)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    people = load_population(recipe)
    if people.table.label_names != labels:
        raise ClientError(
            f"classes must be the server's, {', '.join(labels)}, got {', '.join(people.table.label_names)}; "
            "give the node the server's data, or a file of its own"
        )
    adapted = build_model(
        setup.model_settings(recipe, people),
        num_labels=setup.num_labels(recipe, people),
        device=setup.device_of(recipe),
        seed=recipe.run.seed,
    )
    return _Parts(recipe, people, adapted, base_digest(adapted))


@dataclass(frozen=True)
class _Loaded:
    """The parts, and this client among them."""

    recipe: Recipe
    people: Population
    adapted: AdaptedModel
    digest: str
    client: ClientProfile
    index: int


class Trainer:
    """Answers queries and tasks.

    Args:
        options: Of the node.
        loader: Shared with other trainers of the process; its own where left out.
    """

    def __init__(self, options: NodeOptions, loader: Loader | None = None) -> None:
        self._options, self._loader = options, loader or Loader()
        self._methods: dict[str, Algorithm[Any]] = {}
        self._free = free_bytes("cuda" if torch.cuda.is_available() else "cpu")  # before anything is loaded
        self._storage: dict[tuple[str, str], Storage] = {}
        self._participants: dict[tuple[str, str], Participant] = {}

    def describe(self, settings: str) -> str:
        """What this node is, as JSON; loads data and model, so that the first task finds them.

        Args:
            settings: JSON: ``recipe`` and, of the server's data, ``labels``.

        Returns:
            ``name``, ``partition``, ``num_examples``, ``memory_bytes`` (its budget), ``free_bytes`` (before anything
            was loaded), ``device``, ``dtypes``, ``base`` (SHA-256 of the frozen weights) and versions; or ``error``,
            why it cannot take part.
        """
        try:
            loaded = self._load(settings)
        except (FedpilotError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not ran_out(error):
                raise
            return json.dumps({"name": self._options.name or "", "error": str(error) or type(error).__name__})
        client = loaded.client
        return json.dumps(
            {
                "name": client.name,
                "partition": self._options.partition,
                "num_examples": client.num_examples,
                "memory_bytes": client.memory_bytes,
                "free_bytes": self._free,
                "device": loaded.adapted.device.type,
                "dtypes": ["float32", "bf16"] if _does_bf16(loaded.adapted.device) else ["float32"],
                "base": loaded.digest,
                "versions": {"fedpilot": fedpilot.__version__, "torch": torch.__version__, "python": _python()},
            }
        )

    def note(self, settings: str, manifest: str) -> str:
        """The answer to a note of a secure sum; its secrets stay in this process's memory.

        Args:
            settings: As for `update`.
            manifest: The note.

        Raises:
            ClientError: The note cannot be read far enough to answer it.
        """
        stamp, asked = codec.decode_note(Packed(manifest, b""))
        try:
            loaded = self._load(settings)
            text = self._participant(loaded, stamp).answer(stamp.client_id, stamp.round, str(asked))
            return codec.encode_note(text, stamp).manifest
        except Exception as error:
            return codec.encode_failure(_failure(error, stamp), stamp).manifest

    def _participant(self, loaded: _Loaded, stamp: Stamp) -> Participant:
        key = (stamp.run, loaded.client.name)
        if key not in self._participants:
            self._participants[key] = loaded.recipe.safeguards.participant()
        return self._participants[key]

    def update(self, settings: str, packed: Packed, note: str = "") -> Packed:
        """A task's answer: the upload, or why there is none.

        Args:
            settings: JSON: ``recipe``, ``labels``, and ``method`` with its name and options.
            packed: The task.
            note: Of a secure sum, by which the upload is masked.

        Raises:
            ClientError: The task cannot be read far enough to answer it.
        """
        started = time.perf_counter()
        stamp: Stamp | None = None
        try:
            loaded = self._load(settings)
            spec = loaded.adapted.spec
            stamp, task = codec.decode_task(packed, partial(lora.fresh, spec))
            if stamp.scale != spec.scale:
                raise ClientError(f"scale must be {spec.scale} here, got {stamp.scale}; use the server's recipe")
            answer = self._train(loaded, settings, stamp, task, note)
        except Exception as error:
            if stamp is None:
                raise
            answer = codec.encode_failure(_failure(error, stamp), stamp)
        logger.info("round %d done in %.2f s", stamp.round, time.perf_counter() - started)
        return answer

    def _train(self, loaded: _Loaded, settings: str, stamp: Stamp, task: Task, note: str) -> Packed:
        client = loaded.client
        if bool(note) != (loaded.recipe.safeguards.secure is not None):
            raise ClientError("an upload must be masked where the recipe says so, got a task that says otherwise")
        promised = self._options.memory_bytes
        if promised and (task.plan.peak_bytes or 0) > promised:  # it came back with less than it said before
            raise MemoryError(f"plan must fit {promised} bytes, this node's budget now, got {task.plan.peak_bytes}")
        storage = self._storage.setdefault(
            (stamp.run, client.name), Storage(self._options.folder, stamp.run, client.name)
        )
        task = replace(task, base_delta=storage.based(task.base_delta))
        places = _Place(loaded, stamp.client_id)
        clients = Clients(
            loaded.recipe, cast(Population, places), loaded.adapted, noise_key=self._noise_key(client.name, stamp, task)
        )
        method = self._method(loaded, json.loads(settings)["method"])
        result, kept = carry(method, clients.site, stamp.round, task, storage.kept(stamp.round, task.exchange))
        if isinstance(result, Failure):
            return codec.encode_failure(NodeFailure("client", result.reason), stamp)
        if note:
            result = self._participant(loaded, stamp).mask(stamp.round, note, task, result)
        if kept is not None:
            storage.keep(stamp.round, kept)
        return codec.encode_upload(result, stamp)

    def _noise_key(self, name: str, stamp: Stamp, task: Task) -> bytes | None:
        """Of a client's noise in a round, the same again for the same task, and another one for any other."""
        if self._options.noise == "seeded":
            return None
        told = f"{stamp.run}, {name}, round {stamp.round}, {sorted(task.plan.trainable)}, {digest(task.tensors)}"
        return keyed(node_secret(self._options.folder), told)

    def _method(self, loaded: _Loaded, described: Mapping[str, Any]) -> Algorithm[Any]:
        """The method; it does not plan here, so it has no memory profile."""
        key = json.dumps([described, loaded.recipe.resolved()], sort_keys=True, default=str)
        if key not in self._methods:
            recipe = read_recipe(
                {**loaded.recipe.resolved(), "algorithm": {"name": described["name"], **described["options"]}},
                "the server's recipe",
            )
            chosen = AlgorithmSettings(recipe.algorithm.name, recipe.algorithm.options)
            self._methods[key] = setup.algorithm(chosen, recipe, loaded.adapted.spec, None, loaded.people)
        return self._methods[key]

    def _load(self, settings: str) -> _Loaded:
        options = self._options
        parts = self._loader(settings, options.data, options.model)
        index, count = options.partition or 0, len(parts.people.clients)
        if index >= count:
            raise ClientError(f"partition must be below {count}, got {index}; the recipe divides its data so")
        client = parts.people.clients[index]
        budget = client.memory_bytes if options.memory_bytes is None else options.memory_bytes or self._free
        client = replace(client, name=options.name or client.name, memory_bytes=budget)
        return _Loaded(parts.recipe, parts.people, parts.adapted, parts.digest, client, index)


class _Place:
    """The population as `Clients` reads it: this node's client under the number that the server gave it."""

    def __init__(self, loaded: _Loaded, client_id: int) -> None:
        self.clients = {client_id: replace(loaded.client, client_id=client_id)}
        self.examples = {client_id: loaded.people.examples[loaded.index]}


def _on_own_data(recipe: Recipe, file: str, labels: tuple[str, ...]) -> Recipe:
    """The recipe for one client with a file of its own, all of whose rows it trains on."""
    data = replace(
        recipe.data,
        source=file,
        test=file,
        columns=(),
        limit=None,
        validation_fraction=0.0,
        public_fraction=0.0,
        labels=labels,
    )
    clients = replace(
        recipe.clients, memory=(ByteSize(max(recipe.clients.memory)),), tiers=(), deadline_s=(), flops_per_second=()
    )
    return replace(
        recipe,
        data=data,
        partition=PartitionSettings(kind="iid", num_clients=1),
        clients=clients,
        evaluation=replace(recipe.evaluation, by=None),
        run=replace(recipe.run, cohort=None),
    )


def free_bytes(device: str) -> int:
    """Memory that is free now, on the GPU or for this process."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else machine.free_memory()


def base_digest(adapted: AdaptedModel) -> str:
    """SHA-256 of the frozen weights, adapters and head left out; equal on server and nodes, or they train apart."""
    frozen = {
        name: parameter
        for name, parameter in adapted.base.named_parameters()
        if "lora_" not in name and name not in adapted.spec.head and "modules_to_save" not in name
    }
    return digest({name.replace(".base_layer", ""): parameter for name, parameter in frozen.items()})


def _does_bf16(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.is_bf16_supported()


def _python() -> str:
    return platform.python_version()


SCARCE = (
    *("can't allocate memory", "not enough memory", "Cannot allocate memory", "CUDA out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "could not create a primitive", "could not create a memory object"),
)
"""What libraries say in a RuntimeError when memory ran out."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a class for it on a GPU only.

    oneDNN says no more than that it could not create a primitive; for shapes that a round before had, memory is why.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SCARCE)


def _failure(error: Exception, stamp: Stamp) -> NodeFailure:
    """What the server is told of an error."""
    reason = str(error) or type(error).__name__
    if ran_out(error):
        logger.warning("round %d ran out of memory: %s", stamp.round, reason)
        error.__traceback__ = None  # it holds the tensors of the step
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return NodeFailure("memory", reason)
    if isinstance(error, FedpilotError):
        return NodeFailure("base" if isinstance(error, MissingBaseError) else "client", reason)
    logger.error("round %d failed", stamp.round, exc_info=error)
    return NodeFailure("error", f"{type(error).__name__}: {error}")
