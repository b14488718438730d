"""A document as a picture: bars with their spread, the ceilings as marks, curves for what grows."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import against, conditions, label, made_of, number, parts, spread
from tidali.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS, CEILING = "#0072b2", "#999999", "#d55e00"  # Okabe and Ito's palette, which colour-blind readers can tell apart
LOG_ABOVE = 20.0
"""A panel whose largest rate is this many times its smallest has a logarithmic axis: the short bars could not be read."""
_BAR_INCHES, _PANEL_INCHES, _WIDTH_INCHES = 0.34, 1.1, 9.0


def write_plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw to .png, .svg or .html, which is one file with the picture, the figures and where they were measured.

    Raises:
        TidaliError: the file cannot be written.
    """
    figure = draw(document)
    if path.suffix == ".html":
        content = _page(document, _bytes(figure, "svg").decode()).encode()
    else:
        content = _bytes(figure, path.suffix.removeprefix("."))
    write_atomically(path, content)


def draw(document: Mapping[str, Any]) -> Figure:
    """A panel for each place that rows were measured at, and one for each thing that was varied."""
    from matplotlib.figure import Figure

    panels = [panel for part in parts(document) for panel in _panels(part)]
    heights = [_PANEL_INCHES + _BAR_INCHES * (len(rows) if kind == "bars" else 6) for _, kind, rows in panels]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, kind, rows) in zip(axes, panels, strict=True):
        (_bars if kind == "bars" else _curves)(ax, rows)
        ax.set_title(title, loc="left", fontsize=10)
    figure.supxlabel(about(parts(document)[0]), fontsize=7, color="#555555")
    return figure


def about(document: Mapping[str, Any]) -> str:
    """Where and with what it was measured, in two lines."""
    machine = document["machine"]
    hardware = [machine["gpu"] or machine["cpu"], f"{machine['cores']} cores", f"{machine['memory_gib']:g} GiB"]
    legend = f"median of {document['repeats']}, whiskers from lowest to highest"
    legend += ", orange: the ceiling" if document.get("ceilings") else ""
    return f"{', '.join(hardware)}; {legend}\n{made_of(document)}"


def _panels(document: Mapping[str, Any]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Title, kind and rows."""
    panels = []
    name = ", ".join([document["benchmark"], *conditions(document)])
    for where, rows in groupby(document["rows"], key=label):
        panels.append((f"{name}{f', at {where}' if where else ''}", "bars", list(rows)))
    growth = sorted(document.get("growth", ()), key=lambda row: row["varied"])
    for varied, rows in groupby(growth, key=lambda row: row["varied"]):
        curves = list(rows)
        where = "" if varied == "res" else f" at {curves[0]['res']} px"
        panels.append((f"{document['benchmark']}{where} against {against(varied)}", "curves", curves))
    return panels


def _bars(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    measured = [row["images_per_s"] for row in rows if "images_per_s" in row]
    ceilings = [row["ceiling"]["images_per_s"] for row in rows if "ceiling" in row]
    lowest = min((rate["min"] for rate in measured), default=1.0)
    highest = max([rate["max"] for rate in measured] + ceilings, default=1.0)
    logarithmic = highest > LOG_ABOVE * lowest
    if logarithmic:
        ax.set_xscale("log")
        ax.set_xlim(10 ** _floor_log10(lowest), highest * 1.5)
    else:
        ax.set_xlim(0, highest * 1.05)
    for place, row in enumerate(rows):
        if "images_per_s" not in row:
            ax.text(
                0.01, place, f"not run: {row['not_run']}"[:110], transform=ax.get_yaxis_transform(), va="center", fontsize=7
            )
            continue
        rate = row["images_per_s"]
        colour = OURS if is_ours(row["case"], rows) else THEIRS
        ax.barh(place, rate["median"], color=colour, height=0.7)
        ax.plot([rate["min"], rate["max"]], [place, place], color="black", linewidth=1.2, marker="|", markersize=6)
        text = number(rate["median"])
        if "ceiling" in row:
            ceiling = row["ceiling"]
            ax.plot([ceiling["images_per_s"]] * 2, [place - 0.4, place + 0.4], color=CEILING, linewidth=2)
            text += f", {100 * ceiling['share']:.0f} % of {ceiling['name']}"
        ax.text(1.01, place, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8)  # beside the axes
    ax.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(f"images/s{', logarithmic' if logarithmic else ''}", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _curves(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    varied = rows[0]["varied"]
    values = sorted({row[varied] for row in rows})
    for case, styled in zip(
        dict.fromkeys(row["case"] for row in rows), ((OURS, "o"), (CEILING, "s"), (THEIRS, "^")), strict=False
    ):
        points = sorted((row[varied], row["images_per_s"]) for row in rows if row["case"] == case)
        x, rates = [value for value, _ in points], [rate for _, rate in points]
        middle = [rate["median"] for rate in rates]
        whiskers = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
        ax.errorbar(
            x, middle, yerr=whiskers, color=styled[0], marker=styled[1], markersize=4, capsize=3, linewidth=1.2, label=case
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.minorticks_off()
    low, high = ax.get_ylim()
    widen = max((5 / (high / low)) ** 0.5, 1)  # to show at least two of the marks below
    low, high = low / widen, high * widen
    ax.set_ylim(low, high)
    ticks = [factor * 10**power for power in range(1, 9) for factor in (1, 2, 5) if low <= factor * 10**power <= high]
    ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.set_xlabel(against(varied), fontsize=8)
    ax.set_ylabel("images/s", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def is_ours(case: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """tidali's cases are named so where others stand beside them; where none does, all are."""
    named = [row["case"] for row in rows if row["case"].startswith("tidali")]
    return case in named or not named


def _floor_log10(value: float) -> int:
    return len(str(int(value))) - 1 if value >= 1 else -1


def _bytes(figure: Figure, suffix: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=130)
    return buffer.getvalue()


def _page(document: Mapping[str, Any], svg: str) -> str:
    """One HTML file: the picture inline, a table, and the head of the document."""
    tables = []
    for part in parts(document):
        rows = []
        for row in part["rows"]:
            rate, ceiling = row.get("images_per_s"), row.get("ceiling")
            cells = [row["case"], label(row)]
            if rate is None:
                cells += ["not run", row["not_run"]]
            else:
                cells += [number(rate["median"]), spread(rate)]
            cells.append(f"{100 * ceiling['share']:.0f} % of {ceiling['name']}" if ceiling else "")
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        head = "".join(f"<th>{name}</th>" for name in ("case", "where", "images/s", "spread", "ceiling"))
        lines = "".join(f"<p>{html.escape(found['line'])}</p>" for found in part.get("diagnosis", ()))
        small = "<br>".join(html.escape(line) for line in about(part).splitlines())
        tables.append(
            f"<h2>{html.escape(part['benchmark'])}</h2>{lines}<table><tr>{head}</tr>{''.join(rows)}</table>"
            f"<p class=small>{small}<br><code>{html.escape(part['command'])}</code></p>"
        )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>tidali bench</title><style>"
        "body{font:15px/1.4 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "svg{max-width:100%;height:auto}table{border-collapse:collapse}"
        "td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
        "td:first-child,th:first-child{text-align:left}"
        ".small{color:#555;font-size:.85rem}</style>"
        f"<h1>tidali bench {html.escape(document['benchmark'])}</h1>{svg[svg.index('<svg') :]}{''.join(tables)}</html>\n"
    )
