"""``fedpilot certs | serve | join``: a run with nodes on other machines."""

from pathlib import Path
from typing import Annotated

import click
import typer

from fedpilot.cli.base import DEPLOYING, LogFile, Overrides, Resume, RunDirectoryOption, app, check_start, examples


@app.command(
    rich_help_panel=DEPLOYING,
    epilog=examples(
        "fedpilot certs certs --host fl.example.org --node bern --node oslo",
        "fedpilot certs certs --revoke oslo",
    ),
)
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address that nodes reach the server by; may be given repeatedly."),
    ] = None,
    node: Annotated[list[str] | None, typer.Option(help="Name of a client; may be given repeatedly.")] = None,
    days: Annotated[int, typer.Option(min=1, help="Days that the server's certificate is good.")] = 365,
    revoke: Annotated[
        list[str] | None, typer.Option(help="Instead: name of a node to let in no more; may be given repeatedly.")
    ] = None,
) -> None:
    """Makes the certificates of a server and a key for each node; adds what is missing to a folder that has some."""
    from fedpilot.engines.flower import commands

    if revoke and (host or node):
        raise click.UsageError("--revoke takes keys away; it takes neither --host nor --node")
    commands.certs(folder, host or [], node or [], days, click.echo, revoke or [])


@app.command(
    rich_help_panel=DEPLOYING,
    epilog=examples(
        "fedpilot serve recipes/quickstart.toml --nodes 3",
        "fedpilot serve --resume runs/quickstart",
    ),
)
def serve(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file.")] = None,
    overrides: Overrides = None,
    out: RunDirectoryOption = None,
    resume: Resume = None,
    certificates: Annotated[Path, typer.Option("--certs", help="What fedpilot certs wrote.")] = Path("certs"),
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where nodes reach it.")] = "0.0.0.0:8000",
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Clients to start with; by default all that the recipe divides its data among."),
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds until they must be there.")] = 600.0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds, at least, for the answer to a task.")] = 600.0,
    poll: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks for work.")] = 0.5,
) -> None:
    """Runs a recipe with the nodes that join, over TLS; ends with the run, and with its exit code."""
    check_start(recipe, overrides, out, resume)
    with LogFile():
        from fedpilot.engines.flower import commands

        where = commands.Where(out, resume, certificates, address)
        commands.serve(recipe, overrides or [], where, nodes, wait, timeout, poll, click.echo)


@app.command(
    rich_help_panel=DEPLOYING,
    epilog=examples(
        "fedpilot join fl.example.org:8000 --ca ca.crt --key bern --data bern.csv --memory auto",
        "fedpilot join 127.0.0.1:8000 --ca certs/ca.crt --key certs/nodes/bern --partition 0",
    ),
)
def join(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The server.")],
    ca: Annotated[Path, typer.Option(help="The server's ca.crt.")],
    key: Annotated[Path, typer.Option(help="The node's own key, of the server's certs/nodes.")],
    folder: Annotated[Path, typer.Option(help="What the node remembers, and its logs.")] = Path("node"),
    name: Annotated[
        str | None,
        typer.Option(help="Name of the client; by default the key's, or that of its part of the recipe's data."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Its own data file, in the form of the recipe's.")] = None,
    partition: Annotated[int | None, typer.Option(min=0, help="Instead: its part of the recipe's data.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|auto|recipe",
            help='Its budget, as "6 GiB"; auto is what is free, and the default with --data; recipe is the tier\'s.',
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its own folder of the base model.")] = None,
    poll: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks for messages.")] = 0.5,
) -> None:
    """Takes part in runs of a server until it is stopped; comes back by itself."""
    from fedpilot.engines.flower import commands

    what = commands.What(name, data, partition, memory, model)
    commands.join(server, ca, key, folder, what, poll, click.echo)
