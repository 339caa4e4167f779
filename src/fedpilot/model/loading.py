"""Loads a transformers model and finds in it what federated LoRA needs: blocks, modules to adapt, head."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedpilot.errors import ModelError
from fedpilot.model.quantised import Quantisation, QuantisedLinear, quantise
from fedpilot.types import Tensors

TaskType: TypeAlias = Literal["sequence-classification", "image-classification", "causal-lm"]
Device: TypeAlias = Literal["cpu", "cuda", "meta", "fake"]
Fact: TypeAlias = str | int | float | bool

_AUTO = {
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "causal-lm": AutoModelForCausalLM,
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
        train_pooler: Whether a pooler below the classifier is trained with it, as part of the head. ``None`` for
            leaving one that the source's ``model.safetensors`` holds as it is, and training any other.
        attention: ``sdpa`` is fused and keeps no scores of long inputs; ``eager`` is faster for short ones in bf16 on
            a CPU, and as fast in float32. ``auto`` is for recipes, which put in the faster (`faster_attention`).
        dtype: Of the frozen base. With ``bf16`` every forward pass runs under autocast; adapters stay float32.
        quantisation: How the linear layers of the blocks are stored: ``int8`` or ``nf4`` (4 bits, with bitsandbytes);
            what is computed stays in ``dtype``. ``None`` for no less than ``dtype``.
        last_block: ``first-position`` leaves out what the last block of a BERT-like classifier computes behind its
            attention at positions that the head does not read; predicted memory and operations know it.
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
    train_pooler: bool | None = None
    attention: Literal["sdpa", "eager", "auto"] = "sdpa"
    dtype: Literal["float32", "bf16"] = "float32"
    quantisation: Quantisation | None = None
    last_block: Literal["whole", "first-position"] = "whole"

    @property
    def precision(self) -> str:
        """Of the frozen weights, in words."""
        return precision(self.dtype, self.quantisation)


SHORT = 256
"""Tokens up to which a CPU is faster with eager attention in bf16, as docs/performance.md has it."""


def faster_attention(device_type: str, arithmetic: str, max_length: int) -> Literal["sdpa", "eager"]:
    """The kernel that takes less time for inputs of that many tokens; the same for all clients and methods of a recipe.

    The fused kernel of a CPU is slow backward in bf16. Eager attention keeps (examples, heads, length, length) scores.
    """
    return "eager" if device_type == "cpu" and arithmetic == "bf16" and max_length <= SHORT else "sdpa"


def precision(dtype: str, quantisation: Quantisation | None) -> str:
    """Of frozen weights, in words."""
    return dtype if quantisation is None else f"{quantisation}, the rest {dtype}"


@dataclass(frozen=True)
class Base:
    """A loaded model, not adapted yet.

    Attributes:
        model: The transformers model.
        head: First values of the tensors that every client trains in full, on the CPU.
        facts: What was chosen, for the record.
        mode: Context in which its tensors can be computed with.
    """

    model: nn.Module
    head: Tensors
    facts: Mapping[str, Fact]
    mode: AbstractContextManager[object]


def load_base(settings: ModelSettings, num_labels: int | None, device: Device, seed: int) -> Base:
    """The model of `build_model`, before it is adapted."""
    if settings.task != "causal-lm" and num_labels is None:
        raise ModelError(f"{settings.task} must know its number of classes, got none; pass num_labels")
    mode: AbstractContextManager[object] = nullcontext()
    fresh: frozenset[str] | None = None
    with _quiet():
        config = _config(settings, num_labels)
        if device in ("meta", "fake"):
            base = _without_storage(config, settings)
        else:
            base, fresh = _with_weights(config, settings, device)
            base = base.to(device)
    if device == "fake":
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        _to_fake(base, mode)
    names = _head_names(base, settings)
    head = _head_values(base, names, names if fresh is None else fresh, seed)
    with mode:
        for name in names:
            parameter = base.get_parameter(name)
            parameter.data = parameter.data.float()
    facts: dict[str, Fact] = {
        "source": settings.source,
        "model_type": str(config.model_type),
        "attention": settings.attention,
        "last_block": settings.last_block,
        "dtype": settings.dtype,
        "quantisation": settings.quantisation or "none",
        "head": ", ".join(names),
        "newly_initialised": ", ".join(sorted(names if fresh is None else fresh)),
    }
    return Base(base, head, facts, mode)


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
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model source must be stored in full precision, got quantised weights in {settings.source!r}; take the "
            "model that they were made from, with model.quantisation = 'nf4' or 'int8'"
        )
    if num_labels is not None:
        config.num_labels = num_labels
    if settings.dropout is not None:
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            for name in _DROPOUTS:
                if isinstance(getattr(part, name, None), int | float):
                    setattr(part, name, settings.dropout)
    if settings.task == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = _end_of_text(config)  # a decoder is read at its last token that is not padding
    if hasattr(config, "use_cache"):
        config.use_cache = False  # the cache of generation is dead weight in training
    return config


def _end_of_text(config: Any) -> int:
    """What fills up where a model names no padding; as `data.text.pad_id` has it."""
    end = getattr(config, "eos_token_id", None)
    return int((end[0] if isinstance(end, list) else end) or 0)


def _unreachable(settings: ModelSettings, error: Exception) -> ModelError:
    return ModelError(
        f"model source must be a folder with a model or a hub id that can be reached, got {settings.source!r}; "
        "check the spelling, give the path of a folder, or allow the hub (unset HF_HUB_OFFLINE) "
        f"[{type(error).__name__}: {str(error).splitlines()[0]}]"
    )


def _unsuited(config: Any, settings: ModelSettings, error: Exception) -> ModelError:
    return ModelError(
        f"model task must be one that {config.model_type} can do, got {settings.task!r}; choose another task or source "
        f"[{str(error).splitlines()[0]}]"
    )


def _options(settings: ModelSettings) -> dict[str, object]:
    if settings.attention == "auto":
        raise ModelError("attention must be settled before a model is built, got 'auto'; put in faster_attention(...)")
    return {"dtype": _dtype(settings), "attn_implementation": settings.attention}


def _dtype(settings: ModelSettings) -> torch.dtype:
    return torch.bfloat16 if settings.dtype == "bf16" else torch.float32


def _without_storage(config: Any, settings: ModelSettings) -> nn.Module:
    try:
        with torch.device("meta"):
            base: nn.Module = _AUTO[settings.task].from_config(config, **_options(settings))
    except ValueError as error:
        raise _unsuited(config, settings, error) from error
    if settings.quantisation is not None:
        quantise(find_blocks(base)[0], settings.quantisation)
    return base


def _to_fake(base: nn.Module, mode: FakeTensorMode) -> None:
    """Turns meta tensors into ones that claim to be on the CPU, so that the CPU's kernels are chosen; ties are kept.

    Building under the mode would run the initialisers, some of which look at values.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if weight else empty
        return made[id(tensor)]

    with mode:
        for module in base.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, fake(parameter))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, fake(buffer))


def _with_weights(config: Any, settings: ModelSettings, device: Device) -> tuple[nn.Module, frozenset[str]]:
    """The model and the names of its weights that the checkpoint does not hold in the right shape."""
    options = _options(settings)
    if settings.quantisation is not None:
        options["dtype"] = "auto"  # as the file has it: weights stay in the file until they are quantised one by one
    with torch.random.fork_rng(devices=[]):  # what is missing is drawn here, and drawn again by `_head_values`
        try:
            base, info = _AUTO[settings.task].from_pretrained(
                settings.source,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        except OSError as error:
            raise _unreachable(settings, error) from error
        except ValueError as error:
            raise _unsuited(config, settings, error) from error
    fresh = frozenset(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    allowed = frozenset(_head_names(base, settings))
    if fresh - allowed:
        raise ModelError(
            f"the checkpoint {settings.source} must hold every weight but the head's, got none for "
            f"{some(sorted(fresh - allowed))}; use a checkpoint of the whole model, "
            "or set train_pooler if only the pooler is missing"
        )
    if settings.quantisation is not None:
        quantise(find_blocks(base)[0], settings.quantisation, device)
        _cast_the_rest(base, _dtype(settings))
    return base, fresh


def _cast_the_rest(base: nn.Module, dtype: torch.dtype) -> None:
    """Gives all weights that are not quantised the dtype."""
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not (isinstance(module, QuantisedLinear) and name == "weight"):
                parameter.data = parameter.data.to(dtype)


def _outside(base: nn.Module) -> frozenset[str]:
    """Parameters that do not belong to the backbone: what a task puts on top."""
    prefix = backbone_of(base)
    return frozenset(name for name, _ in base.named_parameters() if not name.startswith(prefix))


def backbone_of(base: Any) -> str:
    """What names below the head open with: transformers' prefix, or the part with the blocks where there is no such."""
    prefix = str(base.base_model_prefix)
    return f"{prefix if hasattr(base, prefix) else find_blocks(base)[1].partition('.')[0]}."


def backbone_config(base: Any) -> Any:
    """Configuration of the part with the blocks: of a model of images and texts, that of its input."""
    if base.main_input_name == "pixel_values" and hasattr(base.config, "vision_config"):
        return base.config.vision_config
    return base.config.get_text_config()


def _pooler(base: nn.Module) -> frozenset[str]:
    prefix = f"{backbone_of(base)}pooler."
    return frozenset(name for name, _ in base.named_parameters() if name.startswith(prefix))


def _head_names(base: nn.Module, settings: ModelSettings) -> tuple[str, ...]:
    """Dense tensors that every client trains, in the model's order."""
    if settings.task == "causal-lm":
        return ()
    trained = settings.train_pooler
    if trained is None:  # decided by the source alone, so that a sketch without storage and the model agree
        trained = not _holds_pooler(Path(settings.source))
    chosen = _outside(base) | (_pooler(base) if trained else frozenset())
    return tuple(name for name, _ in base.named_parameters() if name in chosen)


def _holds_pooler(folder: Path) -> bool:
    """Whether the weights in a local folder are seen to hold a pooler."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names: Iterable[str] = ()
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            names = list(file.keys())
    elif index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return any("pooler" in name.split(".") for name in names)


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


def find_blocks(base: Any) -> tuple[nn.ModuleList, str]:
    """The list of transformer blocks and its path."""
    count = backbone_config(base).num_hidden_layers
    found = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outermost = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(base).__name__} must have one list of its {count} blocks, got {len(outermost)}; "
            "encoder-decoders and models without a module list cannot be adapted block by block"
        )
    name, blocks = outermost[0]
    return blocks, name


def find_targets(base: Any, endings: Sequence[str], prefix: str) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Adapted module -> (out, in), and adapted module -> block."""
    linear = {
        name: module
        for name, module in base.named_modules()
        if name.startswith(f"{prefix}.") and isinstance(module, nn.Linear | Conv1D)
    }
    modules: dict[str, tuple[int, int]] = {}
    block_of: dict[str, int] = {}
    for name, module in linear.items():
        if any(name.endswith(f".{ending}") for ending in endings):
            if isinstance(module, nn.Linear):
                modules[name] = (module.out_features, module.in_features)
            else:
                modules[name] = (module.weight.shape[1], module.weight.shape[0])
            block_of[name] = int(name.removeprefix(f"{prefix}.").split(".")[0])
    missing = [ending for ending in endings if not any(name.endswith(f".{ending}") for name in modules)]
    if missing or not modules:
        known = sorted({name.removeprefix(f"{prefix}.").partition(".")[2] for name in linear})
        raise ModelError(
            f"target_modules must name linear modules of {base.config.model_type}, got {missing or 'nothing'}; "
            f"choose among {', '.join(known)}"
        )
    return modules, block_of


def some(names: Iterable[str]) -> str:
    """A few of the names, for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
