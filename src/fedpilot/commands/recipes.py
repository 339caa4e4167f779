"""What ``fedpilot recipes`` does."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

import fedpilot
from fedpilot import display
from fedpilot.config.schema import suggestion
from fedpilot.errors import ConfigError, FedpilotError


@dataclass(frozen=True)
class Shipped:
    """A recipe that comes with fedpilot.

    Attributes:
        name: Of the file, without its ending.
        path: The file.
        command: What runs it.
        shows: What it is about, in words.
        takes: How long it takes, in words.
    """

    name: str
    path: Path
    command: str
    shows: str
    takes: str


def folder() -> Path:
    """Where the shipped recipes lie: in the package, or at the root of a checkout.

    Raises:
        FedpilotError: They are in neither.
    """
    package = Path(fedpilot.__file__).parent
    found = next((path for path in (package / "recipes", package.parents[1] / "recipes") if path.is_dir()), None)
    if found is None:
        raise FedpilotError(f"recipes must lie in {package / 'recipes'}, got none; install fedpilot again")
    return found


def shipped() -> list[Shipped]:
    """All of them, by name."""
    return [_read(path) for path in sorted(folder().glob("*.toml"))]


def _read(path: Path) -> Shipped:
    """The recipe by the comment that it begins with: a command, what it shows, how long it takes, what to expect."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    command, *rest = lines
    paragraphs = [" ".join(part.split()) for part in "\n".join(rest).split("\n\n") if part.strip()]
    told = [part for part in paragraphs if not part.startswith(("Takes:", "Expected:", "fedpilot "))]
    takes = next(part.removeprefix("Takes: ").rstrip(".") for part in paragraphs if part.startswith("Takes:"))
    return Shipped(path.stem, path, command, told[0], takes)


def list_recipes(say: Callable[[object], None] | None) -> None:
    """What each shows and how long it takes; ``say`` gets plain values instead of the table, where given."""
    found = shipped()
    if say is not None:
        say([{**vars(one), "path": str(one.path)} for one in found])
        return
    table = Table(title=f"Shipped recipes; they lie in {folder()}", title_justify="left", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("what it shows", ratio=3)
    table.add_column("how long it takes", ratio=1)
    for one in found:
        table.add_row(one.name, first_sentences(one.shows), one.takes)
    console = display.console_for()
    console.print(table)
    console.print("run one: fedpilot run PATH; take one home: fedpilot recipes --copy NAME", soft_wrap=True)


def first_sentences(text: str, length: int = 160) -> str:
    """As many sentences as make so many characters, one at least.

    >>> first_sentences("Who learns? All do. Some more.", 15)
    'Who learns? All do.'
    """
    shown = ""
    for sentence in re.split(r"(?<=[.?]) ", text):
        if len(shown) >= length:
            break
        shown = f"{shown} {sentence}".strip()
    return shown


def copy(name: str, out: Path) -> None:
    """A shipped recipe for one's own.

    Raises:
        ConfigError: There is no such recipe, or the file is there already.
    """
    known = {one.name: one for one in shipped()}
    if name not in known:
        raise ConfigError([f"--copy must name a shipped recipe, got {name!r}; {suggestion(name, known)}"])
    file = out / f"{name}.toml"
    if file.exists():
        raise ConfigError([f"--copy must not overwrite {file}; move it away or name another folder"])
    out.mkdir(parents=True, exist_ok=True)
    file.write_bytes(known[name].path.read_bytes())
    display.console_for().print(f"written to {file}; run it: {known[name].command}", soft_wrap=True, markup=False)
