"""The figures of predictions by class: accuracy, the difference of two models, confusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tidali.report.drawing import INK, MUTED, PALE, TIPS, house_style, panel, series_colour, series_marker, tip, tip_area
from tidali.training.predictions import ClassAccuracy
from tidali.training.uncertainty import wilson_interval_percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL_CLASSES = 40
"""Up to this many classes each have a bar; of more, only the twenty lowest and the twenty highest."""
NAMED_CELLS = 30
"""Up to this many classes, a confusion matrix has their names and counts."""
_NAME_LETTERS = 22
# The cells of a confusion matrix are an image, whose colours cannot follow the theme of the page. The contrast of these colours
# is 4.1 to 4.4 to 1 against a light and a dark page, and at least 3.5 to 1 against the counts in the cells.
_RIGHT_RGB, _WRONG_RGB = (0.2, 0.46, 0.91), (0.86, 0.3, 0.04)


@house_style()
def class_accuracy(names: Sequence[str], accuracies: Sequence[ClassAccuracy]) -> Figure:
    """Top-1 of each class as sorted bars with their 95 % intervals, at most `ALL_CLASSES` of them. Classes without samples are
    left out."""
    found = [(name, one) for name, one in zip(names, accuracies, strict=True) if one.samples]
    rows: list[tuple[str, ClassAccuracy] | None] = [*sorted(found, key=lambda row: -row[1].correct / row[1].samples)]
    left_out = len(rows) - ALL_CLASSES
    if left_out > 0:
        rows[ALL_CLASSES // 2 : -ALL_CLASSES // 2] = [None]
    figure, axes = panel("top-1, %", height_in=0.5 + 0.2 * len(rows))
    for place, row in enumerate(rows):
        if row is None:
            axes.text(1, place, f"… {left_out} more …", va="center", color=MUTED)
            continue
        name, one = row
        percent, (low, high) = 100 * one.correct / one.samples, wilson_interval_percent(one.correct, one.samples)
        shown = tip(f"{name}: {percent:.1f} %, {low:.1f} to {high:.1f} %")
        axes.barh(place, percent, height=0.7, color=series_colour(0), alpha=0.6, gid=shown)  # the line on it can be seen
        axes.plot([low, high], [place, place], color=INK, linewidth=1.3)
        axes.text(max(percent, high) + 1, place, f"{percent:.0f}", va="center", color=MUTED)
    axes.set_yticks(range(len(rows)), [_short(row[0]) if row is not None else "" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure


@house_style()
def class_differences(names: Sequence[str], first: Sequence[float | None], second: Sequence[float | None]) -> Figure:
    """Top-1 of each class with two models, joined by a line, in the order of the difference; at most `ALL_CLASSES`, those that
    differ most. Classes without samples (None) are left out."""
    rows = [(b - a, a, b, name) for name, a, b in zip(names, first, second, strict=True) if a is not None and b is not None]
    rows = sorted(sorted(rows, key=lambda row: -abs(row[0]))[:ALL_CLASSES], key=lambda row: -row[0])
    figure, axes = panel("top-1, %", height_in=0.5 + 0.2 * len(rows))
    for place, (difference, *both, name) in enumerate(rows):
        axes.plot(both, [place, place], color=PALE, linewidth=3, solid_capstyle="round", zorder=1)
        for series, percent in enumerate(both):
            axes.plot([percent], [place], color=series_colour(series), marker=series_marker(series), markersize=6)
        tip_area(axes, sum(both) / 2, place, f"{name}: {both[0]:.1f} % and {both[1]:.1f} %, difference {difference:+.1f}")
    axes.set_yticks(range(len(rows)), [_short(row[-1]) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-3, 103)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure


@house_style()
def confusion_matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """Samples by true class (rows) and predicted class (columns).

    Args:
        counts: in class order. The opacity of a cell is the square root of its fraction of the row, so that rare mistakes show.
    """
    import numpy as np

    table = np.asarray(counts, dtype=float)
    fraction = table / np.maximum(table.sum(1, keepdims=True), 1)
    cells = np.empty((*table.shape, 4))
    cells[..., :3] = _WRONG_RGB
    cells[np.arange(len(table)), np.arange(len(table)), :3] = _RIGHT_RGB
    cells[..., 3] = np.sqrt(fraction)
    named = len(names) <= NAMED_CELLS
    side_in = 2.2 + 0.26 * len(names) if named else 6.2  # a quarter of an inch has room for a count of three digits
    figure, axes = panel("predicted class", "true class", width_in=side_in + 0.3, height_in=side_in)
    axes.imshow(cells, interpolation="nearest")
    axes.grid(visible=False)
    cells_found = list(zip(*np.nonzero(table), strict=True))
    if named:
        for row, column in cells_found:
            axes.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", color=INK)
        short = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90)
        axes.set_yticks(range(len(names)), short)
        axes.tick_params(length=0)
    for row, column in sorted(cells_found, key=lambda cell: -table[cell])[:TIPS]:
        tip_area(axes, column, row, f"{names[row]} predicted as {names[column]}: {table[row, column]:,.0f}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LETTERS else f"{name[: _NAME_LETTERS - 1]}…"
