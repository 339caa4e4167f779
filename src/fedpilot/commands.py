"""What the commands do; `cli` holds their options."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from fedpilot import assets, display, jobs, progress
from fedpilot.compare import report, study, tuning
from fedpilot.compare.report import Report
from fedpilot.compare.study import DryPlan, Member, Study
from fedpilot.compare.tuning import Choice, Search
from fedpilot.compare.workers import run_members as run_in_processes
from fedpilot.comparison import Comparison, Line, rounds_trained, standings
from fedpilot.config import profiles, setup
from fedpilot.config.population import Population
from fedpilot.config.recipe import load_recipe
from fedpilot.config.setup import Experiment
from fedpilot.display import size
from fedpilot.export import export_peft
from fedpilot.jobs import Job
from fedpilot.model import build_model
from fedpilot.planning import trained_blocks
from fedpilot.record import RunDirectory
from fedpilot.report import page, plots
from fedpilot.rounds import PLANNING, SAMPLING, generator, sample
from fedpilot.types import LeftOut, Plan

# --- run ----------------------------------------------------------------------------------------------------------


def begin(recipe: Path | None, overrides: Sequence[str], out: Path | None, resume: Path | None) -> Job:
    """The run directory with everything up to the first round."""
    console = display.console_for()
    settings = None if recipe is None else load_recipe(recipe, overrides)
    if settings is not None:
        jobs.check_engine(settings)
    with progress.working(console, "loading data and tracing the memory of a training step"):
        if settings is not None:
            job = jobs.start(settings, out)
        else:
            assert resume is not None, "the options were checked"
            job = jobs.resume(resume)
    people = job.experiment.population
    console.print(
        f"{job.recipe.model.source} on {job.recipe.data.source}: {len(people.train)} training and {len(people.test)} "
        f"test examples, {len(people.clients)} clients, {job.recipe.algorithm.name}; run directory {job.path}"
    )
    return job


def finish(job: Job) -> None:
    """Trains, and shows how it went."""
    console = display.console_for()
    people, metric = job.experiment.population, job.recipe.evaluation.metric
    names = [client.name for client in people.clients]
    comparison = jobs.run(job, partial(progress.Watcher, console, names=names, metric=metric, said=set()))
    lines = job.directory.lines()
    budgets = [client.memory_bytes for client in people.clients]
    console.print()
    console.print(display.clients_table(lines, names, people.tiers, budgets))
    console.print()
    stood = standings(lines)
    rows = [("before training", stood[0]), (job.recipe.algorithm.name, stood[-1])]
    if comparison is not None:
        rows = display.comparison_rows(comparison)
    console.print(display.metrics_table(rows, metric, job.recipe.evaluation.on))
    ends = [(job.recipe.algorithm.name, jobs.tested(job.directory))]
    if comparison is not None:
        ends.append((comparison.baseline, jobs.tested(job.baseline_directory())))
    for name, end in ends:
        if end is not None:
            value = f"{metric} {end.metrics[metric]:.4f}"
            console.print(f"{name} on the test set, read once at the end: {value} after round {end.round}")
    for sentence in display.verdict(comparison) if comparison is not None else ():
        console.print(sentence, soft_wrap=True)
    pictures = draw(job, lines, comparison)
    console.print()
    first = [page.FILE] if (job.path / page.FILE).exists() else []
    names_of_files = [*first, "metrics.jsonl", "adapters/best and adapters/last", *pictures]
    written = f"written to {job.path}: {', '.join(names_of_files)}"
    console.print(written, soft_wrap=True)
    console.print(f"take the adapter home: fedpilot export {job.path} my-adapter", soft_wrap=True)


def draw(job: Job, lines: Sequence[Line], comparison: Comparison | None) -> list[str]:
    """Pictures of the run in its directory; their names."""
    people = job.experiment.population
    names = [client.name for client in people.clients]
    made = [
        plots.partition_map(people.counts, names, people.class_names, job.path / "partition.png"),
        plots.block_map(
            rounds_trained(lines, len(names), job.experiment.sketch.spec.num_blocks),
            names,
            job.path / "blocks.png",
        ),
    ]
    curves = {job.recipe.algorithm.name: standings(lines)}
    if comparison is not None:
        curves[comparison.baseline] = standings(job.baseline_directory().lines())
    metric = job.recipe.evaluation.metric
    made.append(
        plots.metric_over_time(
            {
                name: ([s.seconds for s in line if s.metrics], [s.metrics[metric] for s in line if s.metrics])
                for name, line in curves.items()
            },
            metric,
            job.path / f"{metric.replace('/', '-')}.png",
        )
    )
    return [path.name for path in made]


def say_how_to_resume(job: Job) -> None:
    """After Ctrl-C."""
    console = display.console_for(stderr=True)
    console.print(
        f"\nstopped; every finished round is on disk. Go on with: fedpilot run --resume {job.path}", soft_wrap=True
    )


# --- compare ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompareOptions:
    """The options of ``fedpilot compare``; see there."""

    methods: Sequence[str]
    seeds: int
    out: Path | None
    workers: int | None
    target: float | None
    tune: Sequence[str]
    tune_rounds: int | None
    tune_seed: int | None
    report_only: bool


def compare(recipe: Path, overrides: Sequence[str], options: CompareOptions) -> bool:
    """Runs what is missing of a comparison, and reports; whether all runs are done."""
    console = display.console_for()
    settings = load_recipe(recipe, overrides)
    folder = options.out or Path(settings.run.out) / f"{settings.run.name}-compare"
    made = study.study(settings, options.methods, options.seeds, folder)
    problems: dict[str, str] = {}
    if not options.report_only:
        search = tuning.parse(options.tune, options.tune_rounds, made, options.tune_seed) if options.tune else None
        with study.alone(folder):
            with progress.working(console, "loading data, tracing the memory of a training step and planning a round"):
                made, plans = study.check(made)
            console.print(dry_table(plans))
            try:
                if search is not None:
                    made, problems = search_settings(console, made, search, options.workers)
                problems |= run_members(console, made, made.members(), options.workers)
            except KeyboardInterrupt:
                raise Stopped(
                    f"stopped; every finished round is on disk. Go on with the same command; the folder is {folder}"
                ) from None
    show_report(console, report.read(made, options.target))
    for label, problem in problems.items():
        console.print(f"{label} failed: {problem}", style="red", markup=False, soft_wrap=True)
    return not problems


class Stopped(Exception):  # noqa: N818 - it is no error
    """Ctrl-C, with what to say about it."""


def search_settings(console: Console, made: Study, search: Search, workers: int | None) -> tuple[Study, dict[str, str]]:
    """Tries every method with every setting, and takes the best on validation data."""
    problems = run_members(console, made, tuning.tries(made, search), workers)
    chosen = tuning.choose(made, search)
    made = tuning.write(made, search, chosen)
    console.print(search_table(made, search, chosen))
    absent = {method: "no try of its search succeeded" for method in made.methods if method not in chosen}
    return replace(made, methods=tuple(method for method in made.methods if method in chosen)), problems | absent


def run_members(console: Console, made: Study, members: Sequence[Member], workers: int | None) -> dict[str, str]:
    """Runs what is not done; label -> problem of those that failed."""
    waiting = [member for member in members if not member.done()]
    done = len(members) - len(waiting)
    if done:
        console.print(f"{display.counted(done, 'run')} of {len(members)} done before")
    count = workers or len(os.sched_getaffinity(0))
    metric = made.recipe.evaluation.metric
    with progress.Runs(console, metric, len(waiting)) as watcher:
        return run_in_processes(
            waiting,
            workers=count,
            traces=made.path / study.TRACES,
            logs=made.path / study.LOGS,
            watcher=watcher,
        )


def dry_table(plans: Sequence[DryPlan]) -> Table:
    """What each method would do with the whole population in its first round."""
    table = Table(title="In round 1, of all clients", title_justify="left")
    for header in ("method", "left out", "blocks trained", "slowest client"):
        table.add_column(header, justify="left" if header == "method" else "right")
    for plan in plans:
        fewest, most = plan.blocks
        blocks = str(most) if fewest == most else f"{fewest} to {most}"
        seconds = "-" if plan.seconds is None else display.clock(plan.seconds)
        table.add_row(plan.method, f"{plan.left_out} of {plan.clients}", blocks, seconds)
    return table


def search_table(made: Study, search: Search, chosen: Mapping[str, Choice]) -> Table:
    """The tries of each method, the best one marked."""
    metric = made.recipe.evaluation.metric
    table = Table(title=f"Search on validation data, {search.rounds} rounds each: {metric}", title_justify="left")
    table.add_column("method")
    for candidate in search.candidates():
        table.add_column(", ".join(candidate), justify="right")
    for method, choice in chosen.items():
        scores = [(candidate, choice.scores[candidate]) for candidate in search.candidates()]
        table.add_row(method, *(f"{score:.4f}{' *' if c == choice.overrides else ''}" for c, score in scores))
    return table


def show_report(console: Console, found: Report) -> None:
    """Tables and sentences on the screen; the same, with plots, in the folder."""
    console.print()
    wide = Console(width=200, highlight=False) if not console.is_terminal else console
    wide.print(report.screen_table("Comparison", *report.rows(found)))
    header, cells = report.equal_rows(found)
    if len(header) > 1:
        wide.print(report.screen_table(f"{found.goal.metric} at equal cost", header, cells))
    for sentence in report.sentences(found):
        console.print(sentence, soft_wrap=True)
    written = report.write(found)
    if any(method.runs for method in found.methods) and (made := page.try_to_write(found.made.path)) is not None:
        written.append(made)
    console.print(f"written to {found.made.path}: {', '.join(path.name for path in written)}", soft_wrap=True)


# --- report -------------------------------------------------------------------------------------------------------


def write_page(directories: Sequence[Path], out: Path | None) -> None:
    """The page of runs and comparisons."""
    display.console_for().print(f"written to {page.write(directories, out)}", soft_wrap=True)


# --- plan ---------------------------------------------------------------------------------------------------------


def plan(recipe: Path, overrides: Sequence[str], out: Path | None) -> None:
    """Who has what and who would train what."""
    console = display.console_for()
    settings = load_recipe(recipe, overrides)
    with progress.working(console, "loading data and tracing the memory of a training step"):
        experiment = setup.experiment(settings)
    people = experiment.population
    entries = first_plans(experiment)
    console.print(f"{settings.data.source}: {people.train.report}")
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
    made = [
        plots.partition_map(people.counts, names, people.class_names, folder / "partition.png"),
        plots.block_map(trained, names, folder / "blocks.png", "Blocks trained in round 1"),
    ]
    console.print(f"drawn to {' and '.join(str(path) for path in made)}", soft_wrap=True)


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


# --- profile ------------------------------------------------------------------------------------------------------


def profile_recipe(recipe: Path, overrides: Sequence[str]) -> None:
    """Memory of a recipe's training step."""
    console = display.console_for()
    settings = load_recipe(recipe, overrides)
    started = time.perf_counter()
    show_profile(console, profiles.of_recipe(settings), time.perf_counter() - started)


def profile_model(
    model: Mapping[str, object], training: Mapping[str, object], micro_batch: int | None, num_labels: int
) -> None:
    """Memory of a model's training step, from its configuration alone."""
    console = display.console_for()
    started = time.perf_counter()
    found = profiles.of_options(model, training, micro_batch, num_labels)
    show_profile(console, found, time.perf_counter() - started)


def show_profile(console: Console, found: profiles.Profile, seconds: float) -> None:
    """Tables by part and by block."""
    console.print(f"{found.source}: {found.what}")
    parts = Table(title="A training step of all blocks, by part", title_justify="left")
    parts.add_column("part")
    parts.add_column("memory", justify="right", no_wrap=True)
    parts.add_column("bytes", justify="right", no_wrap=True)
    for name, num_bytes in found.parts_by_name().items():
        if not num_bytes:
            continue
        parts.add_row(name, size(num_bytes), f"{num_bytes:,}")
    console.print(parts)
    table = Table(title="Peak by block", title_justify="left")
    for header in ("block", "this block alone", "from this block up", "the same, recomputed"):
        table.add_column(header, justify="right")
    for block, peaks in enumerate(found.by_block):
        table.add_row(str(block), *(size(peak) for peak in peaks))
    console.print(table)
    console.print(f"traced without weights in {seconds:.1f} s")


# --- export, assets -----------------------------------------------------------------------------------------------


def export(directory: Path, out: Path, which: Literal["best", "last"], max_rank: int | None = None) -> None:
    """The adapter as a PEFT folder."""
    console = display.console_for()
    found = RunDirectory.open(directory)
    deployment, facts = found.load_adapter(which)
    recipe, labels = jobs.recipe_of(directory), jobs.label_names(found)
    adapted = build_model(
        setup.resolved_model(recipe), num_labels=len(labels) or None, device="fake", seed=recipe.run.seed
    )
    about = {"method": recipe.algorithm.name, "data": recipe.data.source, "adapter": which, **flat(facts)}
    about |= {"classes": ", ".join(labels) or "none"}
    export_peft(adapted, deployment, out, facts=about, max_rank=max_rank)
    console.print(f"written to {out}: adapter_config.json, adapter_model.safetensors, README.md", soft_wrap=True)
    console.print(f"load it with: PeftModel.from_pretrained(base_model, {str(out)!r})", soft_wrap=True)


def flat(facts: Mapping[str, object]) -> dict[str, object]:
    """Nested mappings as ``outer inner`` keys."""
    result: dict[str, object] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            result |= {f"{name} {inner}": entry for inner, entry in flat(value).items()}
        else:
            result[name] = value
    return result


def list_assets() -> None:
    """The packaged models and data sets."""
    table = Table(title=f"Packaged assets; the cache is {assets.cache_folder()}", title_justify="left")
    for header in ("name", "kind", "what", "licence"):
        table.add_column(header)
    for name, asset in sorted(assets.ASSETS.items(), key=lambda entry: (entry[1].kind, entry[0])):
        table.add_row(name, asset.kind, asset.what, asset.licence)
    display.console_for().print(table)


def fetch_assets(names: Sequence[str]) -> None:
    """Fetches and unpacks."""
    console = display.console_for()
    for name, folder in assets.prepare(names).items():
        console.print(f"{name}: {folder}")
