"""Plots: who has what data, who trains which blocks, how good the model is after each round."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpilot.errors import FedpilotError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # an extra

DPI = 120
MOST_NUMBERS = 400
"""Cells of a heat map beyond which their numbers are left out."""
MOST_NAMES = 60
"""Rows of a heat map beyond which they are not named."""


ABSENT = "pictures must have matplotlib, got none installed; pip install 'fedpilot[report]'"


def available() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require() -> None:
    """Says how to get the library that draws.

    Raises:
        FedpilotError: It is not installed.
    """
    if not available():
        raise FedpilotError(ABSENT)


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


def budgets_by_blocks(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    budgets: Mapping[str, float],
    weights: float,
    title: str,
    path: Path,
) -> Path:
    """How much memory it takes to train so many blocks, beside budgets.

    Args:
        curves: Way to train -> (blocks trained, GiB) pairs.
        budgets: What a budget is called -> GiB.
        weights: GiB of the weights alone.
        title: Above the plot.
        path: The picture to write; its ending says the format.
    """
    figure, axes = _figure(width=7.2, height=4.6)
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    for name, budget in budgets.items():
        axes.axhline(budget, color="0.45", linewidth=0.9, linestyle="--")
        axes.annotate(name, (1.0, budget), xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom")
    axes.axhspan(0, weights, color="0.92", zorder=0, label="weights alone")
    axes.set_ylim(0, 1.08 * max([weights, *budgets.values(), *(y for points in curves.values() for _, y in points)]))
    axes.set_xlabel("blocks trained, the deepest")
    axes.set_ylabel("peak memory, GiB")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    return _save(figure, path)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot there is no global state and no window system to ask for.
    figure = Figure(figsize=(min(width, 24), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _heat_map(axes: "Axes", values: NDArray[np.int64], rows: Sequence[str], columns: Sequence[str], unit: str) -> None:
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


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


# --- comparisons of methods -----------------------------------------------------------------------------------------

Shares: TypeAlias = NDArray[np.float64]
"""(tiers, blocks) between 0 and 1; NaN where there is nothing to say."""

PANEL_COLUMNS = 4


def metric_bands(
    bands: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    place: str,
    metric: str,
    path: Path,
    *,
    in_bytes: bool = False,
) -> Path:
    """A panel a method: its mean over seeds with a band of one standard deviation, all other methods in grey behind it.

    Args:
        bands: Method -> places, means and spreads.
        place: What the x axis shows.
        metric: What the y axis shows.
        path: The PNG to write.
        in_bytes: Whether places are bytes, to be shown in MiB.
    """
    unit = 2**20 if in_bytes else 1
    figure, panels = _panels(len(bands), width=3.1, height=2.3)
    for axes, (name, (x, y, sd)) in zip(panels, bands.items(), strict=True):
        for other, (other_x, other_y, _) in bands.items():
            if other != name:
                axes.plot(np.array(other_x) / unit, other_y, color="0.82", linewidth=0.7, zorder=1)
        mean, spread = np.array(y), np.array(sd)
        axes.fill_between(
            np.array(x) / unit, mean - spread, mean + spread, color="C0", alpha=0.25, linewidth=0, zorder=2
        )
        axes.plot(np.array(x) / unit, mean, color="C0", linewidth=1.6, zorder=3)
        axes.set_title(f"{name}  {mean[-1]:.3f}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    figure.supxlabel(f"{place}, MiB" if in_bytes else place, fontsize=9)
    figure.supylabel(metric, fontsize=9)
    return _save(figure, path)


def block_maps(shares: Mapping[str, Shares], tiers: Sequence[str], path: Path) -> Path:
    """A panel a method: how large a share of each tier's sampled clients trained each block.

    Args:
        shares: Method -> (tiers, blocks).
        tiers: Their names.
        path: The PNG to write.
    """
    figure, panels = _panels(len(shares), width=3.1, height=0.9 + 0.32 * len(tiers), shared=False)
    for axes, (name, share) in zip(panels, shares.items(), strict=True):
        axes.set_facecolor("0.8")
        image = axes.imshow(np.ma.masked_invalid(share), aspect="auto", cmap="Blues", vmin=0, vmax=1)
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(share.shape[1]), [str(block) for block in range(share.shape[1])], fontsize=7)
        axes.set_yticks(range(len(tiers)), tiers, fontsize=7)
        if share.shape[1] <= 12:
            for (row, column), value in np.ndenumerate(share):
                if np.isfinite(value):
                    colour = "white" if value > 0.6 else "black"
                    text = f"{100 * value:.0f}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    figure.supxlabel("block (0 is next to the input); % of the tier's sampled clients that trained it", fontsize=9)
    figure.colorbar(image, ax=panels, shrink=0.6, label="share")
    return _save(figure, path)


def _panels(count: int, width: float, height: float, *, shared: bool = True) -> "tuple[Figure, list[Axes]]":
    """As many panels as methods, a few in a row."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, PANEL_COLUMNS)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5), max(height * lines, 2.2) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=shared, sharey=shared)
    flat = list(grid.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]
