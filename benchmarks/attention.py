"""Seconds of a training step with each attention kernel, by model, length and arithmetic; made for `faster_attention`.

Two blocks with random weights, LoRA of rank 8, one thread, processor seconds, in turn.
Usage: python benchmarks/attention.py [--repeats 5]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from fedpilot import lora, training
from fedpilot.model import AdaptedModel, ModelSettings
from fedpilot.model.loading import Base
from fedpilot.training import TrainingSettings, native_arithmetic
from fedpilot.types import Plan, Task

MODELS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "BERT, 384 wide, 12 heads": (
        BertConfig,
        BertForSequenceClassification,
        {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12},
    ),
    "BERT, 768 wide, 12 heads": (
        BertConfig,
        BertForSequenceClassification,
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    ),
    "Llama, 576 wide, 9 heads": (
        LlamaConfig,
        LlamaForSequenceClassification,
        {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
}
BATCHES = ((16, 16), (16, 64), (16, 128), (8, 256), (4, 512))
"""Examples and tokens of each."""


def step(name: str, attention: str, autocast: str, examples: int, length: int) -> Callable[[], object]:
    """A training step of the code that clients run."""
    config_of, model_of, sizes = MODELS[name]
    config = config_of(vocab_size=1000, num_hidden_layers=2, pad_token_id=0, attn_implementation=attention, **sizes)
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, dropout, 0.0)
    config.use_cache = False
    base = model_of(config)
    heads = ("classifier.", "score.")
    head = {n: p.detach().clone() for n, p in base.named_parameters() if n.startswith(heads)}
    settings = ModelSettings("random", max_length=length, attention=attention)  # type: ignore[arg-type]
    model = AdaptedModel(settings, Base(base, head, {"model_type": config.model_type}, nullcontext()))
    ranks = dict.fromkeys(model.spec.modules, settings.rank)
    tensors = lora.init(model.spec, ranks, np.random.default_rng(0))
    model.load(Task(Plan(0, ranks, frozenset(tensors)), tensors))
    model.base.train()
    how = TrainingSettings(learning_rate=1e-3, batch_size=examples, autocast=autocast)  # type: ignore[arg-type]
    train = training.make_step(model.loss, model.parameters_by_name(), how, 1e-3, head=model.spec.head)
    batch = model.made_up_batch(examples)
    return lambda: train([batch])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = ["float32", *(["bf16"] if native_arithmetic("cpu") == "bf16" else [])]
    print(f"{date.today()}, {platform.machine()}, one thread, processor seconds, torch {torch.__version__}")
    for name in MODELS:
        for examples, length in BATCHES:
            runs = {(a, k): step(name, a, k, examples, length) for k in kinds for a in ("sdpa", "eager")}
            times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
            for number in range(options.repeats + 1):
                for key, run in runs.items():
                    started = time.process_time()
                    run()
                    if number:  # the first one also makes the optimiser's state and generates code
                        times[key].append(1e3 * (time.process_time() - started))
            found = {key: statistics.median(values) for key, values in times.items()}
            shown = ", ".join(f"{k} {a} {found[a, k]:.0f} ms" for a, k in found)
            print(f"{name}, {examples} x {length}: {shown}", flush=True)


if __name__ == "__main__":
    main()
