"""Seconds of a round by the number of clients that train in one pass, on the device at hand.

A round of FedIT over clients that are alike: a BERT of random weights, LoRA of rank 8 on queries and values of all
blocks, AdamW, clipping, no dropout, texts of unlike lengths. Aggregation is part of the round, an evaluation is not.
All numbers of clients take turns, so that what else the machine does falls on all alike; medians, smallest and largest.
Usage: python benchmarks/clients_per_pass.py [--model minilm] [--clients 16] [--examples 64] [--repeats 5]
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date

import torch
from transformers import BertConfig, BertForSequenceClassification

from fedpilot import planning
from fedpilot.algorithms.fedit import FedIT
from fedpilot.client import ClientModel
from fedpilot.engines.in_process import InProcess
from fedpilot.model import AdaptedModel, ModelSettings
from fedpilot.model.loading import Base
from fedpilot.rounds import run_rounds
from fedpilot.together import Together
from fedpilot.training import Batch, TrainingSettings
from fedpilot.types import ClientProfile, LeftOut, Plan, Site

RANK, LABELS, WORDS = 8, 8, 1000
SHAPES = {"tiny": (64, 128, 2, 4), "minilm": (384, 1536, 6, 12), "bert-base": (768, 3072, 12, 12)}
"""Width, inner width, blocks, heads."""


@dataclass(frozen=True)
class Texts:
    """Random texts; a `training.Examples`."""

    rows: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: Sequence[int]) -> "Texts":
        return Texts(tuple(self.rows[index] for index in indices))

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, max_batches: int | None = None
    ) -> Iterator[Batch]:
        order = list(range(len(self)))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, len(order), batch_size)[:max_batches]:
            rows = [self.rows[index] for index in order[start : start + batch_size]]
            words = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            labels = torch.tensor([int(row[0]) % LABELS for row in rows])
            yield {"input_ids": words, "attention_mask": (words > 0).long(), "labels": labels}


@dataclass(frozen=True)
class Whole(FedIT):
    """FedIT on machines that have memory for everything: no profile is traced."""

    def plan(self, state: object, cohort: Sequence[ClientProfile], rng: object) -> Sequence[Plan | LeftOut]:
        return [planning.train_all(self.spec, client.client_id, self.rank) for client in cohort]


def build(shape: str, device: torch.device, length: int) -> AdaptedModel:
    width, inner, blocks, heads = SHAPES[shape]
    config = BertConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_labels=LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        vocab_size=WORDS,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    base = BertForSequenceClassification(config).to(device)
    head = {name: p.detach().cpu().clone() for name, p in base.named_parameters() if name.startswith("classifier.")}
    settings = ModelSettings("random", rank=RANK, max_length=length, attention="sdpa")
    return AdaptedModel(settings, Base(base, head, {}, nullcontext()))


def texts(count: int, length: int, seed: int) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 3, length + 1, (count,), generator=generator).tolist()
    return Texts(tuple(torch.randint(1, WORDS, (n,), generator=generator) for n in lengths))


def seconds(model: AdaptedModel, data: Sequence[Texts], per_pass: int, settings: TrainingSettings) -> float:
    """Of one round, from the plan to the new state."""
    people = [ClientProfile(k, len(own), 2**62) for k, own in enumerate(data)]

    def site_for(client_id: int, round: int) -> Site:
        own = ClientModel(model, data[client_id], settings, learning_rate=settings.learning_rate, seed=client_id)
        return Site(people[client_id], own)

    method = Whole(spec=model.spec, profile=None, rank=RANK)  # type: ignore[arg-type]
    engine = InProcess(method, site_for, together=Together(per_pass) if per_pass > 1 else None)
    started = time.perf_counter()
    for _ in run_rounds(method, engine, people, lambda deployment: {}, num_rounds=1, seed=0):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - started


def machine(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="minilm")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--examples", type=int, default=64, help="of each client")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of the longest text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--passes", default="1,2,4,8,16", help="numbers of clients in a pass")
    parser.add_argument("--autocast", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch.device(chosen)
    settings = TrainingSettings(1e-3, batch_size=options.batch_size, autocast=options.autocast)
    model = build(options.model, device, options.length)
    data = [texts(options.examples, options.length, seed=k) for k in range(options.clients)]
    counts = [int(count) for count in options.passes.split(",")]
    print(f"{date.today()}, {machine(device)}, torch {torch.__version__}, {options.autocast}")
    print(f"{options.model}, {options.clients} clients of {options.examples} texts, batches of {options.batch_size}")
    found: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(options.repeats + 1):  # the first of each is not counted
        for count in counts:
            took = seconds(model, data, count, settings)
            if repeat:
                found[count].append(took)
    alone = statistics.median(found[counts[0]])
    for count, times in found.items():
        middle = statistics.median(times)
        span = f"{min(times):.3f} to {max(times):.3f}"
        print(f"{count:3d} in a pass: {middle:.3f} s a round ({span}), {alone / middle:.2f} x of {counts[0]} in a pass")


if __name__ == "__main__":
    main()
