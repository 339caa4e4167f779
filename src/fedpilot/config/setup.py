"""From a recipe to the parts of a run: population, memory profile, algorithm, engine, evaluation."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from fedpilot import assets, memory, planning
from fedpilot.algorithms import ALGORITHMS
from fedpilot.config.clients import Clients
from fedpilot.config.population import Population, load_population
from fedpilot.config.recipe import Recipe
from fedpilot.config.schema import ByteSize
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.engines.in_process import InProcess
from fedpilot.errors import ConfigError
from fedpilot.evaluation import evaluate
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel, ModelSettings, build_model
from fedpilot.stopping import EarlyStop, Goal
from fedpilot.training import TrainingSettings
from fedpilot.types import Algorithm, Deployment, ModelSpec, StepKind

CALIBRATION_STEPS = 3


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
    wants_gpu = recipe.run.device == "cuda" or (recipe.run.device == "auto" and torch.cuda.is_available())
    return "cuda" if wants_gpu else "cpu"


def profile_of(
    sketch: AdaptedModel,
    training: TrainingSettings,
    *,
    checkpointing: bool,
    micro_batches: tuple[int, ...] = (),
    kind: StepKind | None = None,
) -> MemoryProfile:
    """Memory and operations of a training step of a kind, traced on a model without storage."""
    return memory.trace(
        _programs(sketch, training, kind),
        sketch.spec,
        batch=training.batch_size,
        micro_batches=micro_batches,
        patterns=(kind or StepKind()).patterns,
        checkpointing=checkpointing,
    )


def _programs(adapted: AdaptedModel, training: TrainingSettings, kind: StepKind | None = None) -> memory.ProgramFor:
    return lambda plan, micro_batch: adapted.program(plan, training, micro_batch, kind)


def recomputes(settings: AlgorithmSettings | None) -> bool:
    """Whether the method may recompute blocks, which takes further traces."""
    options = {} if settings is None else settings.options
    return bool(options.get("checkpointing")) or options.get("solver") == "all-checkpointed"


def algorithm(
    settings: AlgorithmSettings, recipe: Recipe, spec: ModelSpec, profile: MemoryProfile, people: Population
) -> Algorithm[Any]:
    """The method with its hyper-parameters; ``rank`` is the model's where the recipe does not say."""
    cls = ALGORITHMS[settings.name]
    names = {field.name for field in dataclasses.fields(cls)}
    options = dict(settings.options)
    if "rank" in names:
        options.setdefault("rank", recipe.model.rank)
    if "budget_bytes" in names:
        options["budget_bytes"] = min(client.memory_bytes for client in people.clients)
    made: Algorithm[Any] = cls(spec=spec, profile=profile, **options)
    return made


def goal(recipe: Recipe) -> Goal:
    """What the best adapter is best at."""
    metric = recipe.evaluation.metric
    return Goal(metric, higher_is_better=not metric.startswith(("loss", "perplexity")))


def early_stop(recipe: Recipe) -> EarlyStop | None:
    """When to stop before the last round."""
    settings = recipe.evaluation
    return None if settings.patience is None else EarlyStop(goal(recipe), settings.patience, settings.min_delta)


# --- all of them --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A recipe with its parts; the weights are loaded when they are first needed.

    Attributes:
        recipe: The configuration.
        population: Clients and data.
        sketch: The model without storage, for planning.
        profile: Memory of its training step.
    """

    recipe: Recipe
    population: Population
    sketch: AdaptedModel
    profile: MemoryProfile

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The model that all clients share."""
        return build_model(
            self.sketch.settings,
            num_labels=num_labels(self.recipe, self.population),
            device=device_of(self.recipe),
            seed=self.recipe.run.seed,
        )

    def algorithm(self, settings: AlgorithmSettings | None = None, *, dry: bool = False) -> Algorithm[Any]:
        """The recipe's method, or another one on the same model; a dry one plans without the weights."""
        spec = (self.sketch if dry else self.adapted).spec
        return algorithm(settings or self.recipe.algorithm, self.recipe, spec, self.profile, self.population)

    def engine(self, method: Algorithm[Any]) -> InProcess:
        """A fresh engine for one run of the method."""
        return InProcess(method, Clients(self.recipe, self.population, self.adapted).site)

    def evaluate(self, deployment: Deployment) -> Mapping[str, float]:
        """Metrics on the test set."""
        settings = self.recipe.evaluation
        groups = None if settings.by is None else self.population.table.test.column(settings.by).tolist()
        return evaluate(
            self.adapted,
            deployment,
            self.population.test,
            groups=groups,
            batch_size=settings.batch_size,
            autocast=self.recipe.training.autocast,
        )


def experiment(recipe: Recipe) -> Experiment:
    """Everything up to the weights; what is measured on this machine is written into its recipe, for the record.

    Raises:
        FedpilotError: Data, model or plan cannot be had as asked.
    """
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    device = device_of(recipe)
    people = load_population(recipe)
    sketch = build_model(
        model_settings(recipe, people), num_labels=num_labels(recipe, people), device="fake", seed=recipe.run.seed
    )
    checkpointing = recomputes(recipe.algorithm) or recomputes(recipe.baseline)
    sizes = tuple(sorted({recipe.training.batch_size, *recipe.clients.micro_batches}))
    profile = profile_of(sketch, recipe.training, checkpointing=checkpointing, micro_batches=sizes)
    made = Experiment(recipe, people, sketch, profile)
    if device == "cuda" and recipe.clients.overhead_bytes is None:
        made = _with_overhead(made)
    elif recipe.clients.overhead_bytes is not None:
        made = dataclasses.replace(made, profile=profile.with_overhead(recipe.clients.overhead_bytes))
    if recipe.clients.deadline_s and not recipe.clients.flops_per_second:
        made = _with_speed(made)
    return made


def _with_overhead(made: Experiment) -> Experiment:
    """Measures on the GPU what a device needs beside the tensors."""
    spec, rank = made.adapted.spec, made.recipe.model.rank
    plans = [planning.train_blocks(spec, 0, rank, [spec.num_blocks - 1]), planning.train_all(spec, 0, rank)]
    programs = _programs(made.adapted, made.recipe.training)
    profile = memory.calibrate(programs, made.profile, made.adapted.device, plans)
    clients = dataclasses.replace(made.recipe.clients, overhead_bytes=ByteSize(profile.overhead_bytes))
    return _again(made, dataclasses.replace(made.recipe, clients=clients), made.population, profile)


def _with_speed(made: Experiment) -> Experiment:
    """Measures this machine's speed over a few steps and takes every client for as fast."""
    spec, training = made.adapted.spec, made.recipe.training
    plan = planning.train_all(spec, 0, made.recipe.model.rank)
    program = made.adapted.program(plan, training)
    program.step()  # the first one also makes the optimiser's state
    started = time.perf_counter()
    for _ in range(CALIBRATION_STEPS):
        program.step()
    took = time.perf_counter() - started
    speed = CALIBRATION_STEPS * memory.seconds(made.profile, plan, 1.0, 1) / took
    speeds = (speed,) * len(made.recipe.clients.memory)
    clients = tuple(dataclasses.replace(client, flops_per_second=speed) for client in made.population.clients)
    recipe = dataclasses.replace(made.recipe, clients=dataclasses.replace(made.recipe.clients, flops_per_second=speeds))
    return _again(made, recipe, dataclasses.replace(made.population, clients=clients), made.profile)


def _again(made: Experiment, recipe: Recipe, people: Population, profile: MemoryProfile) -> Experiment:
    """The experiment with other facts and the same loaded model."""
    changed = Experiment(recipe, people, made.sketch, profile)
    changed.__dict__["adapted"] = made.adapted  # where cached_property keeps it
    return changed
