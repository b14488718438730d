"""Whether a network's confidence means what it says: of samples predicted at 80 %, 80 % should be correct."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BINS = 15
"""Of equal width between 0 and 100 % confidence, as in Guo et al., 2017, "On Calibration of Modern Neural Networks"."""


@dataclass(frozen=True, kw_only=True)
class ConfidenceBin:
    """The samples whose predicted class got a probability above ``low_percent`` and up to ``high_percent``."""

    low_percent: float
    high_percent: float
    samples: int
    correct: int
    mean_confidence_percent: float

    @property
    def top1_percent(self) -> float:
        return 100 * self.correct / self.samples


def reliability(confidences: Tensor, hits: Tensor, bins: int = BINS) -> list[ConfidenceBin]:
    """The reliability curve: accuracy by confidence. Bins without samples are left out.

    Args:
        confidences: (N,) float32, probability of the predicted class, 0..1.
        hits: (N,) bool, whether the prediction is correct.
    """
    places = (confidences * bins).ceil().long().sub(1).clamp(0, bins - 1)  # a bin has its upper end and not its lower one
    found = []
    for place in places.unique().tolist():
        inside = places == place
        found.append(
            ConfidenceBin(
                low_percent=100 * place / bins,
                high_percent=100 * (place + 1) / bins,
                samples=int(inside.sum()),
                correct=int(hits[inside].sum()),
                mean_confidence_percent=100 * float(confidences[inside].double().mean()),
            )
        )
    return found


def calibration_error_percent(curve: list[ConfidenceBin]) -> float:
    """Expected calibration error (ECE), in percentage points: the mean distance of accuracy and confidence, weighted by
    samples (Naeini et al., 2015).

    Args:
        curve: of `reliability`; at least one bin.
    """
    samples = sum(one.samples for one in curve)
    return sum(one.samples * abs(one.top1_percent - one.mean_confidence_percent) for one in curve) / samples
