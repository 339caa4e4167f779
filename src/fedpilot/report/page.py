"""``report.html``: everything that a run or a comparison left on disk, on one page without a network."""

import base64
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from fedpilot import checkpoint
from fedpilot.display import counted
from fedpilot.report import figures, svg, tables, theme, words
from fedpilot.report.reading import Group, Run, comparison_of, find
from fedpilot.report.svg import Figure, Table

logger = logging.getLogger(__name__)

FILE = "report.html"


@dataclass(frozen=True)
class Section:
    """What the page says of one method."""

    ident: str
    label: str
    about: str
    clients: int
    tiers: Sequence[str]
    figures: Sequence[Figure]
    communication: Table
    missed: Table


@dataclass(frozen=True)
class Key:
    """A line of the legend."""

    name: str
    index: int
    colour: int
    dash: str


@dataclass(frozen=True)
class Recipe:
    """A resolved configuration."""

    label: str
    text: str


def write(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of the runs and comparisons in directories.

    Args:
        paths: Run directories and folders of comparisons; several stand side by side.
        out: The file; ``None`` for ``report.html`` in the first directory.

    Raises:
        RecordError: A directory has no run, or it cannot be written.
    """
    file = out or paths[0] / FILE
    text = render(paths)
    with checkpoint.writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_file(file, text.encode())
    return file


def try_to_write(path: Path) -> Path | None:
    """`write` for the end of a run, which it must not spoil: what goes wrong is logged."""
    try:
        return write([path])
    except Exception:
        logger.warning("%s could not be written; fedpilot report %s tries again", path / FILE, path, exc_info=True)
        return None


def render(paths: Sequence[Path], *, live: str | None = None) -> str:
    """The page as text.

    Args:
        paths: Run directories and folders of comparisons.
        live: Version of what is shown, for a page that loads itself anew when there is another; see `watch`.

    Raises:
        RecordError: A directory has no run.
    """
    groups = find(paths)
    style = theme.style() + _shipped("report.css")
    script = _shipped("report.js")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=_title(paths, groups),
            subtitle=_subtitle(groups),
            version=importlib.metadata.version("fedpilot"),
            answers=words.answers(groups, verdict(paths)),
            lines=[_key(index, group.label) for index, group in enumerate(groups)],
            spread=max(len(group.runs) for group in groups) if any(len(group.runs) > 1 for group in groups) else 0,
            course=figures.course(groups),
            totals=tables.totals(groups),
            differing=tables.differing(groups),
            groups=[section(index, group) for index, group in enumerate(groups)],
            recipes=[
                Recipe(f"{group.label}: {run.path.name}", _settings(run)) for group in groups for run in group.runs[:1]
            ],
            commands=tables.commands(paths, groups),
            origins=tables.origins(groups),
            style=style,
            script=script,
            style_hash=_hash(style),
            script_hash=_hash(script),
            **_live(live),
        )
    )


def waiting(names: Sequence[str], live: str) -> str:
    """The page of runs that have nothing to show yet."""
    style = theme.style() + _shipped("report.css")
    template = _environment().get_template("waiting.html.j2")
    return template.render(names=names, style=style, style_hash=_hash(style), **_live(live))


def _live(version: str | None) -> dict[str, str | None]:
    script = _shipped("watch.js")
    return {"live": version, "live_script": script, "live_hash": _hash(script)}


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("fedpilot.report")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)


def _shipped(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None, "made with one"
    return environment.loader.get_source(environment, name)[0]


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _key(index: int, name: str) -> Key:
    return Key(name, index, index % svg.SERIES, svg.dash_of(index))


def _title(paths: Sequence[Path], groups: Sequence[Group]) -> str:
    first = groups[0].first
    if len(paths) > 1:
        return f"{counted(len(paths), 'directory').replace('directorys', 'directories')} side by side"
    if (paths[0] / "manifest.json").exists():
        return f"{first.section('run').get('name', paths[0].name)}: {first.method}"
    return f"{paths[0].name}: {counted(len(groups), 'method')} compared"


def _subtitle(groups: Sequence[Group]) -> str:
    run = groups[0].first
    model, data = run.section("model").get("source", "a model"), run.section("data").get("source", "data")
    started = str(run.manifest.get("started", "")).replace("T", " ").removesuffix("+00:00")
    when = f", started {started} UTC" if started else ""
    blocks = counted(run.num_blocks, "block")
    return f"{model} ({blocks}) on {data}, {counted(len(run.clients), 'client')}{when}"


def verdict(paths: Sequence[Path]) -> Sequence[str]:
    """What a run's own comparison with its baseline came to, as the terminal said it; nothing for several runs."""
    return words.verdict(comparison_of(paths[0])) if len(paths) == 1 else ()


def section(index: int, group: Group) -> Section:
    """What one method did, on the first seed."""
    run, ident = group.first, f"g{index}"
    tiers = list(dict.fromkeys(client.tier for client in run.clients))
    drawn = [
        figures.blocks_map(ident, run),
        figures.split(ident, run),
        figures.budgets(ident, run),
        figures.coverage(ident, run),
        figures.bytes_by_round(ident, run),
        figures.block_facts(ident, run),
    ]
    others = (
        f" {len(group.runs)} seeds were run; each run directory has a page of its own." if len(group.runs) > 1 else ""
    )
    about = f"{run.method}, {counted(run.last_round, 'round')}, seed {run.seed}.{others}"
    return Section(
        *(ident, group.label, about, len(run.clients), tiers),
        [figure for figure in drawn if figure is not None],
        tables.communication(run),
        tables.missed_table(run),
    )


def _settings(run: Run) -> str:
    return run.recipe or json.dumps(run.config, indent=2)
