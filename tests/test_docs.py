"""What the README and the docs say exists, exists."""

import dataclasses
import re
from pathlib import Path

import pytest

from fedpilot.algorithms import ALGORITHMS
from fedpilot.cli import app
from fedpilot.config.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_one(page: Path) -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    for name in re.findall(r"^(?:\$ )?fedpilot ([a-z]+)", page.read_text(), flags=re.MULTILINE):
        assert name in known


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_page_that_the_readme_links_and_that_names_its_options(name: str) -> None:
    page = (ROOT / "docs" / "algorithms" / f"{name}.md").read_text()
    assert f"docs/algorithms/{name}.md" in (ROOT / "README.md").read_text()
    given = {"spec", "profile", "budget_bytes"}  # by the run, not by the user
    for field in dataclasses.fields(ALGORITHMS[name]):
        assert field.name in given or f"`{field.name}" in page, f"{field.name} is not on the page of {name}"


def test_the_readme_lists_exactly_the_algorithms_that_there_are() -> None:
    section = (ROOT / "README.md").read_text().partition("## Algorithms")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", section, flags=re.MULTILINE)) == set(ALGORITHMS)


def test_the_sizes_that_the_readme_gives_are_those_of_the_source() -> None:
    def lines(*paths: Path) -> int:
        return sum(len(path.read_text().splitlines()) for path in paths)

    said = re.search(
        r"about (\d+) thousand lines .*file of (\d+) .*to (\d+) \(", (ROOT / "README.md").read_text(), re.S
    )
    assert said is not None
    source = ROOT / "src" / "fedpilot"
    counted = (
        lines(*source.rglob("*.py")) / 1000,
        lines(source / "algorithms" / "fedit.py"),
        lines(source / "algorithms" / "fed_pilot.py"),
    )
    assert counted == pytest.approx(tuple(map(float, said.groups())), rel=0.1)


def test_every_make_target_that_the_docs_name_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)`", page.read_text())) <= targets


def test_the_quickstart_recipe_is_the_one_that_the_readme_describes() -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml")
    assert (recipe.model.source, recipe.data.source, recipe.algorithm.name) == ("minilm-l6", "vader", "fed-pilot")
    assert len(recipe.clients.memory) == 3


def test_the_quickstart_example_stays_under_sixty_lines() -> None:
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) < 60
    assert len((ROOT / "examples" / "your_algorithm.py").read_text().splitlines()) < 70
