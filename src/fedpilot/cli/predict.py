"""``fedpilot predict``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedpilot.cli.base import TRAINING, LogFile, app, examples


@app.command(
    rich_help_panel=TRAINING,
    epilog=examples(
        'fedpilot predict runs/quickstart --text "A joy from start to end."',
        "fedpilot predict runs/quickstart --data new.csv --out labelled.csv",
        'fedpilot predict runs/reclora --client "user 12" --data films.csv --json',
    ),
)
def predict(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    text: Annotated[list[str] | None, typer.Option(help="An input; may be given several times.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A table with the run's columns; classes are not needed.")
    ] = None,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="The client whose own model answers.")] = None,
    which: Annotated[Literal["best", "last"], typer.Option(help="Which adapter.")] = "best",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a table (.csv) or JSON Lines (.jsonl) instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Says what a run's model makes of new inputs: class and probabilities, or what a language model goes on with."""
    with LogFile():
        from fedpilot.commands import predict as commands

        commands.predict(directory, text or (), data, client=client, which=which, out=out, as_json=as_json)
