"""What a round costs the server beside its clients, for 1,000 to 100,000 registered clients with 100 a round.

Clients do nothing but keep a vector, which goes to disk, and send back what they got. Planning is Fed-piLot's exact
allocation on MiniLM-L6's shapes; everything is recorded as in a real run. Each population runs in a process of its own,
so that memory is its own. Seconds are the processor's. The share is that of a round whose clients take a second each,
one after the other, which is little for a local update.
Usage: python benchmarks/population.py [--rounds 6]
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

import torch
from transformers import BertConfig

from fedpilot import memory, planning
from fedpilot.algorithms import FedPilot
from fedpilot.config.setup import profile_of
from fedpilot.engines.in_process import InProcess
from fedpilot.engines.kept import DiskKept
from fedpilot.manifest import manifest
from fedpilot.model import ModelSettings, build_model
from fedpilot.record import RunDirectory
from fedpilot.rounds import SAMPLING, generator, sample
from fedpilot.runs import train
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile, Deployment, Site, Task, Upload

SIZES = (1_000, 10_000, 100_000)
COHORT, RANK, MIB = 100, 8, 2**20
CLIENT_SECONDS = 1.0


@dataclass(frozen=True)
class Idle(FedPilot):
    """Fed-piLot whose clients send back what they got."""

    def local_update(self, task: Task, site: Site) -> Upload:
        site.kept["own"] = {"vector": torch.full((384,), float(site.profile.client_id))}
        sent = {name: task.tensors[name] for name in task.plan.trainable}
        return Upload(site.profile.client_id, site.profile.num_examples, sent, {"loss": 1.0})


def resident() -> float:
    """Resident MiB of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB


def one(size: int, rounds: int) -> dict[str, float]:
    """The figures of one population."""
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
        BertConfig(**shape, vocab_size=1000).save_pretrained(folder)
        settings = ModelSettings(folder, rank=RANK, max_length=25, dropout=0.0)
        sketch = build_model(settings, num_labels=77, device="fake")
        profile = profile_of(sketch, TrainingSettings(learning_rate=1e-3, batch_size=16), checkpointing=False)
        algorithm = Idle(spec=sketch.spec, profile=profile, rank=RANK, warmup_rounds=10**6)
        before = resident()
        everything = memory.peak_bytes(profile, planning.train_all(sketch.spec, 0, RANK))
        top = memory.peak_bytes(profile, planning.train_blocks(sketch.spec, 0, RANK, [5]))
        budgets = [top, (top + everything) // 2, everything, 2 * everything]
        people = tuple(ClientProfile(k, 64 + k % 7, budgets[k % 4], name=f"client {k}") for k in range(size))
        table = resident() - before
        store = DiskKept(Path(folder) / "kept")
        engine = InProcess(algorithm, lambda client_id, round: Site(people[client_id], _NoModel()), store)
        directory = RunDirectory.create(Path(folder) / "run", manifest({}, seed=0, dtype="float32"))
        seen: list[float] = []
        marks = [time.process_time()]

        def evaluate(deployment: Deployment) -> dict[str, float]:
            seen.append(resident())
            marks.append(time.process_time())
            return {"accuracy": 0.5}

        train(algorithm, engine, people, evaluate, directory, num_rounds=rounds, cohort_size=COHORT, checkpoint_every=1)
        each = [b - a for a, b in pairwise(marks[2:])]
        drawn = []
        for round in range(1, 6):
            started = time.process_time()
            sample(people, COHORT, generator(0, round, SAMPLING))
            drawn.append(time.process_time() - started)
        lines = directory.lines()[2:]
        plan = statistics.median(float(line["seconds"]["plan"]) for line in lines)  # type: ignore[index]
        return {
            "round_s": statistics.median(each),
            "sampling_s": statistics.median(drawn),
            "plan_s": plan,
            "table_mib": table,
            "grown_mib": seen[-1] - seen[1],
            "resident_mib": seen[-1],
            "left_out": float(sum(len(line["left_out"]) for line in lines)),  # type: ignore[arg-type]
        }


class _NoModel:
    """Clients that do nothing need none."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--one", type=int, help="run this population only, and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(one(options.one, options.rounds)))
        return
    print(f"{date.today()}, {platform.machine()}, {COHORT} clients a round, {options.rounds} rounds, cpu seconds")
    for size in SIZES:
        command = [sys.executable, __file__, "--one", str(size), "--rounds", str(options.rounds)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        share = found["round_s"] / (found["round_s"] + COHORT * CLIENT_SECONDS)
        print(
            f"{size:>7} clients: {1e3 * found['round_s']:.0f} ms a round beside its clients "
            f"(sampling {1e3 * found['sampling_s']:.1f}, planning {1e3 * found['plan_s']:.0f} wall), "
            f"{100 * share:.2f} % of a round; table {found['table_mib']:.0f} MiB, "
            f"resident {found['resident_mib']:.0f} MiB, grown by {found['grown_mib']:.1f} MiB over the rounds"
        )


if __name__ == "__main__":
    main()
