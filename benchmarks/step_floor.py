"""A training step over the time of its matrix products alone: same shapes, same run, in turn.

The products of the frozen weights forward and for their inputs' gradients, of the pairs forward and backward, of the
attention scores, and of the head are run as bare `torch.mm` and `torch.bmm` calls into tensors that are there already.
Seconds are those of the processor by default, so that what else the machine does is not counted; `--clock wall` for an
idle machine and several threads.
Usage: python benchmarks/step_floor.py [--threads 1] [--repeats 7] [--steps 2] [--clock cpu] [--only MiniLM]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from fedpilot import lora, training
from fedpilot.model import AdaptedModel, ModelSettings
from fedpilot.model.loading import Base
from fedpilot.training import TrainingSettings
from fedpilot.types import Plan, Task

RANK, LABELS = 8, 77


@dataclass(frozen=True)
class Case:
    """A model, a batch and a bound."""

    name: str
    width: int
    inner: int
    blocks: int
    heads: int
    examples: int
    length: int
    bound: float

    def model(self, attention: str, last_block: str = "whole") -> AdaptedModel:
        """Random weights; LoRA of rank 8 on queries and values of all blocks."""
        config = BertConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_labels=LABELS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            vocab_size=1000,
            attn_implementation=attention,
        )
        base = BertForSequenceClassification(config)
        head = {name: p.detach().clone() for name, p in base.named_parameters() if name.startswith("classifier.")}
        settings = ModelSettings(
            "random", rank=RANK, max_length=self.length, attention=attention, last_block=last_block
        )
        return AdaptedModel(settings, Base(base, head, {"model_type": "bert"}, nullcontext()))


CASES = (
    Case("MiniLM-L6, 16 x 25", 384, 1536, 6, 12, 16, 25, 1.7),
    Case("BERT-base, 16 x 64", 768, 3072, 12, 12, 16, 64, 1.25),
)


def products(case: Case, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """All matrix products of a step, and their floating-point operations."""
    tokens, width, inner, rank = case.examples * case.length, case.width, case.inner, RANK
    flat: list[tuple[int, int, int, int]] = []  # rows, inner, columns, how often
    for rows, columns in ((width, width),) * 4 + ((width, inner), (inner, width)):
        flat.append((tokens, rows, columns, case.blocks))  # forward
        flat.append((tokens, columns, rows, case.blocks))  # gradient of the input
    flat += [(tokens, width, rank, 2 * case.blocks), (tokens, rank, width, 2 * case.blocks)]  # pairs, forward
    flat += [(tokens, width, rank, 2 * case.blocks), (tokens, rank, width, 2 * case.blocks)]  # their inputs
    flat += [(rank, tokens, width, 2 * case.blocks), (width, tokens, rank, 2 * case.blocks)]  # A's and B's gradients
    # The lowest block needs no gradient of its input: its keys' whole product, its queries' and values' of the base.
    skipped = 3
    groups, size = case.examples * case.heads, width // case.heads
    batched = [(groups, case.length, size, case.length), (groups, case.length, case.length, size)] * 3  # and backward
    operands = [(torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype), count) for m, k, n, count in flat]
    outputs = [torch.empty(a.shape[0], b.shape[1], dtype=dtype) for a, b, _ in operands]
    pairs = [(torch.randn(g, m, k, dtype=dtype), torch.randn(g, k, n, dtype=dtype)) for g, m, k, n in batched]
    operations = sum(2 * m * k * n * count for m, k, n, count in flat) - skipped * 2 * tokens * width * width
    operations += case.blocks * sum(2 * g * m * k * n for g, m, k, n in batched)
    # Weights are as many as in the model, so that the caches are as cold; backward passes read those of the forward.
    weights = [[b.clone() for _ in range(count)] for _, b, count in operands]
    for forward in range(0, 12, 2):
        weights[forward + 1] = [weight.t() for weight in weights[forward]]

    def run() -> None:
        left = skipped
        for (a, _, count), many, out in zip(operands, weights, outputs, strict=True):
            for number in range(count):
                if left and number == 0 and a.shape == (tokens, width) and many[0].shape == (width, width):
                    left -= 1
                    continue
                torch.mm(a, many[number], out=out)
        for _ in range(case.blocks):
            for a, b in pairs:
                torch.bmm(a, b)

    return run, operations


def step(case: Case, attention: str, autocast: str) -> Callable[[], None]:
    """A training step of the code that clients run."""
    model = case.model(attention)
    ranks = dict.fromkeys(model.spec.modules, RANK)
    tensors = lora.init(model.spec, ranks, np.random.default_rng(0))
    model.load(Task(Plan(0, ranks, frozenset(tensors)), tensors))
    model.base.train()
    settings = TrainingSettings(learning_rate=1e-3, batch_size=case.examples, autocast=autocast)
    train = training.make_step(model.loss, model.parameters_by_name(), settings, 1e-3, head=model.spec.head)
    batch = model.made_up_batch(case.examples)
    return lambda: training.checked(train([batch]), 1) and None


CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def measured(
    runs: Sequence[Callable[[], None]], repeats: int, count: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Seconds of each, in turn, so that what else the machine does falls on all alike."""

    def seconds(run: Callable[[], None]) -> float:
        started = clock()
        for _ in range(count):
            run()
        return (clock() - started) / count

    for run in runs:
        seconds(run)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, times, strict=True):
            found.append(seconds(run))
    return times


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself."""
    with open("/proc/cpuinfo") as file:
        flags = file.read()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{date.today()}, {platform.machine()}, {options.threads} thread(s), {options.clock} seconds, "
        f"torch {torch.__version__}"
    )
    kinds = ["float32", *(["bf16"] if has_bf16() else [])]
    print(f"arithmetic: {', '.join(kinds)}" + ("" if has_bf16() else " (the processor has no bf16 products)"))
    for case in (case for case in CASES if options.only in case.name):
        for kind in kinds:
            dtype = torch.bfloat16 if kind == "bf16" else torch.float32
            bare, operations = products(case, dtype)
            names = ("sdpa", "eager")
            times = measured(
                [bare, *(step(case, name, kind) for name in names)],
                options.repeats,
                options.steps,
                CLOCKS[options.clock],
            )
            floor = statistics.median(times[0])
            print(f"{case.name}, {kind}: {operations / 1e9:.1f} GFLOP, products alone {1e3 * floor:.1f} ms", end=" ")
            print(f"({operations / floor / 1e9:.0f} GFLOP/s)")
            for name, found in zip(names, times[1:], strict=True):
                ratios = [a / b for a, b in zip(found, times[0], strict=True)]
                print(
                    f"  step, {name}: {1e3 * statistics.median(found):.1f} ms, {statistics.median(ratios):.2f} x "
                    f"({min(ratios):.2f} to {max(ratios):.2f}); bound {case.bound}"
                )


if __name__ == "__main__":
    main()
