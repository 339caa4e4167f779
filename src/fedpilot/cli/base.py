"""The application: its errors, its log, and the options that several commands share.

A module of this folder holds the options of one group of commands; `fedpilot.commands` does the work. Heavy imports
stand in the commands, so that help and usage errors are immediate.
Exit codes: 0 done, 2 a recipe or an option is wrong, 1 anything else.
"""

import gc
import logging
import math
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from fedpilot import startup
from fedpilot.errors import ConfigError, FedpilotError

PANELS = (STARTING, TRAINING, LOOKING, DEPLOYING) = ("Start", "Train", "Look", "Deploy")
"""Panels of the help, in its order."""


class Commands(TyperGroup):
    """Prints fedpilot's own errors without a traceback, and its commands by panel."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands in the order of the help."""
        panels = {name: getattr(command, "rich_help_panel", None) for name, command in self.commands.items()}
        return sorted(panels, key=lambda name: PANELS.index(panels[name]) if panels[name] in PANELS else len(PANELS))

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; its errors become exit codes."""
        from rich.markup import escape

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            for problem in error.problems:
                console.print(f"[red]error:[/] {escape(problem)}")
            ctx.exit(2)
        except FedpilotError as error:
            console.print(f"[red]error:[/] {escape(str(error))}")
            ctx.exit(1)
        except KeyboardInterrupt:
            console.print("stopped")
            ctx.exit(1)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Federated LoRA fine-tuning across clients that differ in memory: budgets in, one PEFT adapter out.",
)


def _say_version(asked: bool) -> None:
    """Prints the version and ends the command."""
    if asked:
        from fedpilot import __version__

        click.echo(f"fedpilot {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Shows the version and ends.")
    ] = False,
) -> None:
    """Options of the command itself; its help is the application's."""


def examples(*commands: str) -> str:
    """The end of a command's help: commands that can be typed as they stand."""
    return "\n\n".join(("[bold]Examples[/]", *commands))


@contextmanager
def importing() -> Iterator[None]:
    """For a command's heavy imports: collects no garbage in the body, and never looks at what was made there again.

    Over half a million objects come to stay; going through them again and again takes a sixth of the imports' time.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see the folder recipes.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides a setting; may be given repeatedly."),
]


Json = Annotated[
    bool,
    typer.Option("--json", help="Prints JSON on standard output and nothing else there."),
]

RunDirectoryOption = Annotated[
    Path | None, typer.Option("--out", help="The run directory; by default a free name in the recipe's out.")
]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="Goes on with a run that was stopped.")]


def say_json(document: object) -> None:
    """Prints a document of plain values; numbers that JSON lacks become null."""
    import json

    click.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: object) -> object:
    """The value with whatever is not finite as ``None``, and paths as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def check_start(recipe: Path | None, overrides: list[str] | None, out: Path | None, resume: Path | None) -> None:
    """A run is either new or resumed."""
    if (recipe is None) == (resume is None):
        raise click.UsageError("give a recipe, or --resume with a run directory")
    if resume is not None and (overrides or out):
        raise click.UsageError("--resume goes on with the settings of the run; it takes neither --set nor --out")


class _Shown(logging.Handler):
    """Writes to the error stream of the moment, which a live display replaces by one that keeps out of its way."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the message."""
        click.echo(self.format(record), err=True)


class LogFile:
    """Keeps what libraries log and warn off the screen, in a file once there is a folder for it.

    What fedpilot itself warns of is shown too.
    """

    def __enter__(self) -> "LogFile":
        from logging.handlers import MemoryHandler

        self._held = MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.Handler | None = None
        self._shown = _Shown()
        self._shown.addFilter(lambda record: record.name.startswith("fedpilot"))
        self._shown.setLevel(min(logging.WARNING, logging.getLogger("fedpilot").level or logging.WARNING))
        self._shown.setFormatter(logging.Formatter("%(message)s"))
        root = logging.getLogger()
        root.addHandler(self._held)
        root.addHandler(self._shown)
        logging.captureWarnings(True)
        return self

    def write_to(self, folder: Path) -> None:
        """Writes what was held and all that follows to ``log.txt``."""
        logging.getLogger("fedpilot").setLevel(logging.INFO)
        self._file = logging.FileHandler(folder / "log.txt")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._held.setTarget(self._file)
        self._held.flush()
        root = logging.getLogger()
        root.removeHandler(self._held)
        root.addHandler(self._file)

    def __exit__(self, *_: object) -> None:
        logging.captureWarnings(False)
        logging.getLogger("fedpilot").setLevel(logging.NOTSET)
        for handler in (self._held, self._shown, self._file):
            if handler is not None:
                logging.getLogger().removeHandler(handler)
                handler.close()


def main() -> None:
    """Entry point of the command ``fedpilot``."""
    startup.without_bitsandbytes()
    try:
        app()
    finally:  # what is left is to tidy up, where a second Ctrl-C would only print a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
