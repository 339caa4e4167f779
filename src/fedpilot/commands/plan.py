"""What ``fedpilot plan`` does with a recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from fedpilot import display, progress
from fedpilot.config import setup
from fedpilot.config.population import Population
from fedpilot.config.recipe import load_recipe
from fedpilot.config.setup import Experiment
from fedpilot.display import size
from fedpilot.planning import trained_blocks
from fedpilot.report import plots
from fedpilot.rounds import PLANNING, SAMPLING, generator, sample
from fedpilot.types import LeftOut, Plan


def plan(recipe: Path, overrides: Sequence[str], out: Path | None, say: Callable[[object], None] | None = None) -> None:
    """Who has what and who would train what; ``say`` gets plain values instead of the tables, where given."""
    console = display.console_for(stderr=say is not None)
    settings = load_recipe(recipe, overrides)
    with progress.working(console, "loading data and tracing the memory of a training step"):
        experiment = setup.experiment(settings)
    people = experiment.population
    entries = first_plans(experiment)
    console.print(f"{settings.data.source}: {people.train.report}")
    if say is None:
        console.print(split_table(people))
        console.print()
        console.print(plans_table(experiment, entries))
    names = [client.name for client in people.clients]
    folder = out or Path(settings.run.out) / f"{settings.run.name}-plan"
    trained = np.zeros((len(names), experiment.sketch.spec.num_blocks), dtype=np.int64)
    for entry in entries:
        if isinstance(entry, Plan):
            trained[entry.client_id, list(trained_blocks(experiment.sketch.spec, entry))] = 1
        else:
            trained[entry.client_id] = -1
    if not plots.available():
        display.console_for(stderr=True).print(plots.ABSENT, soft_wrap=True, markup=False)
        return
    made = [
        plots.partition_map(people.counts, names, people.class_names, folder / "partition.png"),
        plots.block_map(trained, names, folder / "blocks.png", "Blocks trained in round 1"),
    ]
    console.print(f"drawn to {' and '.join(str(path) for path in made)}", soft_wrap=True)
    if say is not None:
        say(document(experiment, entries))


def document(experiment: Experiment, entries: Sequence[Plan | LeftOut]) -> dict[str, object]:
    """The split and the plans as plain values."""
    people, recipe = experiment.population, experiment.recipe
    planned = {entry.client_id: entry for entry in entries}
    clients = []
    for client, tier, counts in zip(people.clients, people.tiers, people.counts, strict=True):
        found: dict[str, object] = {
            "client_id": client.client_id,
            "name": client.name,
            "tier": tier,
            "budget_bytes": client.memory_bytes,
            "num_examples": client.num_examples,
            "examples": dict(zip(people.class_names, counts.tolist(), strict=True)),
        }
        entry = planned.get(client.client_id)
        if isinstance(entry, LeftOut):
            found |= {"left_out": entry.reason, "needed_bytes": entry.needed_bytes}
        elif entry is not None:
            found |= {
                "peak_bytes": entry.peak_bytes,
                "seconds": entry.seconds,
                "trained": list(trained_blocks(experiment.sketch.spec, entry)),
                "recomputed": sorted(entry.checkpointed),
                "micro_batch": entry.micro_batch,
            }
        clients.append(found)
    return {
        "model": recipe.model.source,
        "data": recipe.data.source,
        "algorithm": recipe.algorithm.name,
        "clients": clients,
    }


def first_plans(experiment: Experiment) -> Sequence[Plan | LeftOut]:
    """What the method plans in round 1, to the bit as a run would."""
    recipe = experiment.recipe
    algorithm = experiment.algorithm(dry=True)
    cohort = sample(experiment.population.clients, recipe.run.cohort, generator(recipe.run.seed, 1, SAMPLING))
    state = algorithm.init(generator(recipe.run.seed, 0))
    return algorithm.plan(state, cohort, generator(recipe.run.seed, 1, PLANNING))


def split_table(people: Population) -> Table:
    """Examples of each client by class."""
    classes = people.class_names
    shown = classes[:12]
    table = Table(title="Who has what", title_justify="left")
    for header in ("client", "tier"):
        table.add_column(header)
    for header in ("budget", "examples", *shown):
        table.add_column(header, justify="right")
    rows = list(zip(people.clients, people.tiers, people.counts, strict=True))
    for client, tier, counts in rows[: display.MOST_CLIENTS]:
        numbers = [str(count) for count in counts[: len(shown)]]
        table.add_row(client.name, tier, size(client.memory_bytes), str(client.num_examples), *numbers)
    if len(rows) > display.MOST_CLIENTS or len(classes) > len(shown):
        table.caption = "cut; the picture has all of it"
    return table


def plans_table(experiment: Experiment, entries: Sequence[Plan | LeftOut]) -> Table:
    """Blocks, predicted peak and budget of each client; who is left out and what would do."""
    spec, people = experiment.sketch.spec, experiment.population
    title = f"Who would train what in round 1 with {experiment.recipe.algorithm.name}"
    table = Table(title=title, title_justify="left")
    for header in ("client", "tier"):
        table.add_column(header)
    for header in ("budget", "predicted peak", "seconds"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("blocks trained")
    for entry in entries[: display.MOST_CLIENTS]:
        client = people.clients[entry.client_id]
        row = [client.name, people.tiers[entry.client_id], size(client.memory_bytes)]
        if isinstance(entry, LeftOut):
            table.add_row(*row, "-", "-", f"left out: {display.why(entry)}")
            continue
        again = f", recomputing {display.blocks(entry.checkpointed)}" if entry.checkpointed else ""
        seconds = "-" if entry.seconds is None else f"{entry.seconds:.1f}"
        peak = "-" if entry.peak_bytes is None else size(entry.peak_bytes)
        table.add_row(*row, peak, seconds, display.blocks(trained_blocks(spec, entry)) + again)
    return table
