"""How long planning takes: every client has its own values, budget and deadline; all share one cost table.

    python benchmarks/planning_speed.py                      # 10,000 clients x 32 blocks x 4 ranks, 5 runs each
    python benchmarks/planning_speed.py --clients 500 --runs 1

The table is that of a transformer with equal blocks, in units u = batch x length x width x 4 bytes: a block that is
passed through saves 14 u, a trained one 1 u more and what its rank adds, a checkpointed one 1 u, with 15 u at its
backward pass; the lowest block saves a little less. Budgets go from a little less than the least that any plan needs
to a little more than everything plain, deadlines likewise. Values are a block's value times the square root of the
relative rank ("rank weight"), free (rising with the rank, without a pattern), or equal for all blocks, so that nearly
everything ties.

A sample of clients is checked: alone against together, and, for memory alone, against a plain dynamic program that
knows no bounds.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedpilot.allocation import Allocation, allocate, allocate_many, choice_values, flops, peak
from fedpilot.types import BlockCosts, Choice, CostTable

RANKS = (4, 8, 16, 32)
BATCH, LENGTH, WIDTH, MODULES = 16, 64, 1024, 4
UNIT = BATCH * LENGTH * WIDTH * 4


def transformer_table(num_blocks: int, *, checkpointing: bool) -> CostTable:
    """Costs of a transformer with equal blocks, float32, AdamW, four adapted square modules a block."""
    choices = [Choice(None), *map(Choice, RANKS)]
    if checkpointing:
        choices += [Choice(choice.rank, checkpointed=True) for choice in choices]
    products = 2 * BATCH * LENGTH * 12 * WIDTH**2  # of one forward pass through a block

    def costs(*, lowest: bool) -> BlockCosts:
        columns: dict[str, list[int]] = {name: [] for name in BlockCosts.__dataclass_fields__}
        for choice in choices:
            rank, held = choice.rank or 0, choice.rank or max(RANKS)
            parameters = MODULES * 2 * WIDTH * rank * 4
            plain = (12 if lowest else 14) * UNIT + (UNIT + MODULES * BATCH * LENGTH * rank * 4 if rank else 0)
            again = plain + UNIT if choice.checkpointed else 5 * UNIT // 2
            columns["resident"].append(3 * parameters if rank else MODULES * 2 * WIDTH * held * 4)
            columns["saved"].append(UNIT if choice.checkpointed else plain)
            columns["forward_peak"].append(5 * UNIT if choice.checkpointed else plain + 2 * UNIT)
            columns["backward_peak"].append(again + parameters)
            columns["gradient"].append(parameters)
            columns["optimiser_peak"].append(2 * WIDTH * rank * 4)
            passes = 1 + (0.25 if lowest else 1) + choice.checkpointed
            adapters = 2 * BATCH * LENGTH * MODULES * 2 * WIDTH * held
            columns["flops"].append(int(passes * products) + adapters * (3 if rank else 2))
        return BlockCosts(**{name: np.tile(np.array(column), (num_blocks, 1)) for name, column in columns.items()})

    each = np.ones(num_blocks, dtype=np.int64)
    return CostTable(
        choices=tuple(choices),
        above=costs(lowest=False),
        lowest=costs(lowest=True),
        frozen_resident=each * MODULES * 2 * WIDTH * max(RANKS) * 4,
        frozen_forward_peak=each * 6 * UNIT,
        frozen_flops=each * products,
        fixed=num_blocks * 12 * WIDTH**2 * 4,
        head_peak=2 * UNIT,
        head_gradient=40_000,
        head_optimiser_peak=80_000,
        head_flops=10**10,
    )


@dataclass(frozen=True)
class Clients:
    """Values (clients, blocks, choices), budgets (clients,), operations allowed (clients,) or None."""

    values: npt.NDArray[np.float64]
    budgets: npt.NDArray[np.int64]
    max_flops: npt.NDArray[np.int64] | None


def draw_clients(table: CostTable, num: int, rng: np.random.Generator, *, pattern: str, deadline: bool) -> Clients:
    num_blocks = len(table.frozen_resident)
    if pattern in ("rank weight", "equal"):
        weights = {rank: (rank / max(RANKS)) ** 0.5 for rank in RANKS}
        block_values = rng.random((num, num_blocks)) if pattern == "rank weight" else np.ones((num, num_blocks))
        values = choice_values(table, block_values, weights)
    else:
        rising = np.sort(rng.random((num, num_blocks, len(RANKS))), axis=2)
        of_rank = [None if choice.rank is None else RANKS.index(choice.rank) for choice in table.choices]
        nothing = np.zeros((num, num_blocks))
        values = np.stack([nothing if at is None else rising[:, :, at] for at in of_rank], axis=2)
    least = [None] * (num_blocks - 1) + [Choice(min(RANKS))]
    most = [Choice(max(RANKS))] * num_blocks
    slowest = [Choice(max(RANKS), checkpointed=Choice(None, True) in table.choices)] * num_blocks

    def between(low: int, high: int) -> npt.NDArray[np.int64]:
        return (0.99 * low + rng.random(num) * 1.03 * (high - low)).astype(np.int64)

    budgets = between(peak(table, least), peak(table, most))
    return Clients(values, budgets, between(flops(table, least), flops(table, slowest)) if deadline else None)


def reference_value(table: CostTable, values: npt.NDArray[np.float64], budget: int) -> float | None:
    """The optimum for memory alone: all distinct states of the recursion, block after block, with nothing clever."""
    saved, best = {(table.head_peak, table.head_gradient, 0): 0.0}, float("-inf")
    for block in range(len(values) - 1, -1, -1):
        here: dict[tuple[int, int, int], float] = {}
        standing = table.fixed + int(table.frozen_resident[:block].sum())
        for costs, ends in ((table.lowest, True), (table.above, False)):
            for choice, meaning in enumerate(table.choices):
                if ends and meaning.rank is None:
                    continue
                names = ("resident", "saved", "forward_peak", "backward_peak", "gradient")
                resident, kept, forward, backward, gradient = (int(getattr(costs, n)[block, choice]) for n in names)
                worth = float(values[block, choice])
                for (highest, below, held), value in saved.items():
                    top = max(kept + max(highest, below + held + backward), held + forward) + resident
                    if top + standing > budget:
                        continue
                    if ends:  # the scratch of this table's optimiser is never the highest stage
                        best = max(best, value + worth)
                    else:
                        key = (top, below + gradient, held + resident)
                        here[key] = max(here.get(key, float("-inf")), value + worth)
        saved = here
    return None if best == float("-inf") else best


def worth(plan: Allocation | None) -> float | None:
    return None if plan is None else plan.value


def check(
    table: CostTable, clients: Clients, plans: list[Allocation | None], rng: np.random.Generator, num: int
) -> tuple[int, int]:
    """How many of the clients of a sample were checked alone, and by the reference; raises where one differs."""
    sample = rng.choice(len(plans), size=min(num, len(plans)), replace=False).tolist()
    for client in sample:
        limit = None if clients.max_flops is None else int(clients.max_flops[client])
        alone = allocate(table, clients.values[client], int(clients.budgets[client]), max_flops=limit)
        together = plans[client]
        np.testing.assert_allclose(worth(alone) or 0.0, worth(together) or 0.0, rtol=1e-9)
        if together is not None:
            assert peak(table, together.choices) == together.peak_bytes <= clients.budgets[client]
            assert flops(table, together.choices) == together.flops
            assert limit is None or together.flops <= limit
    if clients.max_flops is not None or any(choice.checkpointed for choice in table.choices):
        return len(sample), 0
    for client in sample[:3]:
        found = reference_value(table, clients.values[client], int(clients.budgets[client]))
        np.testing.assert_allclose(found or 0.0, worth(plans[client]) or 0.0, rtol=1e-9)
    return len(sample), len(sample[:3])


def machine() -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, numpy {np.__version__}, OMP_NUM_THREADS {threads}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--values", nargs="+", default=["rank weight", "free", "equal"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--check", type=int, default=40, help="clients of each row that are checked")
    options = parser.parse_args()
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; {machine()}")
    size = f"{options.clients} clients x {options.blocks} blocks x ranks {RANKS}"
    print(f"{size}; median of {options.runs} runs, one process")
    columns = "nothing fits  unproved  checked alone, by reference"
    print(f"{'':38}{'values':>12}  {'seconds':>8} {'slowest':>8} {'CPU s':>8}  {columns}")
    for checkpointing, deadline in ((False, False), (False, True), (True, False), (True, True)):
        table = transformer_table(options.blocks, checkpointing=checkpointing)
        for pattern in options.values:
            rng = np.random.default_rng(0)
            clients = draw_clients(table, options.clients, rng, pattern=pattern, deadline=deadline)
            wall, cpu = [], []
            for _ in range(options.runs):
                start, start_cpu = time.perf_counter(), time.process_time()
                plans = allocate_many(table, clients.values, clients.budgets, max_flops=clients.max_flops)
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - start_cpu)
            checked = check(table, clients, plans, rng, options.check)
            what = "memory" + ", deadline" * deadline + ", checkpointing" * checkpointing
            times = f"{statistics.median(wall):8.2f} {max(wall):8.2f} {statistics.median(cpu):8.2f}"
            unproved = sum(plan is not None and plan.gap > 0 for plan in plans)
            counts = f"{plans.count(None):12}  {unproved:8}  {checked[0]}, {checked[1]}"
            print(f"{what:38}{pattern:>12}  {times}  {counts}", flush=True)


if __name__ == "__main__":
    main()
