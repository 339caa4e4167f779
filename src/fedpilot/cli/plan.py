"""``fedpilot plan``: what would be trained, of a recipe or of a model on machines that nobody has bought yet."""

from pathlib import Path
from typing import Annotated, Literal

import click
import typer

from fedpilot.cli.base import LOOKING, Json, LogFile, Overrides, app, examples, importing, say_json
from fedpilot.cli.profile import MODEL_HELP


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "fedpilot plan recipes/quickstart.toml",
        'fedpilot plan --model llama-7b --memory "8 GiB, 24 GiB" --batch 16 --length 512 --rank 16 --dtype bf16',
        "fedpilot plan --model minilm-l6 --task sequence-classification --memory 512MiB --json",
        "fedpilot plan --model path/to/config.json --length 1024 --micro-batch 1 --out plan.svg",
    ),
)
def plan(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file.")] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With a recipe the folder for the pictures, by default one beside the runs; with --model a picture."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    task: Annotated[str, typer.Option(help="sequence-classification, image-classification or causal-lm.")] = (
        "causal-lm"
    ),
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE,...", help="Budgets; without them the smallest budget for each number of blocks."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples of an optimiser step.")] = 16,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Examples of a forward pass.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of the longest example.")] = 512,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels of an image's side.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of every pair.")] = 16,
    dtype: Annotated[Literal["float32", "bf16"], typer.Option(help="Of the frozen weights.")] = "float32",
    quantisation: Annotated[
        Literal["none", "int8", "nf4"], typer.Option(help="Of the blocks' frozen linear layers: 8 or 4 bits.")
    ] = "none",
    optimiser: Annotated[Literal["adamw", "sgd", "momentum"], typer.Option(help="Optimiser.")] = "adamw",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute blocks from the start.")] = False,
    labels: Annotated[int, typer.Option(min=1, help="Classes.")] = 2,
    speed: Annotated[
        float | None, typer.Option(min=1, help="Operations a second of the machine, to show seconds of a step.")
    ] = None,
    json: Json = False,
) -> None:
    """Shows who would train what of a recipe, or what fits which memory of a model; loads no weights."""
    if (recipe is None) == (model is None):
        raise click.UsageError("give a recipe or --model")
    if model is not None and overrides:
        raise click.UsageError("--set changes a recipe; with --model use the options")
    own = ("task", "memory", "batch", "micro_batch", "length", "image_size", "rank", "dtype", "quantisation")
    given = [name for name in (*own, "optimiser", "labels", "checkpointing", "speed") if _given(context, name)]
    if recipe is not None and given:
        raise click.UsageError(
            f"--{given[0].replace('_', '-')} goes with --model; a recipe takes --set SECTION.KEY=VALUE"
        )
    if task == "image-classification" and _given(context, "length"):
        raise click.UsageError("--length counts tokens; images take --image-size")
    with LogFile():
        say = say_json if json else None
        if recipe is not None:
            with importing():
                from fedpilot.commands import plan as commands

            commands.plan(recipe, overrides or [], out, say)
            return
        with importing():
            from fedpilot.commands import hardware

        sizes = {"rank": rank, "max_length": length, "image_size": image_size}
        hardware.plan(
            {"source": model, "task": task, "dtype": dtype, "quantisation": quantisation, **sizes},
            {"batch_size": batch, "optimiser": optimiser, "autocast": dtype, "learning_rate": 1e-3},
            micro_batch,
            labels,
            memory=memory,
            recompute=checkpointing,
            speed=speed,
            out=out,
            say=say,
        )


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
