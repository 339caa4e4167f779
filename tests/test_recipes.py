import re
from dataclasses import replace
from pathlib import Path

import pytest

from fedpilot import assets
from fedpilot.config import profiles
from fedpilot.config.recipe import load_recipe
from fedpilot.record import RunDirectory
from tests.test_cli import fedpilot

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))


def command_of(recipe: Path) -> str:
    """The command in a recipe's first line."""
    return recipe.read_text().splitlines()[0].removeprefix("# ")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_and_opens_with_its_command_and_expected_figure(recipe: Path) -> None:
    settings = load_recipe(recipe)
    assert settings.run.name.replace("-", "_") == recipe.stem
    command = "compare" if recipe.stem.startswith("study_") else "(run|compare)"
    assert re.match(rf"fedpilot {command} recipes/{re.escape(recipe.name)}\b", command_of(recipe))
    assert re.search(r"^# Takes: .*(second|minute|hour|not measured yet)", recipe.read_text(), re.MULTILINE)
    assert re.search(r"^# Expected: ", recipe.read_text(), re.MULTILINE)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_reads_back_from_what_it_resolves_to(recipe: Path, tmp_path: Path) -> None:
    settings = load_recipe(recipe)
    (tmp_path / "again.toml").write_text(settings.to_toml())
    assert load_recipe(tmp_path / "again.toml") == settings


def test_the_tiny_recipe_runs_on_real_weights_and_data(tmp_path: Path) -> None:
    result = fedpilot("run", str(FOLDER / "tiny.toml"), "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    lines = RunDirectory.open(tmp_path / "run").lines()
    assert lines[-1]["metrics"]["accuracy"] > lines[0]["metrics"]["accuracy"]  # type: ignore[index]
    assert [out["client_id"] for out in lines[-1]["left_out"]] == [0]  # type: ignore[attr-defined]
    for plan, upload in zip(lines[1]["plans"], lines[1]["uploads"], strict=True):  # type: ignore[call-overload]
        assert upload["metrics"]["peak_bytes"] <= plan["peak_bytes"] <= plan["budget_bytes"]


def test_the_recipe_for_your_own_table_runs_on_one(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    rows = [f"{'a lovely' if n % 2 else 'an awful'} day number {n},{'up' if n % 2 else 'down'}" for n in range(60)]
    table.write_text("\n".join(["text,label", *rows]) + "\n")
    changes = [f"data.source={table}", "model.source=minilm-l3", "run.rounds=1", "training.max_steps=1"]
    options = [part for change in changes for part in ("--set", change)]
    result = fedpilot("run", str(FOLDER / "own_csv.toml"), "--out", str(tmp_path / "run"), *options)
    assert result.exit_code == 0, result.output
    assert "fed-pilot  round 1/1" in result.output


def test_in_the_quickstart_the_smallest_tiers_cannot_train_all_blocks_and_the_largest_can() -> None:
    recipe = load_recipe(FOLDER / "quickstart.toml")
    peaks = [up for _, up, _ in profiles.of_recipe(recipe).by_block]
    small, medium, large = recipe.clients.memory
    assert peaks[-1] <= small < medium < peaks[0] <= large


@pytest.mark.parametrize(
    ("name", "classes", "lowest"),
    [("study_banking77", 77, (4, 2, 0)), ("study_vader_domains", 2, (4, 2, 0)), ("study_fashion_mnist", 10, (8, 4, 0))],
)
def test_the_tiers_of_a_study_are_all_blocks_two_thirds_and_a_third(
    name: str, classes: int, lowest: tuple[int, int, int]
) -> None:
    recipe = load_recipe(FOLDER / f"{name}.toml")
    model = replace(recipe.model, source=assets.resolve(recipe.model.source))
    rows = profiles.profile(model, recipe.training, classes, None).by_block
    peaks, all_recomputed = [up for _, up, _ in rows], rows[0][2]
    for budget, block in zip(recipe.clients.memory, lowest, strict=True):
        needed = max(peaks[block], all_recomputed)
        assert needed <= budget < needed + 2**20  # a tenth of a MiB would do; one less block would show
        assert block == 0 or budget < peaks[block - 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "language_model"])
def test_a_recipe_of_another_task_runs_on_real_weights(name: str, tmp_path: Path) -> None:
    changes = [
        "run.rounds=1",
        "training.max_steps=2",
        "data.limit=160",
        "data.test_limit=20",
        "partition.min_examples=2",
    ]
    options = [part for change in changes for part in ("--set", change)]
    result = fedpilot("run", str(FOLDER / f"{name}.toml"), "--out", str(tmp_path / "run"), *options)
    assert result.exit_code == 0, result.output
    for line in RunDirectory.open(tmp_path / "run").lines()[1:]:
        for plan, upload in zip(line["plans"], line["uploads"], strict=True):  # type: ignore[call-overload]
            assert upload["metrics"]["peak_bytes"] <= plan["peak_bytes"] <= plan["budget_bytes"]
