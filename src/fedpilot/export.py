"""Writes a deployment as a PEFT folder: two files for `peft.PeftModel.from_pretrained`, and a model card for people.

What a method has merged into the base is folded into the pairs, so that one adapter is all that a user needs.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from fedpilot import base_deltas, lora
from fedpilot.errors import ModelError
from fedpilot.model import AdaptedModel, check_tensors, ranks_of
from fedpilot.types import Deployment, ModelSpec, Tensors

ROUNDING = 1e-6
"""Share of a change's norm that a folded pair may leave out: what float32 sums of many rounds have lost anyway."""

_PIPELINES = {
    "sequence-classification": ("text-classification", "AutoModelForSequenceClassification"),
    "image-classification": ("image-classification", "AutoModelForImageClassification"),
    "causal-lm": ("text-generation", "AutoModelForCausalLM"),
}
_STORED: Mapping[str, tuple[str, str]] = {
    "int8": ("load_in_8bit=True", "as it was trained, but that activations are rounded too"),
    "nf4": ('load_in_4bit=True, bnb_4bit_quant_type="nf4"', "as it was trained"),
}
"""How transformers is told to store a base, and what that gives."""


def export_peft(
    adapted: AdaptedModel,
    deployment: Deployment,
    directory: Path,
    *,
    base_model: str | None = None,
    facts: Mapping[str, object] | None = None,
    max_rank: int | None = None,
) -> Path:
    """Writes ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md``.

    Args:
        adapted: The model the tensors belong to; one without weights will do.
        deployment: What is exported; modules may differ in rank, and some may have no adapter.
        directory: Made if it is not there; files of the same names are replaced.
        base_model: Hub id or folder that users load the base from; the settings' source by default.
        facts: Rows of the model card's table about the run.
        max_rank: Largest rank of a pair; ``None`` for the ranks that changes have.

    Returns:
        The directory.

    Raises:
        ModelError: The tensors are not this model's, nothing was changed, or a weight that no pair adapts was.
    """
    if deployment.blocks is not None:
        raise ModelError(
            f"an exported adapter must be of the whole model, got one of blocks {deployment.blocks} alone, which PEFT "
            "cannot say; export what the method deploys"
        )
    check_tensors(adapted.spec, ranks_of(deployment.tensors), deployment.tensors)
    tensors, left_out = deployment.tensors, 0.0
    if deployment.base_delta.version or max_rank is not None:
        tensors, left_out = folded(adapted.spec, deployment, max_rank)
    ranks = ranks_of(tensors)
    if not ranks:
        raise ModelError(
            "an exported adapter must have at least one adapted module, got none; take an adapter of a later round"
        )
    base_model = base_model or adapted.settings.source
    directory.mkdir(parents=True, exist_ok=True)
    config = adapted.adapter_config(ranks)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.modules_to_save = list(adapted.head_modules()) or None
    config.save_pretrained(directory)
    state = {name: tensor.cpu() for name, tensor in adapted.peft_state(tensors).items()}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    card = model_card(adapted, ranks, base_model, facts or {}, left_out)
    (directory / "README.md").write_text(card, encoding="utf-8")
    return directory


def folded(spec: ModelSpec, deployment: Deployment, max_rank: int | None = None) -> tuple[Tensors, float]:
    """The deployment's tensors with one pair for each module whose weight it changes, base delta and pair together.

    A pair's rank is the change's own: of the singular values, the smallest are left out whose norm together is at most
    `ROUNDING` of the change's.

    Returns:
        Pairs and head; and the norm of what ``max_rank`` left out of all changes together, as a share of their norm.

    Raises:
        ModelError: The base delta changes a weight that no pair adapts, or ``max_rank`` is below 1.
    """
    if max_rank is not None and max_rank < 1:
        raise ModelError(f"max_rank must be at least 1, got {max_rank}; leave it out for the ranks that changes have")
    base = deployment.base_delta
    steps = [*base.steps] if not base.snapshot else [base.snapshot, *base.steps]
    changed = {module for step in steps for module in base_deltas.modules_of(step)}
    if strangers := sorted(changed - spec.modules.keys()):
        raise ModelError(
            f"an adapter can change {len(spec.modules)} adapted modules, got a change of {strangers[0]}; "
            "adapt it too, or use the run's own files"
        )
    result: dict[str, torch.Tensor] = {}
    lost = whole = 0.0
    for module in spec.modules:
        u, s, vh = _change(spec, deployment, steps, module).svd()
        tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[k]: norm of what rank k leaves out
        rank = int((tails > ROUNDING * tails[:1]).sum())
        kept = rank if max_rank is None else min(rank, max_rank)
        if kept:
            root = (s[:kept] / spec.scale).sqrt()
            result[lora.a_name(module)] = (root[:, None] * vh[:kept]).float()
            result[lora.b_name(module)] = (u[:, :kept] * root).float().contiguous()
            lost += float(tails[kept]) ** 2 if kept < rank else 0.0
            whole += float(tails[0]) ** 2
    head = {name: tensor for name, tensor in deployment.tensors.items() if name in spec.head}
    return result | head, math.sqrt(lost / whole) if whole else 0.0


def _change(spec: ModelSpec, deployment: Deployment, steps: list[Tensors], module: str) -> lora.ProductSum:
    """All that a module's weight has been changed by, in float64."""
    total = lora.ProductSum(*spec.modules[module], dtype=torch.float64)
    for step in steps:
        if base_deltas.weight_name(module) in step:
            change = step[base_deltas.weight_name(module)].double()
            total.add(change, torch.eye(change.shape[1], dtype=torch.float64))
        elif base_deltas.a_name(module) in step:
            total.add(step[base_deltas.b_name(module)].double(), step[base_deltas.a_name(module)].double())
    if lora.a_name(module) in deployment.tensors:
        b, a = deployment.tensors[lora.b_name(module)], deployment.tensors[lora.a_name(module)]
        total.add(b.double(), a.double(), spec.scale)
    return total


def model_card(
    adapted: AdaptedModel,
    ranks: Mapping[str, int],
    base_model: str,
    facts: Mapping[str, object],
    left_out: float = 0.0,
) -> str:
    """Markdown with the metadata block that model hubs read; ``left_out`` as `folded` gives it."""
    pipeline, auto_class = _PIPELINES[adapted.task_type]
    imported, option, beside = auto_class, "", ""
    if (kind := adapted.settings.quantisation) is not None:
        imported, option = f"{auto_class}, BitsAndBytesConfig", ", quantization_config=stored"
        options, words = _STORED[kind]
        if kind == "nf4" and adapted.settings.dtype == "bf16":
            options += ', bnb_4bit_compute_dtype="bfloat16"'
        options += f", llm_int8_skip_modules={list(adapted.unquantised)}"
        beside = f"stored = BitsAndBytesConfig({options})  # {words}; without it the base is in full\n"
    labels = "" if adapted.task_type == "causal-lm" else f", num_labels={adapted.num_labels}"
    labels += "" if adapted.padding is None else f", pad_token_id={adapted.padding}"
    head = ", ".join(adapted.head_modules()) or "nothing"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    cut = f" Cut to rank {max(ranks.values())}: {left_out:.3g} of the changes' Frobenius norm is left out."
    cut = cut if left_out else ""
    return f"""---
base_model: {base_model}
library_name: peft
pipeline_tag: {pipeline}
tags:
- lora
- federated
- fedpilot
---

# LoRA adapter of {base_model}

Trained by fedpilot across clients that differ in memory; no client's data left it.

```python
from peft import PeftModel
from transformers import {imported}

{beside}base = {auto_class}.from_pretrained("{base_model}"{labels}{option})
model = PeftModel.from_pretrained(base, "<this folder>")
```

## The adapter

{_ranks_table(adapted, ranks)}

Scale (alpha / rank) of every pair: {adapted.spec.scale:g}. Trained in full: {head}.{cut}

## The run

| what | value |
| --- | --- |
{rows}
"""


def _ranks_table(adapted: AdaptedModel, ranks: Mapping[str, int]) -> str:
    """Ranks of the adapted modules, a line for each block; `-` where a block has no adapter."""
    lines = ["| block | ranks |", "| --- | --- |"]
    for block in range(adapted.spec.num_blocks):
        modules = [m for m in ranks if adapted.spec.block_of[m] == block]
        cell = ", ".join(f"{module.rpartition('.')[2]} {ranks[module]}" for module in modules)
        lines.append(f"| {block} | {cell or '-'} |")
    return "\n".join(lines)
