"""What the code that oneDNN generates for each shape of a bf16 product takes, with and without few lengths of batches.

Each arrangement in a process of its own: the clients of a recipe train an epoch one after the other, all blocks, one
thread; printed are processor seconds a step and how far the process's anonymous memory has grown after each client.
Usage: python benchmarks/batch_widths.py [RECIPE]
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from fedpilot import lora, training
from fedpilot.config import setup
from fedpilot.config.population import load_population
from fedpilot.config.recipe import load_recipe
from fedpilot.model import build_model
from fedpilot.types import Plan, Task

RECIPE = Path(__file__).parent / "flower_trainer" / "job.toml"
ARRANGEMENTS = {"float32": "float32", "bf16, each batch its longest": "bf16", "bf16, few lengths": "bf16"}


def anonymous_mib() -> int:
    """Of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) // 1024
    raise RuntimeError("smaps_rollup must have a line Anonymous, got none")


def measure(file: str, name: str) -> None:
    """Trains each client's epoch and prints what it took."""
    torch.set_num_threads(1)
    recipe = load_recipe(Path(file), [f"training.autocast={ARRANGEMENTS[name]}", "model.attention=auto"])
    people = load_population(recipe)
    model = build_model(
        setup.model_settings(recipe, people), num_labels=setup.num_labels(recipe, people), device="cpu", seed=0
    )
    ranks = dict.fromkeys(model.spec.modules, recipe.model.rank)
    tensors = lora.init(model.spec, ranks, np.random.default_rng(0))
    model.load(Task(Plan(0, ranks, frozenset(tensors)), tensors))
    model.base.train()
    before, seconds, grown = anonymous_mib(), [], []
    for number, examples in enumerate(people.examples):
        if name == "bf16, each batch its longest":
            examples = dataclasses.replace(examples, widths=())
        train = training.make_step(model.loss, model.parameters_by_name(), recipe.training, 1e-3, head=model.spec.head)
        started, steps = time.process_time(), 0
        for batch in examples.batches(recipe.training.batch_size, torch.Generator().manual_seed(number)):
            train([batch])
            steps += 1
        seconds.append((time.process_time() - started) / steps)
        grown.append(anonymous_mib() - before)
    print(f"{name}: ms a step {[round(1e3 * value) for value in seconds]}, MiB more {grown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default=str(RECIPE))
    parser.add_argument("--only", choices=ARRANGEMENTS, help="in this process")
    options = parser.parse_args()
    if options.only:
        measure(options.recipe, options.only)
        return
    for name in ARRANGEMENTS:
        subprocess.run([sys.executable, __file__, options.recipe, "--only", name], check=True)


if __name__ == "__main__":
    main()
