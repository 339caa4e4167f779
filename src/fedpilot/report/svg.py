"""Plots as SVG text: one width that a phone shows at its size, few elements whatever the data, a table behind each.

Colours are classes that the page's style sheet fills in, so that both themes and print share one drawing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

WIDTH = 460
LEVELS = 7
"""Shades of a heat map, the first one for zero."""
MOST_ROW_NAMES = 40
"""Rows of a heat map beyond which they are not named beside it."""
TALLEST = 720
"""Pixels of a heat map's cells together."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")
SERIES = 8
"""Colours of lines; a ninth line has the first colour with another dash."""

Show: TypeAlias = Callable[[float], str]


@dataclass(frozen=True)
class Table:
    """What a plot shows, in words and numbers.

    Attributes:
        header: Of the columns.
        rows: Cells; the first of a row names it.
        tiers: Tier of each row where the rows are clients, for the filter; empty otherwise.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    tiers: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A plot with all that a page needs of it.

    Attributes:
        ident: Of its element; what belongs to it starts with it.
        kind: ``lines``, ``bars`` or ``map``: how it answers to a pointer.
        title: A few words.
        description: What it shows, for those who do not see it.
        svg: The drawing.
        data: What a pointer reads; JSON.
        table: The same as numbers.
        note: A sentence below.
        legend: Class -> what it stands for.
    """

    ident: str
    kind: str
    title: str
    description: str
    svg: Markup
    data: dict[str, Any]
    table: Table
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()

    def with_legend(self, legend: Sequence[tuple[str, str]]) -> "Figure":
        """The same with another legend."""
        return replace(self, legend=legend)


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Attributes:
        name: In the legend.
        x: Places.
        y: Values; NaN breaks the line.
        sd: Spread around it; empty for none.
        index: Of its colour and dash; the same for a method in all plots.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    sd: Sequence[float] = field(default=())
    index: int = 0


def ticks(low: float, high: float, most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers that span a range; ``whole`` ones for what is counted.

    >>> ticks(0.52, 0.81)
    [0.5, 0.6, 0.7, 0.8, 0.9]
    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    >>> ticks(0, 2, whole=True)
    [0.0, 1.0, 2.0]
    """
    if not high > low:
        high = low + (abs(low) * 0.1 or 1.0)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def dash_of(index: int) -> str:
    """Dashes of the line with that index; the colours of two lines with the same dashes differ."""
    return DASHES[(index + index // SERIES) % len(DASHES)]


def number(value: float) -> str:
    """A coordinate with no more digits than a screen has.

    >>> number(12.0), number(3.14159)
    ('12', '3.1')
    """
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def _opened(ident: str, title: str, description: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {number(height)}" role="img" aria-labelledby="{ident}-t {ident}-d">'
        f'<title id="{ident}-t">{escape(title)}</title><desc id="{ident}-d">{escape(description)}</desc>'
    )


def _text(x: float, y: float, text: str, classes: str = "", anchor: str = "start") -> str:
    placed = "" if anchor == "start" else f' text-anchor="{anchor}"'
    named = f' class="{classes}"' if classes else ""
    return f'<text x="{number(x)}" y="{number(y)}"{named}{placed}>{escape(text)}</text>'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# --- lines ----------------------------------------------------------------------------------------------------------


def lines(
    ident: str,
    title: str,
    description: str,
    series: Sequence[Line],
    *,
    x_name: str,
    show_x: Show,
    show_y: Show,
    from_zero: bool = False,
    note: str = "",
    whole: bool = True,
) -> Figure:
    """Values over an axis, a line each, with bands where there is spread.

    Args:
        ident: Of the element.
        title: A few words.
        description: What it shows.
        series: The lines; at least one with a finite value.
        x_name: Below the axis.
        show_x: Places as text.
        show_y: Values as text.
        from_zero: Whether the value axis starts at 0.
        note: A sentence below.
        whole: Whether places are counted, as rounds are.
    """
    height, left, right, top, bottom = 270.0, 66.0, 12.0, 10.0, 44.0
    finite = [v for line in series for v in _edges(line) if math.isfinite(v)]
    marks_y = ticks(min([0.0, *finite] if from_zero else finite), max(finite))
    places = [x for line in series for x in line.x]
    marks_x = ticks(min(places), max(places), whole=whole)
    low_x, high_x = min(places), max(max(places), min(places) + 1e-9)
    wide, tall = WIDTH - left - right, height - top - bottom

    def px(x: float) -> float:
        return left + wide * ((x - low_x) / (high_x - low_x) if high_x - low_x > 1e-9 else 0.5)

    def py(y: float) -> float:
        return top + tall * (1 - (y - marks_y[0]) / (marks_y[-1] - marks_y[0]))

    parts = [_opened(ident, title, description, height)]
    for mark in marks_y:
        parts.append(f'<path class="grid" d="M{number(left)} {number(py(mark))}H{number(WIDTH - right)}"/>')
        parts.append(_text(left - 7, py(mark) + 4, show_y(mark), anchor="end"))
    for mark in marks_x:
        if low_x - 1e-9 <= mark <= high_x + 1e-9:
            anchor = "end" if px(mark) > WIDTH - 30 else "middle"
            parts.append(_text(px(mark), height - bottom + 18, show_x(mark), anchor=anchor))
    parts.append(_text(left + wide / 2, height - 6, x_name, "axis", "middle"))
    data: list[dict[str, Any]] = []
    for line in series:
        points = [(px(x), py(y)) for x, y in zip(line.x, line.y, strict=True)]
        dash = dash_of(line.index)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        drawn = f'<g data-s="{line.index}" class="s{line.index % SERIES}">'
        if any(line.sd):
            drawn += f'<path class="band" d="{_band(line, px, py)}"/>'
        drawn += f'<path class="line" d="{_path(points)}"{dashed}/>'
        if len(points) <= 30:
            dots = "".join(f"M{number(x)} {number(y)}h0" for x, y in points if math.isfinite(y))
            drawn += f'<path class="dots" d="{dots}"/>'
        parts.append(drawn + "</g>")
        data.append(
            {
                "name": line.name,
                "s": line.index,
                "x": [round(x, 1) for x, _ in points],
                "y": [round(y, 1) if math.isfinite(y) else None for _, y in points],
                "at": [show_x(x) for x in line.x],
                "is": _said(line, show_y),
            }
        )
    parts.append(f'<path class="cursor" d="M0 {number(top)}V{number(height - bottom)}"/></svg>')
    return Figure(
        ident,
        "lines",
        title,
        description,
        Markup("".join(parts)),
        {"lines": data, "xName": x_name},
        _lines_table(series, x_name, show_x, show_y, whole=whole),
        note,
    )


def _edges(line: Line) -> list[float]:
    spread = line.sd or [0.0] * len(line.y)
    return [value + sign * sd for value, sd in zip(line.y, spread, strict=True) for sign in (-1, 1)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    path, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{number(x)} {number(y)}")
        pen = "L"
    return "".join(path)


def _band(line: Line, px: Show | Callable[[float], float], py: Callable[[float], float]) -> str:
    known = [(x, y, sd) for x, y, sd in zip(line.x, line.y, line.sd, strict=True) if math.isfinite(y)]
    upper = [f"{number(float(px(x)))} {number(py(y + sd))}" for x, y, sd in known]
    lower = [f"{number(float(px(x)))} {number(py(y - sd))}" for x, y, sd in reversed(known)]
    return f"M{'L'.join([*upper, *lower])}Z"


def _said(line: Line, show: Show) -> list[str]:
    spread = line.sd or [0.0] * len(line.y)
    return [_value(y, sd, show) for y, sd in zip(line.y, spread, strict=True)]


def _value(value: float, sd: float, show: Show) -> str:
    if not math.isfinite(value):
        return "not a number"
    return f"{show(value)} ± {show(sd)}" if sd else show(value)


def _lines_table(series: Sequence[Line], x_name: str, show_x: Show, show_y: Show, *, whole: bool) -> Table:
    """One row a place where places are counted, else one a point."""
    said = [dict(zip(line.x, _said(line, show_y), strict=True)) for line in series]
    if whole or len(series) == 1:
        places = sorted({x for line in series for x in line.x})
        rows = [[show_x(x), *(one.get(x, "-") for one in said)] for x in places]
        return Table([x_name, *(line.name for line in series)], rows)
    points = [(line.name, show_x(x), text) for line, one in zip(series, said, strict=True) for x, text in one.items()]
    return Table(["line", x_name, "value"], points)


# --- bars -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A row of `budget_bars`.

    Attributes:
        name: On its left.
        budget: The outline.
        predicted: The filled part; ``None`` where it is not known.
        measured: The mark; ``None`` where it is not known.
    """

    name: str
    budget: float
    predicted: float | None
    measured: float | None


def budget_bars(ident: str, title: str, description: str, bars: Sequence[Bar], show: Show, note: str = "") -> Figure:
    """Budgets as outlines, what was predicted as bars in them, what was measured as marks."""
    left, right, row, high = 6.0, 12.0, 46.0, 18.0
    top = max((value for bar in bars for value in (bar.budget, bar.predicted, bar.measured) if value), default=1.0)
    height = row * len(bars) + 6
    wide = WIDTH - left - right
    parts = [_opened(ident, title, description, height)]
    for index, bar in enumerate(bars):
        y = row * index + 20
        over = (bar.measured or 0) > bar.budget or (bar.predicted or 0) > bar.budget
        parts.append(_text(left, y - 5, _short(f"{bar.name}: {show(bar.budget)}", 44), "name"))
        if bar.predicted is not None:
            shade = "bar over" if over else "bar"
            width = number(wide * bar.predicted / top)
            parts.append(f'<rect class="{shade}" x="{number(left)}" y="{number(y)}" width="{width}" height="{high}"/>')
        width = number(wide * bar.budget / top)
        parts.append(f'<rect class="budget" x="{number(left)}" y="{number(y)}" width="{width}" height="{high}"/>')
        if bar.measured is not None:
            x = left + wide * bar.measured / top
            parts.append(f'<path class="mark" d="M{number(x)} {number(y - 3)}V{number(y + high + 3)}"/>')
    parts.append("</svg>")
    rows = [
        [
            bar.name,
            show(bar.budget),
            "-" if bar.predicted is None else show(bar.predicted),
            "-" if bar.measured is None else show(bar.measured),
            "-" if bar.predicted is None else f"{100 * bar.predicted / bar.budget:.1f}%",
            "-" if bar.predicted is None or bar.measured is None else _apart(bar.measured, bar.predicted, show),
        ]
        for bar in bars
    ]
    header = ["tier", "budget", "predicted peak", "measured peak", "predicted / budget", "measured - predicted"]
    said = [
        f"{row[0]}\nbudget {row[1]}\npredicted peak {row[2]}\nmeasured peak {row[3]}\npredicted / budget {row[4]}"
        for row in rows
    ]
    legend = [("key-budget", "budget"), ("key-bar", "predicted peak"), ("key-mark", "measured peak")]
    data = {"rowHeight": row, "top": 0, "said": said}
    return Figure(ident, "bars", title, description, Markup("".join(parts)), data, Table(header, rows), note, legend)


def _apart(measured: float, predicted: float, show: Show) -> str:
    gap = measured - predicted
    return "0 B" if gap == 0 else f"{'+' if gap > 0 else '-'}{show(abs(gap))}"


def columns(
    ident: str,
    title: str,
    description: str,
    shares: Sequence[float],
    said: Sequence[str],
    table: Table,
    *,
    x_name: str,
    note: str = "",
) -> Figure:
    """A column for each block; shares are between 0 and 1."""
    height, left, right, top, bottom = 210.0, 58.0, 12.0, 10.0, 44.0
    tall, step = height - top - bottom, (WIDTH - left - right) / max(len(shares), 1)
    parts = [_opened(ident, title, description, height)]
    for mark in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + tall * (1 - mark)
        parts.append(f'<path class="grid" d="M{number(left)} {number(y)}H{number(WIDTH - right)}"/>')
        parts.append(_text(left - 7, y + 4, f"{100 * mark:.0f}%", anchor="end"))
    every = max(1, math.ceil(len(shares) * 22 / (WIDTH - left - right)))
    for block, share in enumerate(shares):
        x = left + step * block
        size = tall * share
        shape = f'x="{number(x + step * 0.12)}" y="{number(top + tall - size)}" width="{number(step * 0.76)}"'
        parts.append(f'<rect class="bar" {shape} height="{number(size)}"/>')
        if block % every == 0:
            parts.append(_text(x + step / 2, height - bottom + 18, str(block), anchor="middle"))
    parts.append(_text(left + (WIDTH - left - right) / 2, height - 6, x_name, "axis", "middle"))
    parts.append("</svg>")
    data = {"left": left, "step": step, "said": list(said)}
    return Figure(ident, "columns", title, description, Markup("".join(parts)), data, table, note)


# --- heat maps ------------------------------------------------------------------------------------------------------


def heat_map(
    ident: str,
    title: str,
    description: str,
    values: NDArray[np.int64],
    rows: Sequence[str],
    groups: Sequence[str],
    columns: Sequence[str],
    *,
    unit: str,
    column_name: str,
    about: Sequence[str],
    further: Sequence[tuple[str, NDArray[np.float64]]] = (),
    table: Table,
    note: str = "",
    absent: str = "left out",
) -> Figure:
    """Shades of one colour, as few paths as there are shades, whatever the number of cells.

    Args:
        ident: Of the element.
        title: A few words.
        description: What it shows.
        values: (rows, columns) numbers; below 0 for what is hatched.
        rows: Their names.
        groups: What they are filtered by.
        columns: Their names.
        unit: Of the values.
        column_name: What a column is, in the singular.
        about: What a pointer says of each row.
        further: Name -> (rows, columns) numbers that a pointer says of a cell; NaN for nothing.
        table: The same as numbers.
        note: A sentence below.
        absent: What the hatching means.
    """
    num_rows, num_columns = values.shape
    named = num_rows <= MOST_ROW_NAMES
    left = 112.0
    cell = min(44.0, (WIDTH - left - 8) / max(num_columns, 1))
    row = min(24.0, TALLEST / max(num_rows, 1))
    top, bottom = 4.0, 76.0 if _long(columns) else 42.0
    height = top + row * num_rows + bottom
    peak = max(int(values.max(initial=0)), 1)
    shades = level(values, peak)
    parts = [_opened(ident, title, description, height), _hatching(ident)]
    parts.append(f'<g class="cells">{_cells(ident, shades, left, top, cell, row)}</g>')
    names = _names(rows, left, top, row) if named else _group_names(groups, left, top, row)
    parts.append(f'<g class="names">{names}</g>')
    shown = _numbers(values, shades, left, top, cell, row) if cell >= 20 and row >= 14 and named else ""
    parts.append(f'<g class="numbers">{shown}</g>')
    parts.append(f'<g class="below" data-y="{number(top + row * num_rows)}">')
    parts.append(_column_names(columns, left, top + row * num_rows, cell))
    parts.append(_text(left + cell * num_columns / 2, height - 6, column_name, "axis", "middle"))
    parts.append('</g><rect class="cursor" width="0" height="0"/></svg>')
    data = {
        "rows": list(rows),
        "groups": list(groups),
        "columns": list(columns),
        "unit": unit,
        "columnName": column_name,
        "about": list(about),
        "values": values.tolist(),
        "peak": peak,
        "absent": absent,
        "further": [[name, [[_brief(v) for v in line] for line in array]] for name, array in further],
        "box": [left, top, cell, row, bottom],
    }
    return Figure(
        *(ident, "map", title, description, Markup("".join(parts)), data, table, note),
        legend=_shade_legend(peak, unit, absent if bool((values < 0).any()) else None),
    )


def level(values: NDArray[np.int64], peak: int) -> NDArray[np.int64]:
    """Shades of numbers: 0 for 0, 1 to ``LEVELS - 1`` for the rest, -1 below 0.

    >>> level(np.array([-1, 0, 1, 5, 10]), 10).tolist()
    [-1, 0, 1, 3, 6]
    """
    shades = np.ceil(values * (LEVELS - 1) / peak).astype(np.int64)
    return np.where(values < 0, -1, shades)


def _brief(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _hatching(ident: str) -> str:
    lines = '<path class="hatch" d="M0 6L6 0"/>'
    pattern = f'<pattern id="{ident}-hatch" width="6" height="6" patternUnits="userSpaceOnUse">'
    return f'<defs>{pattern}<rect class="absent" width="6" height="6"/>{lines}</pattern></defs>'


def _cells(ident: str, shades: NDArray[np.int64], left: float, top: float, cell: float, row: float) -> str:
    """One path a shade; neighbours in a row share one box."""
    paths: dict[int, list[str]] = {}
    gap = 1.0 if row >= 8 else 0.0
    for i, line in enumerate(shades.tolist()):
        start = 0
        for j in range(1, len(line) + 1):
            if j == len(line) or line[j] != line[start] or gap:
                x, width = left + start * cell, (j - start) * cell - gap
                box = f"M{number(x)} {top + i * row:.2f}h{number(width)}v{row - gap:.2f}h-{number(width)}z"
                paths.setdefault(line[start], []).append(box)
                start = j
    return "".join(
        f'<path class="l{shade}" d="{"".join(boxes)}"/>'
        if shade >= 0
        else f'<path fill="url(#{ident}-hatch)" d="{"".join(boxes)}"/>'
        for shade, boxes in sorted(paths.items())
    )


def _names(rows: Sequence[str], left: float, top: float, row: float) -> str:
    y = top + row / 2 + 4
    placed = (_text(left - 6, y + i * row, _short(name, 15), anchor="end") for i, name in enumerate(rows))
    return "".join(placed)


def _group_names(groups: Sequence[str], left: float, top: float, row: float) -> str:
    """Where rows are too many, the names of their groups that stand together."""
    parts, start = [], 0
    for place in range(1, len(groups) + 1):
        if place < len(groups) and groups[place] == groups[start]:
            continue
        if (place - start) * row >= 13:
            y = top + (start + place) / 2 * row + 4
            parts.append(_text(left - 6, y, _short(groups[start], 15), anchor="end"))
        start = place
    return "".join(parts)


def _numbers(
    values: NDArray[np.int64], shades: NDArray[np.int64], left: float, top: float, cell: float, row: float
) -> str:
    return "".join(
        _text(left + (j + 0.5) * cell - 0.5, top + i * row + row / 2 + 4, str(value), f"n{shades[i, j]}", "middle")
        for (i, j), value in np.ndenumerate(values)
        if value >= 0
    )


def _long(columns: Sequence[str]) -> bool:
    return max(map(len, columns), default=0) > 4


def _column_names(columns: Sequence[str], left: float, y: float, cell: float) -> str:
    if not _long(columns):
        every = max(1, math.ceil(24 / cell))
        kept = [(j, name) for j, name in enumerate(columns) if j % every == 0]
        return "".join(_text(left + (j + 0.5) * cell, y + 18, name, anchor="middle") for j, name in kept)
    if cell < 12:
        return ""  # a pointer and the table name them
    places = [f"translate({number(left + (j + 0.6) * cell)} {number(y + 14)})" for j in range(len(columns))]
    return "".join(
        f'<text text-anchor="end" transform="{place} rotate(-35)">{escape(_short(name, 12))}</text>'
        for place, name in zip(places, columns, strict=True)
    )


def _shade_legend(peak: int, unit: str, absent: str | None) -> list[tuple[str, str]]:
    """Only shades that a whole number can have."""
    low = 1
    entries = [("key-l0", "0")]
    for shade in range(1, LEVELS):
        high = math.floor(peak * shade / (LEVELS - 1) + 1e-9)
        if high >= low:
            entries.append((f"key-l{shade}", str(low) if low == high else f"{low} to {high}"))
            low = high + 1
    entries[-1] = (entries[-1][0], f"{entries[-1][1]} {unit}")
    return [*entries, ("key-absent", absent)] if absent is not None else entries
