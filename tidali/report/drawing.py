"""How figures look: colours, markers, type; as files, or as SVG inside a page whose light or dark theme they follow."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from tidali.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = ParamSpec("Drawing")

# Light and dark value of each colour. Figures are drawn in the light ones; inside a page each is replaced by the CSS variable
# of its name, so no two may be equal. The first six series came out of a search for colours that lie far apart: at least 24
# hundredths of OKLab for normal sight and 13 with protanopia, deuteranopia and tritanopia (Machado et al., 2009, severity 1) in
# the light ones, 23 and 10.9 in the dark ones; with the seventh, close to the ink, 18 and 13, and 17 and 8. Their contrast
# against the page is at least 3.2 and 4.2 to 1.
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
"""matplotlib's name -> the character that stands for it in a page. With seven colours, 42 series before one comes again."""

# Of a figure in inches: SVG has 72 units an inch, and pages show a figure 340 to 560 CSS pixels wide, at about its own size.
WIDTH_IN, HEIGHT_IN = 5.6, 3.6

_STYLE: dict[Any, Any] = {
    "font.size": 10,
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


def legend_entries(labels: list[str]) -> list[dict[str, str]]:
    """What a page's legend needs for each series: its marker as a character, its colour's CSS variable, its label."""
    return [
        {"mark": _MARKERS[series_marker(place)], "colour": f"var(--series-{place % _SERIES})", "label": label}
        for place, label in enumerate(labels)
    ]


def styled(draw: Callable[Drawing, Figure]) -> Callable[Drawing, Figure]:
    """Draw in the house style, whatever matplotlibrc says."""

    @functools.wraps(draw)
    def wrapped(*args: Drawing.args, **kwargs: Drawing.kwargs) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return wrapped


def check_figure_path(given: str, option: str) -> Path:
    """
    Raises:
        UsageError: not a PNG's or an SVG's name, or in a folder that is not there.
    """
    path = Path(given)
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"{option} {given}: give a file that ends in .png or .svg")
    return check_folder(path, option)


def check_folder(path: Path, option: str) -> Path:
    """
    Raises:
        UsageError: the file's folder is not there, or the file is a folder.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder; give a file")
    return path


def save_figure(figure: Figure, path: Path) -> None:
    """A PNG of 150 dots an inch or an SVG with its letters as outlines, by the suffix, on white.

    Raises:
        TidaliError: it cannot be written.
    """
    from tidali.files import write_atomically

    kind = path.suffix.lower().removeprefix(".")
    write_atomically(path, _rendered(figure, kind, facecolor=COLOURS["page"][0], dpi=150))


def inline_svg(figure: Figure, description: str) -> str:
    """An ``<svg>`` element for a page: its letters are text, its colours the page's CSS variables, its width the place's.

    Args:
        description: of what it shows, for those who cannot see it.
    """
    from html import escape

    text = _rendered(figure, "svg", transparent=True, dpi=144, fonttype="none").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # figure_1, axes_1, ...: a page holds several figures
    head, tail = text.split(">", 1)
    width, height = re.findall(r'(?:width|height)="([0-9.]+)pt"', head)
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}"'
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
    # No date and a fixed salt: equal runs give equal files. SVG's ids are hashes of what they name.
    metadata = {"Date": None} if kind == "svg" else {}
    with _style({"svg.fonttype": fonttype, "svg.hashsalt": "tidali"}), warnings.catch_warnings():
        # A class name may hold characters that matplotlib's own font lacks: a page's text has the reader's fonts.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(out, format=kind, metadata=metadata, **options)
    return out.getvalue()


@contextmanager
def _style(more: dict[Any, Any] | None = None) -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, **(more or {})})
        yield
