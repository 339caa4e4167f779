"""The one file that imports peft: a shared frozen base whose adapters are swapped in place, names in, names out.

Outside, a tensor is named by the base model's own module path (``bert.encoder.layer.0.attention.self.query.lora_A``,
``classifier.weight``); PEFT's prefixes stay in here. Three things differ from a `peft.PeftModel`, on purpose: the head
is trained in place instead of in a second copy, ranks differ by module under one scale, and only what a plan trains has
``requires_grad``, so that no backward pass goes below the lowest trained block.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from peft import LoraConfig, LoraModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedpilot import lora, training
from fedpilot.errors import ModelError
from fedpilot.memory import StepProgram
from fedpilot.training import IGNORED, Batch, TrainingSettings
from fedpilot.types import Deployment, ModelSpec, Plan, Task, Tensors

TaskType: TypeAlias = Literal["sequence-classification", "image-classification", "causal-lm"]

_AUTO = {
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "causal-lm": AutoModelForCausalLM,
}
# Where PEFT's own mapping has nothing, or the names of older versions of transformers.
_TARGETS: Mapping[str, tuple[str, ...]] = {
    "vit": ("q_proj", "v_proj"),
    "dinov2": ("q_proj", "v_proj"),
}
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "classifier_dropout",
    "dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "seq_classif_dropout",
)
_ADAPTER = "default"

Fact: TypeAlias = str | int | float | bool


@dataclass(frozen=True)
class ModelSettings:
    """Which model is adapted, and where.

    Attributes:
        source: Local folder with a ``config.json`` (and weights, but for the meta device), or a hub id.
        task: What the model does.
        rank: Rank that ``alpha`` belongs to; a client's own ranks keep the scale ``alpha / rank``.
        alpha: LoRA's alpha.
        target_modules: Last parts of the adapted modules' names; ``None`` for the model family's usual ones.
        max_length: Tokens of the longest example.
        image_size: Pixels of an image's side; ``None`` for the model's own.
        dropout: Probability of all the base model's dropouts; ``None`` leaves its configuration.
        lora_dropout: Probability of the dropout before A.
        train_pooler: Whether a pooler that the checkpoint holds belongs to the head. One that it lacks always does.
        attention: ``eager`` is faster for short inputs on a CPU and keeps its scores; ``sdpa`` is fused. ``None`` for
            ``eager`` in classification, ``sdpa`` in language models.
        dtype: Of the frozen base. With ``bf16`` every forward pass runs under autocast; adapters stay float32.
    """

    source: str
    task: TaskType = "sequence-classification"
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] | None = None
    max_length: int = 128
    image_size: int | None = None
    dropout: float | None = None
    lora_dropout: float = 0.0
    train_pooler: bool = True
    attention: Literal["eager", "sdpa"] | None = None
    dtype: Literal["float32", "bf16"] = "float32"

    @property
    def chosen_attention(self) -> str:
        """The attention implementation in force."""
        return self.attention or ("sdpa" if self.task == "causal-lm" else "eager")


class AdaptedModel:
    """A base model with adapters that `load` swaps in place; one in a process serves all clients in turn.

    Built by `build_model`.

    Attributes:
        settings: What it was built from.
        spec: What algorithms know of it.
        base: The transformers model. Its weights are frozen but for the head.
        facts: What was chosen while it was built, for the record.
        plan: The plan of the loaded task; ``None`` after `deploy`.
        mode: Context in which its tensors can be computed with; not trivial for a model without storage.
    """

    def __init__(
        self,
        base: nn.Module,
        settings: ModelSettings,
        head: Tensors,
        facts: Mapping[str, Fact],
        mode: AbstractContextManager[object],
    ) -> None:
        base.requires_grad_(False)
        self.base = base
        self.settings = settings
        self.mode = mode
        self._block_list, prefix = _find_blocks(base)
        self._blocks: list[nn.Module] = list(self._block_list)
        self._block_owner = base.get_submodule(prefix.rpartition(".")[0])
        self._block_attribute = prefix.rpartition(".")[2]
        modules, block_of = _find_targets(base, settings, prefix)
        self.spec = ModelSpec(modules, block_of, len(self._blocks), settings.alpha / settings.rank, head)
        self.facts = dict(facts)
        # Taken before any injection: the parameter objects survive it, their names do not.
        self._parameters: dict[str, nn.Parameter] = dict(base.named_parameters())
        self._inputs = _extra_inputs(base, settings)
        self._transposed = {f"{n}.weight" for n, m in base.named_modules() if isinstance(m, Conv1D)}
        self._pristine: dict[str, torch.Tensor] = {}
        self._tuner: LoraModel | None = None
        self._ranks: dict[str, int] = {}
        self._live: dict[str, nn.Parameter] = {name: self._parameters[name] for name in head}
        self.plan: Plan | None = None
        self._copy(head)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self._parameters.values())).device

    @property
    def has_storage(self) -> bool:
        """Whether its tensors hold numbers; false on the meta device and for fake tensors."""
        return isinstance(self.mode, nullcontext) and self.device.type != "meta"

    @property
    def task_type(self) -> str:
        """What the model does."""
        return self.settings.task

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks that run, next to the input first."""
        return list(getattr(self._block_owner, self._block_attribute))

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Live adapter and head parameters by global name."""
        return dict(self._live)

    def read(self) -> Tensors:
        """Copies of all loaded adapter and head tensors, on the CPU."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._live.items()}

    def load(self, task: Task) -> None:
        """Makes the model the one that a task describes.

        Raises:
            ModelError: The task's names, shapes or blocks are not this model's.
        """
        plan = task.plan
        self._install(plan.ranks, task.tensors, task.base_delta, plan.blocks)
        self.set_trainable(plan.trainable)
        self._set_checkpointed(plan.checkpointed)
        self.plan = plan

    def deploy(self, deployment: Deployment) -> None:
        """Makes the model the one that is evaluated and exported: all blocks, nothing trained."""
        tensors = deployment.tensors
        ranks = {module: int(tensors[lora.a_name(module)].shape[0]) for module in lora.modules_of(tensors)}
        self._install(ranks, tensors, deployment.base_delta, None)
        self.set_trainable(frozenset())
        self._set_checkpointed(frozenset())
        self.plan = None

    def set_trainable(self, names: frozenset[str]) -> None:
        """Gives exactly the named tensors gradients.

        Raises:
            ModelError: A name is not loaded.
        """
        unknown = sorted(names - self._live.keys())
        if unknown:
            raise ModelError(
                f"trainable tensors must be loaded, got {_some(unknown)}; plan a rank for the module first"
            )
        for name, parameter in self._live.items():
            parameter.requires_grad_(name in names)
            parameter.grad = None

    def logits(self, batch: Batch) -> torch.Tensor:
        """(examples, classes), or (examples, length, words) of a language model."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with self._arithmetic():
            logits: torch.Tensor = self.base(**inputs, **self._inputs).logits
        return logits

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy over the batch's targets (`training.num_targets`), a scalar with its graph."""
        return cross_entropy(self.logits(batch), batch["labels"]) / training.num_targets(batch).clamp(min=1)

    def program(self, plan: Plan, settings: TrainingSettings, micro_batch: int | None = None) -> StepProgram:
        """One optimiser step of the plan on made-up inputs of full length, for tracing and measuring.

        It overwrites the loaded adapters and, on a real device, trains them: `load` before the model is used again.

        Args:
            plan: Its ``micro_batch`` counts where the argument is ``None``.
            settings: Batch size, optimiser, clipping and autocast.
            micro_batch: Examples of a forward pass.
        """
        shapes = lora.shapes(self.spec, plan.ranks)
        if self.has_storage:
            tensors = lora.init(self.spec, plan.ranks, np.random.default_rng(0))
        else:
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        self.load(Task(plan, tensors))
        self.base.train()
        with self.mode:
            batch = self.made_up_batch(settings.batch_size)
            pieces = training.micro_batches(batch, micro_batch or plan.micro_batch)
            trained = {name: parameter for name, parameter in self._live.items() if name in plan.trainable}
            optimiser = training.make_optimiser(trained.values(), settings, settings.learning_rate)

        def step() -> None:
            with self.mode:
                training.train_step(self.loss, pieces, optimiser, trained, settings)

        resident = (*self.resident(), *batch.values())
        return StepProgram(resident=resident, blocks=self.blocks, parameters=self.parameters_by_name(), step=step)

    def resident(self) -> list[torch.Tensor]:
        """Weights and buffers of the running model."""
        return [*self.base.parameters(), *self.base.buffers()]

    def made_up_batch(self, examples: int) -> Batch:
        """Inputs of full size and their labels; of texts, each but the first ends in one position of padding."""
        labels = torch.zeros(examples, dtype=torch.long, device=self.device)
        if self.settings.task == "image-classification":
            config: Any = self.base.config
            size = self.settings.image_size or config.image_size
            pixels = torch.zeros(examples, config.num_channels, size, size, device=self.device)
            return {"pixel_values": pixels, "labels": labels}
        shape = (examples, self.settings.max_length)
        words = torch.ones(shape, dtype=torch.long, device=self.device)
        mask = torch.ones(shape, dtype=torch.long, device=self.device)
        mask[1 if examples > 1 else 0 :, -1] = 0
        if self.settings.task == "causal-lm":
            labels = torch.ones(shape, dtype=torch.long, device=self.device)
        return {"input_ids": words, "attention_mask": mask, "labels": labels}

    def _arithmetic(self) -> AbstractContextManager[object]:
        if self.settings.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _install(
        self, ranks: Mapping[str, int], tensors: Tensors, base_delta: Tensors, blocks: Sequence[int] | None
    ) -> None:
        self._check(ranks, tensors, blocks)
        if dict(ranks) != self._ranks:
            self._inject(ranks)
        self._run_blocks(range(self.spec.num_blocks) if blocks is None else blocks)
        self._copy(tensors)
        self._change_base(base_delta)

    def _copy(self, tensors: Tensors) -> None:
        if self.has_storage:
            with torch.no_grad():
                for name, parameter in self._live.items():
                    parameter.copy_(tensors[name])

    def _check(self, ranks: Mapping[str, int], tensors: Tensors, blocks: Sequence[int] | None) -> None:
        unknown = sorted(ranks.keys() - self.spec.modules.keys())
        if unknown:
            raise ModelError(f"adapted modules must be among the model's targets, got {_some(unknown)}")
        low = sorted(module for module, rank in ranks.items() if rank < 1)
        if low:
            raise ModelError(f"a rank must be at least 1, got less for {_some(low)}; leave the module out instead")
        expected = lora.shapes(self.spec, ranks)
        if expected.keys() != tensors.keys():
            raise ModelError(
                "tensors must be those of the plan's ranks and the head, got "
                f"extra {_some(sorted(tensors.keys() - expected.keys()))}, "
                f"missing {_some(sorted(expected.keys() - tensors.keys()))}"
            )
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ModelError(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}")
        if blocks is not None:
            self._check_blocks(ranks, tuple(blocks))

    def _check_blocks(self, ranks: Mapping[str, int], blocks: tuple[int, ...]) -> None:
        if not blocks or blocks != tuple(sorted(set(blocks))) or blocks[0] < 0 or blocks[-1] >= self.spec.num_blocks:
            raise ModelError(
                f"loaded blocks must be increasing numbers from 0 to {self.spec.num_blocks - 1}, got {blocks}"
            )
        absent = [module for module in ranks if self.spec.block_of[module] not in blocks]
        if absent:
            raise ModelError(f"adapted modules must lie in loaded blocks {blocks}, got {_some(absent)}")

    def _inject(self, ranks: Mapping[str, int]) -> None:
        """Replaces the adapters by uninitialised ones of these ranks."""
        self._run_blocks(range(self.spec.num_blocks))  # PEFT finds modules by their names in the whole model
        if self._tuner is not None:
            self._tuner.unload()
            self._tuner = None
        self._live = {name: self._parameters[name] for name in self.spec.head}
        if ranks:
            config = adapter_config(self.spec, ranks, self.settings, conv1d=bool(self._transposed))
            # Built without storage: kaiming's draws would cost time and touch the global generator.
            self._tuner = LoraModel(self.base, config, _ADAPTER, low_cpu_mem_usage=True)
        adapter: dict[str, nn.Parameter] = {}
        with self.mode:
            for module in self.spec.modules:  # the model's order, whatever the plan's: optimisers go through it
                if module in ranks:
                    adapter |= self._fill(module, ranks[module])
        self._live = adapter | self._live
        self._ranks = dict(ranks)

    def _fill(self, module: str, rank: int) -> dict[str, nn.Parameter]:
        """Gives a module's pair storage; returns it by global name."""
        layer: Any = self.base.get_submodule(module)
        out_features, in_features = self.spec.modules[module]
        a = nn.Parameter(torch.empty(rank, in_features, device=self.device))
        b = nn.Parameter(torch.empty(out_features, rank, device=self.device))
        layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight = a, b
        layer.scaling[_ADAPTER] = self.spec.scale  # alpha / rank of scale * rank may round
        layer.cast_input_dtype_enabled = False  # under autocast the product casts; a float32 copy would be kept
        return {lora.a_name(module): a, lora.b_name(module): b}

    def _run_blocks(self, blocks: Iterable[int]) -> None:
        chosen = [self._blocks[block] for block in blocks]
        whole = len(chosen) == len(self._blocks)
        setattr(self._block_owner, self._block_attribute, self._block_list if whole else nn.ModuleList(chosen))

    @torch.no_grad()
    def _change_base(self, delta: Tensors) -> None:
        """Adds a dense change to frozen weights, from their first bits; whatever was added before is gone."""
        for name in delta:
            self._check_change(name, delta[name])
        for name, pristine in self._pristine.items():
            self._parameters[name].copy_(pristine)
        self._pristine = {name: self._parameters[name].detach().clone() for name in delta}
        for name, change in delta.items():
            change = change.T if name in self._transposed else change
            pristine = self._pristine[name]
            self._parameters[name].copy_(pristine.float() + change.to(pristine.device))

    def _check_change(self, name: str, change: torch.Tensor) -> None:
        if name not in self._parameters or name in self.spec.head:
            raise ModelError(f"a base delta must name a frozen weight, got {name}")
        shape = self._parameters[name].shape
        expected = tuple(reversed(shape)) if name in self._transposed else tuple(shape)
        if tuple(change.shape) != expected:
            raise ModelError(f"base delta of {name} must have shape {expected}, got {tuple(change.shape)}")

    def _set_checkpointed(self, blocks: frozenset[int]) -> None:
        """Marks blocks for recomputation; below the lowest trained block nothing is kept, so nothing is recomputed."""
        trained = (
            self.spec.block_of[module]
            for module in self._ranks
            if any(self._live[name].requires_grad for name in lora.names([module]))
        )
        lowest = min(trained, default=self.spec.num_blocks)
        for index, block in enumerate(self._blocks):
            wanted = index in blocks and index >= lowest
            if wanted and not isinstance(block, GradientCheckpointingLayer):
                raise ModelError(
                    f"a checkpointed block must support recomputation, got {type(block).__name__}; "
                    "plan this model without checkpointing"
                )
            if isinstance(block, GradientCheckpointingLayer):
                block.gradient_checkpointing = wanted
                block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in float32; of texts, each position predicts the next label."""
    if labels.ndim == 2:
        # Shifting the labels instead of the logits saves a copy of the largest tensor of the step.
        labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")


def build_model(
    settings: ModelSettings,
    *,
    num_labels: int | None = None,
    device: Literal["cpu", "cuda", "meta", "fake"] = "cpu",
    seed: int = 0,
) -> AdaptedModel:
    """Loads a base model and finds its blocks, modules to adapt and head.

    Args:
        settings: Which model.
        num_labels: Classes; ``None`` for a language model.
        device: ``meta`` and ``fake`` (tensors that claim to be on the CPU) have shapes and no storage, and need no
            weights: a folder with a ``config.json`` is enough.
        seed: Of the head's first values, where the checkpoint holds none.

    Raises:
        ModelError: The source cannot be had, lacks weights, or cannot be adapted as asked.
    """
    if settings.task != "causal-lm" and num_labels is None:
        raise ModelError(f"{settings.task} must know its number of classes, got none; pass num_labels")
    config = _config(settings, num_labels)
    mode: AbstractContextManager[object] = nullcontext()
    with _quiet():
        if device in ("meta", "fake"):
            base, fresh = _without_storage(config, settings), None
            if device == "fake":
                mode = FakeTensorMode(allow_non_fake_inputs=True)
                _to_fake(base, mode)
        else:
            base, fresh = _with_weights(config, settings)
            base = base.to(device)
    names = _head_names(base, settings, fresh or frozenset())
    head = _head_values(base, names, names if fresh is None else fresh, seed)
    with mode:
        for name in names:
            parameter = base.get_parameter(name)
            parameter.data = parameter.data.float()
    facts: dict[str, Fact] = {
        "source": settings.source,
        "model_type": str(config.model_type),
        "attention": settings.chosen_attention,
        "dtype": settings.dtype,
        "head": ", ".join(names),
        "newly_initialised": ", ".join(sorted(names if fresh is None else fresh)),
    }
    return AdaptedModel(base, settings, head, facts, mode)


def adapter_config(spec: ModelSpec, ranks: Mapping[str, int], settings: ModelSettings, *, conv1d: bool) -> LoraConfig:
    """PEFT's description of these adapters: exact module names throughout, alpha of a module is ``scale * rank``.

    PEFT matches a name against the end of a module's path. Whole paths leave it no choice, where the shorter
    ``1.attention.query`` would be caught by block 11 too.
    """
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=settings.lora_dropout,
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern={module: spec.scale * rank for module, rank in ranks.items()},
        fan_in_fan_out=conv1d,
        bias="none",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from reporting on loading what `AdaptedModel.facts` and `ModelError` say."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _config(settings: ModelSettings, num_labels: int | None) -> Any:
    folder = Path(settings.source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model source must be a folder with a config.json, got {settings.source}; "
            "save the model there with save_pretrained"
        )
    try:
        config = AutoConfig.from_pretrained(settings.source)
    except (OSError, ValueError) as error:
        raise _unreachable(settings, error) from error
    if num_labels is not None:
        config.num_labels = num_labels
    if settings.dropout is not None:
        for name in _DROPOUTS:
            if isinstance(getattr(config, name, None), int | float):
                setattr(config, name, settings.dropout)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # the cache of generation is dead weight in training
    return config


def _unreachable(settings: ModelSettings, error: Exception) -> ModelError:
    return ModelError(
        f"model source must be a folder with a model or a hub id that can be reached, got {settings.source!r}; "
        "check the spelling, give the path of a folder, or allow the hub (unset HF_HUB_OFFLINE) "
        f"[{type(error).__name__}: {str(error).splitlines()[0]}]"
    )


def _options(settings: ModelSettings) -> dict[str, object]:
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    return {"dtype": dtype, "attn_implementation": settings.chosen_attention}


def _without_storage(config: Any, settings: ModelSettings) -> nn.Module:
    with torch.device("meta"):
        base: nn.Module = _AUTO[settings.task].from_config(config, **_options(settings))
    return base


def _to_fake(base: nn.Module, mode: FakeTensorMode) -> None:
    """Turns meta tensors into ones that claim to be on the CPU, so that the CPU's kernels are chosen; ties are kept.

    Building under the mode would run the initialisers, some of which look at values.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu")
            made[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    with mode:
        for module in base.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, fake(parameter))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, fake(buffer))


def _with_weights(config: Any, settings: ModelSettings) -> tuple[nn.Module, frozenset[str]]:
    """The model and the names of its weights that the checkpoint does not hold in the right shape."""
    with torch.random.fork_rng(devices=[]):  # what is missing is drawn here, and drawn again by `_head_values`
        try:
            base, info = _AUTO[settings.task].from_pretrained(
                settings.source,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_options(settings),
            )
        except (OSError, ValueError) as error:
            raise _unreachable(settings, error) from error
    fresh = frozenset(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    allowed = _outside(base) | _pooler(base)
    if settings.task == "causal-lm":
        allowed = frozenset()
    if fresh - allowed:
        raise ModelError(
            f"the checkpoint {settings.source} must hold every weight but the head's, got none for "
            f"{_some(sorted(fresh - allowed))}; use a checkpoint of this model, or save the model whole first"
        )
    return base, fresh


def _outside(base: nn.Module) -> frozenset[str]:
    """Parameters that do not belong to the backbone: what a task puts on top."""
    prefix = f"{base.base_model_prefix}."
    return frozenset(name for name, _ in base.named_parameters() if not name.startswith(prefix))


def _pooler(base: nn.Module) -> frozenset[str]:
    prefix = f"{base.base_model_prefix}.pooler."
    return frozenset(name for name, _ in base.named_parameters() if name.startswith(prefix))


def _head_names(base: nn.Module, settings: ModelSettings, fresh: frozenset[str]) -> tuple[str, ...]:
    """Dense tensors that every client trains, in the model's order."""
    if settings.task == "causal-lm":
        return ()
    chosen = _outside(base) | (_pooler(base) if settings.train_pooler else _pooler(base) & fresh)
    return tuple(name for name, _ in base.named_parameters() if name in chosen)


def _head_values(base: Any, names: Sequence[str], fresh: Iterable[str], seed: int) -> Tensors:
    """First values on the CPU: the checkpoint's, and seeded draws as BERT makes them for what it lacks."""
    generator = torch.Generator().manual_seed(seed)
    spread = float(getattr(base.config, "initializer_range", 0.02))
    values: dict[str, torch.Tensor] = {}
    for name in names:
        parameter = base.get_parameter(name)
        if name not in fresh:
            values[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        elif parameter.ndim > 1:
            values[name] = torch.randn(tuple(parameter.shape), generator=generator) * spread
        else:
            values[name] = torch.full(tuple(parameter.shape), 0.0 if name.endswith("bias") else 1.0)
    return values


def _find_blocks(base: Any) -> tuple[nn.ModuleList, str]:
    """The list of transformer blocks and its path."""
    count = base.config.get_text_config().num_hidden_layers
    found = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outermost = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(base).__name__} must have one list of its {count} blocks, got {len(outermost)}; "
            "encoder-decoders and models without a module list cannot be adapted block by block"
        )
    name, blocks = outermost[0]
    return blocks, name


def _find_targets(base: Any, settings: ModelSettings, prefix: str) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Adapted module -> (out, in), and adapted module -> block."""
    linear = {
        name: module
        for name, module in base.named_modules()
        if name.startswith(f"{prefix}.") and isinstance(module, nn.Linear | Conv1D)
    }
    endings = settings.target_modules or _default_targets(str(base.config.model_type))
    modules: dict[str, tuple[int, int]] = {}
    block_of: dict[str, int] = {}
    for name, module in linear.items():
        if any(name.endswith(f".{ending}") for ending in endings):
            rows, columns = module.weight.shape
            modules[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
            block_of[name] = int(name.removeprefix(f"{prefix}.").split(".")[0])
    missing = [ending for ending in endings if not any(name.endswith(f".{ending}") for name in modules)]
    if missing or not modules:
        known = sorted({name.removeprefix(f"{prefix}.").partition(".")[2] for name in linear})
        raise ModelError(
            f"target_modules must name linear modules of {base.config.model_type}, got {missing or 'nothing'}; "
            f"choose among {', '.join(known)}"
        )
    return modules, block_of


def _default_targets(model_type: str) -> tuple[str, ...]:
    known = _TARGETS.get(model_type) or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ())
    return tuple(known) if not isinstance(known, str) else ()


def _extra_inputs(base: Any, settings: ModelSettings) -> dict[str, bool]:
    """What a forward pass needs beside the batch."""
    resized = settings.image_size is not None and settings.image_size != getattr(base.config, "image_size", None)
    if resized and "interpolate_pos_encoding" in inspect.signature(base.forward).parameters:
        return {"interpolate_pos_encoding": True}
    return {}


def _some(names: Iterable[str]) -> str:
    """A few of the names, for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
