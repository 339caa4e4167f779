"""What ``fedpilot run`` does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedpilot import display, interrupts, jobs, progress
from fedpilot.comparison import Comparison, Line, rounds_trained, standings, summary
from fedpilot.config.recipe import load_recipe
from fedpilot.jobs import Job
from fedpilot.report import page, plots
from fedpilot.startup import Parent


def begin(
    recipe: Path | None,
    overrides: Sequence[str],
    out: Path | None,
    resume: Path | None,
    *,
    parent: Parent | None = None,
    stderr: bool = False,
) -> Job:
    """The run directory with everything up to the first round.

    Args:
        recipe: A file, or none for ``resume``.
        overrides: Of the recipe's settings.
        out: The run directory, if it is given.
        resume: That of a run to go on with.
        parent: Of worker processes, if there is one already.
        stderr: Whether to keep standard output free.
    """
    console = display.console_for(stderr=stderr)
    settings = None if recipe is None else load_recipe(recipe, overrides)
    if settings is not None:
        jobs.check_engine(settings)
    with progress.working(console, "loading data and tracing the memory of a training step"):
        if settings is not None:
            job = jobs.start(settings, out, parent=parent)
        else:
            assert resume is not None, "the options were checked"
            job = jobs.resume(resume, parent=parent)
    people = job.experiment.population
    console.print(
        f"{job.recipe.model.source} on {job.recipe.data.source}: {len(people.train)} training and {len(people.test)} "
        f"test examples, {len(people.clients)} clients, {job.recipe.algorithm.name}; run directory {job.path}"
    )
    return job


def finish(job: Job, say: Callable[[object], None] | None = None) -> None:
    """Trains, and shows how it went; ``say`` gets that as plain values instead, where given."""
    console = display.console_for(stderr=say is not None)
    people, metric = job.experiment.population, job.recipe.evaluation.metric
    names = [client.name for client in people.clients]
    watch = partial(progress.Watcher, console, names=names, metric=metric, said=set())
    with interrupts.after_the_round() as halt:
        comparison = jobs.run(replace(job, halt=halt), watch)
    lines = job.directory.lines()
    if say is not None:
        draw(job, lines, comparison)
        say(document(job, lines, comparison))
        return
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


def document(job: Job, lines: Sequence[Line], comparison: Comparison | None) -> dict[str, object]:
    """How the run went, as plain values."""
    stood, end = standings(lines), jobs.tested(job.directory)
    return {
        "directory": job.path,
        "algorithm": job.recipe.algorithm.name,
        "metric": job.recipe.evaluation.metric,
        "rounds": stood[-1].round,
        "before": dict(stood[0].metrics),
        "after": dict(stood[-1].metrics),
        "training_seconds": stood[-1].seconds,
        "test": None if end is None else dict(end.metrics),
        "comparison": None if comparison is None else summary(comparison),
    }


def draw(job: Job, lines: Sequence[Line], comparison: Comparison | None) -> list[str]:
    """Pictures of the run in its directory; their names."""
    if not plots.available():
        display.console_for(stderr=True).print(plots.ABSENT, soft_wrap=True, markup=False)
        return []
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
