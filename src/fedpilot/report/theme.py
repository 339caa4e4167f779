"""Colours of the report in both themes, and the contrast that they must have."""

from collections.abc import Mapping

from fedpilot.report.svg import LEVELS, SERIES

INKS = ("#0b1620", "#ffffff")
"""What numbers in a heat map are written in, whichever stands out more."""


def _palette(plain: Mapping[str, str], series: str, levels: str) -> dict[str, str]:
    lines, shades = series.split(), levels.split()
    assert len(lines) == SERIES, "one colour a line"
    assert len(shades) == LEVELS, "one colour a shade"
    return {
        **plain,
        **{f"s{index}": colour for index, colour in enumerate(lines)},
        **{f"l{index}": colour for index, colour in enumerate(shades)},
        **{f"n{index}": max(INKS, key=lambda ink: contrast(ink, shade)) for index, shade in enumerate(shades)},
    }


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2).

    >>> luminance("#ffffff"), luminance("#000000")
    (1.0, 0.0)
    """
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2).

    >>> contrast("#ffffff", "#000000")
    21.0
    """
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


LIGHT = _palette(
    {
        "page": "#ffffff",
        "panel": "#f6f8fa",
        "text": "#1b1f24",
        "muted": "#57606a",
        "grid": "#d8dee4",
        "edge": "#6e7781",
        "link": "#0550ae",
        "good": "#116329",
        "bad": "#a40e26",
        "absent": "#e3e6ea",
        "hatch": "#6e7781",
    },
    series="#0550ae #b84300 #116329 #7a3fd1 #a8006d #0b6e80 #7d4e00 #3d444d",
    levels="#eaeff4 #cbe0f5 #9dc7ee #69a7e0 #2f74c0 #1a579e #0a3a75",
)
DARK = _palette(
    {
        "page": "#0d1117",
        "panel": "#161b22",
        "text": "#e6edf3",
        "muted": "#9da7b3",
        "grid": "#30363d",
        "edge": "#8b949e",
        "link": "#79c0ff",
        "good": "#56d364",
        "bad": "#ff8a80",
        "absent": "#2a3038",
        "hatch": "#8b949e",
    },
    series="#58a6ff #f0883e #56d364 #bc8cff #ff7bbf #39c5cf #d6a75a #c9d1d9",
    levels="#1e2632 #12325a #174a86 #2161ac #5a9ce4 #8dbcf0 #cae2fb",
)


def variables(palette: Mapping[str, str]) -> str:
    """The palette as CSS."""
    return "".join(f"--{name}:{colour};" for name, colour in palette.items())


def style() -> str:
    """Both themes: by the system's wish, by the page's button, and light on paper."""
    light, dark = variables(LIGHT), variables(DARK)
    series = "".join(
        f".s{k} .line,.s{k} .dots{{stroke:var(--s{k})}}.s{k} .band{{fill:var(--s{k})}}.key-s{k}{{color:var(--s{k})}}"
        for k in range(SERIES)
    )
    levels = "".join(
        f".l{k}{{fill:var(--l{k})}}svg .n{k}{{fill:var(--n{k})}}.key-l{k}{{background:var(--l{k})}}"
        for k in range(LEVELS)
    )
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f":root[data-theme=light]{{color-scheme:light}}:root[data-theme=dark]{{color-scheme:dark;{dark}}}"
        f"@media print{{:root,:root[data-theme],:root:not([data-theme=light]){{color-scheme:light;{light}}}}}"
        f"{series}{levels}"
    )
