"""A document as a picture: a bar or, on a logarithmic axis, a dot for each rate, with its spread; the ceilings as marks; and a
curve for each thing that was varied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import (
    axis,
    ceiling_share,
    ceiling_table,
    conditions,
    label,
    notes,
    number,
    parts,
    rate_table,
    software,
    spread,
)
from tidali.files import write_atomically
from tidali.report.drawing import INK, MUTED, PALE, WIDTH_IN, house_style, save_figure, series_colour, series_marker, tip_area

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS, CEILING = series_colour(0), PALE, series_colour(1)
LOG_ABOVE = 20.0
"""A panel whose largest rate is more than this multiple of its smallest has a logarithmic axis, so that small ones can be read,
and dots: the length of a bar would say nothing there."""
_UNITS = {"seconds": "seconds", "images_per_s": "images/s", "peak_rss_mib": "peak memory, MiB"}
_MOST_INSIDE, _LEGEND_ROW_INCHES = 3, 0.25  # curves whose legend has room among them
_BAR_INCHES, _PANEL_INCHES, _CURVES_INCHES, _WIDTH_INCHES = 0.3, 0.9, 2.0, 9.0


def write_plot(document: Mapping[str, Any], path: Path) -> None:
    """Write .png, .svg or .html. The last is one file with the pictures, the tables and the machine they were measured on.

    Raises:
        TidaliError: the file cannot be written.
    """
    if path.suffix.lower() == ".html":
        write_atomically(path, page(document))
    else:
        save_figure(draw(document), path)


@house_style()
def draw(document: Mapping[str, Any], *, in_page: bool = False) -> Figure:
    """A panel for each resolution and stem, and one for each thing that was varied.

    Args:
        in_page: as narrow as a telephone, and without what a page says beside it: shares of the ceilings, reasons, the machine
            and the software.
    """
    from matplotlib.figure import Figure

    panels = [panel for part in parts(document) for panel in _panels(part)]
    heights = [
        _PANEL_INCHES + (_BAR_INCHES * len(rows) if kind == "bars" else _curves_inches(rows)) for _, kind, rows in panels
    ]
    figure = Figure(figsize=(WIDTH_IN if in_page else _WIDTH_INCHES, sum(heights) + 0.5 * (not in_page)))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, kind, rows) in zip(axes, panels, strict=True):
        if kind == "bars":
            _bars(ax, rows, in_page=in_page)
        else:
            _curves(ax, rows, kind)
        ax.set_title(
            title.removeprefix(", ".join([document["benchmark"], *conditions(document)])).lstrip(", ") if in_page else title
        )
    if not in_page:
        figure.supxlabel("\n".join(about(parts(document)[0])), fontsize=8, color=MUTED)
    return figure


def _curves_inches(rows: Sequence[Mapping[str, Any]]) -> float:
    cases = len({row["case"] for row in rows})
    return _CURVES_INCHES + (0 if cases <= _MOST_INSIDE else _LEGEND_ROW_INCHES * (cases // 2 + 1))


def page(document: Mapping[str, Any], *, title: str | None = None, stages: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """The diagnosis, the pictures and a table of each part, in one HTML file that loads nothing else.

    Args:
        stages: of `bench.first_gpu`, for a table before them.
    """
    from tidali.report.page import drawn, render

    shown = [
        {
            "name": ", ".join([part["benchmark"], *conditions(part)]),
            "lines": [found["line"] for found in part.get("diagnosis", ())],
            "figure": drawn(draw(part, in_page=True), f"measurements of {part['benchmark']}; the table below has the values"),
            "measured": "What grows with the data" if part["benchmark"] == "growth" else "images/s",
            "rates": rate_table(part),
            "notes": notes(part),
            "ceilings": ceiling_table(part),
            "about": about(part),
            "command": part["command"],
        }
        for part in parts(document)
    ]
    title = title or f"tidali bench {document['benchmark']}"
    return render("bench.html", Path(__file__).parent, title=title, parts=shown, stages=stages)


def about(document: Mapping[str, Any]) -> list[str]:
    """The machine and the software, in two lines."""
    machine = document["machine"]
    hardware = [machine["gpu"] or machine["cpu"], f"{machine['cores']} cores", f"{machine['memory_gib']:g} GiB"]
    repeats = document["repeats"]
    legend = "measured once" if repeats == 1 else f"median of {repeats}, the line from lowest to highest"
    legend += ", orange: the ceiling" if document.get("ceilings") else ""
    return [f"{', '.join(hardware)}; {legend}", software(document)]


def _panels(document: Mapping[str, Any]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Title, kind ("bars", or what a curve shows) and rows."""
    if document["benchmark"] == "growth":
        found = [{**row, "varied": "samples"} for row in document["rows"]]
        measured: dict[str, list[Mapping[str, Any]]] = {name: [row for row in found if name in row] for name in _UNITS}
        measured["images_per_s"] = [row for row in measured["images_per_s"] if "seconds" not in row]
        return [(f"{unit} by the number of images", name, measured[name]) for name, unit in _UNITS.items() if measured[name]]
    panels = []
    name = ", ".join([document["benchmark"], *conditions(document)])
    for where, rows in groupby(document["rows"], key=label):
        panels.append((f"{name}{f', at {where}' if where else ''}", "bars", list(rows)))
    growth = sorted(document.get("growth", ()), key=lambda row: row["varied"])
    for varied, rows in groupby(growth, key=lambda row: row["varied"]):
        curves = list(rows)
        where = "" if varied == "res" else f" at {curves[0]['res']} px"
        panels.append((f"{document['benchmark']}{where} over {axis(varied)}", "images_per_s", curves))
    return panels


def _bars(ax: Axes, rows: Sequence[Mapping[str, Any]], *, in_page: bool) -> None:
    measured = [row["images_per_s"] for row in rows if "images_per_s" in row]
    ceilings = [row["ceiling"]["images_per_s"] for row in rows if "ceiling" in row]
    lowest = min((rate["min"] for rate in measured), default=1.0)
    highest = max([rate["max"] for rate in measured] + ceilings, default=1.0)
    logarithmic = highest > LOG_ABOVE * lowest
    if logarithmic:
        ax.set_xscale("log")
        ax.set_xlim(10 ** math.floor(math.log10(lowest)), highest * 1.5)
    else:
        ax.set_xlim(0, highest * 1.05)
    with_peers = any(row["case"].startswith("tidali") for row in rows)  # without peers, names do not say whose the cases are
    for place, row in enumerate(rows):
        if "images_per_s" not in row:
            text = "not run" if in_page else f"not run: {row['not_run']}"[:110]
            ax.text(0.01, place, text, transform=ax.get_yaxis_transform(), va="center", color=MUTED)
            continue
        rate = row["images_per_s"]
        colour = OURS if row["case"].startswith("tidali") or not with_peers else THEIRS
        if logarithmic:
            ax.plot([rate["median"]], [place], color=MUTED if colour == PALE else colour, marker="o", markersize=7)
        else:
            ax.barh(place, rate["median"], color=colour, height=0.7)
        if rate["min"] < rate["max"]:  # a single repeat has no spread
            ax.plot([rate["min"], rate["max"]], [place, place], color=INK, linewidth=1.2, marker="|")
        text = number(rate["median"])
        if "ceiling" in row:
            ax.plot([row["ceiling"]["images_per_s"]] * 2, [place - 0.4, place + 0.4], color=CEILING, linewidth=2)
            text += "" if in_page else f", {ceiling_share(row)}"
        tip_area(
            ax, rate["median"], place, f"{row['case']}: {number(rate['median'])} images/s ({spread(rate)}) {ceiling_share(row)}"
        )
        ax.text(1.01, place, text, transform=ax.get_yaxis_transform(), va="center")  # beside the axes
    ax.set_yticks(range(len(rows)), [row["case"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.xaxis.set_major_formatter(lambda rate, _: _short(rate))
    ax.set_xlabel(f"images/s{', logarithmic' if logarithmic else ''}")
    ax.grid(visible=False, axis="y")


def _short(rate: float) -> str:
    """'100k' and '2.5M', for an axis that has no room for all the zeros."""
    divisor, unit = next(((size, unit) for size, unit in ((1e6, "M"), (1e3, "k")) if rate >= size), (1, ""))
    return f"{rate / divisor:,.9g}{unit}"


def _curves(ax: Axes, rows: Sequence[Mapping[str, Any]], quantity: str) -> None:
    def measured(row: Mapping[str, Any]) -> Mapping[str, float]:
        value = row[quantity]
        return value if isinstance(value, Mapping) else dict.fromkeys(("median", "min", "max"), value)

    varied = rows[0]["varied"]
    values = sorted({row[varied] for row in rows})
    for place, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        points = sorted((row[varied], measured(row)) for row in rows if row["case"] == case)
        x, rates = [value for value, _ in points], [rate for _, rate in points]
        middle = [rate["median"] for rate in rates]
        whiskers = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
        spreads = whiskers if any(map(any, whiskers)) else None  # a single repeat has no spread
        ax.errorbar(x, middle, yerr=spreads, color=series_colour(place), marker=series_marker(place), capsize=3, label=case)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.minorticks_off()
    low, high = ax.get_ylim()
    widen = max((5 / (high / low)) ** 0.5, 1)  # so that at least two of the ticks below are shown
    low, high = low / widen, high * widen
    ax.set_ylim(low, high)
    ticks = [factor * 10**power for power in range(-3, 9) for factor in (1, 2, 5) if low <= factor * 10**power <= high]
    ax.set_yticks(ticks, [f"{tick:,.6g}" for tick in ticks])
    ax.set_xlabel(axis(varied))
    ax.set_ylabel(_UNITS[quantity])
    few = len({row["case"] for row in rows}) <= _MOST_INSIDE
    ax.legend(**{} if few else {"loc": "upper center", "bbox_to_anchor": (0.5, -0.25), "ncols": 2})
