"""Writes a pool of adapters as a folder: tensors, facts, a model card, and a loader that needs no fedpilot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file

from fedpilot.attachments import InstancePool, last_layer
from fedpilot.errors import ModelError
from fedpilot.model import AdaptedModel, check_tensors
from fedpilot.types import Deployment

LOADER = Path(__file__).parent / "model" / "pool_loader.py"


def export_pool(
    adapted: AdaptedModel,
    deployment: Deployment,
    directory: Path,
    *,
    labels: Sequence[str],
    base_model: str | None = None,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Writes ``pool.safetensors``, ``pool.json``, ``load_pool.py`` and ``README.md``.

    Args:
        adapted: The model the tensors belong to; one without weights will do.
        deployment: With an `InstancePool`.
        directory: Made if it is not there; files of the same names are replaced.
        labels: Names of the classes.
        base_model: Hub id or folder that users load the base from; the settings' source by default.
        facts: Rows of the model card's table about the run.

    Returns:
        The directory.

    Raises:
        ModelError: The tensors are not this model's, or frozen weights were changed besides.
    """
    pool, spec = deployment.attachment, adapted.spec
    if not isinstance(pool, InstancePool):
        raise ModelError(f"an exported pool must be an InstancePool, got {type(pool).__name__}; export the pairs")
    if deployment.base_delta.version:
        raise ModelError("an exported pool must leave the base's weights as they are, got a run that changed them")
    check_tensors(spec, {}, deployment.tensors, pool)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.cpu().contiguous() for n, t in deployment.tensors.items()}, directory / "pool.safetensors")
    known = {
        "base_model": base_model or adapted.settings.source,
        "task": adapted.task_type,
        "labels": list(labels),
        "pool": pool.pool,
        "size": pool.size,
        "top_k": pool.top_k,
        "query": pool.query,
        "query_blocks": pool.query_blocks,
        "blocks": adapted.block_path,
        "scale": spec.scale,
        "modules": list(spec.modules),
        "classifier": last_layer(spec),
        "head": [name for name in spec.head if name not in pool.replaces(spec)],
        "inputs": dict(adapted.extra_inputs),
    }
    (directory / "pool.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    (directory / "load_pool.py").write_text(LOADER.read_text(encoding="utf-8"), encoding="utf-8")
    (directory / "README.md").write_text(_card(known, pool, facts or {}), encoding="utf-8")
    return directory


def _card(known: Mapping[str, object], pool: InstancePool, facts: Mapping[str, object]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    kind = "scale-and-shift sets" if pool.pool == "ssf" else f"LoRAs of rank {pool.rank}"
    return f"""---
base_model: {known["base_model"]}
tags:
- federated
- fedpilot
---

# Pool of adapters of {known["base_model"]}

{pool.size} {kind} with a key each. Every input is run with the mean of the {pool.top_k} whose keys are nearest to what
the base model makes of it. Trained by fedpilot across clients; no client's data left it.

```python
from load_pool import load  # needs torch, transformers and safetensors

model = load("<this folder>")
logits = model(**inputs)  # of the base model's tokenizer or image processor
```

## The run

| what | value |
| --- | --- |
{rows}
"""
