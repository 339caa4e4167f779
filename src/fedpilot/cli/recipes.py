"""``fedpilot recipes | init``: where to start."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast

import click
import typer

from fedpilot.cli.base import STARTING, Json, LogFile, app, examples, say_json
from fedpilot.errors import ConfigError, FedpilotError

Task: TypeAlias = Literal["sequence-classification", "causal-lm"]
Columns: TypeAlias = Mapping[str, Sequence[object]]


@app.command(
    rich_help_panel=STARTING,
    epilog=examples("fedpilot recipes", "fedpilot recipes --copy quickstart", "fedpilot run quickstart.toml"),
)
def recipes(
    copy: Annotated[str | None, typer.Option(metavar="NAME", help="Writes a recipe into a folder of yours.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="That folder.")] = Path(),
    json: Json = False,
) -> None:
    """Lists the recipes that come with fedpilot: what each shows and how long it takes."""
    with LogFile():
        from fedpilot.commands import recipes as commands

        if copy is not None:
            commands.copy(copy, out)
        else:
            commands.list_recipes(say_json if json else None)


@app.command(
    rich_help_panel=STARTING,
    epilog=examples(
        "fedpilot init",
        "fedpilot init my-study --data reviews.csv --text review --label stars --model minilm-l6 --clients 6 --yes",
    ),
)
def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the recipe goes.")] = Path(),
    data: Annotated[Path | None, typer.Option(help="The table: .csv, .tsv, .jsonl or .parquet.")] = None,
    task: Annotated[Task | None, typer.Option(help="Learn classes, or to write.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the classes.")] = None,
    by: Annotated[str | None, typer.Option(help="Column whose values are the clients.")] = None,
    clients: Annotated[int | None, typer.Option(min=2, help="Otherwise so many clients of equal share.")] = None,
    model: Annotated[str | None, typer.Option(help="A packaged name, a folder or a hub id.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE,...", help="Budgets of the clients; by default measured off model and data."),
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="The method.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 10,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Takes the defaults for what is not given.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrites a recipe.")] = False,
) -> None:
    """Asks a few questions and writes a commented recipe that runs."""
    if data is None and yes:
        raise click.UsageError("--yes takes defaults, and data has none; give --data")
    with LogFile():
        from fedpilot.commands import init as commands

        asked = _Asking(yes)
        table, columns = asked.table(data)
        chosen = cast(Task, asked.choice("Task", task, ("sequence-classification", "causal-lm")))
        named = asked.column("Column of the texts", text, columns, commands.guessed_text(columns))
        classes = ""
        if chosen == "sequence-classification":
            classes = asked.column(
                "Column of the classes",
                label,
                columns,
                commands.guessed_label(columns, named),
                partial(commands.problem_of_label, named),
            )
        split = asked.column("Column whose values are clients (empty for none)", by, columns, "")
        default = "minilm-l6" if chosen == "sequence-classification" else "smollm2-135m"
        answers = commands.Answers(
            data=table,
            task=chosen,
            text=named,
            label=classes,
            by=split,
            clients=asked.clients(clients, split),
            model=asked.text("Model: a packaged name, a folder or a hub id", model, default),
            memory=asked.text(
                "Budgets of the clients, as 120 MiB, 300 MiB (empty: measured off model and data)", memory, ""
            ),
            algorithm=asked.choice("Algorithm", algorithm, commands.OFFERED),
            rounds=rounds,
        )
        commands.write(answers, folder, force=force)


class _Asking:
    """Asks for what options do not give."""

    def __init__(self, yes: bool) -> None:
        self._yes = yes

    def text(self, question: str, given: str | None, default: str) -> str:
        if given is not None or self._yes:
            return default if given is None else given
        return str(typer.prompt(question, default=default, show_default=bool(default))).strip()

    def table(self, given: Path | None) -> tuple[Path, Columns]:
        """The data file and its columns; asks again where it cannot be read."""
        from fedpilot.commands.init import columns_of

        while True:
            path = given or Path(str(typer.prompt("Data file (.csv, .tsv, .jsonl, .parquet)")).strip())
            try:
                columns = columns_of(path)
            except FedpilotError as error:
                if given is not None:
                    raise
                click.echo(f"  {error}")
                continue
            rows = len(next(iter(columns.values())))
            click.echo(f"  {rows} rows; columns: {', '.join(columns)}")
            return path, columns

    def choice(self, question: str, given: str | None, known: Sequence[str]) -> str:
        if given is None and not self._yes:
            return str(typer.prompt(question, default=known[0], type=click.Choice(known)))
        chosen = known[0] if given is None else given
        if chosen not in known:
            raise ConfigError([f"--{question.lower()} must be one of {', '.join(known)}, got {chosen!r}"])
        return chosen

    def column(
        self,
        question: str,
        given: str | None,
        columns: Columns,
        guess: str | None,
        problem: Callable[[Columns, str], str | None] = lambda columns, name: None,
    ) -> str:
        """A column of the table; an empty name only where the guess is one."""
        while True:
            name = self.text(question, given, guess or "")
            if not name and guess == "":
                return ""
            fault = f"there is no column {name!r}; known: {', '.join(columns)}" if name not in columns else None
            fault = fault or problem(columns, name)
            if fault is None:
                return name
            if given is not None or self._yes:
                raise ConfigError([fault])
            click.echo(f"  {fault}")

    def clients(self, given: int | None, by: str) -> int:
        """Number of clients, where no column says it."""
        if by or given is not None or self._yes:
            return given or 6
        return int(typer.prompt("Number of clients", default=6, type=click.IntRange(min=2)))
