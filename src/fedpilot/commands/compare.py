"""What ``fedpilot compare`` does."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedpilot import display, interrupts, progress
from fedpilot.compare import report, study, tuning
from fedpilot.compare.report import Report
from fedpilot.compare.study import DryPlan, Member, Study
from fedpilot.compare.tuning import Choice, Search
from fedpilot.compare.workers import Refusal
from fedpilot.compare.workers import run_members as run_in_processes
from fedpilot.config.recipe import load_recipe
from fedpilot.report import page
from fedpilot.stopping import Halted


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


def compare(
    recipe: Path, overrides: Sequence[str], options: CompareOptions, say: Callable[[object], None] | None = None
) -> bool:
    """Runs what is missing of a comparison, and reports; whether all runs are done.

    Where ``say`` is given, it gets the figures as plain values instead of the screen getting tables.
    """
    console = display.console_for(stderr=say is not None)
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
            except (KeyboardInterrupt, Halted):
                raise Stopped(
                    f"stopped; every finished round is on disk. Go on with the same command; the folder is {folder}"
                ) from None
    found = report.read(made, options.target)
    show_report(console, found, tables=say is None)
    if say is not None:
        say(report.as_json(found))
    for label, problem in problems.items():
        console.print(f"{label} failed: {problem}", style="red", markup=False, soft_wrap=True)
    return not problems


class Stopped(Exception):  # noqa: N818 - it is no error
    """Ctrl-C, with what to say about it."""


def search_settings(console: Console, made: Study, search: Search, workers: int | None) -> tuple[Study, dict[str, str]]:
    """Tries every method with every setting, and takes the best on validation data.

    A method of which a try is missing, say because its process was killed, is not chosen for yet and does not run.
    """
    problems = run_members(console, made, tuning.tries(made, search), workers)
    refused = {label for label, problem in problems.items() if isinstance(problem, Refusal)}
    left, chosen = tuning.missing(made, search, refused), tuning.choose(made, search, refused)
    made = tuning.write(made, search, chosen)
    console.print(search_table(made, search, chosen))
    show_edges(console, search, chosen)
    absent = {method: "no try of its search succeeded" for method in made.methods if method not in chosen}
    again = "its search lacks {}, which the same command tries again; nothing is chosen before"
    absent |= {method: again.format(", ".join(labels)) for method, labels in left.items()}
    return replace(made, methods=tuple(method for method in made.methods if method in chosen)), problems | absent


def run_members(console: Console, made: Study, members: Sequence[Member], workers: int | None) -> dict[str, str]:
    """Runs what is not done; label -> problem of those that failed."""
    waiting = [member for member in members if not member.done()]
    done = len(members) - len(waiting)
    if done:
        console.print(f"{display.counted(done, 'run')} of {len(members)} done before")
    count = workers or len(os.sched_getaffinity(0))
    metric = made.recipe.evaluation.metric
    with progress.Runs(console, metric, len(waiting)) as watcher, interrupts.after_the_round() as halt:
        return run_in_processes(
            waiting,
            workers=count,
            traces=made.path / study.TRACES,
            logs=made.path / study.LOGS,
            watcher=watcher,
            halt=halt,
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


def show_edges(console: Console, search: Search, chosen: Mapping[str, Choice]) -> None:
    """Says where the best of what was tried may not be the best."""
    edges: dict[str, list[str]] = {}
    for method, choice in chosen.items():
        for override in search.at_edge(choice.overrides):
            edges.setdefault(override, []).append(method)
    for override, methods in edges.items():
        text = f"{override} is at the edge of what was tried and best for {', '.join(methods)}: try values beyond it"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def show_report(console: Console, found: Report, *, tables: bool) -> None:
    """Tables, where asked for, and sentences on the screen; the same, with plots, in the folder."""
    console.print()
    if tables:
        wide = Console(width=200, highlight=False) if not console.is_terminal else console
        wide.print(report.screen_table("Comparison", *report.rows(found)))
        header, cells = report.equal_rows(found)
        if len(header) > 1:
            wide.print(report.screen_table(f"{found.goal.metric} at equal cost", header, cells))
        header, cells = report.lead_rows(found)
        if cells:
            wide.print(report.screen_table(f"Lead of {found.methods[0].name} in {found.goal.metric}", header, cells))
    for sentence in report.sentences(found):
        console.print(sentence, soft_wrap=True)
    written = report.write(found)
    if any(method.runs for method in found.methods) and (made := page.try_to_write(found.made.path)) is not None:
        written.append(made)
    console.print(f"written to {found.made.path}: {', '.join(path.name for path in written)}", soft_wrap=True)
