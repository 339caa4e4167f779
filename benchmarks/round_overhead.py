"""A round's time over the sum of its bare training and evaluation steps: what planning, carrying, checking,
aggregating and recording add.

MiniLM-L6 (`fedpilot assets get minilm-l6`) with LoRA of rank 8, 4 clients of 64 texts of banking-like lengths, batch
16, one local epoch, an evaluation on 128 texts. A round through the engine and the same steps on the same batches in a
bare loop take turns. Seconds are the processor's by default; `--clock wall` for an idle machine.
Usage: python benchmarks/round_overhead.py [--rounds 5] [--clock cpu]
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import numpy as np
import torch

from fedpilot import assets, training
from fedpilot.algorithms import FedIT
from fedpilot.client import ClientModel
from fedpilot.config.setup import profile_of
from fedpilot.data.encoded import EncodedDataset, TokenStore
from fedpilot.engines.in_process import InProcess
from fedpilot.evaluation import evaluate
from fedpilot.manifest import manifest
from fedpilot.model import AdaptedModel, ModelSettings, build_model, cross_entropy
from fedpilot.record import RunDirectory
from fedpilot.runs import train
from fedpilot.training import Batch, TrainingSettings
from fedpilot.types import ClientProfile, Deployment, Site

CLIENTS, EXAMPLES, TEST, LABELS = 4, 64, 128, 77
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def texts(count: int, seed: int) -> EncodedDataset:
    """Random words in the lengths of short questions: 14 tokens on average, 40 at most."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.gamma(4.0, 3.5, count).astype(np.int64), 5, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(1000, 20000, offsets[-1]).astype(np.int32)
    labels = rng.integers(0, LABELS, count)
    store = TokenStore(tokens, offsets, labels, pad_id=0)
    return EncodedDataset(store, np.arange(count), labels, lengths, np.zeros(count, bool))


class Bare:
    """The steps of a round and nothing else: no engine, no plans, no copies, no checks."""

    def __init__(self, model: AdaptedModel, settings: TrainingSettings) -> None:
        self._model, self._settings = model, settings

    def train(self, batches: list[list[Batch]]) -> None:
        """As many fresh optimisers as there are clients, as many steps as there are batches."""
        model, settings = self._model, self._settings
        names = frozenset(model.parameters_by_name())
        for of_client in batches:
            model.set_trainable(names)
            model.base.train()
            step = training.make_step(model.loss, model.parameters_by_name(), settings, 1e-3, head=model.spec.head)
            for batch in of_client:
                float(step([batch]))

    def evaluate(self, batches: list[Batch]) -> None:
        """A forward pass and the loss of each batch."""
        self._model.base.eval()
        with torch.no_grad():
            for batch in batches:
                float(cross_entropy(self._model.logits(batch), batch["labels"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    options = parser.parse_args()
    clock: Callable[[], float] = CLOCKS[options.clock]
    torch.set_num_threads(1)
    source = ModelSettings(assets.resolve("minilm-l6"), max_length=40, dropout=0.0)
    settings = TrainingSettings(learning_rate=1e-3, batch_size=16)
    model = build_model(source, num_labels=LABELS)
    profile = profile_of(build_model(source, num_labels=LABELS, device="fake"), settings, checkpointing=False)
    people = tuple(ClientProfile(k, EXAMPLES, 2**40) for k in range(CLIENTS))
    data, test = [texts(EXAMPLES, k) for k in range(CLIENTS)], texts(TEST, 99)

    def seed(client_id: int, round: int) -> int:
        return 1000 * round + client_id

    def site(client_id: int, round: int) -> Site:
        made = ClientModel(model, data[client_id], settings, learning_rate=1e-3, seed=seed(client_id, round))
        return Site(people[client_id], made)

    algorithm = FedIT(spec=model.spec, profile=profile, rank=8)
    bare, ratios, rounds, sums = Bare(model, settings), list[float](), list[float](), list[float]()
    test_batches = list(test.batches(64, None))

    def drawn(round: int) -> list[list[Batch]]:
        # The same numbers of batches, and sorted into lengths alike; their order does not matter to the time.
        return [
            list(data[k].batches(settings.batch_size, torch.Generator().manual_seed(seed(k, round))))
            for k in range(CLIENTS)
        ]

    marks = [clock()]

    def after(deployment: Deployment) -> Mapping[str, float]:
        return evaluate(model, deployment, test, batch_size=64)

    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            directory = Path(folder) / "run"
            made = manifest({}, seed=0, dtype="float32")
            run = RunDirectory.open(directory) if number else RunDirectory.create(directory, made)
            engine = InProcess(algorithm, site)
            marks.append(clock())
            train(algorithm, engine, people, after, run, num_rounds=number)
            took = clock() - marks[-1]
            batches = drawn(number)
            started = clock()
            bare.train(batches)
            bare.evaluate(test_batches)
            alone = clock() - started
            if number > 1:  # round 0 only evaluates, round 1 warms up
                rounds.append(took)
                sums.append(alone)
                ratios.append(took / alone)
    print(f"{date.today()}, {platform.machine()}, 1 thread, {options.clock} seconds, torch {torch.__version__}")
    print(
        f"round {statistics.median(rounds):.2f} s, bare steps {statistics.median(sums):.2f} s, "
        f"{statistics.median(ratios):.3f} x ({min(ratios):.3f} to {max(ratios):.3f}); bound 1.10"
    )


if __name__ == "__main__":
    main()
