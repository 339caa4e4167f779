"""What ``fedpilot profile`` does."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from fedpilot import display
from fedpilot.config import profiles
from fedpilot.config.recipe import load_recipe
from fedpilot.display import size

Say: TypeAlias = Callable[[object], None]


def profile_recipe(recipe: Path, overrides: Sequence[str], say: Say | None = None) -> None:
    """Memory of a recipe's training step; ``say`` gets plain values instead of the tables, where given."""
    settings = load_recipe(recipe, overrides)
    _show(lambda: profiles.of_recipe(settings), say)


def profile_model(
    model: Mapping[str, object],
    training: Mapping[str, object],
    micro_batch: int | None,
    num_labels: int,
    say: Say | None = None,
) -> None:
    """Memory of a model's training step, from its configuration alone."""
    _show(lambda: profiles.of_options(model, training, micro_batch, num_labels), say)


def _show(profile: Callable[[], profiles.Profile], say: Say | None) -> None:
    started = time.perf_counter()
    found = profile()
    if say is None:
        show_profile(display.console_for(), found, time.perf_counter() - started)
    else:
        say(document(found))


def document(found: profiles.Profile) -> dict[str, object]:
    """The profile as plain values; bytes."""
    *parts, (moment, peak) = found.parts_by_name().items()
    keys = ("alone_bytes", "from_here_up_bytes", "recomputed_bytes")
    return {
        "model": found.source,
        "what": found.what,
        "parts": dict(parts),
        "peak_bytes": peak,
        "moment": moment.removeprefix("peak, in "),
        "blocks": [
            {"block": block, **dict(zip(keys, peaks, strict=True))} for block, peaks in enumerate(found.by_block)
        ],
    }


def show_profile(console: Console, found: profiles.Profile, seconds: float) -> None:
    """Tables by part and by block."""
    console.print(f"{found.source}: {found.what}")
    parts = Table(title="A training step of all blocks, by part", title_justify="left")
    parts.add_column("part")
    parts.add_column("memory", justify="right", no_wrap=True)
    parts.add_column("bytes", justify="right", no_wrap=True)
    for name, num_bytes in found.parts_by_name().items():
        if not num_bytes:
            continue
        parts.add_row(name, size(num_bytes), f"{num_bytes:,}")
    console.print(parts)
    table = Table(title="Peak by block", title_justify="left")
    for header in ("block", "this block alone", "from this block up", "the same, recomputed"):
        table.add_column(header, justify="right")
    for block, peaks in enumerate(found.by_block):
        table.add_row(str(block), *(size(peak) for peak in peaks))
    console.print(table)
    console.print(f"traced without weights in {seconds:.1f} s")
