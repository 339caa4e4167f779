"""The memory of a training step for people: by part and by block, from a recipe or from a few options."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedpilot import memory, planning
from fedpilot.config import schema, setup
from fedpilot.config.hardware import source_of
from fedpilot.config.population import load_population
from fedpilot.config.recipe import Recipe
from fedpilot.errors import ConfigError
from fedpilot.memory import Breakdown, MemoryProfile
from fedpilot.model import AdaptedModel, ModelSettings, build_model
from fedpilot.training import TrainingSettings
from fedpilot.types import Plan


@dataclass(frozen=True)
class Profile:
    """What `fedpilot profile` shows.

    Attributes:
        source: The model.
        what: Its size and the step's, in words.
        parts: Where the bytes are when all blocks are trained.
        by_block: For each block the peak when it alone is trained, when it and all above are, and when these are
            recomputed besides.
    """

    source: str
    what: str
    parts: Breakdown
    by_block: tuple[tuple[int, int, int], ...]

    def parts_by_name(self) -> dict[str, int]:
        """Part -> bytes; all but the last add up to the last."""
        parts = self.parts
        return {
            "frozen weights": parts.weights,
            "trained head": parts.head,
            "adapters": parts.adapters,
            "optimiser state": parts.optimiser,
            "inputs": parts.batch,
            "gradients": parts.gradients,
            "activations, logits, scratch": parts.activations,
            "device": parts.overhead,
            f"peak, in {parts.moment}": parts.peak,
        }


def of_recipe(recipe: Recipe) -> Profile:
    """Of the recipe's model and settings, with inputs as long as its data's longest."""
    people = load_population(recipe)
    settings = setup.model_settings(recipe, people)
    return profile(settings, recipe.training, setup.num_labels(recipe, people), None)


def of_options(
    model: Mapping[str, object], training: Mapping[str, object], micro_batch: int | None, num_labels: int
) -> Profile:
    """Of a model by name, folder, configuration or hub id, with inputs of full length.

    Raises:
        ConfigError: An option is wrong.
        ModelError: The model cannot be had.
    """
    with source_of(str(model["source"])) as source:
        settings, step, labels = options(dict(model) | {"source": source}, training, micro_batch, num_labels)
        return replace(profile(settings, step, labels, micro_batch), source=str(model["source"]))


def options(
    model: Mapping[str, object], training: Mapping[str, object], micro_batch: int | None, num_labels: int
) -> tuple[ModelSettings, TrainingSettings, int | None]:
    """The settings that options of the command line stand for.

    Raises:
        ConfigError: An option is wrong.
    """
    problems: list[str] = []
    made = (
        schema.build(ModelSettings, model, _option, problems),
        schema.build(TrainingSettings, training, _option, problems),
    )
    if micro_batch is not None and made[1] is not None and made[1].batch_size % micro_batch:
        problems.append(f"--micro-batch must divide --batch {made[1].batch_size}, got {micro_batch}")
    if made[0] is not None and made[0].image_size is not None and made[0].task != "image-classification":
        problems.append(f"--image-size must be left out with --task {made[0].task}, got {made[0].image_size}")
    if problems or made[0] is None or made[1] is None:
        raise ConfigError(problems)
    return made[0], made[1], None if made[0].task == "causal-lm" else num_labels


def profile(
    settings: ModelSettings, training: TrainingSettings, num_labels: int | None, micro_batch: int | None
) -> Profile:
    """Traces a step and puts its plans together."""
    sketch = build_model(settings, num_labels=num_labels, device="fake")
    words = _words(sketch, settings, training)  # before the traces, which leave adapters of their own in the model
    # Beside the whole batch: the optimiser is traced on the first, in one pass instead of many.
    micro_batches = () if micro_batch is None else (training.batch_size, micro_batch)
    traced = setup.profile_of(sketch, training, checkpointing=True, micro_batches=micro_batches)
    everything = replace(planning.train_all(sketch.spec, 0, settings.rank), micro_batch=micro_batch)
    return Profile(
        settings.source,
        words,
        memory.breakdown(traced, everything),
        tuple(_peaks(traced, sketch, everything, block) for block in range(sketch.spec.num_blocks)),
    )


def _peaks(traced: MemoryProfile, sketch: AdaptedModel, everything: Plan, block: int) -> tuple[int, int, int]:
    spec, rank = sketch.spec, next(iter(everything.ranks.values()))
    upper = range(block, spec.num_blocks)
    alone, up = (
        replace(planning.train_blocks(spec, 0, rank, blocks), micro_batch=everything.micro_batch)
        for blocks in ([block], upper)
    )
    again = replace(up, checkpointed=frozenset(upper))
    return memory.peak_bytes(traced, alone), memory.peak_bytes(traced, up), memory.peak_bytes(traced, again)


def _words(sketch: AdaptedModel, settings: ModelSettings, training: TrainingSettings) -> str:
    millions = sketch.num_parameters / 1e6
    if settings.task == "image-classification":
        size = "images" if settings.image_size is None else f"images of {settings.image_size} x {settings.image_size}"
    else:
        size = f"{settings.max_length} tokens"
    return (
        f"{sketch.facts['model_type']}, {sketch.spec.num_blocks} blocks, {millions:,.1f} M parameters in "
        f"{settings.precision}; rank {settings.rank} on {len(sketch.spec.modules)} modules; batches of "
        f"{training.batch_size} x {size}, {training.optimiser}, {training.autocast}"
    )


def _option(key: str) -> str:
    names = {"max_length": "length", "batch_size": "batch", "source": "model"}
    first, space, rest = key.partition(" ")
    return f"--{names.get(first, first).replace('_', '-')}{space}{rest}"
