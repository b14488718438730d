"""How sure a page can be of an accuracy, and how sure the network is of itself: standard errors, intervals, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tidali.report.drawing import MUTED, PALE, WIDTH_IN, house_style, series_colour, series_marker
from tidali.report.insight import Insight
from tidali.report.page import drawn
from tidali.training.calibration import ConfidenceBin
from tidali.training.uncertainty import interval_text, wilson_interval_percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def certainty_part(insight: Insight) -> dict[str, Any]:
    """The values of the template's ``certainty`` macro."""
    curve = insight.reliability()
    return {
        "top1_percent": insight.top1_percent,
        "confidence_percent": 100 * float(insight.confidences.double().mean()),
        "error_percent": insight.calibration_error_percent,
        "curve": drawn(reliability_diagram(curve), "accuracy by confidence, and the share of samples of each confidence"),
        "bins": [
            (
                f"{one.low_percent:.0f} to {one.high_percent:.0f}",
                f"{one.mean_confidence_percent:.1f}",
                f"{one.top1_percent:.1f}",
                interval_text(one.correct, one.samples),
                f"{one.samples:,}",
            )
            for one in curve
        ],
        "classes": [
            (name, f"{100 * one.correct / one.samples:.1f}", interval_text(one.correct, one.samples), f"{one.samples:,}")
            for name, one in insight.lowest_classes()
        ],
    }


@house_style()
def reliability_diagram(curve: Sequence[ConfidenceBin]) -> Figure:
    """Above, the accuracy of each bin of confidence with its 95 % interval; below, the share of all samples that it has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, 4.2))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 100], [0, 100], color=MUTED, linestyle=":", linewidth=1.2)
    confidences, accuracies = [one.mean_confidence_percent for one in curve], [one.top1_percent for one in curve]
    for one in curve:
        interval = wilson_interval_percent(one.correct, one.samples)
        upper.plot([one.mean_confidence_percent] * 2, interval, color=PALE, linewidth=2.5, solid_capstyle="butt")
    upper.plot(confidences, accuracies, color=series_colour(0), marker=series_marker(0))
    upper.set(ylabel="top-1, %", xlim=(-2, 102), ylim=(-4, 104))
    samples = sum(one.samples for one in curve)
    lower.bar(
        [one.low_percent for one in curve],
        [100 * one.samples / samples for one in curve],
        width=[one.high_percent - one.low_percent for one in curve],
        align="edge",
        color=series_colour(0),
        edgecolor="none",
    )
    lower.set(xlabel="confidence, %", ylabel="samples, %", ylim=(0, None))
    return figure
