"""``fedpilot report``."""

from pathlib import Path
from typing import Annotated

import typer

from fedpilot.cli.base import LOOKING, LogFile, app, examples


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "fedpilot report runs/quickstart",
        "fedpilot report runs/quickstart runs/quickstart-2 --out both.html",
    ),
)
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Run directories, or folders of comparisons.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="By default report.html in the first directory.")
    ] = None,
) -> None:
    """Writes one page that needs no network: what was learnt, who trained what, what it took; several side by side."""
    with LogFile():
        from fedpilot.commands import report as commands

        commands.write_page(directories, out)
