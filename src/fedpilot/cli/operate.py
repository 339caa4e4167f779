"""``fedpilot status | doctor``: how a served run is doing, and why a machine or a node does not work."""

from pathlib import Path
from typing import Annotated

import click
import typer

from fedpilot.cli.base import DEPLOYING, LogFile, app, examples

Json = Annotated[bool, typer.Option("--json", help="Prints JSON instead of a table.")]


@app.command(
    rich_help_panel=DEPLOYING,
    epilog=examples(
        "fedpilot status runs/quickstart",
        "watch fedpilot status runs/quickstart",
        "fedpilot status runs/quickstart --json",
    ),
)
def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The run directory of fedpilot serve.")],
    as_json: Json = False,
) -> None:
    """Shows what a served run is doing: the round, who is there, who failed and why, budgets, time left."""
    with LogFile():
        from fedpilot.commands import operate as commands

        commands.show_status(directory, as_json)


@app.command(
    rich_help_panel=DEPLOYING,
    epilog=examples(
        "fedpilot doctor",
        "fedpilot doctor --server fl.example.org:8000 --ca ca.crt --key bern",
    ),
)
def doctor(
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Also: why a node cannot join it.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The server's ca.crt.")] = None,
    key: Annotated[Path | None, typer.Option(help="The node's own key.")] = None,
    folder: Annotated[Path, typer.Option(help="Where runs or the node's files will be.")] = Path(),
    as_json: Json = False,
) -> None:
    """Says what is wrong with this machine, and what keeps a node from a server: exit code 1 if anything does."""
    if server is not None and (ca is None or key is None):
        raise click.UsageError("--server needs --ca and --key, those that the node joins with")
    with LogFile():
        from fedpilot.commands import operate as commands

        if not commands.show_findings(folder, server, ca, key, as_json):
            raise typer.Exit(1)
