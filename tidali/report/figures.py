"""The figures of runs: learning curves, speed, accuracy against cost and resolution.

Most functions return a matplotlib figure, for `tidali.report.drawing.save_figure` or `tidali.report.drawing.inline_svg`.
matplotlib is imported when one is drawn. Names in figures are plain text: a ``$`` in the name of a class is drawn as a ``$``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tidali.report.drawing import (
    HEIGHT_IN,
    MUTED,
    PALE,
    TIPS,
    WIDTH_IN,
    house_style,
    panel,
    series_colour,
    series_marker,
    tip,
    tip_area,
)
from tidali.training.history import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLATTENED = 8
"""Where the largest loss is this many times the median, a linear axis would flatten all the others."""
_GMAC_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


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
    figure = Figure(figsize=(2.4 * WIDTH_IN, 1.2 * HEIGHT_IN + 0.2 + 0.2 * -(-len(names) // columns)))
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
    figure, axes = panel()
    draw(axes, runs)
    return figure


def accuracy(axes: Axes, runs: Sequence[Run], *, chance_percent: Collection[float] = ()) -> None:
    """Top-1 by epoch: evaluated as lines with markers, on train dashed.

    Args:
        chance_percent: what guessing reaches, for a dotted line each; several where runs differ in their classes.
    """
    _evaluated_and_train(axes, runs, "top1_percent", "top-1, %")
    for percent in chance_percent:
        axes.axhline(percent, color=MUTED, linestyle=":", linewidth=1.2, gid=tip(f"chance: {percent:.1f} %"))
        x, ha = (1, "right") if _ends_farther(runs, percent) else (0, "left")
        of_width = axes.get_yaxis_transform()  # x is a fraction of the width
        axes.text(x, percent, f"chance, {percent:.1f} %", ha=ha, va="bottom", color=MUTED, transform=of_width)
    _percent_limits(axes)


def _ends_farther(runs: Sequence[Run], percent: float) -> bool:
    """Whether the accuracies are farther from this one in the last epoch than in the first: there its label has room."""
    first, last = (
        min(abs(run.column(f"{which}_top1_percent")[end] - percent) for run in runs for which in ("train", run.split))
        for end in (0, -1)
    )
    return last >= first


def loss(axes: Axes, runs: Sequence[Run]) -> None:
    """Cross entropy by epoch: evaluated as lines with markers, on train dashed; on a logarithmic axis where one loss is so high
    that a linear one would flatten the others."""
    _evaluated_and_train(axes, runs, "loss", "cross entropy, nats")
    if loss_is_logarithmic(runs):
        _logarithmic_loss(axes)


def loss_is_logarithmic(runs: Sequence[Run]) -> bool:
    """Whether `loss` has a logarithmic axis for these runs."""
    values = [value for run in runs for which in ("train", run.split) for value in run.column(f"{which}_loss")]
    positive = [value for value in values if math.isfinite(value) and value > 0]
    return bool(positive) and max(positive) > _FLATTENED * statistics.median(positive)


def throughput(axes: Axes, runs: Sequence[Run]) -> None:
    """Images per second in training, by epoch."""
    for place, run in enumerate(runs):
        _line(axes, run, "images_per_s", place)
    _label_epochs(axes, runs, "images/s in training")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # room for the marker of the highest


def waiting(axes: Axes, runs: Sequence[Run]) -> None:
    """Percentage of the training time that steps waited for data, by epoch."""
    for place, run in enumerate(runs):
        _line(axes, run, "data_wait_share", place, scale=100)
    _label_epochs(axes, runs, "waiting for data, % of the time")
    axes.set_ylim(0, max(1.05 * axes.get_ylim()[1], 5))  # otherwise the noise around 0 % would fill the figure


@house_style()
def runs_among_others(runs: Sequence[Run], others: Sequence[Run], series: int) -> Figure:
    """The accuracy of some runs, such as all seeds of a row, drawn over the pale lines of other runs.

    Several of these stand side by side on a page, so their axes are equal.
    """
    figure, axes = panel(width_in=3.2, height_in=2.2)
    for run in others:
        marker = "." if len(run.epochs) == 1 else None  # a single point is not visible as a line
        axes.plot(run.column("epoch"), run.column(f"{run.split}_top1_percent"), color=PALE, linewidth=1, marker=marker)
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
    figure, axes = panel("GMACs per forward pass", "top-1, %")
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
            gid=tip(f"{model.label}: {model.top1_percent:.1f} % for {model.gmacs:.3f} GMACs"),
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
    figure, axes = panel("input side, px", "top-1, %")
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


def _evaluated_and_train(axes: Axes, runs: Sequence[Run], measure: str, label: str) -> None:
    for place, run in enumerate(runs):
        _line(axes, run, f"train_{measure}", place, train=True)
        _line(axes, run, f"{run.split}_{measure}", place)
    _label_epochs(axes, runs, label)


def _line(axes: Axes, run: Run, field: str, place: int, *, train: bool = False, scale: float = 1.0) -> None:
    style: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2}
    if not train:
        style = {"marker": series_marker(place), "markevery": max(1, len(run.epochs) // 8)}
    values = [scale * value if math.isfinite(value) else math.nan for value in run.column(field)]
    if train and len(values) == 1:  # a single point is not visible as a line
        style["marker"] = "_"
    axes.plot(run.column("epoch"), values, color=series_colour(place), **style)
    for epoch, value in list(zip(run.column("epoch"), values, strict=True))[:: 1 + len(values) // TIPS]:
        tip_area(axes, epoch, value, f"{run.name}, epoch {epoch:.0f}{', train' if train else ''}: {value:,.4g}")


def _label_epochs(axes: Axes, runs: Sequence[Run], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if max(len(run.epochs) for run in runs) == 1:
        axes.set_xlim(0, 2)


def _logarithmic_loss(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 3000 else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.minorticks_off()
    axes.set_ylabel("cross entropy, nats, logarithmic")


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
    height_percent = (axes.get_ylim()[1] - axes.get_ylim()[0]) * 0.075
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
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0} if moved else None,
        )
