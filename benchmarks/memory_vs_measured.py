"""Predicted against measured peak bytes of real training steps on the CPU, over random plans.

Measured is the highest sum of live storages over two steps of the code that clients run, on the real model with real
tensors; predicted is arithmetic over traces that hold no weights. A process needs more than the sum of its tensors:
interpreter, libraries and the allocator's rounding are on neither side.

    python benchmarks/memory_vs_measured.py --plans 60 --out results/memory_vs_measured.json
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, LlamaConfig, ViTConfig
from transformers.utils import logging

from fedpilot import assets, lora, memory
from fedpilot.model import AdaptedModel, ModelSettings, Quantisation, build_model
from fedpilot.training import TrainingSettings
from fedpilot.types import ModelSpec, Plan


@dataclass(frozen=True)
class Setting:
    """A model and how it is trained; ``source`` is a packaged model, or a configuration of ours with random weights.

    ``length`` is in words, of images in pixels of a side.
    """

    source: str
    task: str
    target_modules: tuple[str, ...]
    attention: str
    autocast: str
    optimiser: str
    batch: int
    micro_batch: int
    length: int


_QV, _ALL = ("query", "value"), ("query", "key", "value", "intermediate.dense", "output.dense")
_VIT, _LLAMA = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TEXT, _IMAGE, _LM = "sequence-classification", "image-classification", "causal-lm"

# Few tokens under bf16: processors without instructions for it are thirty times slower there.
SETTINGS = {
    "bert": (
        Setting("minilm-l3", _TEXT, _QV, "eager", "float32", "adamw", 16, 4, 64),
        Setting("minilm-l3", _TEXT, _ALL, "sdpa", "bf16", "adamw", 4, 2, 12),
        Setting("minilm-l6", _TEXT, _ALL, "sdpa", "float32", "sgd", 8, 4, 48),
        Setting("minilm-l6", _TEXT, _QV, "eager", "bf16", "adamw", 4, 2, 12),
    ),
    "vit": (
        Setting("vit-tiny", _IMAGE, _VIT, "eager", "float32", "adamw", 8, 4, 96),
        Setting("vit-tiny", _IMAGE, _VIT, "sdpa", "bf16", "momentum", 2, 1, 96),
        Setting("dinov2-s", _IMAGE, _VIT, "sdpa", "float32", "adamw", 4, 2, 112),
        Setting("dinov2-s", _IMAGE, _VIT, "eager", "bf16", "adamw", 2, 1, 42),
    ),
    "llama": (
        Setting("llama-small", _LM, _LLAMA, "sdpa", "float32", "adamw", 8, 2, 64),
        Setting("llama-small", _LM, _LLAMA[:3], "eager", "bf16", "sgd", 2, 1, 12),
        Setting("smollm2-135m", _LM, ("q_proj", "v_proj"), "sdpa", "float32", "adamw", 2, 1, 32),
        Setting("smollm2-135m", _LM, _LLAMA, "eager", "float32", "momentum", 2, 1, 24),
    ),
}


@dataclass(frozen=True)
class Row:
    """One plan."""

    trained: tuple[int, ...]
    ranks: tuple[int, ...]
    checkpointed: tuple[int, ...]
    micro_batch: int
    moment: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


def folder_of(source: str, scratch: Path) -> str:
    """A folder with config and weights."""
    if source in assets.ASSETS:
        return str(assets.model(source))
    path = scratch / source
    if not path.exists():
        torch.manual_seed(0)
        if source == "vit-tiny":
            size = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 8, "image_size": 96}
            config = ViTConfig(**size, num_attention_heads=3)
            AutoModelForImageClassification.from_config(config).save_pretrained(path)
        else:
            size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "vocab_size": 8192}
            heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
            AutoModelForCausalLM.from_config(LlamaConfig(**size, **heads)).save_pretrained(path)
    return str(path)


def random_plan(rng: random.Random, spec: ModelSpec, setting: Setting) -> Plan:
    """Any blocks; a rank for each block, for each module, or for all; any recomputed; with or without frozen pairs."""
    blocks = range(spec.num_blocks)
    share = rng.choice((0.15, 0.5, 1.0))
    trained = [block for block in blocks if rng.random() < share] or [rng.choice(blocks)]
    frozen = rng.choice((None, 8))
    ranks: dict[str, int] = {}
    names: list[str] = []
    for module in spec.modules:
        if spec.block_of[module] in trained:
            ranks[module] = rng.choice((1, 4, 8, 16, 64))
            names += lora.names([module])
        elif frozen is not None:
            ranks[module] = frozen
    kept = rng.choice((0.0, 0.5, 1.0))
    recomputed = frozenset(block for block in blocks if rng.random() < kept)
    micro_batch = rng.choice((setting.batch, setting.micro_batch))
    trainable = frozenset(names) | frozenset(spec.head)
    return Plan(0, ranks, trainable, checkpointed=recomputed, micro_batch=micro_batch)


def compare(
    setting: Setting, plans: int, seed: int, scratch: Path, quantisation: Quantisation | None
) -> dict[str, object]:
    """Traces without weights, then measures with them."""
    labels = None if setting.task == _LM else 4
    settings = ModelSettings(
        folder_of(setting.source, scratch),
        task=setting.task,  # type: ignore[arg-type]
        target_modules=setting.target_modules,
        max_length=setting.length,
        image_size=setting.length if setting.task == _IMAGE else None,
        attention=setting.attention,  # type: ignore[arg-type]
        quantisation=quantisation,
    )
    training = TrainingSettings(
        learning_rate=1e-4,
        batch_size=setting.batch,
        optimiser=setting.optimiser,  # type: ignore[arg-type]
        autocast=setting.autocast,  # type: ignore[arg-type]
    )
    started = time.perf_counter()
    sketch = build_model(settings, num_labels=labels, device="fake")
    profile = memory.trace(
        lambda plan, size: sketch.program(plan, training, size),
        sketch.spec,
        batch=setting.batch,
        micro_batches=(setting.batch, setting.micro_batch),
    )
    traced = time.perf_counter() - started
    model = build_model(settings, num_labels=labels, device="cpu")
    rng = random.Random(seed)
    rows = list(rows_of(model, profile, training, [random_plan(rng, model.spec, setting) for _ in range(plans)]))
    return {
        **asdict(setting),
        "trace_seconds": round(traced, 2),
        **summary(rows),
        "plans": [asdict(row) for row in rows],
    }


def rows_of(
    model: AdaptedModel, profile: memory.MemoryProfile, training: TrainingSettings, plans: list[Plan]
) -> Iterator[Row]:
    """One row a plan."""
    for plan in plans:
        trained = sorted({model.spec.block_of[m] for m in plan.ranks if lora.a_name(m) in plan.trainable})
        ranks = {rank for module, rank in plan.ranks.items() if lora.a_name(module) in plan.trainable}
        yield Row(
            trained=tuple(trained),
            ranks=tuple(sorted(ranks)),
            checkpointed=tuple(sorted(plan.checkpointed)),
            micro_batch=plan.micro_batch or training.batch_size,
            moment=memory.breakdown(profile, plan).moment,
            predicted=memory.peak_bytes(profile, plan),
            measured=memory.measure_peak(model.program(plan, training)),
        )


def summary(rows: list[Row]) -> dict[str, object]:
    """How far off the predictions are."""
    errors = sorted(abs(row.error) for row in rows)
    return {
        "num_plans": len(rows),
        "exact": sum(row.predicted == row.measured for row in rows),
        "median_error": statistics.median(errors),
        "worst_error": errors[-1],
        "smallest_measured": min(row.measured for row in rows),
        "largest_measured": max(row.measured for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=SETTINGS, action="append", help="default: all")
    parser.add_argument("--plans", type=int, default=60, help="plans of a family")
    parser.add_argument("--quantisation", choices=("int8", "nf4"), help="of the frozen weights; default: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.system()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "seed": arguments.seed,
        "quantisation": arguments.quantisation or "none",
    }
    with tempfile.TemporaryDirectory() as scratch:
        for family in arguments.family or SETTINGS:
            settings = SETTINGS[family]
            found = []
            for setting in settings:
                plans = -(-arguments.plans // len(settings))
                found.append(compare(setting, plans, arguments.seed, Path(scratch), arguments.quantisation))
                print(family, {name: value for name, value in found[-1].items() if name != "plans"}, flush=True)
            result[family] = found
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
