"""Writes a deployment as a PEFT folder: two files for `peft.PeftModel.from_pretrained`, and a model card for people."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from fedpilot.errors import ModelError
from fedpilot.model import AdaptedModel, check_tensors, ranks_of
from fedpilot.types import Deployment

_PIPELINES = {
    "sequence-classification": ("text-classification", "AutoModelForSequenceClassification"),
    "image-classification": ("image-classification", "AutoModelForImageClassification"),
    "causal-lm": ("text-generation", "AutoModelForCausalLM"),
}


def export_peft(
    adapted: AdaptedModel,
    deployment: Deployment,
    directory: Path,
    *,
    base_model: str | None = None,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Writes ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md``.

    Args:
        adapted: The model the tensors belong to; one without weights will do.
        deployment: What is exported; modules may differ in rank, and some may have no adapter.
        directory: Made if it is not there; files of the same names are replaced.
        base_model: Hub id or folder that users load the base from; the settings' source by default.
        facts: Rows of the model card's table about the run.

    Returns:
        The directory.

    Raises:
        ModelError: The tensors are not this model's, there is no adapter, or the base's own weights were changed.
    """
    ranks = ranks_of(deployment.tensors)
    check_tensors(adapted.spec, ranks, deployment.tensors)
    if not ranks:
        raise ModelError("an exported adapter must have at least one adapted module, got none")
    if deployment.base_delta.version:
        raise ModelError(
            f"an adapter must leave the base as it is, got a base changed {deployment.base_delta.version} times; "
            "export from an algorithm that keeps everything in the adapter"
        )
    base_model = base_model or adapted.settings.source
    directory.mkdir(parents=True, exist_ok=True)
    config = adapted.adapter_config(ranks)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.modules_to_save = list(adapted.head_modules()) or None
    config.save_pretrained(directory)
    tensors = {name: tensor.cpu() for name, tensor in adapted.peft_state(deployment.tensors).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "README.md").write_text(model_card(adapted, ranks, base_model, facts or {}), encoding="utf-8")
    return directory


def model_card(adapted: AdaptedModel, ranks: Mapping[str, int], base_model: str, facts: Mapping[str, object]) -> str:
    """Markdown with the metadata block that model hubs read."""
    pipeline, auto_class = _PIPELINES[adapted.task_type]
    labels = "" if adapted.task_type == "causal-lm" else f", num_labels={adapted.num_labels}"
    head = ", ".join(adapted.head_modules()) or "nothing"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
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
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base_model}"{labels})
model = PeftModel.from_pretrained(base, "<this folder>")
```

## The adapter

{_ranks_table(adapted, ranks)}

Scale (alpha / rank) of every pair: {adapted.spec.scale:g}. Trained in full: {head}.

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
