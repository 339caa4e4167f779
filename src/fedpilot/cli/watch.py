"""``fedpilot watch``."""

from pathlib import Path
from typing import Annotated

import click
import typer

from fedpilot.cli.base import LOOKING, LogFile, app, examples


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples("fedpilot watch runs/quickstart", "fedpilot watch runs/quickstart-compare --port 8080"),
)
def watch(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Run directories, or folders of comparisons.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; by default a free one.")] = 0,
) -> None:
    """Serves the report of a run that goes on to a browser on this machine; ends with the run, or with Ctrl-C."""
    with LogFile():
        from fedpilot.report import watch as doing

        try:
            doing.serve(directories, port, click.echo)
        except KeyboardInterrupt:
            click.echo("no longer watching; the run goes on")
