"""The same small search for every method: settings chosen on validation data, before the runs that count."""

import itertools
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fedpilot import checkpoint
from fedpilot.compare import figures
from fedpilot.compare.study import TUNED, Member, Study, read_tuned
from fedpilot.config import schema, setup
from fedpilot.config.recipe import SHARED
from fedpilot.errors import ConfigError, RecordError
from fedpilot.stopping import Goal

FOLDER = "tune"


@dataclass(frozen=True)
class Search:
    """Values to try, for every method alike.

    Attributes:
        grid: ``section.key`` -> its values as TOML; all combinations are tried.
        rounds: Of each try.
        seed_index: Which of the comparison's seeds, from 0.
    """

    grid: Mapping[str, tuple[str, ...]]
    rounds: int
    seed_index: int = 0

    def candidates(self) -> list[tuple[str, ...]]:
        """Overrides of each try."""
        pairs = [[f"{key}={value}" for value in values] for key, values in self.grid.items()]
        return list(itertools.product(*pairs))

    def at_edge(self, overrides: Sequence[str]) -> list[str]:
        """Those of a candidate's settings that are the least or the greatest of the numbers tried.

        >>> search = Search({"a.x": ("1e-3", "1e-2", "0.1"), "a.y": ("1", "2"), "a.z": ("p", "q")}, rounds=5)
        >>> search.at_edge(("a.x=1e-2", "a.y=2", "a.z=p"))
        ['a.y=2']
        """
        found = []
        for override, values in zip(overrides, self.grid.values(), strict=True):
            try:
                numbers = [float(value) for value in values]
            except ValueError:
                continue
            value = float(override.partition("=")[2])
            if min(numbers) < max(numbers) and value in (min(numbers), max(numbers)):
                found.append(override)
        return found

    def facts(self) -> dict[str, object]:
        """What the file of the outcome keeps of it."""
        return {
            "grid": [f"{key}={','.join(values)}" for key, values in self.grid.items()],
            "rounds": self.rounds,
            "seed_index": self.seed_index,
        }


def parse(options: Sequence[str], rounds: int | None, made: Study, seed: int | None) -> Search:
    """The search that the options ask for.

    Raises:
        ConfigError: All that is wrong with them.
    """
    problems, grid = [], {}
    for option in options:
        key, equals, values = option.partition("=")
        section, _, name = key.strip().partition(".")
        parts = tuple(part.strip() for part in values.split(",") if part.strip())
        if not equals or not name or not parts:
            problems.append(f"--tune must be section.key=v1,v2,..., got {option!r}")
        elif section in SHARED and (not SHARED[section] or name in SHARED[section]):
            problems.append(f"--tune must leave what all methods share, got {option!r}; tune training.learning_rate")
        else:
            grid[key.strip()] = parts
    recipe = made.recipe
    if not recipe.data.validation_fraction:
        rule = "data.validation_fraction must be above 0 to tune on validation data, got 0.0"
        problems.append(f"{rule}; --set data.validation_fraction=0.1 is usual")
    if rounds is None or rounds < 1:
        problems.append(f"--tune-rounds must be given with --tune and be at least 1, got {schema.show(rounds)}")
    index = 0 if seed is None else seed - recipe.run.seed
    if index < 0:
        problems.append(f"--tune-seed must be at least run.seed, {recipe.run.seed}, got {seed}")
    if problems:
        raise ConfigError(problems)
    search = Search(grid, rounds or 1, index)
    _check(made, search)
    return search


def _check(made: Study, search: Search) -> None:
    problems = []
    for method, candidate in itertools.product(made.methods, search.candidates()):
        try:
            made.member_recipe(method, search.seed_index, candidate)
        except ConfigError as error:
            problems += [f"--tune for method {method!r}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def tries(made: Study, search: Search) -> list[Member]:
    """The runs of the search, for methods that have not been tuned by it yet; they never read the test set.

    Raises:
        RecordError: The folder holds the outcome of another search.
    """
    file = made.path / TUNED
    known = read_tuned(made.path)
    if known:
        text = file.read_text(encoding="utf-8")
        said = re.search(r"^# search: (.*)$", text, flags=re.MULTILINE)
        if said is None or json.loads(said[1]) != search.facts():
            raise RecordError(
                f"{file} must come from this search, got {said[1] if said else 'no search'}; leave --tune out to use "
                "what it chose, or compare in another folder"
            )
    return [
        _member(made, search, method, candidate)
        for candidate in search.candidates()
        for method in made.methods
        if method not in known
    ]


def _member(made: Study, search: Search, method: str, candidate: Sequence[str]) -> Member:
    recipe = made.member_recipe(method, search.seed_index, candidate)
    recipe = replace(
        recipe,
        run=replace(recipe.run, rounds=search.rounds),
        evaluation=replace(recipe.evaluation, on="validation"),
    )
    folder = re.sub(r"[^A-Za-z0-9_.=,+-]", "_", ",".join(part.partition(".")[2] for part in candidate))
    path = made.path / FOLDER / method / folder
    return Member(method, recipe.run.seed, recipe, path, read_test=False)


@dataclass(frozen=True)
class Choice:
    """What the search found for a method.

    Attributes:
        overrides: The best.
        scores: Overrides -> mean of the last evaluations; NaN for a try that failed.
    """

    overrides: tuple[str, ...]
    scores: Mapping[tuple[str, ...], float]


def missing(made: Study, search: Search, refused: Collection[str] = ()) -> dict[str, list[str]]:
    """Method -> labels of its tries that are to be made yet, of methods that have not been tuned before.

    Args:
        made: The comparison.
        search: The search.
        refused: Labels of tries that failed and would again.
    """
    found: dict[str, list[str]] = {}
    for member in tries(made, search):
        if member.label not in refused and not member.done():
            found.setdefault(member.method, []).append(member.label)
    return found


def choose(made: Study, search: Search, refused: Collection[str] = ()) -> dict[str, Choice]:
    """The best try of each method none of whose tries is `missing`; of equals the first."""
    chosen: dict[str, Choice] = {}
    left = missing(made, search, refused)
    for method in made.methods:
        if method in left:
            continue
        scores: dict[tuple[str, ...], float] = {}
        for candidate in search.candidates():
            member = _member(made, search, method, candidate)
            goal = setup.goal(member.recipe)
            scores[candidate] = _score(member, goal)
        sign = 1.0 if goal.higher_is_better else -1.0
        known = {candidate: value for candidate, value in scores.items() if math.isfinite(value)}
        if known:
            chosen[method] = Choice(max(known, key=lambda candidate: sign * known[candidate]), scores)
    return chosen


def _score(member: Member, goal: Goal) -> float:
    if not member.done():
        return math.nan
    rounds, last = member.recipe.run.rounds, member.recipe.evaluation.last
    found = figures.run_figures(member.lines(), goal, rounds=rounds, last=last).score
    return math.nan if found is None else found


def write(made: Study, search: Search, chosen: Mapping[str, Choice]) -> Study:
    """Adds what was chosen to ``tuned.toml``; the study that uses it."""
    tuned = {**read_tuned(made.path), **{method: list(choice.overrides) for method, choice in chosen.items()}}
    parts = [
        "# What the search on validation data chose; all runs of the method use it.",
        f"# search: {json.dumps(search.facts())}",
        "",
    ]
    for method, overrides in tuned.items():
        parts += [f'[methods."{method}"]', f"set = {schema.show(overrides)}", ""]
    checkpoint.write_file(made.path / TUNED, "\n".join(parts).encode())
    return replace(made, tuned=tuned)
