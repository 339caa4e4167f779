"""What fits which memory: a model's training step against budgets, before anybody buys or borrows a machine.

Every figure is the memory profile's of the very step that it names, traced without weights. A budget in which nothing
fits is offered changes in this order, from the one that costs least: smaller forward passes (as many operations),
recomputed blocks (the same gradients for more operations), frozen weights in bf16, frozen weights of the blocks in 8 or
4 bits, a lower rank, shorter texts, and last a model of some of the blocks alone, as FedRA trains. Single changes are
tried before they are put together.
"""

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from fedpilot import assets, lora, memory, planning
from fedpilot.config import setup
from fedpilot.errors import ConfigError, ModelError
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel, ModelSettings, Quantisation, build_model, precision
from fedpilot.training import TrainingSettings
from fedpilot.types import ModelSpec, Plan

Precision: TypeAlias = Literal["float32", "bf16"]
_Sketched: TypeAlias = tuple[int, Precision, Quantisation | None]
"""Length, data type and storage of a model's weights."""

_LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES: Mapping[str, Mapping[str, object]] = {
    "bert-base": {"model_type": "bert"},
    "gpt2": {"model_type": "gpt2"},
    "llama-7b": _LLAMA | {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama-13b": _LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"vocab_size": 32000, "max_position_embeddings": 4096},
    "llama3-8b": _LLAMA
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    "mistral-7b": _LLAMA
    | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000}
    | {"max_position_embeddings": 32768},
    "tinyllama-1.1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4}
    | {"vocab_size": 32000, "max_position_embeddings": 2048},
}
"""Shapes of well-known models, by the settings of their configurations; there are no weights behind them."""

MOST_SEQUENCES = 64
"""Subsets of one size that are priced where blocks are unlike."""

SHORTEST = 32
"""Tokens below which no text is cut."""


@contextmanager
def source_of(name: str) -> Iterator[str]:
    """A folder or hub id for a named shape, a packaged model, a folder, a hub id, or a JSON file of a configuration.

    Raises:
        ConfigError: The file is none.
        AssetError: A name is nearly that of a packaged model.
    """
    file = Path(name).expanduser()
    if file.is_file():
        if file.name == "config.json":
            yield str(file.parent)
            return
        config = _configuration(file)
    elif name in SHAPES and name not in assets.ASSETS:
        config = dict(SHAPES[name])
    else:
        yield assets.resolve(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        yield folder


def _configuration(file: Path) -> Mapping[str, object]:
    rule = f"--model must be a folder, a name or a model's config.json with its model_type, got {file}"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{rule}: {error}"]) from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise ConfigError([rule])
    return found


@dataclass(frozen=True)
class Step:
    """One way to take a training step.

    Attributes:
        micro_batch: Examples of a forward pass.
        length: Tokens of the longest example.
        dtype: Of the frozen weights.
        rank: Of every pair.
        recompute: Whether blocks may be recomputed.
        quantisation: Of the blocks' linear layers.
    """

    micro_batch: int
    length: int
    dtype: Precision
    rank: int
    recompute: bool
    quantisation: Quantisation | None = None

    @property
    def sketched(self) -> _Sketched:
        """What the model without storage depends on."""
        return self.length, self.dtype, self.quantisation

    @property
    def precision(self) -> str:
        """Of the weights, in words."""
        return precision(self.dtype, self.quantisation)


@dataclass(frozen=True)
class Fit:
    """What a budget can train with a step.

    Attributes:
        change: What differs from the step that was asked for, in words; empty for nothing.
        step: How.
        loaded: Blocks of the model; all, or fewer in a shallow one.
        trained: Blocks trained, the deepest of those loaded.
        recomputed: Of these, blocks that are recomputed; as few as the budget allows.
        peak_bytes: Highest live bytes of the step.
        flops: Operations of an optimiser step.
        adapter_share: Trained share of the numbers that the whole adapter holds at the rank that was asked for.
    """

    change: str
    step: Step
    loaded: int
    trained: int
    recomputed: int
    peak_bytes: int
    flops: float
    adapter_share: float


@dataclass(frozen=True)
class Answer:
    """One budget.

    Attributes:
        budget_bytes: It.
        fits: What it can train as asked, with recomputed blocks, and at lower ranks where these let more blocks in.
        changes: What would let it in where nothing is trained as asked, the cheapest first.
        needed_bytes: The least that the step needs as asked.
    """

    budget_bytes: int
    fits: tuple[Fit, ...]
    changes: tuple[Fit, ...]
    needed_bytes: int

    @property
    def left_out(self) -> bool:
        """Whether nothing fits as asked."""
        return not any(not fit.change for fit in self.fits)


@dataclass(frozen=True)
class Rung:
    """The deepest ``trained`` blocks: smallest budgets, and operations of an optimiser step."""

    trained: int
    peak_bytes: int
    recomputed_peak_bytes: int
    flops: float
    recomputed_flops: float


@dataclass(frozen=True)
class Outlook:
    """What `fedpilot plan` says of a model and budgets.

    Attributes:
        source: The model, as asked for.
        what: It and its step in words.
        weight_bytes: Its weights in the step's data type.
        num_blocks: Its blocks.
        all_flops: Operations of an optimiser step that trains all blocks plainly.
        step: As asked.
        rungs: By number of blocks trained.
        answers: By budget, ascending.
    """

    source: str
    what: str
    weight_bytes: int
    num_blocks: int
    all_flops: float
    step: Step
    rungs: tuple[Rung, ...]
    answers: tuple[Answer, ...]


@dataclass
class Planner:
    """Traces the steps that it is asked about, each once.

    Attributes:
        settings: The model, its source resolved.
        training: The step.
        num_labels: Classes; ``None`` for a language model.
    """

    settings: ModelSettings
    training: TrainingSettings
    num_labels: int | None
    _sketches: dict[_Sketched, AdaptedModel] = field(init=False, default_factory=dict)
    _profiles: dict[tuple[_Sketched, int, bool], MemoryProfile] = field(init=False, default_factory=dict)
    _prices: dict[tuple[Step, int, int, int | None], tuple[int, float]] = field(init=False, default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Of the model, before it is adapted."""
        return self._own.num_parameters

    @property
    def num_quantisable(self) -> int:
        """Of these, weights that can be quantised."""
        return self._own.linear_weights

    @property
    def _own(self) -> AdaptedModel:
        """The model as it was asked for."""
        return self.sketch((self.settings.max_length, self.settings.dtype, self.settings.quantisation))

    @property
    def positions(self) -> int | None:
        """The longest input that the model can take; ``None`` where it does not say."""
        base = self._own.base
        found = getattr(base.config, "max_position_embeddings", None)
        return found if isinstance(found, int) and self.settings.task != "image-classification" else None

    def asked(self, micro_batch: int | None = None, *, recompute: bool = False) -> Step:
        """The step that the settings ask for; ``None`` for the whole batch in one pass."""
        return Step(
            micro_batch=micro_batch or self.training.batch_size,
            length=self.settings.max_length,
            dtype=self.settings.dtype,
            quantisation=self.settings.quantisation,
            rank=self.settings.rank,
            recompute=recompute,
        )

    @property
    def spec(self) -> ModelSpec:
        """The model's adapted modules; they are the same for every step."""
        return self._own.spec

    def sketch(self, key: _Sketched) -> AdaptedModel:
        """The model without storage."""
        if key not in self._sketches:
            length, dtype, quantisation = key
            settings = replace(self.settings, max_length=length, dtype=dtype, quantisation=quantisation)
            self._sketches[key] = build_model(settings, num_labels=self.num_labels, device="fake")
        return self._sketches[key]

    def profile(self, step: Step) -> MemoryProfile:
        """The memory of a step; without recomputed blocks where the step has none and these were not asked for before.

        Passes are alike from the second on, so two stand for all of a batch. What its inputs take is added; the few
        bytes of a number that each further pass may hold are not.
        """
        key = (step.sketched, step.micro_batch, step.recompute)
        more = (step.sketched, step.micro_batch, True)
        if more in self._profiles:
            return self._profiles[more]
        if key not in self._profiles:
            batch = self.training.batch_size
            traced = min(batch, 2 * step.micro_batch)
            training = replace(self.training, batch_size=traced)
            found = setup.profile_of(
                self.sketch(step.sketched),
                training,
                checkpointing=step.recompute,
                micro_batches=(step.micro_batch,),
                suffixes=True,
                checked=not any(known[0] == key[0] for known in self._profiles),
            )
            self._profiles[key] = replace(found, batch=batch, batch_bytes=found.batch_bytes * batch // traced)
        return self._profiles[key]

    def price(self, step: Step, trained: int, recomputed: int = 0, loaded: int | None = None) -> tuple[int, float]:
        """Peak bytes and operations of training the deepest blocks, the deepest of these recomputed."""
        key = (step, trained, recomputed, loaded)
        if key not in self._prices:
            profile = self.profile(replace(step, recompute=step.recompute or recomputed > 0))
            plans = self._plans(step, trained, recomputed, loaded)
            prices = [(memory.peak_bytes(profile, plan), memory.seconds(profile, plan, 1.0, 1)) for plan in plans]
            self._prices[key] = max(peak for peak, _ in prices), max(flops for _, flops in prices)
        return self._prices[key]

    def _plans(self, step: Step, trained: int, recomputed: int, loaded: int | None) -> Iterator[Plan]:
        """The plan; of a shallow model, one for each sequence of unlike blocks."""
        spec, count = self.spec, self.spec.num_blocks
        if loaded is None:
            plan = planning.train_blocks(spec, 0, step.rank, range(count - trained, count))
            again = frozenset(range(count - recomputed, count))
            yield replace(plan, micro_batch=step.micro_batch, checkpointed=again)
            return
        for blocks in itertools.islice(planning.unlike_subsets(self.profile(step).groups, loaded), MOST_SEQUENCES):
            modules = lora.blocks_modules(spec, blocks)
            names = planning.trainable(spec, modules)
            yield Plan(0, dict.fromkeys(modules, step.rank), names, blocks=blocks, micro_batch=step.micro_batch)

    # --- what fits ------------------------------------------------------------------------------------------------

    def fit(self, step: Step, budget: int, change: str = "") -> Fit | None:
        """The most blocks that fit, with as few of them recomputed as that takes."""
        count = self.spec.num_blocks
        enough = self._most(count, lambda n: self.price(step, n, n if step.recompute else 0)[0] <= budget)
        if not enough:
            return None
        recomputed = 0
        if step.recompute:
            spared = self._most(enough, lambda n: self.price(step, enough, enough - n)[0] <= budget)
            recomputed = enough - spared
        return self._made(change, step, enough, recomputed, None)

    def shallow(self, step: Step, budget: int, change: str) -> Fit | None:
        """The largest model of some blocks alone, all trained, of which any such blocks fit."""
        loaded = self._most(self.spec.num_blocks, lambda n: self.price(step, n, 0, n)[0] <= budget)
        return self._made(change, step, loaded, 0, loaded) if loaded else None

    def _made(self, change: str, step: Step, trained: int, recomputed: int, loaded: int | None) -> Fit:
        peak, flops = self.price(step, trained, recomputed, loaded)
        spec = self.spec
        first = 0 if loaded is not None else spec.num_blocks - trained
        modules = lora.blocks_modules(spec, range(first, first + trained))
        share = step.rank * sum(sum(spec.modules[name]) for name in modules)
        share_of = self.settings.rank * sum(map(sum, spec.modules.values()))
        loaded = spec.num_blocks if loaded is None else loaded
        return Fit(change, step, loaded, trained, recomputed, peak, flops, share / share_of)

    @staticmethod
    def _most(highest: int, good: Callable[[int], bool]) -> int:
        """The largest number up to ``highest`` that is good, 0 for none; bytes grow with it."""
        low, high = 0, highest + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(middle) else (low, middle)
        return low

    def answer(self, step: Step, budget: int) -> Answer:
        """What one budget can train."""
        fits = [self.fit(step, budget)]
        again = replace(step, recompute=True)
        if not step.recompute:
            fits.append(self.fit(again, budget, "recomputing blocks"))
        found = [fit for fit in fits if fit is not None]
        if len(found) == 2 and found[1].trained <= found[0].trained:
            found.pop()  # recomputing gains nothing
        for rank in lower_ranks(step.rank):
            most = max((fit.trained for fit in found), default=0)
            lower = self.fit(replace(again, rank=rank), budget, f"rank {rank}, recomputing blocks")
            if lower is not None and lower.trained > most:
                found.append(lower)
        needed = self.price(step, 1, 1 if step.recompute else 0)[0]
        made = Answer(budget, tuple(found), (), needed)
        return replace(made, changes=tuple(self._changes(step, budget))) if made.left_out else made

    # --- what would help ------------------------------------------------------------------------------------------

    def _changes(self, step: Step, budget: int) -> Iterator[Fit]:
        """Changes that let a budget in, the cheapest first: single ones, else the fewest together, else shallow."""
        single = [fit for kind in _KINDS for fit in self._single(kind, step, budget)]
        if single:
            yield from single
            return
        if self._lightest(step) < budget:
            words: list[str] = []
            for kind in _KINDS:
                changed = self._steps(kind, step)
                if not changed:
                    continue
                words.append(changed[-1][0])
                step = changed[-1][1]
                fits = len(words) > 1 and self._lightest(step, exactly=True) <= budget
                found = self.fit(step, budget, " + ".join(words)) if fits else None
                if found is not None:
                    yield found
                    return
        yield from self._shallow_ones(step, budget)

    def _single(self, kind: str, step: Step, budget: int) -> Iterator[Fit]:
        """The gentlest change of a kind that lets a budget in, if the strongest does."""
        changed = self._steps(kind, step)
        if not changed or self._lightest(changed[-1][1], exactly=True) > budget:
            return
        if self.fit(changed[-1][1], budget) is not None:
            yield next(fit for words, new in changed if (fit := self.fit(new, budget, words)) is not None)

    def _shallow_ones(self, step: Step, budget: int) -> Iterator[Fit]:
        """Models of some blocks that fit, with the whole batch at once and one example at a time."""
        asked = self.settings
        stored = "nf4" if self.num_quantisable else asked.quantisation
        light = replace(step, dtype="bf16", quantisation=stored, recompute=False, rank=asked.rank)
        light = replace(light, length=asked.max_length)
        for micro_batch in dict.fromkeys((self.training.batch_size, 1)):
            new = replace(light, micro_batch=micro_batch)
            words = [f"micro-batch {micro_batch}"] if micro_batch < self.training.batch_size else []
            words += ["bf16 weights"] if asked.dtype != "bf16" else []
            words += ["4-bit weights"] if asked.quantisation != stored else []
            found = self.shallow(new, budget, " + ".join([*words, "a model of some blocks (fedra)"]))
            if found is not None:
                yield found

    def _steps(self, kind: str, step: Step) -> list[tuple[str, Step]]:
        """Changes of a kind in words, the gentlest first."""
        match kind:
            case "micro-batch":
                sizes = dict.fromkeys(size for size in (self.training.batch_size // 4, 1) if size)
                known = [size for size in sizes if size < step.micro_batch and not self.training.batch_size % size]
                return [(f"micro-batch {size}", replace(step, micro_batch=size)) for size in known]
            case "recompute":
                return [] if step.recompute else [("recomputing blocks", replace(step, recompute=True))]
            case "precision":
                return [] if step.dtype == "bf16" else [("bf16 weights", replace(step, dtype="bf16"))]
            case "quantisation":
                if step.quantisation == "nf4" or not self.num_quantisable:
                    return []
                fewer = {"8-bit weights": replace(step, quantisation="int8")} if step.quantisation is None else {}
                return [*fewer.items(), ("4-bit weights", replace(step, quantisation="nf4"))]
            case "rank":
                return [(f"rank {rank}", replace(step, rank=rank)) for rank in lower_ranks(step.rank)]
            case _:
                if self.settings.task == "image-classification":
                    return []
                lengths = [n for n in (step.length // 2, step.length // 4) if n >= SHORTEST]
                return [(f"{length} tokens", replace(step, length=length)) for length in lengths]

    def _lightest(self, step: Step, *, exactly: bool = False) -> int:
        """Bytes of the weights alone: below these nothing helps; in the lightest storage unless as they are."""
        in_full = 2 if not exactly or step.dtype == "bf16" else 4
        if not self.num_quantisable or (exactly and step.quantisation is None):
            return self.num_parameters * in_full
        linear = self.num_quantisable if exactly and step.quantisation == "int8" else self.num_quantisable // 2
        return linear + (self.num_parameters - self.num_quantisable) * in_full


_KINDS = ("micro-batch", "recompute", "precision", "quantisation", "rank", "length")


def lower_ranks(rank: int) -> tuple[int, ...]:
    """Half and a quarter.

    >>> lower_ranks(16), lower_ranks(3), lower_ranks(1)
    ((8, 4), (1,), ())
    """
    return tuple(lower for lower in dict.fromkeys((rank // 2, rank // 4)) if lower)


def outlook(
    name: str,
    settings: ModelSettings,
    training: TrainingSettings,
    num_labels: int | None,
    budgets: Sequence[int],
    micro_batch: int | None,
    recompute: bool,
) -> Outlook:
    """What each of the budgets can train of a model.

    Args:
        name: The model, as asked for.
        settings: It, its source resolved.
        training: The step.
        num_labels: Classes; ``None`` for a language model.
        budgets: Bytes.
        micro_batch: Examples of a forward pass; ``None`` for the whole batch.
        recompute: Whether blocks may be recomputed from the start.

    Raises:
        FedpilotError: The model cannot be had or traced so.
    """
    planner = Planner(settings, training, num_labels)
    step = planner.asked(micro_batch, recompute=recompute)
    sketch = planner.sketch(step.sketched)
    if planner.positions is not None and step.length > planner.positions:
        raise ModelError(f"--length must be at most the model's {planner.positions} positions, got {step.length}")
    count = planner.spec.num_blocks
    rungs = []
    for trained in range(1, count + 1):
        (again, more), (peak, flops) = (planner.price(step, trained, kept) for kept in (trained, 0))
        rungs.append(Rung(trained, peak, again, flops, more))
    # The largest first: what it traces, with recomputed blocks, smaller ones ask for without.
    answers = [planner.answer(step, budget) for budget in sorted(set(budgets), reverse=True)]
    millions = planner.num_parameters / 1e6
    return Outlook(
        name,
        f"{sketch.facts['model_type']}, {count} blocks, {millions:,.1f} M parameters, {len(planner.spec.modules)} "
        "adapted modules",
        sum(planner.profile(step).block_bytes) + planner.profile(step).base_bytes,
        count,
        rungs[-1].flops,
        step,
        tuple(rungs),
        tuple(reversed(answers)),
    )
