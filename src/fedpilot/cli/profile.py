"""``fedpilot profile``: the memory of a training step."""

from pathlib import Path
from typing import Annotated, Literal

import click
import typer

from fedpilot.cli.base import LOOKING, Json, LogFile, Overrides, app, examples, say_json

MODEL_HELP = (
    "Instead of a recipe: a shape such as llama-7b, an asset, a folder, a hub id, a config.json; needs no weights."
)


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "fedpilot profile recipes/quickstart.toml",
        "fedpilot profile --model minilm-l6 --batch 16 --length 64",
    ),
)
def profile(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file.")] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help=MODEL_HELP),
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
    quantisation: Annotated[
        Literal["none", "int8", "nf4"], typer.Option(help="Of the blocks' frozen linear layers: 8 or 4 bits.")
    ] = "none",
    labels: Annotated[int, typer.Option(min=1, help="Classes.")] = 2,
    json: Json = False,
) -> None:
    """Shows the memory of a training step, by part and by block; needs no weights."""
    if (recipe is None) == (model is None):
        raise click.UsageError("give a recipe or --model")
    if model is not None and overrides:
        raise click.UsageError("--set changes a recipe; with --model use the options")
    with LogFile():
        from fedpilot.commands import profile as commands

        say = say_json if json else None
        if recipe is not None:
            commands.profile_recipe(recipe, overrides or [], say)
            return
        sizes = {"rank": rank, "max_length": length, "image_size": image_size}
        commands.profile_model(
            {"source": model, "task": task, "dtype": dtype, "quantisation": quantisation, **sizes},
            {"batch_size": batch, "optimiser": optimiser, "autocast": autocast, "learning_rate": 1e-3},
            micro_batch,
            labels,
            say,
        )
