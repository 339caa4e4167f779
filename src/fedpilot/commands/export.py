"""What ``fedpilot export`` does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fedpilot import display, jobs
from fedpilot.attachments import InstancePool
from fedpilot.config import setup
from fedpilot.errors import ConfigError
from fedpilot.export import export_peft
from fedpilot.model import build_model
from fedpilot.pool_export import export_pool
from fedpilot.prediction import of_client
from fedpilot.record import RunDirectory


def export(
    directory: Path,
    out: Path,
    which: Literal["best", "last"],
    max_rank: int | None = None,
    client: str | None = None,
) -> None:
    """The adapter as a PEFT folder, a client's own where one is named; a pool as a folder with its loader."""
    console = display.console_for()
    found = RunDirectory.open(directory)
    deployment, facts = found.load_adapter(which)
    recipe, labels = jobs.recipe_of(directory), jobs.label_names(found)
    adapted = build_model(
        setup.resolved_model(recipe), num_labels=len(labels) or None, device="fake", seed=recipe.run.seed
    )
    deployment = of_client(recipe, adapted.spec, deployment, client, plain=True)
    about = {"method": recipe.algorithm.name, "data": recipe.data.source, "adapter": which, **flat(facts)}
    about |= {"classes": ", ".join(labels) or "none"}
    about |= {} if client is None else {"client": client}
    if isinstance(deployment.attachment, InstancePool):
        if max_rank is not None:
            raise ConfigError([f"--max-rank must be left out for a pool, which is exported as it is, got {max_rank}"])
        export_pool(adapted, deployment, out, labels=labels, facts=about)
        console.print(f"written to {out}: pool.safetensors, pool.json, load_pool.py, README.md", soft_wrap=True)
        return
    export_peft(adapted, deployment, out, facts=about, max_rank=max_rank)
    console.print(f"written to {out}: adapter_config.json, adapter_model.safetensors, README.md", soft_wrap=True)
    console.print(f"load it with: PeftModel.from_pretrained(base_model, {str(out)!r})", soft_wrap=True)


def flat(facts: Mapping[str, object]) -> dict[str, object]:
    """Nested mappings as ``outer inner`` keys."""
    result: dict[str, object] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            result |= {f"{name} {inner}": entry for inner, entry in flat(value).items()}
        else:
            result[name] = value
    return result
