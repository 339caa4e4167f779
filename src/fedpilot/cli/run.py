"""``fedpilot run``."""

import logging
import tomllib
from collections.abc import Sequence
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
from fedpilot.startup import WORKPLACE, Parent


def has_workers(recipe: Path | None, overrides: Sequence[str], resume: Path | None) -> bool:
    """Whether there may be worker processes, as far as a glance tells; what is wrong with a recipe is said later."""
    file = recipe if resume is None else resume / "recipe.toml"
    try:
        tables = {} if file is None else tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    run = tables.get("run")
    workers = run.get("workers", 1) if isinstance(run, dict) else 1
    for override in overrides:
        key, _, value = override.partition("=")
        workers = value if key.strip() == "run.workers" else workers
    return str(workers).strip() != "1"


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
    parent = Parent([WORKPLACE]) if has_workers(recipe, overrides or [], resume) else None
    with LogFile() as log:
        with importing():
            from fedpilot.commands import run as commands
            from fedpilot.stopping import Halted

        job = commands.begin(recipe, overrides or [], out, resume, parent=parent, stderr=json)
        log.write_to(job.path)
        try:
            commands.finish(job, say_json if json else None)
        except (KeyboardInterrupt, Halted):
            commands.say_how_to_resume(job)
            raise typer.Exit(1) from None
        except Exception:
            logging.getLogger("run").exception("the run ended with an error")  # in the file only
            raise
