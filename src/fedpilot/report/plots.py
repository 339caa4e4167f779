"""Plots: who has what data, who trains which blocks, how good the model is after each round."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

DPI = 120
MOST_NUMBERS = 400
"""Cells of a heat map beyond which their numbers are left out."""
MOST_NAMES = 60
"""Rows of a heat map beyond which they are not named."""


def partition_map(counts: NDArray[np.int64], clients: Sequence[str], classes: Sequence[str], path: Path) -> Path:
    """Heat map of examples.

    Args:
        counts: (clients, classes) examples.
        clients: Their names.
        classes: Their names.
        path: The PNG to write.
    """
    figure, axes = _figure(width=3 + 0.7 * len(classes), height=1.4 + 0.3 * min(len(clients), MOST_NAMES))
    _heat_map(axes, counts, clients, classes, "examples")
    axes.set_title("Training examples of each client by class")
    return _save(figure, path)


def block_map(
    rounds_trained: NDArray[np.int64],
    clients: Sequence[str],
    path: Path,
    title: str = "Rounds in which a block was trained",
) -> Path:
    """Heat map of who trained which block how often; -1 marks a client that was left out.

    Args:
        rounds_trained: (clients, blocks) rounds.
        clients: Their names.
        path: The PNG to write.
        title: Above the map.
    """
    blocks = [str(block) for block in range(rounds_trained.shape[1])]
    figure, axes = _figure(width=3 + 0.5 * len(blocks), height=1.4 + 0.3 * min(len(clients), MOST_NAMES))
    _heat_map(axes, rounds_trained, clients, blocks, "rounds (grey: left out)")
    axes.set_xlabel("block (0 is next to the input)")
    axes.set_title(title)
    return _save(figure, path)


def metric_over_time(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], metric: str, path: Path) -> Path:
    """One line a run.

    Args:
        curves: Name of a run -> seconds of training until the end of each round, and the metric then.
        metric: What the y axis shows.
        path: The PNG to write.
    """
    figure, axes = _figure(width=6.4, height=4.0)
    for name, (x, y) in curves.items():
        axes.plot(x, y, marker="o", markersize=3, label=name)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Without pyplot there is no global state and no window system to ask for.
    figure = Figure(figsize=(min(width, 24), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _heat_map(axes: Axes, values: NDArray[np.int64], rows: Sequence[str], columns: Sequence[str], unit: str) -> None:
    shown = np.ma.masked_less(values, 0)
    top = max(int(values.max(initial=0)), 1)
    axes.set_facecolor("0.8")
    image = axes.imshow(shown, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    axes.figure.colorbar(image, ax=axes, label=unit)
    axes.set_xticks(range(len(columns)), columns)
    if max(map(len, columns)) > 4:
        axes.tick_params(axis="x", labelrotation=45)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    if len(rows) <= MOST_NAMES:
        axes.set_yticks(range(len(rows)), rows)
    if values.size <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if value >= 0:
                colour = "white" if value > 0.6 * top else "black"
                axes.text(column, row, str(value), ha="center", va="center", fontsize=7, color=colour)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
