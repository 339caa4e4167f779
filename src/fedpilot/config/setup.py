"""From a recipe to the parts of a run: population, memory profile, algorithm, engine, evaluation."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fedpilot import assets, memory, planning
from fedpilot.algorithms import ALGORITHMS
from fedpilot.condensation import REHEARSED
from fedpilot.config.population import Population, load_population
from fedpilot.config.recipe import Recipe, wants_gpu
from fedpilot.config.schema import ByteSize
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.config.server import Server, public_examples
from fedpilot.config.traces import Traces
from fedpilot.config.workplace import MakePlaces, Places, faster_workers
from fedpilot.engines.in_process import InProcess
from fedpilot.engines.kept import DiskKept
from fedpilot.engines.workers import Pool, Workers
from fedpilot.errors import ConfigError, PlanError
from fedpilot.evaluation import combined
from fedpilot.manifest import package_versions
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel, ModelSettings, build_model, item_shape, program_of
from fedpilot.rounds import ServerSite
from fedpilot.startup import WORKPLACE, Parent
from fedpilot.stopping import Cadence, EarlyStop, Goal
from fedpilot.together import Together
from fedpilot.training import TrainingSettings
from fedpilot.types import (
    Algorithm,
    ClientProfile,
    Condensation,
    Deployment,
    HasStepKind,
    ModelSpec,
    Plan,
    RefinesOnServer,
    StepKind,
)

logger = logging.getLogger(__name__)

CALIBRATION_STEPS = 3

CLIENTS_PER_PASS = 8
"""Of a GPU where the recipe leaves the number to us."""


def model_settings(recipe: Recipe, people: Population) -> ModelSettings:
    """The model section with its source resolved and its inputs no longer than the longest training example.

    The memory of a step is predicted for full-length inputs: what no example reaches is not paid for.
    """
    longest = min(recipe.model.max_length, people.train.longest)
    return dataclasses.replace(resolved_model(recipe), max_length=max(longest, 2))


def resolved_model(recipe: Recipe) -> ModelSettings:
    """The model section with the folder of a packaged asset for its name."""
    return dataclasses.replace(recipe.model, source=assets.resolve(recipe.model.source))


def num_labels(recipe: Recipe, people: Population) -> int | None:
    """Classes; ``None`` for a language model."""
    return None if recipe.model.task == "causal-lm" else len(people.table.label_names)


def device_of(recipe: Recipe) -> Literal["cpu", "cuda"]:
    """Where clients train.

    Raises:
        ConfigError: A GPU is asked for and there is none.
    """
    if recipe.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(['run.device must be "cpu" or "auto" on a machine without a GPU, got "cuda"'])
    return "cuda" if wants_gpu(recipe.run) else "cpu"


def profile_of(
    sketch: AdaptedModel,
    training: TrainingSettings,
    *,
    checkpointing: bool,
    micro_batches: tuple[int, ...] = (),
    kind: StepKind | None = None,
    suffixes: bool = False,
    checked: bool = True,
) -> MemoryProfile:
    """Memory and operations of a training step of a kind, traced on a model without storage; see `memory.trace`."""
    if kind is not None and kind.attachment is not None:
        return memory.trace_attached(
            _programs(sketch, training, kind),
            sketch.spec,
            kind.attachment,
            batch=training.batch_size,
            micro_batches=micro_batches,
            checkpointing=checkpointing,
        )
    if kind is not None and kind.condensation is not None:
        return _condensing_profile(sketch, training, micro_batches, kind, kind.condensation)
    return memory.trace(
        _programs(sketch, training, kind),
        sketch.spec,
        batch=training.batch_size,
        micro_batches=micro_batches,
        patterns=(kind or StepKind()).patterns,
        checkpointing=checkpointing,
        suffixes=suffixes,
        checked=checked,
    )


def _condensing_profile(
    sketch: AdaptedModel,
    training: TrainingSettings,
    micro_batches: tuple[int, ...],
    kind: StepKind,
    how: Condensation,
) -> MemoryProfile:
    """Memory and operations of a condensation, in each of the micro-batches."""
    sizes = sorted({*micro_batches} or {training.batch_size}, reverse=True)
    whole = planning.frozen_from(sketch.spec, 0, how.rank, how.depth)
    plans = [dataclasses.replace(whole, micro_batch=None if size == training.batch_size else size) for size in sizes]
    programs = _programs(sketch, training, kind)
    shape = item_shape(sketch, how)
    return memory.trace_plans(
        programs, sketch.spec, plans, batch=training.batch_size, sizes=sizes, item_shape=shape, rehearsed=REHEARSED
    )


def _programs(adapted: AdaptedModel, training: TrainingSettings, kind: StepKind | None = None) -> memory.ProgramFor:
    return lambda plan, micro_batch: program_of(adapted, plan, training, micro_batch, kind)


def recomputes(settings: AlgorithmSettings | None) -> bool:
    """Whether the method may recompute blocks, which takes further traces."""
    options = {} if settings is None else settings.options
    return bool(options.get("checkpointing")) or options.get("solver") == "all-checkpointed"


def algorithm(
    settings: AlgorithmSettings, recipe: Recipe, spec: ModelSpec, profile: MemoryProfile | None, people: Population
) -> Algorithm[Any]:
    """The method with its hyper-parameters; ``rank`` is the model's where the recipe does not say.

    Without a profile it cannot plan yet, but says what kind of step it makes.
    """
    cls = ALGORITHMS[settings.name]
    names = {field.name for field in dataclasses.fields(cls)}
    options = dict(settings.options)
    if "rank" in names:
        options.setdefault("rank", recipe.model.rank)
    if "budget_bytes" in names:
        options["budget_bytes"] = min(client.memory_bytes for client in people.clients)
    if "num_rounds" in names:
        options["num_rounds"] = recipe.run.rounds
    if "batch_size" in names:
        options["batch_size"] = recipe.training.batch_size
    if "user_width" in names:
        options["user_width"] = 0 if recipe.click_model is None else recipe.click_model.width
    made: Algorithm[Any] = cls(spec=spec, profile=profile, **options)
    return made


def kind_of(method: Algorithm[Any]) -> StepKind | None:
    """The kind of step that the method's memory profile must know; ``None`` for plain LoRA's."""
    return method.step_kind if isinstance(method, HasStepKind) else None


def goal(recipe: Recipe) -> Goal:
    """What the best adapter is best at."""
    metric = recipe.evaluation.metric
    return Goal(metric, higher_is_better=not metric.startswith(("loss", "perplexity")))


def early_stop(recipe: Recipe) -> EarlyStop | None:
    """When to stop before the last round."""
    settings = recipe.evaluation
    return None if settings.patience is None else EarlyStop(goal(recipe), settings.patience, settings.min_delta)


def cadence(recipe: Recipe) -> Cadence:
    """Which rounds are evaluated."""
    return Cadence(recipe.evaluation.every, recipe.evaluation.last)


# --- all of them --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A recipe with its parts; the weights are loaded when they are first needed.

    Attributes:
        recipe: The configuration.
        population: Clients and data.
        sketch: The model without storage, for planning.
        traces: Memory of its training step, by kind of step.
        parent: Of worker processes, if there is one already.
    """

    recipe: Recipe
    population: Population
    sketch: AdaptedModel
    traces: Traces
    parent: Parent | None = None

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The model that all clients share."""
        return build_model(
            self.sketch.settings,
            num_labels=num_labels(self.recipe, self.population),
            device=device_of(self.recipe),
            seed=self.recipe.run.seed,
        )

    def kind(self, settings: AlgorithmSettings) -> StepKind | None:
        """The kind of step that a method makes; ``None`` for plain LoRA's."""
        return kind_of(algorithm(settings, self.recipe, self.sketch.spec, None, self.population))

    def profile(self, settings: AlgorithmSettings | None = None) -> MemoryProfile:
        """The memory of a step of the recipe's method, or of another one, on the clients' devices."""
        chosen = settings or self.recipe.algorithm
        traced = self.traces.of(self.kind(chosen), checkpointing=recomputes(chosen))
        besides = self.recipe.training.cache_bytes + self._carried_bytes(chosen)
        return traced.with_overhead((self.recipe.clients.overhead_bytes or 0) + besides)

    def _carried_bytes(self, settings: AlgorithmSettings) -> int:
        """What a changed base takes where its weights are quantised: float32 beside them, from the second round on."""
        if self.recipe.model.quantisation is None or not getattr(ALGORITHMS[settings.name], "changes_base", False):
            return 0
        return sum(4 * out_features * in_features for out_features, in_features in self.sketch.spec.modules.values())

    def algorithm(self, settings: AlgorithmSettings | None = None, *, dry: bool = False) -> Algorithm[Any]:
        """The recipe's method, or another one on the same model; a dry one plans without the weights."""
        spec, chosen = (self.sketch if dry else self.adapted).spec, settings or self.recipe.algorithm
        return algorithm(chosen, self.recipe, spec, self.profile(chosen), self.population)

    @cached_property
    def places(self) -> Places:
        """The clients' places in this process."""
        return Places(self.recipe, self.population, self.adapted)

    @cached_property
    def pool(self) -> Pool | None:
        """The worker processes, shared by all methods and evaluations; ``None`` where this process does the work."""
        workers = self.recipe.run.workers
        return None if workers == 1 else self.new_pool(workers if isinstance(workers, int) else threads(self.recipe))

    def new_pool(self, count: int) -> Pool:
        """So many worker processes, which do not run yet."""
        labels = num_labels(self.recipe, self.population)
        places = MakePlaces(self.recipe, self.population, self.sketch.settings, labels)
        return Pool(places, count, parent=self.parent)

    def engine(self, method: Algorithm[Any], folder: Path | None = None) -> InProcess | Workers:
        """A fresh engine for one run of the method; what clients keep is held in the folder if the recipe says so."""
        on_disk = folder is not None and self.recipe.run.kept == "disk"
        store = DiskKept(folder) if on_disk and folder is not None else None
        if self.pool is not None:
            return Workers(method, self.pool, store)
        return InProcess(method, self.places.site, store, self.together)

    @property
    def together(self) -> Together | None:
        """What trains several clients in one pass; ``None`` for one after the other."""
        count = self.recipe.run.clients_per_pass
        if not isinstance(count, int) or count == 1:
            return None
        return Together(count, _free_bytes if device_of(self.recipe) == "cuda" else None)

    @cached_property
    def server(self) -> Server:
        """The server's own place; it has the public data, if the recipe names any."""
        return Server(self.recipe, public_examples(self.recipe, self.population), self.adapted)

    def server_site(self, method: Algorithm[Any]) -> ServerSite | None:
        """Where a method trains on the server; ``None`` for one that does not, and nothing is loaded for it."""
        return self.server.site if isinstance(method, RefinesOnServer) else None

    def evaluate(self, deployment: Deployment) -> Mapping[str, float]:
        """Metrics on what the recipe evaluates rounds on."""
        return self.evaluate_on(self.recipe.evaluation.on, deployment)

    def evaluate_on(self, split: Literal["test", "validation"], deployment: Deployment) -> Mapping[str, float]:
        """Metrics on the test or the validation set.

        Raises:
            ConfigError: There is no validation set.
        """
        if self.pool is None:
            return combined(self.sketch.task_type, self.places.measure(split, deployment))
        count = self.pool.count
        parts = self.pool.call("measure", [(split, deployment, part, count) for part in range(count)])
        return combined(self.sketch.task_type, [batch for part in parts for batch in part])


def experiment(
    recipe: Recipe,
    *,
    people: Population | None = None,
    traces: Path | None = None,
    trains: bool = False,
    parent: Parent | None = None,
) -> Experiment:
    """Everything up to the weights; what is measured on this machine is written into its recipe, for the record.

    Args:
        recipe: The configuration.
        people: Its population where that is loaded already.
        traces: Folder that keeps memory profiles.
        trains: Whether a run follows, so that what worker processes import may be imported meanwhile.
        parent: A process that has begun to import that already; is ended where there will be no workers.

    Raises:
        FedpilotError: Data, model or plan cannot be had as asked.
    """
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    device = device_of(recipe)
    if recipe.training.autocast == "bf16":
        logger.info("matrix products are bf16, all else is float32")
    soon = trains and recipe.run.engine == "in-process" and _may_have_workers(recipe)
    if soon:
        parent = parent or Parent([WORKPLACE])
    elif parent is not None:
        parent.close()
        parent = None
    people = people or load_population(recipe)
    made = _with_passes(dataclasses.replace(_assembled(recipe, people, traces), parent=parent))
    timed = recipe.clients.deadline_s and not recipe.clients.flops_per_second
    if soon and recipe.run.workers != "auto" and not timed and made.pool is not None:
        made.pool.start()  # nothing that they need is measured: they load the weights while this process traces
    if (
        recipe.baseline is not None
        and recomputes(recipe.baseline)
        and made.kind(recipe.baseline) == made.kind(recipe.algorithm)
    ):
        made.profile(recipe.baseline)  # the larger of two profiles serves both
    made.profile()
    if device == "cuda" and recipe.clients.overhead_bytes is None:
        made = _with_overhead(made)
    if timed:
        made = _with_speed(made)
    return _with_workers(made)


def _assembled(recipe: Recipe, people: Population, folder: Path | None) -> Experiment:
    settings, labels = model_settings(recipe, people), num_labels(recipe, people)
    sketch = build_model(settings, num_labels=labels, device="fake", seed=recipe.run.seed)
    sizes = tuple(sorted({recipe.training.batch_size, *recipe.clients.micro_batches}))
    facts = {
        "model": dataclasses.asdict(settings),
        "shapes": dict(sketch.spec.modules),
        "labels": labels,
        "training": dataclasses.asdict(recipe.training),
        "micro_batches": sizes,
        "versions": package_versions(),
    }

    def trace(kind: StepKind | None, checkpointing: bool) -> MemoryProfile:
        return profile_of(sketch, recipe.training, checkpointing=checkpointing, micro_batches=sizes, kind=kind)

    return Experiment(recipe, people, sketch, Traces(trace, facts, folder))


def ample_plan(method: Algorithm[Any], client: ClientProfile) -> Plan:
    """What the method plans for a client with memory and time for anything.

    Raises:
        PlanError: Nothing.
    """
    free = dataclasses.replace(client, memory_bytes=2**62, deadline_s=None)
    rng = np.random.default_rng(0)
    (plan,) = method.plan(method.init(rng), [free], rng)
    if not isinstance(plan, Plan):
        raise PlanError(f"{type(method).__name__} must plan something for a client with ample memory, got none")
    return plan


def _with_overhead(made: Experiment) -> Experiment:
    """Measures on the GPU what a device needs beside the tensors; the most that the recipe's methods need."""
    spec, rank = made.sketch.spec, made.recipe.model.rank
    overhead = 0
    for settings in (made.recipe.algorithm, made.recipe.baseline):
        if settings is None:
            continue
        kind, profile = made.kind(settings), made.profile(settings)
        plans = [ample_plan(made.algorithm(settings, dry=True), made.population.clients[0])]
        if kind is None:
            plans.append(planning.train_blocks(spec, 0, rank, [spec.num_blocks - 1]))
        programs = _programs(made.adapted, made.recipe.training, kind)
        found = memory.calibrate(programs, profile, made.adapted.device, plans)
        overhead = max(overhead, found.overhead_bytes)
    clients = dataclasses.replace(made.recipe.clients, overhead_bytes=ByteSize(overhead))
    return _again(made, dataclasses.replace(made.recipe, clients=clients), made.population)


def _with_speed(made: Experiment) -> Experiment:
    """Measures this machine's speed over a few steps of the method and takes every client for as fast."""
    chosen = made.recipe.algorithm
    plan = ample_plan(made.algorithm(dry=True), made.population.clients[0])
    program = program_of(made.adapted, plan, made.recipe.training, plan.micro_batch, made.kind(chosen))
    program.step()  # the first one also makes the optimiser's state
    started = time.perf_counter()
    for _ in range(CALIBRATION_STEPS):
        program.step()
    took = time.perf_counter() - started
    speed = CALIBRATION_STEPS * memory.seconds(made.profile(), plan, 1.0, 1) / took
    speeds = (speed,) * len(made.recipe.clients.memory)
    clients = tuple(dataclasses.replace(client, flops_per_second=speed) for client in made.population.clients)
    recipe = dataclasses.replace(made.recipe, clients=dataclasses.replace(made.recipe.clients, flops_per_second=speeds))
    return _again(made, recipe, dataclasses.replace(made.population, clients=clients))


def threads(recipe: Recipe) -> int:
    """Threads of a matrix product in one process."""
    return recipe.run.threads or torch.get_num_threads()


def _free_bytes() -> int:
    """What is left of the GPU's memory, with what the allocator holds and nobody uses."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _with_passes(made: Experiment) -> Experiment:
    """Chooses how many clients train in one pass, where the recipe does not."""
    run = made.recipe.run
    if run.clients_per_pass != "auto":
        return made
    several = device_of(made.recipe) == "cuda" and run.engine == "in-process"
    run = dataclasses.replace(run, clients_per_pass=CLIENTS_PER_PASS if several and run.workers in (1, "auto") else 1)
    return _again(made, dataclasses.replace(made.recipe, run=run), made.population)


def _may_have_workers(recipe: Recipe) -> bool:
    """Whether clients train in worker processes, or it is to be measured whether they should."""
    run = recipe.run
    if device_of(recipe) == "cuda":
        return False
    if run.workers == "auto":
        return threads(recipe) > 1 and run.clients_per_pass in (1, "auto")
    return run.workers > 1


def _with_workers(made: Experiment) -> Experiment:
    """Checks the number of worker processes, or measures whether several are faster than one.

    Raises:
        ConfigError: Several are asked for on a GPU.
    """
    run, count = made.recipe.run, threads(made.recipe)
    on_gpu = device_of(made.recipe) == "cuda"
    if isinstance(run.workers, int):
        if on_gpu and run.workers > 1:
            raise ConfigError([f"run.workers must be 1 on a GPU, which clients share by turns, got {run.workers}"])
        return made
    pool = None
    workers = 1
    if _may_have_workers(made.recipe):
        pool = made.new_pool(count)
        plan = ample_plan(made.algorithm(dry=True), made.population.clients[0])
        workers = faster_workers(pool, made.places, plan, made.kind(made.recipe.algorithm))
    recipe = dataclasses.replace(made.recipe, run=dataclasses.replace(run, workers=workers))
    changed = _again(made, recipe, made.population)
    if workers == 1 and pool is not None:
        pool.close()
    else:
        changed.__dict__["pool"] = pool
    return changed


def _again(made: Experiment, recipe: Recipe, people: Population) -> Experiment:
    """The experiment with other facts and the same loaded model."""
    changed = Experiment(recipe, people, made.sketch, made.traces, made.parent)
    if "adapted" in made.__dict__:  # where cached_property keeps it
        changed.__dict__["adapted"] = made.adapted
    return changed
