"""``fedpilot run``."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from fedpilot.cli.base import (
    TRAINING,
    Json,
    LogFile,
    Overrides,
    Resume,
    RunDirectoryOption,
    app,
    check_start,
    examples,
    importing,
    say_json,
)


@app.command(
    rich_help_panel=TRAINING,
    epilog=examples(
        "fedpilot run recipes/quickstart.toml",
        "fedpilot run recipes/quickstart.toml --set run.rounds=2 --set run.seed=1 --out runs/short",
        "fedpilot run --resume runs/short",
    ),
)
def run(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file.")] = None,
    overrides: Overrides = None,
    out: RunDirectoryOption = None,
    resume: Resume = None,
    json: Json = False,
) -> None:
    """Trains, beside the recipe's baseline where it has one."""
    check_start(recipe, overrides, out, resume)
    with LogFile() as log:
        with importing():
            from fedpilot.commands import run as commands
            from fedpilot.stopping import Halted

        job = commands.begin(recipe, overrides or [], out, resume, stderr=json)
        log.write_to(job.path)
        try:
            commands.finish(job, say_json if json else None)
        except (KeyboardInterrupt, Halted):
            commands.say_how_to_resume(job)
            raise typer.Exit(1) from None
        except Exception:
            logging.getLogger("run").exception("the run ended with an error")  # in the file only
            raise
