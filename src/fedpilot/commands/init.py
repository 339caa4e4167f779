"""What ``fedpilot init`` does: a recipe out of answers, checked before it is written."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeAlias

from fedpilot import display, progress
from fedpilot.algorithms import ALGORITHMS
from fedpilot.assets import ASSETS
from fedpilot.commands.hardware import budgets_of
from fedpilot.config import hardware, profiles, setup
from fedpilot.config.population import Population, load_population
from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.data.files import read_file
from fedpilot.errors import ConfigError

Task: TypeAlias = Literal["sequence-classification", "causal-lm"]
OFFERED = ("fed-pilot", "fedit", "fedra", "flexlora", "flora", "hetlora", "lora-fair", "xgblora")
"""Methods that need nothing but clients with data."""


@dataclass(frozen=True)
class Answers:
    """What a new recipe is made of.

    Attributes:
        data: The table.
        task: What is learnt.
        text: Column of texts.
        label: Column of classes; empty for a language model.
        by: Column whose values are clients; empty to divide the rows evenly.
        clients: Number of clients where there is no such column.
        model: Packaged name, folder or hub id.
        memory: Budgets of the tiers, as text; empty for ones measured off model and data.
        algorithm: The method.
        rounds: How many.
    """

    data: Path
    task: Task
    text: str
    label: str
    by: str
    clients: int
    model: str
    memory: str
    algorithm: str
    rounds: int


def columns_of(data: Path) -> Mapping[str, Sequence[object]]:
    """The table's columns.

    Raises:
        DataError: It cannot be read.
    """
    return {name: list(values) for name, values in read_file(data.expanduser()).items()}


def guessed_text(columns: Mapping[str, Sequence[object]]) -> str:
    """The column called text, or that with the longest cells."""
    return (
        "text" if "text" in columns else max(columns, key=lambda name: sum(len(str(v)) for v in columns[name][:1000]))
    )


def guessed_label(columns: Mapping[str, Sequence[object]], text: str) -> str | None:
    """The column called label, or that with the fewest values of those with several."""
    if "label" in columns:
        return "label"
    counts = {name: len(set(map(str, values))) for name, values in columns.items() if name != text}
    several = {name: count for name, count in counts.items() if count > 1}
    return min(several, key=lambda name: several[name]) if several else None


def problem_of_label(text: str, columns: Mapping[str, Sequence[object]], label: str) -> str | None:
    """Why a column cannot be one of classes beside the texts."""
    if label == text:
        return f"the column of classes must be another than that of texts, got {label!r} for both"
    values = [str(value) for value in columns[label]]
    count = len(set(values))
    if count < 2:
        return f"column {label!r} must have at least two classes, got {count}"
    if count > max(2, len(values) // 2):
        return f"column {label!r} must have classes that repeat, got {count} values in {len(values)} rows"
    return None


def write(answers: Answers, folder: Path, *, force: bool) -> Path:
    """Writes the recipe once it is known to load its data and its model's configuration.

    Raises:
        FedpilotError: Something is not there, or does not go together.
    """
    file = folder / "recipe.toml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError([f"init must write into a folder, got the file {folder}; give another name"])
    if file.exists() and not force:
        raise ConfigError([f"init must not overwrite {file}; give another folder, or --force"])
    console = display.console_for()
    with progress.working(console, "reading the data and the model's configuration"):
        length, given = length_of(answers.model, answers.task), given_budgets(answers.memory)
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / ".recipe.toml.part"
        try:
            draft.write_text(text_of(answers, length, given or ["1 GiB"], folder), encoding="utf-8")
            recipe = load_recipe(draft)
            people = load_population(recipe)
            if not given:
                draft.write_text(text_of(answers, length, measured_budgets(recipe, people), folder), encoding="utf-8")
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
    console.print(f"{people.train.report}; {len(people.clients)} clients")
    console.print(f"written to {file}. Look who would train what: fedpilot plan {file}", soft_wrap=True)
    console.print(f"Train: fedpilot run {file}", soft_wrap=True)
    return file


LENGTH, RANK, BATCH = 64, 8, 16


def length_of(model: str, task: Task) -> int:
    """Tokens of inputs that the model can take, within reason."""
    with hardware.source_of(model) as source:
        settings = {"source": source, "task": task, "rank": RANK, "max_length": LENGTH}
        made = profiles.options(settings, {"batch_size": BATCH, "learning_rate": 1e-3}, None, 2)
        return min(LENGTH, hardware.Planner(*made).positions or LENGTH)


def given_budgets(text: str) -> list[str | int]:
    """Budgets as they were written, once they are known to be any."""
    if not text:
        return []
    budgets_of(text)
    return [int(size) if size.strip().isdecimal() else size.strip() for size in text.split(",")]


def measured_budgets(recipe: Recipe, people: Population) -> list[str]:
    """For the upper half of the blocks, for three quarters and for all of them, on these data.

    Each has room, since Fed-piLot may prefer blocks that cost a little more than the uppermost: half of what one more
    would take, and for all blocks a hundredth.
    """
    labels = setup.num_labels(recipe, people)
    planner = hardware.Planner(setup.model_settings(recipe, people), recipe.training, labels)
    step, count = planner.asked(), planner.spec.num_blocks
    peaks = {n: planner.price(step, n)[0] for n in range(1, count + 1)}
    peaks[count + 1] = peaks[count] + peaks[count] // 50
    shares = dict.fromkeys((max(1, count // 2), max(1, 3 * count // 4), count))
    return [f"{-(-(peaks[n] + peaks[n + 1]) // 2**21)} MiB" for n in shares]


def _from_recipe(path: Path, folder: Path) -> str:
    """The path as the recipe in the folder says it: the name of what lies beside it, or else in full."""
    path = path.expanduser().resolve()
    return path.name if path.parent == folder.resolve() else str(path)


def text_of(answers: Answers, length: int, sizes: Sequence[str | int], folder: Path) -> str:
    """The recipe with its comments."""
    source = _from_recipe(answers.data, folder)
    is_folder = answers.model not in ASSETS and Path(answers.model).expanduser().is_dir()
    model = _from_recipe(Path(answers.model), folder) if is_folder else answers.model
    label = f"label = {json.dumps(answers.label)}           # the column of classes\n" if answers.label else ""
    fraction = "test_fraction = 0.2           # held out for the test\n"
    kept = f"columns = [{json.dumps(answers.by)}]\n" if answers.by else ""
    kind = f'kind = "column"               # a client for each value\ncolumn = {json.dumps(answers.by)}\n'
    even = f'kind = "iid"                  # or dirichlet: uneven classes\nnum_clients = {answers.clients}\n'
    alike = any(field.name == "participation" for field in fields(ALGORITHMS[answers.algorithm]))
    participation = 'participation = "exclusive"   # who cannot train everything sits out\n' if alike else ""
    metric = "" if answers.label else 'metric = "loss"\n'
    baseline = "" if answers.algorithm == "fedit" else '[baseline]\nname = "fedit"\nparticipation = "exclusive"\n'
    return f"""# fedpilot run {folder / "recipe.toml"}
#
# Made by fedpilot init. Look first at who would train what: fedpilot plan {folder / "recipe.toml"}

[run]
name = {json.dumps(re.sub(r"[^a-z0-9]+", "-", answers.data.stem.lower()).strip("-") or "run")}
rounds = {answers.rounds}
# out = "runs"                # where run directories are made

[model]
source = {json.dumps(model)}
task = {json.dumps(answers.task)}
rank = {RANK}
alpha = {2 * RANK}
max_length = {length}               # longer texts are cut, and you are told how many

[data]
source = {json.dumps(source)}
text = {json.dumps(answers.text)}             # the column of texts
{label}{fraction}{kept}
[partition]
{kind if answers.by else even}
[clients]
memory = {json.dumps(list(sizes))}  # budgets of the tiers, dealt out in turn; fedpilot plan shows what they hold

[training]
learning_rate = 2e-3
batch_size = {BATCH}
max_steps = 20                # most optimiser steps a client makes in a round

[algorithm]
name = {json.dumps(answers.algorithm)}
{participation}
[evaluation]
{metric}patience = 4                  # stop when four rounds bring nothing

{baseline}"""
