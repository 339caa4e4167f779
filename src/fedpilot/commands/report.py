"""What ``fedpilot report`` does."""

from collections.abc import Sequence
from pathlib import Path

from fedpilot import display
from fedpilot.report import page


def write_page(directories: Sequence[Path], out: Path | None) -> None:
    """The page of runs and comparisons."""
    display.console_for().print(f"written to {page.write(directories, out)}", soft_wrap=True)
