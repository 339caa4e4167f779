"""A training step whose last block computes the first position alone beside one that computes all, in turn.

    python benchmarks/last_block.py [--repeats 9]

Processor seconds of one thread, medians; MiniLM-L6's shape with random weights, batches of 16 x 25, AdamW, rank 8. With
remembered prefixes only the trained blocks run, as in every local epoch but the first.
"""

import argparse
import itertools
import platform
import statistics
import time
from datetime import date

import torch
from step_floor import CASES, RANK

from fedpilot import lora
from fedpilot.training import TrainingSettings
from fedpilot.types import Plan

MODES = ("whole", "first-position")


def times(trained: int, cache_bytes: int, repeats: int) -> dict[str, list[float]]:
    """Mode -> seconds of a step, of ``repeats`` in turn."""
    programs = {}
    for mode in MODES:
        adapted = CASES[0].model("sdpa", mode)
        blocks = range(adapted.spec.num_blocks)
        names = lora.names(lora.blocks_modules(adapted.spec, blocks[-trained:]))
        plan = Plan(0, dict.fromkeys(adapted.spec.modules, RANK), frozenset(names) | frozenset(adapted.spec.head))
        programs[mode] = adapted.program(plan, TrainingSettings(learning_rate=1e-3, batch_size=CASES[0].examples)).step
        adapted.remember_prefix(plan.trainable, cache_bytes)
        programs[mode]()
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _, mode in itertools.product(range(repeats), MODES):
        started = time.process_time()
        programs[mode]()
        found[mode].append(time.process_time() - started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, one thread, processor seconds")
    print("| trained | prefix | whole | first position | whole / first position |\n|---|---|---|---|---|")
    for trained, cache_bytes in ((6, 0), (3, 0), (1, 0), (3, 2**26), (1, 2**26)):
        found = times(trained, cache_bytes, options.repeats)
        ratios = sorted(a / b for a, b in zip(*found.values(), strict=True))
        medians = [statistics.median(seconds) * 1000 for seconds in found.values()]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        prefix = "remembered" if cache_bytes else "-" if trained == CASES[0].blocks else "run"
        print(f"| top {trained} | {prefix} | {medians[0]:.0f} ms | {medians[1]:.0f} ms | {spread} |", flush=True)


if __name__ == "__main__":
    main()
