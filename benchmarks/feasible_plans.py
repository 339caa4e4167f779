"""Which sets of blocks fit each memory tier of a recipe, by trying all of them: what an allocation can choose between.

    python benchmarks/feasible_plans.py recipes/study_banking77.toml [--set data.source=...] [--max-time 1.0]

Every set of trained blocks is priced with `memory.peak_bytes`, without the allocation's search and without its table.
For each tier it prints the sets that no other feasible set contains. Where there is one, it is the best choice under
every value function that is not negative: whatever the scores say, an exact allocation trains these blocks.

With --max-time the same with recomputation: for every set all ways to recompute its blocks and those that gradients
pass through, bounded by that multiple of the time of training all blocks plainly. The model must have few blocks: there
are 2**L sets, and 4**L plans with recomputation.
"""

import argparse
import datetime
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpilot import memory, planning
from fedpilot.config import setup
from fedpilot.config.recipe import load_recipe
from fedpilot.memory import MemoryProfile
from fedpilot.types import ModelSpec, Plan

Blocks = frozenset[int]


@dataclass(frozen=True)
class Priced:
    """A set of trained blocks in its cheapest form that fits."""

    trained: Blocks
    recomputed: Blocks
    peak_bytes: int
    seconds: float


def subsets(items: Sequence[int]) -> Iterator[Blocks]:
    """All subsets, the empty one first."""
    for count in range(len(items) + 1):
        yield from map(frozenset, itertools.combinations(items, count))


def feasible(
    spec: ModelSpec, profile: MemoryProfile, rank: int, budget_bytes: int, max_seconds: float | None
) -> list[Priced]:
    """Every set of blocks that fits, in its fastest form; plain forms only without ``max_seconds``."""
    found = []
    for trained in subsets(range(spec.num_blocks)):
        if not trained:
            continue
        plain = planning.train_blocks(spec, 0, rank, sorted(trained))
        above = range(min(trained), spec.num_blocks)
        forms = [frozenset[int]()] if max_seconds is None else list(subsets(above))
        priced = [_priced(profile, plain, trained, form) for form in forms]
        fitting = [
            one
            for one in priced
            if one.peak_bytes <= budget_bytes and (max_seconds is None or one.seconds <= max_seconds * (1 + 1e-9))
        ]
        if fitting:
            found.append(min(fitting, key=lambda one: (one.seconds, one.peak_bytes)))
    return found


def _priced(profile: MemoryProfile, plain: Plan, trained: Blocks, recomputed: Blocks) -> Priced:
    plan = replace(plain, checkpointed=recomputed)
    return Priced(trained, recomputed, memory.peak_bytes(profile, plan), memory.seconds(profile, plan, 1.0, 1))


def maximal(found: Sequence[Priced]) -> list[Priced]:
    """Those whose blocks no other one contains."""
    return [one for one in found if not any(one.trained < other.trained for other in found)]


def main() -> None:
    """Prints a table by tier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--max-time", type=float, help="also with recomputation, in this multiple of the plain time")
    options = parser.parse_args()
    recomputing = ["algorithm.checkpointing=true"] if options.max_time else []
    made = setup.experiment(load_recipe(options.recipe, [*options.overrides, *recomputing]))
    spec, profile, rank = made.sketch.spec, made.profile(), made.recipe.model.rank
    plain = planning.train_all(spec, 0, rank)
    longest = memory.seconds(profile, plain, 1.0, 1)
    print(f"{datetime.date.today()}, {options.recipe.name}, {spec.num_blocks} blocks, rank {rank}")
    for budget in sorted({client.memory_bytes for client in made.population.clients}):
        for bound in [None] if options.max_time is None else [None, options.max_time * longest]:
            found = feasible(spec, profile, rank, budget, bound)
            best = maximal(found)
            how = "plain" if bound is None else f"recomputing, at most {options.max_time:g} x the plain time"
            print(f"{budget / 2**20:.1f} MiB, {how}: {len(found)} sets fit, {len(best)} of them in no other")
            for one in sorted(best, key=lambda one: (-len(one.trained), sorted(one.trained)))[:12]:
                again = f", recomputes {sorted(one.recomputed)}" if one.recomputed else ""
                share = one.seconds / longest
                print(
                    f"  trains {sorted(one.trained)}{again}: {one.peak_bytes / 2**20:.3f} MiB, {share:.3f} x plain time"
                )


if __name__ == "__main__":
    main()
