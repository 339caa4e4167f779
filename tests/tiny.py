"""Tiny models of several families with random weights, saved once a session, and examples for them.

BERT has twelve blocks, so that block 1 can be mistaken for 10 and 11; GPT-2 keeps its weights transposed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    Dinov2Config,
    GPT2Config,
    LlamaConfig,
    ViTConfig,
)

from fedpilot import base_deltas, lora
from fedpilot.model import AdaptedModel, ModelSettings, build_model
from fedpilot.training import Batch
from fedpilot.types import BaseDelta, Plan, Task, Tensors

NUM_LABELS = 3
WORDS = 60
LENGTH = 9
SIDE = 12

SETTINGS: Mapping[str, ModelSettings] = {
    "bert": ModelSettings("", rank=4, alpha=6.0, max_length=LENGTH, target_modules=("value", "intermediate.dense")),
    "vit": ModelSettings("", "image-classification", rank=4, alpha=6.0),
    "dinov2": ModelSettings("", "image-classification", rank=4, alpha=6.0),
    "llama": ModelSettings("", "causal-lm", rank=4, alpha=6.0, max_length=LENGTH),
    "gpt2": ModelSettings("", "causal-lm", rank=4, alpha=6.0, max_length=LENGTH),
    "clip": ModelSettings("", "image-classification", rank=4, alpha=6.0),
    "llama-classifier": ModelSettings("", rank=4, alpha=6.0, max_length=LENGTH),
}
FAMILIES = tuple(SETTINGS)


def config_of(family: str) -> Any:
    common = {"initializer_range": 0.2, "hidden_size": 24, "num_attention_heads": 4}
    text = {"vocab_size": WORDS, "max_position_embeddings": 32, "intermediate_size": 40}
    image = {"image_size": SIDE, "patch_size": 4, "num_labels": NUM_LABELS, "num_hidden_layers": 3}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    match family:
        case "bert":
            return BertConfig(**common, **text, num_hidden_layers=12)
        case "vit":
            return ViTConfig(**common, **image, intermediate_size=40)
        case "dinov2":
            return Dinov2Config(**common, **image, mlp_ratio=2, layerscale_value=0.5)
        case "clip":  # as many blocks on its side of texts, and other sizes
            images = {**common, **image, "intermediate_size": 40, "projection_dim": 16}
            texts = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
            return CLIPConfig(
                vision_config=images, text_config={**texts, "vocab_size": WORDS, **special}, num_labels=NUM_LABELS
            )
        case "llama" | "llama-classifier":
            return LlamaConfig(**common, **text, **special, num_hidden_layers=3, num_key_value_heads=2)
        case _:
            size = {"n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 32, "vocab_size": WORDS}
            return GPT2Config(**size, **special, initializer_range=0.2)


@cache
def folder(family: str) -> Path:
    """A folder with config and random weights; BERT's has a pooler and no classifier."""
    path = Path(mkdtemp(prefix=f"fedpilot-{family}-"))
    config = config_of(family)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if family == "bert":
            model: Any = BertModel(config)
        elif SETTINGS[family].task == "causal-lm":
            model = AutoModelForCausalLM.from_config(config)
        elif family == "llama-classifier":
            config.num_labels = NUM_LABELS
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForImageClassification.from_config(config)
        model.save_pretrained(path)
    return path


def settings(family: str, **changes: Any) -> ModelSettings:
    return replace(SETTINGS[family], **{"source": str(folder(family)), **changes})


def labels(family: str) -> int | None:
    return None if SETTINGS[family].task == "causal-lm" else NUM_LABELS


def build(family: str, *, device: Any = "cpu", seed: int = 0, **changes: Any) -> AdaptedModel:
    return build_model(settings(family, **changes), num_labels=labels(family), device=device, seed=seed)


@cache
def shared(family: str) -> AdaptedModel:
    """One model for all tests that leave its base as it is."""
    return build(family)


def random_tensors(model: AdaptedModel, ranks: Mapping[str, int], seed: int = 0) -> Tensors:
    """Pairs and head, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    start = lora.init(model.spec, ranks, np.random.default_rng(seed))
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}


def mixed_ranks(model: AdaptedModel, blocks: Sequence[int] | None = None) -> dict[str, int]:
    """Ranks from 1 to 5 over the modules of the blocks."""
    chosen = lora.blocks_modules(model.spec, range(model.spec.num_blocks) if blocks is None else blocks)
    return {module: 1 + (3 * index) % 5 for index, module in enumerate(chosen)}


def task(
    model: AdaptedModel, ranks: Mapping[str, int], trainable: Sequence[str] | None = None, seed: int = 0, **plan: Any
) -> Task:
    """A task with random tensors that trains the named ones, or all."""
    tensors = random_tensors(model, ranks, seed)
    return Task(Plan(0, ranks, frozenset(tensors if trainable is None else trainable), **plan), tensors)


def changed_base(adapted: AdaptedModel, rounds: int = 4) -> BaseDelta:
    """A log of changes of rank 3 in every adapted module, the first of which have become a snapshot."""
    generator, base = torch.Generator().manual_seed(5), BaseDelta()
    for _ in range(rounds):
        step: dict[str, torch.Tensor] = {}
        for module, (out_features, in_features) in adapted.spec.modules.items():
            b, a = (torch.randn(shape, generator=generator) / 8 for shape in ((out_features, 3), (3, in_features)))
            step |= base_deltas.pair(module, b, a)
        base = base_deltas.extended(base, step)
    return base


@dataclass(frozen=True)
class Rows:
    """Examples of unlike lengths, or images; a `training.Examples`."""

    tensors: tuple[Mapping[str, torch.Tensor], ...]

    def __len__(self) -> int:
        return len(self.tensors)

    def subset(self, indices: Sequence[int]) -> Self:
        return replace(self, tensors=tuple(self.tensors[index] for index in indices))

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, max_batches: int | None = None
    ) -> Iterator[Batch]:
        order = list(range(len(self)))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator).tolist()
        starts = range(0, len(order), batch_size)
        for start in list(starts)[:max_batches]:
            yield collate([self.tensors[index] for index in order[start : start + batch_size]])


def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> Batch:
    longest = max(row["input_ids"].shape[0] for row in rows) if "input_ids" in rows[0] else 0
    fill = {"labels": -100}

    def stretched(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim != 1 or name == "user_vector":
            return tensor
        return torch.nn.functional.pad(tensor, (0, longest - tensor.shape[0]), value=fill.get(name, 0))

    return {name: torch.stack([stretched(name, row[name]) for row in rows]) for name in rows[0]}


def examples(family: str, count: int = 10, seed: int = 0) -> Rows:
    """Random inputs; texts are 3 to LENGTH words long."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, torch.Tensor]] = []
    for index in range(count):
        label = torch.tensor(index % NUM_LABELS)
        if SETTINGS[family].task == "image-classification":
            rows.append({"pixel_values": torch.randn(3, SIDE, SIDE, generator=generator), "labels": label})
            continue
        length = 3 + (4 * index) % (LENGTH - 2)
        words = torch.randint(3, WORDS, (length,), generator=generator)
        is_lm = SETTINGS[family].task == "causal-lm"
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words if is_lm else label})
    return Rows(tuple(rows))


def batch(family: str, count: int = 5, seed: int = 0) -> Batch:
    return next(examples(family, count, seed).batches(count))


def logits(model: AdaptedModel, inputs: Batch) -> torch.Tensor:
    """Without dropout."""
    model.base.eval()
    with torch.no_grad():
        return model.logits(inputs)
