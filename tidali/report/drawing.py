"""How figures look, and how they become files, or SVG in a page that follows its light or dark theme."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from tidali.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # as it is imported it tells of its cache of fonts

# The light and the dark value of each colour. Figures are drawn in the light ones. Inside a page, each is replaced by the CSS
# variable of its name, so no two may be equal. The first six series were found by a search for colours that are far apart: the
# smallest distance of two, in hundredths of OKLab, is 24 for normal sight and 13 with protanopia, deuteranopia or tritanopia
# (Machado et al., 2009, severity 1) in the light theme, and 23 and 10.9 in the dark theme. With the seventh, which is close to
# the ink, it is 18 and 13, and 17 and 8. Their contrast against the page is at least 3.2 to 1 (light) and 4.2 to 1 (dark).
COLOURS = {
    "ink": ("#1d1d1f", "#ececee"),
    "muted": ("#63636b", "#a3a3ad"),
    "grid": ("#dededf", "#37373c"),
    "pale": ("#c9c9ce", "#4d4d55"),
    "page": ("#ffffff", "#161618"),
    "series-0": ("#114ac5", "#147ff7"),
    "series-1": ("#f1590b", "#ff7403"),
    "series-2": ("#5d9a88", "#03c09a"),
    "series-3": ("#940377", "#ba53a6"),
    "series-4": ("#554702", "#fbdf2a"),
    "series-5": ("#b26ef6", "#c4b3ff"),
    "series-6": ("#1e1e20", "#ececed"),
}
INK, MUTED, GRID, PALE = (COLOURS[name][0] for name in ("ink", "muted", "grid", "pale"))
_SERIES = 7
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}
"""matplotlib's name of a marker -> the character for it in a page. With seven colours this makes 42 different series."""

# The default size of a figure, in inches of 72 units of SVG. A page that is 400 CSS pixels wide has room for 374, and shows a
# figure of this width with each letter of ten points at eleven pixels or more.
WIDTH_IN, HEIGHT_IN = 4.6, 3.0
SMALLEST_PT = 10
"""No letter in a figure is smaller. A page shows each unit as at least 1.1 pixels. A figure that is then wider than the screen
can be scrolled."""
_LEAST_PX, _MOST_PX = 1.1, 1.5
"""Smallest and largest number of CSS pixels to a unit of a figure."""
_TIP = "tip-"
TIPS = 400
"""At most so many points of a series, or cells of a matrix, show their values when the mouse is over them."""

_STYLE: dict[Any, Any] = {
    "font.size": SMALLEST_PT,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "svg.image_inline": True,
}


def series_colour(place: int) -> str:
    return COLOURS[f"series-{place % _SERIES}"][0]


def series_marker(place: int) -> str:
    return list(_MARKERS)[place % len(_MARKERS)]


def tip(text: str) -> str:
    """The ``gid`` of an artist that shows this text in a page when the mouse is over it."""
    return f"{_TIP}{quote(text)}"


def panel(x: str = "", y: str = "", *, width_in: float = WIDTH_IN, height_in: float = HEIGHT_IN) -> tuple[Figure, Axes]:
    """A figure of one panel, with the labels of its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in))
    return figure, figure.subplots(subplot_kw={"xlabel": x, "ylabel": y})


def tip_area(axes: Axes, x: float, y: float, text: str) -> None:
    """Show a text in a page when the mouse is near a point."""
    if math.isfinite(y):
        axes.scatter([x], [y], s=200, color=INK, alpha=0, linewidths=0, zorder=9, gid=tip(text))


def legend_entries(labels: list[str]) -> list[dict[str, str]]:
    """For each series of a page's legend: its marker as a character, its colour as a CSS variable, and its label."""
    return [
        {"mark": _MARKERS[series_marker(place)], "colour": f"var(--series-{place % _SERIES})", "label": label}
        for place, label in enumerate(labels)
    ]


@contextmanager
def house_style(more: dict[Any, Any] | None = None) -> Iterator[None]:
    """Draw in tidali's style, whatever matplotlibrc says. Also a decorator of functions that draw.

    Args:
        more: further settings of matplotlib.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, **(more or {})})
        yield


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG of 150 dots per inch, or an SVG with its letters as outlines, by the suffix, on white.

    Raises:
        TidaliError: it cannot be written.
    """
    kind = path.suffix.lower().removeprefix(".")
    write_atomically(path, _rendered(figure, kind, facecolor=COLOURS["page"][0], dpi=150))


def inline_svg(figure: Figure, description: str) -> str:
    """An ``<svg>`` element for a page. Letters are text, colours are the page's CSS variables, and it is as wide as its place,
    within the limits that keep its letters readable.

    Args:
        description: what the figure shows, for readers who cannot see it.
    """
    text = _rendered(figure, "svg", transparent=True, dpi=144, fonttype="none").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(rf'<g id="{_TIP}([^"]*)">', lambda found: f"<g><title>{escape(unquote(found[1]))}</title>", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids such as figure_1 would not be unique: a page has several figures
    head, tail = text.split(">", 1)
    width, height = re.findall(r'(?:width|height)="([0-9.]+)pt"', head)
    limits = f"min-width:{math.ceil(_LEAST_PX * float(width))}px;max-width:{_MOST_PX * float(width):.0f}px"
    svg = f'<svg viewBox="0 0 {width} {height}" style="{limits}" role="img" aria-label="{escape(description)}"'
    svg += f' xmlns:xlink="http://www.w3.org/1999/xlink">{tail}'
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg.strip()


def theme_css() -> str:
    """The CSS variables that inline figures use, for a light and a dark page."""
    light, dark = ("".join(f"--{name}:{pair[place]};" for name, pair in COLOURS.items()) for place in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _rendered(figure: Figure, kind: str, *, fonttype: str = "path", **options: Any) -> bytes:
    out = io.BytesIO()
    # No date and a fixed salt for the ids in the SVG, so that equal figures are equal files.
    metadata = {"Date": None} if kind == "svg" else {}
    with house_style({"svg.fonttype": fonttype, "svg.hashsalt": "tidali"}), warnings.catch_warnings():
        # A class name may have characters that matplotlib's font lacks. On a page the reader's own fonts show them.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(out, format=kind, metadata=metadata, **options)
    return out.getvalue()
