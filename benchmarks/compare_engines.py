"""fedpilot against the usual alternative on the same work: wall time, CPU time, peak memory, accuracy, their ratios.

    python benchmarks/compare_engines.py [--sweep] [--unlike] [--lean] [--runs 5] [--out FILE.json]

The baseline (`flower_trainer/app.py`) runs as its own process in a Python that has flwr[simulation]; ``--python`` names
it where that is not this one. Both engines run in turn, start-up included; with ``--lean`` fedpilot once more, in one
process with a thread for each core. Peak memory is the sum of the proportional
set size over a command's processes, sampled every half second.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from fedpilot.config import setup
from fedpilot.config.population import load_population
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.planning import trained_blocks
from fedpilot.training import native_arithmetic

HERE = Path(__file__).parent
APP = HERE / "flower_trainer" / "app.py"
MARK = "COMPARE_ENGINES_RUN"
"""In the environment of everything that a run starts."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run of one side."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    accuracy: float


def measured(command: list[str], environment: dict[str, str], accuracy_of: object) -> Measured:
    """Runs a command to its end and watches its processes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = Watch(process.pid)
    output = process.communicate()[0]
    wall = time.perf_counter() - started
    watch.stop()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output[-3000:]}")
    return Measured(wall, watch.cpu_s, watch.peak / 2**20, accuracy_of())  # type: ignore[operator]


def proportional_bytes(pid: int) -> int:
    """Its share of resident memory, as the kernel sums it up: going through its mappings here took half a core."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


class Watch:
    """Samples memory and CPU time of a process and all its descendants, those of other sessions included."""

    def __init__(self, pid: int) -> None:
        self.peak, self.cpu_s = 0, 0.0
        self._times: dict[tuple[int, float], float] = {}
        self._root = psutil.Process(pid)
        self._known: dict[int, psutil.Process] = {}
        self._others = set(psutil.pids()) - {pid}  # daemons of the run before may still be there, with our mark
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        self.cpu_s = sum(self._times.values())

    def _loop(self) -> None:
        while not self._done.wait(0.5):
            total = 0
            for process in self._family():
                try:
                    total += proportional_bytes(process.pid)
                    times = process.cpu_times()
                    self._times[process.pid, process.create_time()] = times.user + times.system
                except (psutil.Error, OSError):
                    continue
            self.peak = max(self.peak, total)

    def _family(self) -> list[psutil.Process]:
        """Descendants, and Ray's daemons that have left the family but hold our mark in their environment."""
        try:
            for child in [self._root, *self._root.children(recursive=True)]:
                self._known.setdefault(child.pid, child)
        except psutil.Error:
            pass
        for pid in set(psutil.pids()) - self._known.keys() - self._others:
            try:
                process = psutil.Process(pid)
                if MARK in process.environ():
                    self._known[pid] = process
                elif time.time() - process.create_time() > 2:  # a younger one may not have its environment yet
                    self._others.add(pid)
            except psutil.Error:
                continue
        return [process for process in self._known.values() if process.is_running()]


def environment(**extra: str) -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    quiet |= {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false", MARK: "1"}
    return {**os.environ, **quiet, **extra}


def write_job(folder: Path, recipe: Recipe, blocks: list[list[int]], **options: object) -> None:
    """The recipe's data and settings as the baseline reads them."""
    people = load_population(recipe)
    model = setup.resolved_model(recipe)
    for name, examples in [("test", people.test), *((f"client-{k}", e) for k, e in enumerate(people.examples))]:
        ids, labels = [], []
        for batch in examples.batches(64, None):
            for row, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                ids.append(row[mask.bool()].tolist())
                labels.append(int(label))
        (folder / f"{name}.json").write_text(json.dumps({"input_ids": ids, "labels": labels}))
    job = {
        "model": model.source,
        "num_labels": len(people.table.label_names),
        "pad_id": 0,
        "rank": recipe.model.rank,
        "alpha": recipe.model.alpha,
        "dropout": recipe.model.dropout,
        "batch_size": recipe.training.batch_size,
        "eval_batch_size": recipe.evaluation.batch_size,
        "learning_rate": recipe.training.learning_rate,
        "local_epochs": recipe.training.local_epochs,
        "rounds": recipe.run.rounds,
        "num_clients": len(people.clients),
        "blocks": blocks,
        "bf16": recipe.training.autocast == "bf16",
        **options,
    }
    (folder / "job.json").write_text(json.dumps(job))


def run_baseline(python: str, folder: Path) -> Measured:
    threads = json.loads((folder / "job.json").read_text())["threads"]
    return measured(
        [python, str(APP)],
        environment(FLOWER_TRAINER_FOLDER=str(folder), OMP_NUM_THREADS=str(threads)),
        lambda: json.loads((folder / "history.json").read_text())[-1]["accuracy"],
    )


def run_fedpilot(recipe_file: Path, overrides: list[str], out: Path) -> Measured:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "fedpilot.cli", "run", str(recipe_file), "--out", str(out)]
    command += [part for override in overrides for part in ("--set", override)]

    def accuracy() -> float:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["metrics"]["accuracy"]

    return measured(command, environment(), accuracy)


SETTINGS = [
    {"threads": threads, "cpus_per_client": per_client, "group_by_length": grouped}
    for threads, per_client in ((1, 1), (2, 2), (2, 1))
    for grouped in (False, True)
]
"""What the baseline may choose among; two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="a Python with flwr[simulation]")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="find the baseline's best settings first")
    parser.add_argument("--unlike", action="store_true", help="unlike plans and three local epochs")
    parser.add_argument("--lean", action="store_true", help="also fedpilot in one process")
    parser.add_argument("--set", action="append", default=[], help="override of the recipe, for both sides")
    parser.add_argument("--fedpilot-set", action="append", default=[], help="override for fedpilot alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe_file = HERE / "flower_trainer" / ("unlike.toml" if options.unlike else "job.toml")
    recipe = load_recipe(recipe_file, options.set)
    blocks = blocks_of(recipe)
    chosen = {**SETTINGS[1], "server_threads": os.cpu_count(), "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.sweep:
            times = {}
            for index, settings in enumerate(SETTINGS):
                write_job(folder, recipe, blocks, **{**chosen, **settings})
                times[index] = run_baseline(options.python, folder).wall_s
                print(f"sweep: {settings}: {times[index]:.1f} s", flush=True)
            chosen |= SETTINGS[min(times, key=times.__getitem__)]
        write_job(folder, recipe, blocks, **chosen)
        print(f"baseline with {chosen}", flush=True)
        ours = {"fedpilot": options.set + options.fedpilot_set}
        if options.lean:
            ours["fedpilot, one process"] = [*ours["fedpilot"], "run.workers=1", f"run.threads={os.cpu_count()}"]
        sides: dict[str, list[Measured]] = {"baseline": [], **{name: [] for name in ours}}
        for number in range(options.runs):
            sides["baseline"].append(run_baseline(options.python, folder))
            for name, overrides in ours.items():
                sides[name].append(run_fedpilot(recipe_file, overrides, folder / "run"))
            print(f"run {number + 1}: " + ", ".join(f"{k} {v[-1]}" for k, v in sides.items()), flush=True)
    report(sides, chosen, options.out, recipe_file.name)


def blocks_of(recipe: Recipe) -> list[list[int]]:
    """Blocks that each client trains: as fedpilot plans them in the first round."""
    made = setup.experiment(recipe)
    algorithm = made.algorithm(dry=True)
    rng = np.random.default_rng(0)
    plans = algorithm.plan(algorithm.init(rng), made.population.clients, rng)
    return [list(trained_blocks(algorithm.spec, plan)) for plan in plans]


def report(sides: dict[str, list[Measured]], chosen: dict[str, object], out: Path | None, work: str) -> None:
    rows = {
        side: {f.name: [getattr(m, f.name) for m in runs] for f in dataclasses.fields(Measured)}
        for side, runs in sides.items()
    }
    ratios = {
        side: {
            key: [b / f for b, f in zip(rows["baseline"][key], rows[side][key], strict=True)]
            for key in ("wall_s", "cpu_s", "peak_mib")
        }
        for side in rows
        if side != "baseline"
    }
    for side, columns in rows.items():
        print(side, {key: f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for key, v in columns.items()})
    for side, found in ratios.items():
        shown = {key: f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for key, v in found.items()}
        print(f"ratio to {side}", shown)
    if out is not None:
        facts = {
            "work": work,
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
            "bf16_products": native_arithmetic("cpu") == "bf16",
            "baseline_settings": chosen,
            "runs": rows,
            "ratios": ratios,
        }
        out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
