"""``fedpilot compare``."""

from pathlib import Path
from typing import Annotated

import click
import typer

from fedpilot.cli.base import TRAINING, Json, LogFile, Overrides, RecipeFile, app, examples, say_json


@app.command(
    rich_help_panel=TRAINING,
    epilog=examples(
        "fedpilot compare recipes/quickstart.toml --algorithms fed-pilot,fedit,flora",
        "fedpilot compare recipes/quickstart.toml --algorithms fed-pilot,fedit --tune training.learning_rate=1e-3,1e-2",
        "fedpilot compare recipes/quickstart.toml --algorithms fed-pilot,fedit --report-only",
    ),
)
def compare(
    recipe: RecipeFile,
    algorithms: Annotated[
        str,
        typer.Option(metavar="A,B,C", help="Names of sections [methods.NAME], or of algorithms with their defaults."),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds: the recipe's run.seed and those after it.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The comparison's folder; by default NAME-compare beside the runs."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at once, each in a process of one thread; by default one for each core."),
    ] = None,
    overrides: Overrides = None,
    target: Annotated[float | None, typer.Option(help="The metric whose first round is reported.")] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.KEY=V1,V2,...",
            help="Chooses a setting for every method on validation data first; several make a grid.",
        ),
    ] = None,
    tune_rounds: Annotated[int | None, typer.Option(help="Rounds of each try.")] = None,
    tune_seed: Annotated[int | None, typer.Option(help="Seed of the tries; by default the first.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Runs nothing; reports what is there.")] = False,
    json: Json = False,
) -> None:
    """Compares methods on the same data, budgets, seeds and steps; the same command goes on after a stop."""
    with LogFile():
        from fedpilot.commands import compare as commands

        names = [name.strip() for name in algorithms.split(",") if name.strip()]
        options = commands.CompareOptions(
            names, seeds, out, workers, target, tune or [], tune_rounds, tune_seed, report_only
        )
        try:
            finished = commands.compare(recipe, overrides or [], options, say_json if json else None)
        except commands.Stopped as stopped:
            click.echo(f"\n{stopped}", err=True)
            raise typer.Exit(1) from None
        if not finished:
            raise typer.Exit(1)


@app.command(hidden=True, name="compare-worker")
def compare_worker() -> None:
    """Does one run of a comparison, which it reads from its standard input."""
    with LogFile() as log:
        from fedpilot.compare import workers

        workers.work(log.write_to)
