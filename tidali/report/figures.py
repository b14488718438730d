"""The figures: learning curves, speed, accuracy against cost and resolution, accuracy by class, confusion.

Each function gives a matplotlib figure, for `tidali.report.drawing.save_figure` or `tidali.report.drawing.inline_svg`;
matplotlib is imported when one is drawn. Names in figures are plain text: a ``$`` in a class's name is a ``$``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidali.report.drawing import HEIGHT_IN, INK, MUTED, PALE, WIDTH_IN, series_colour, series_marker, styled
from tidali.training.history import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL_CLASSES = 40
"""Up to so many classes each has its bar; of more, the lowest and the highest twenty."""
NAMED_CELLS = 30
"""Up to so many classes a confusion matrix names them and writes each count."""
_NAME_LETTERS = 22
_GMAC_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# Of cells in a confusion matrix, which are an image and so cannot follow the page: 4.1 to 4.4 to 1 against its light and dark,
# and 3.5 or more against the counts in them.
_RIGHT_RGB, _WRONG_RGB = (0.2, 0.46, 0.91), (0.86, 0.3, 0.04)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model's accuracy at its cost."""

    label: str
    gmacs: float
    top1_percent: float
    series: int


@dataclass(frozen=True, kw_only=True)
class ResolutionLine:
    """One set of weights evaluated at several resolutions."""

    label: str
    series: int
    res: Sequence[int]
    """Input sides, in pixels."""
    gmacs: Sequence[float]
    top1_percent: Sequence[float]


@styled
def comparison(runs: Sequence[Run], labels: Sequence[str]) -> Figure:
    """Accuracy and loss of several runs in one picture with a legend, for a file."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [*labels, "evaluated", "train, as counted while training"]
    columns = 2 if len(names) > 5 and max(len(name) for name in names) < 70 else 1  # a half holds 75 letters
    figure = Figure(figsize=(2 * WIDTH_IN, HEIGHT_IN + 0.2 + 0.2 * -(-len(names) // columns)))
    accuracy, loss = figure.subplots(1, 2)
    _accuracy(accuracy, runs)
    _loss(loss, runs)
    lines = [
        Line2D([], [], color=series_colour(place), marker=series_marker(place), linestyle="-") for place in range(len(runs))
    ]
    lines += [Line2D([], [], color=MUTED, linestyle="-"), Line2D([], [], color=MUTED, linestyle="--", linewidth=1.2)]
    legend = figure.legend(lines, [""] * len(lines), loc="outside lower left", fontsize=9, ncols=columns)
    for text, name in zip(legend.get_texts(), names, strict=True):  # given at once, names that begin with _ would be left out
        text.set_text(name)
    return figure


@styled
def accuracy_curves(runs: Sequence[Run]) -> Figure:
    """Top-1 by epoch: evaluated as lines with markers, on train dashed."""
    figure, axes = _panel()
    _accuracy(axes, runs)
    return figure


@styled
def loss_curves(runs: Sequence[Run]) -> Figure:
    """Cross entropy by epoch: evaluated as lines with markers, on train dashed."""
    figure, axes = _panel()
    _loss(axes, runs)
    return figure


@styled
def throughput(runs: Sequence[Run]) -> Figure:
    """Images a second in training, by epoch."""
    figure, axes = _panel()
    for place, run in enumerate(runs):
        _line(axes, run, "images_per_s", place)
    _finish(axes, runs, "images/s in training")
    axes.set_ylim(bottom=0)
    return figure


@styled
def waiting(runs: Sequence[Run]) -> Figure:
    """Share of the training time that the step waited for data, by epoch."""
    figure, axes = _panel()
    for place, run in enumerate(runs):
        _line(axes, run, "data_wait_share", place, scale=100)
    _finish(axes, runs, "waiting for data, % of the time")
    axes.set_ylim(0, max(axes.get_ylim()[1], 5))  # or noise about a share of nothing would fill the figure
    return figure


@styled
def one_among(runs: Sequence[Run], chosen: Sequence[int], series: int) -> Figure:
    """The accuracy of some runs, seeds of one row say, in front of all the others': one of several panels with equal axes."""
    figure, axes = _panel(width_in=3.4, height_in=2.3)
    for place, run in enumerate(runs):
        if place not in chosen:
            axes.plot(run.column("epoch"), run.column(f"{run.split}_top1_percent"), color=PALE, linewidth=1)
    for place in chosen:
        _line(axes, runs[place], f"{runs[place].split}_top1_percent", series)
        _line(axes, runs[place], "train_top1_percent", series, train=True)
    _finish(axes, runs, "top-1, %")
    axes.set_ylim(0, 102)
    return figure


@styled
def accuracy_against_gmacs(points: Sequence[Point], lines: Sequence[ResolutionLine] = ()) -> Figure:
    """Top-1 against the multiply-adds of a forward pass: models as points, weights at several resolutions as lines."""
    figure, axes = _panel()
    for line in lines:
        pairs = sorted(zip(line.gmacs, line.top1_percent, strict=True))
        axes.plot(*zip(*pairs, strict=True), color=series_colour(line.series), linewidth=1, alpha=0.6, marker=".", markersize=4)
    for point in points:
        axes.plot(
            [point.gmacs],
            [point.top1_percent],
            color=series_colour(point.series),
            marker=series_marker(point.series),
            markersize=8,
            linestyle="none",
        )
    axes.set_xscale("log")
    axes.margins(y=0.09)
    _percent_limits(axes)
    _plain_log_ticks(axes, [point.gmacs for point in points] + [gmacs for line in lines for gmacs in line.gmacs])
    axes.set_xlabel("GMACs a forward pass")
    axes.set_ylabel("top-1, %")
    _label_points(axes, points)
    return figure


@styled
def accuracy_against_resolution(lines: Sequence[ResolutionLine]) -> Figure:
    """Top-1 of each set of weights at the input sides that it was evaluated at."""
    figure, axes = _panel()
    for line in lines:
        axes.plot(
            *zip(*sorted(zip(line.res, line.top1_percent, strict=True)), strict=True),
            color=series_colour(line.series),
            marker=series_marker(line.series),
        )
    sides = sorted({res for line in lines for res in line.res})
    axes.set_xticks(sides, [str(side) for side in sides])
    _percent_limits(axes)
    axes.set_xlabel("input side, px")
    axes.set_ylabel("top-1, %")
    return figure


@styled
def class_accuracy(names: Sequence[str], top1_percent: Sequence[float | None]) -> Figure:
    """Top-1 of each class as sorted bars; of more than 40 classes the lowest and the highest 20. Classes without samples (None)
    are left out."""
    rows: list[tuple[float, str] | None] = [
        *sorted(
            ((percent, name) for name, percent in zip(names, top1_percent, strict=True) if percent is not None), reverse=True
        )
    ]
    left_out = len(rows) - ALL_CLASSES
    if left_out > 0:
        rows[ALL_CLASSES // 2 : -ALL_CLASSES // 2] = [None]
    figure, axes = _panel(height_in=0.5 + 0.2 * len(rows))
    for place, row in enumerate(rows):
        if row is None:
            axes.text(1, place, f"… {left_out} more …", va="center", color=MUTED, fontsize=9)
        else:
            axes.barh(place, row[0], height=0.7, color=series_colour(0))
            axes.text(row[0] + 1, place, f"{row[0]:.0f}", va="center", color=MUTED, fontsize=8)
    axes.set_yticks(range(len(rows)), [_short(row[1]) if row is not None else "" for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 107)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("top-1, %")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure


@styled
def confusion_matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """Samples by true class (rows) and predicted class (columns).

    Args:
        counts: in class order. A cell is as opaque as the square root of its share of the row, so that few mistakes show.
    """
    import numpy as np

    table = np.asarray(counts, dtype=float)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    cells = np.empty((*table.shape, 4))
    cells[..., :3] = _WRONG_RGB
    cells[np.arange(len(table)), np.arange(len(table)), :3] = _RIGHT_RGB
    cells[..., 3] = np.sqrt(share)
    figure, axes = _panel(width_in=6.6, height_in=6.3)
    axes.imshow(cells, interpolation="nearest")
    axes.grid(visible=False)
    if len(names) <= NAMED_CELLS:
        size = 8 if len(names) > 12 else 10
        for row, column in zip(*np.nonzero(table), strict=True):
            axes.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", fontsize=size - 1, color=INK)
        short = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), short, fontsize=size)
        axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    return figure


def _panel(*, width_in: float = WIDTH_IN, height_in: float = HEIGHT_IN) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in))
    return figure, figure.subplots()


def _accuracy(axes: Axes, runs: Sequence[Run]) -> None:
    for place, run in enumerate(runs):
        _line(axes, run, "train_top1_percent", place, train=True)
        _line(axes, run, f"{run.split}_top1_percent", place)
    _finish(axes, runs, "top-1, %")
    _percent_limits(axes)


def _loss(axes: Axes, runs: Sequence[Run]) -> None:
    for place, run in enumerate(runs):
        _line(axes, run, "train_loss", place, train=True)
        _line(axes, run, f"{run.split}_loss", place)
    _finish(axes, runs, "cross entropy, nats")


def _line(axes: Axes, run: Run, field: str, place: int, *, train: bool = False, scale: float = 1.0) -> None:
    style: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2}
    if not train:
        style = {"marker": series_marker(place), "markevery": max(1, len(run.epochs) // 8)}
    values = [scale * value for value in run.column(field)]
    if train and len(values) == 1:  # a line of one point is none
        style["marker"] = "_"
    axes.plot(run.column("epoch"), values, color=series_colour(place), **style)


def _finish(axes: Axes, runs: Sequence[Run], what: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel(what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if max(len(run.epochs) for run in runs) == 1:
        axes.set_xlim(0, 2)


def _percent_limits(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 101))


def _plain_log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Ticks such as 0.2 and 0.5 in place of powers of ten, of which the range holds one or none."""
    low, high = min(values) / 1.3, max(values) * 1.6  # room for labels to the right
    ticks = [tick for tick in _GMAC_TICKS if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Each point's label on the side where no other model is close, moved up where two would touch, with a line back then."""
    height_percent = (axes.get_ylim()[1] - axes.get_ylim()[0]) * 0.055
    placed: list[tuple[float, float]] = []  # log10 of GMACs, height
    for point in sorted(points, key=lambda point: point.top1_percent):
        x = math.log10(point.gmacs)
        crowded = any(0.01 < math.log10(other.gmacs) - x < 0.2 for other in points)
        height = max([point.top1_percent, *(taken + height_percent for at, taken in placed if abs(at - x) < 0.01)])
        placed.append((x, height))
        moved = height != point.top1_percent
        axes.annotate(
            point.label,
            (point.gmacs, point.top1_percent),
            xytext=(point.gmacs / 1.09 if crowded else point.gmacs * 1.09, height),
            ha="right" if crowded else "left",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0} if moved else None,
        )


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LETTERS else f"{name[: _NAME_LETTERS - 1]}…"
