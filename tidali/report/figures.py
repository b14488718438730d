"""The figures: learning curves, speed, accuracy against cost and resolution, accuracy by class, confusion.

Most functions return a matplotlib figure, for `tidali.report.drawing.save_figure` or `tidali.report.drawing.inline_svg`.
matplotlib is imported when one is drawn. Names in figures are plain text: a ``$`` in the name of a class is drawn as a ``$``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tidali.report.drawing import HEIGHT_IN, INK, MUTED, PALE, WIDTH_IN, house_style, series_colour, series_marker
from tidali.training.history import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL_CLASSES = 40
"""Up to this many classes each have a bar; of more, only the twenty lowest and the twenty highest."""
NAMED_CELLS = 30
"""Up to this many classes, a confusion matrix has their names and counts."""
_NAME_LETTERS = 22
_GMAC_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# The cells of a confusion matrix are an image, whose colours cannot follow the theme of the page. The contrast of these colours
# is 4.1 to 4.4 to 1 against a light and a dark page, and at least 3.5 to 1 against the counts in the cells.
_RIGHT_RGB, _WRONG_RGB = (0.2, 0.46, 0.91), (0.86, 0.3, 0.04)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The accuracy of a model and what it costs."""

    label: str
    series: int
    gmacs: float
    """Billions of multiply-adds of a forward pass."""
    top1_percent: float
    at: Sequence[tuple[int, float, float]] = ()
    """The same weights at other resolutions: input side in pixels, GMACs, top-1 in percent."""


@house_style()
def comparison(runs: Sequence[Run], labels: Sequence[str]) -> Figure:
    """Accuracy and loss of several runs in one picture with a legend, for a file."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [*labels, "evaluated", "train, as counted while training"]
    columns = 2 if len(names) > 5 and max(len(name) for name in names) < 70 else 1  # half the width has room for 75 letters
    figure = Figure(figsize=(2 * WIDTH_IN, HEIGHT_IN + 0.2 + 0.2 * -(-len(names) // columns)))
    left, right = figure.subplots(1, 2)
    accuracy(left, runs)
    loss(right, runs)
    lines = [
        Line2D([], [], color=series_colour(place), marker=series_marker(place), linestyle="-") for place in range(len(runs))
    ]
    lines += [Line2D([], [], color=MUTED, linestyle="-"), Line2D([], [], color=MUTED, linestyle="--", linewidth=1.2)]
    legend = figure.legend(lines, [""] * len(lines), loc="outside lower left", fontsize=9, ncols=columns)
    # matplotlib leaves out names that begin with _ when they are passed to legend().
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    return figure


@house_style()
def by_epoch(draw: Callable[[Axes, Sequence[Run]], None], runs: Sequence[Run]) -> Figure:
    """A figure of its own for `accuracy`, `loss`, `throughput` or `waiting`."""
    figure, axes = _panel()
    draw(axes, runs)
    return figure


def accuracy(axes: Axes, runs: Sequence[Run]) -> None:
    """Top-1 by epoch: evaluated as lines with markers, on train dashed."""
    _evaluated_and_train(axes, runs, "top1_percent", "top-1, %")
    _percent_limits(axes)


def loss(axes: Axes, runs: Sequence[Run]) -> None:
    """Cross entropy by epoch: evaluated as lines with markers, on train dashed."""
    _evaluated_and_train(axes, runs, "loss", "cross entropy, nats")


def throughput(axes: Axes, runs: Sequence[Run]) -> None:
    """Images per second in training, by epoch."""
    for place, run in enumerate(runs):
        _line(axes, run, "images_per_s", place)
    _label_epochs(axes, runs, "images/s in training")
    axes.set_ylim(bottom=0)


def waiting(axes: Axes, runs: Sequence[Run]) -> None:
    """Percentage of the training time that steps waited for data, by epoch."""
    for place, run in enumerate(runs):
        _line(axes, run, "data_wait_share", place, scale=100)
    _label_epochs(axes, runs, "waiting for data, % of the time")
    axes.set_ylim(0, max(axes.get_ylim()[1], 5))  # otherwise the noise around 0 % would fill the figure


@house_style()
def runs_among_others(runs: Sequence[Run], others: Sequence[Run], series: int) -> Figure:
    """The accuracy of some runs, such as all seeds of a row, drawn over the pale lines of other runs.

    Several of these stand side by side on a page, so their axes are equal.
    """
    figure, axes = _panel(width_in=3.4, height_in=2.3)
    for run in others:
        axes.plot(run.column("epoch"), run.column(f"{run.split}_top1_percent"), color=PALE, linewidth=1)
    for run in runs:
        _line(axes, run, f"{run.split}_top1_percent", series)
        _line(axes, run, "train_top1_percent", series, train=True)
    _label_epochs(axes, [*runs, *others], "top-1, %")
    axes.set_ylim(0, 102)
    return figure


@house_style()
def accuracy_against_gmacs(models: Sequence[Evaluated]) -> Figure:
    """Top-1 against the multiply-adds of a forward pass: a point for each model, a line for its weights at other resolutions.

    Models with the same cost and, to a tenth, the same accuracy share a point and its label.
    """
    figure, axes = _panel("GMACs per forward pass", "top-1, %")
    for model in models:
        line = sorted((gmacs, top1_percent) for _, gmacs, top1_percent in model.at)
        if line:
            axes.plot(
                *zip(*line, strict=True), color=series_colour(model.series), linewidth=1, alpha=0.6, marker=".", markersize=4
            )
    points: dict[tuple[float, float], Evaluated] = {}
    for model in models:
        first = points.setdefault(place := (round(model.gmacs, 3), round(model.top1_percent, 1)), model)
        if first is not model:
            points[place] = replace(first, label=f"{first.label}, {model.label}")
    for model in points.values():
        axes.plot(
            [model.gmacs],
            [model.top1_percent],
            color=series_colour(model.series),
            marker=series_marker(model.series),
            markersize=8,
            linestyle="none",
        )
    axes.set_xscale("log")
    axes.margins(y=0.09)
    _percent_limits(axes)
    _plain_log_ticks(axes, [model.gmacs for model in models] + [gmacs for model in models for _, gmacs, _ in model.at])
    _label_points(axes, list(points.values()))
    return figure


@house_style()
def accuracy_against_resolution(models: Sequence[Evaluated]) -> Figure:
    """Top-1 of each model at the input sides that it was evaluated at."""
    figure, axes = _panel("input side, px", "top-1, %")
    for model in models:
        axes.plot(
            *zip(*sorted((res, top1_percent) for res, _, top1_percent in model.at), strict=True),
            color=series_colour(model.series),
            marker=series_marker(model.series),
        )
    sides = sorted({res for model in models for res, _, _ in model.at})
    axes.set_xticks(sides, [str(side) for side in sides])
    _percent_limits(axes)
    return figure


@house_style()
def class_accuracy(names: Sequence[str], top1_percent: Sequence[float | None]) -> Figure:
    """Top-1 of each class as sorted bars, at most `ALL_CLASSES` of them. Classes without samples (None) are left out."""
    rows: list[tuple[float, str] | None] = [
        *sorted(
            ((percent, name) for name, percent in zip(names, top1_percent, strict=True) if percent is not None), reverse=True
        )
    ]
    left_out = len(rows) - ALL_CLASSES
    if left_out > 0:
        rows[ALL_CLASSES // 2 : -ALL_CLASSES // 2] = [None]
    figure, axes = _panel("top-1, %", height_in=0.5 + 0.2 * len(rows))
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
    figure, axes = _panel("predicted class", "true class", width_in=6.6, height_in=6.3)
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
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    return figure


def _panel(x: str = "", y: str = "", *, width_in: float = WIDTH_IN, height_in: float = HEIGHT_IN) -> tuple[Figure, Axes]:
    """A figure of one panel, with the labels of its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in))
    return figure, figure.subplots(subplot_kw={"xlabel": x, "ylabel": y})


def _evaluated_and_train(axes: Axes, runs: Sequence[Run], measure: str, label: str) -> None:
    for place, run in enumerate(runs):
        _line(axes, run, f"train_{measure}", place, train=True)
        _line(axes, run, f"{run.split}_{measure}", place)
    _label_epochs(axes, runs, label)


def _line(axes: Axes, run: Run, field: str, place: int, *, train: bool = False, scale: float = 1.0) -> None:
    style: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2}
    if not train:
        style = {"marker": series_marker(place), "markevery": max(1, len(run.epochs) // 8)}
    values = [scale * value for value in run.column(field)]
    if train and len(values) == 1:  # a single point is not visible as a line
        style["marker"] = "_"
    axes.plot(run.column("epoch"), values, color=series_colour(place), **style)


def _label_epochs(axes: Axes, runs: Sequence[Run], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if max(len(run.epochs) for run in runs) == 1:
        axes.set_xlim(0, 2)


def _percent_limits(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 101))


def _plain_log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Ticks such as 0.2 and 0.5 instead of powers of ten: the range contains at most one of those."""
    low, high = min(values) / 1.3, max(values) * 1.6  # room for the labels on the right
    ticks = [tick for tick in _GMAC_TICKS if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _label_points(axes: Axes, points: Sequence[Evaluated]) -> None:
    """Label each point on the side where no other point is close. Labels that would touch are moved up and joined by a line."""
    height_percent = (axes.get_ylim()[1] - axes.get_ylim()[0]) * 0.055
    placed: list[tuple[float, float]] = []  # log10 of GMACs, percent
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
