"""``fedpilot export``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedpilot.cli.base import TRAINING, LogFile, app, examples


@app.command(
    rich_help_panel=TRAINING,
    epilog=examples(
        "fedpilot export runs/quickstart my-adapter",
        "fedpilot export runs/quickstart my-adapter --which last --max-rank 8",
        'fedpilot export runs/reclora of-user-12 --client "user 12"',
    ),
)
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    which: Annotated[Literal["best", "last"], typer.Option(help="Which adapter.")] = "best",
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of a pair; what that leaves out goes into the model card.")
    ] = None,
    client: Annotated[
        str | None, typer.Option(metavar="NAME", help="The client whose own adapter it is to be.")
    ] = None,
) -> None:
    """Writes the trained adapter as a PEFT folder; what was merged into the base becomes part of its pairs.

    A pool of adapters that each input chooses from is written as a folder with a loader of its own.
    """
    with LogFile():
        from fedpilot.commands import export as commands

        commands.export(directory, out, which, max_rank, client)
