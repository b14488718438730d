"""Standard errors, intervals, calibration and McNemar's test against figures worked by hand and numpy written plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tidali.errors import TidaliError
from tidali.training.calibration import calibration_error_percent, reliability
from tidali.training.predictions import ClassAccuracy, Predictions
from tidali.training.uncertainty import McNemar, standard_error_percent, wilson_interval_percent


def predictions(labels, predicted, *, confidences=None, positions=None, classes: int = 3) -> Predictions:
    count = len(labels)
    return Predictions(
        class_count=classes,
        positions=torch.tensor(range(count) if positions is None else positions),
        labels=torch.tensor(labels),
        predicted=torch.tensor(predicted),
        losses=torch.zeros(count),
        confidences=torch.tensor([0.5] * count if confidences is None else confidences),
    )


def test_standard_error_is_the_binomial_one() -> None:
    assert standard_error_percent(80, 100) == pytest.approx(4.0)  # sqrt(0.8 * 0.2 / 100)
    assert standard_error_percent(25, 100) == pytest.approx(100 * math.sqrt(0.1875 / 100))
    assert standard_error_percent(7, 7) == 0
    hits = np.random.default_rng(0).random((20_000, 50)) < 0.7
    # The spread of 20,000 repeated evaluations of 50 samples, known itself to 0.5 %.
    assert standard_error_percent(35, 50) == pytest.approx(100 * hits.mean(1).std(), rel=0.02)


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    [
        # Roots of the quadratic equation (p - x)^2 = z^2 x (1 - x) / n; the first is Newcombe's (1998) example, method 3.
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
        (20, 20, 83.89, 100.0),
    ],
)
def test_wilson_interval_is_newcombes_table(correct: int, samples: int, low: float, high: float) -> None:
    assert wilson_interval_percent(correct, samples) == (pytest.approx(low, abs=0.005), pytest.approx(high, abs=0.005))
    a, b, c = 1 + 1.959964**2 / samples, -(2 * correct / samples + 1.959964**2 / samples), (correct / samples) ** 2
    roots = sorted(100 * np.roots([a, b, c]).real)
    assert wilson_interval_percent(correct, samples) == pytest.approx(roots, abs=1e-4)


def test_a_class_without_samples_has_no_accuracy() -> None:
    found = predictions([0, 0, 2], [0, 1, 2]).by_class()
    assert found == [
        ClassAccuracy(samples=2, correct=1),
        ClassAccuracy(samples=0, correct=0),
        ClassAccuracy(samples=1, correct=1),
    ]
    assert [one.top1_percent for one in found] == [50, None, 100]
    assert found[1].interval_percent is None
    assert found[0].interval_percent == pytest.approx((9.45, 90.55), abs=0.005)  # 0.5 -+ z / (2 sqrt(2 + z^2))


def test_calibration_worked_by_hand() -> None:
    """Five bins of 20 %: 0.2 ends the first, 1.0 the last."""
    confidences = torch.tensor([0.2, 0.1, 0.55, 0.45, 1.0, 0.9])
    hits = torch.tensor([False, True, True, False, True, True])
    first, middle, last = reliability(confidences, hits, bins=5)
    assert [(one.low_percent, one.high_percent, one.samples, one.correct) for one in (first, middle, last)] == [
        (0, 20, 2, 1),
        (40, 60, 2, 1),
        (80, 100, 2, 2),
    ]
    assert [one.mean_confidence_percent for one in (first, middle, last)] == pytest.approx([15, 50, 95], abs=1e-5)
    # (2 * |50 - 15| + 2 * |50 - 50| + 2 * |100 - 95|) / 6
    assert calibration_error_percent([first, middle, last]) == pytest.approx(80 / 6, abs=1e-5)


def test_calibration_against_plain_numpy() -> None:
    rng = np.random.default_rng(1)
    confidences = rng.beta(4, 2, 3000).astype(np.float32)
    hits = rng.random(3000) < confidences**2  # over-confident
    error, bins = 0.0, 15
    for place in range(bins):
        inside = (confidences > place / bins) & (confidences <= (place + 1) / bins)
        if inside.any():
            error += inside.sum() / 3000 * abs(hits[inside].mean() - confidences[inside].astype(np.float64).mean())
    curve = reliability(torch.from_numpy(confidences), torch.from_numpy(hits))
    assert calibration_error_percent(curve) == pytest.approx(100 * error, abs=1e-9)
    assert error > 0.05
    assert sum(one.samples for one in curve) == 3000


def test_a_network_whose_confidence_is_its_accuracy_is_calibrated() -> None:
    confidences = torch.full((10,), 0.7)
    assert calibration_error_percent(reliability(confidences, torch.arange(10) < 7)) == pytest.approx(0, abs=1e-5)


def test_mcnemar_exact_worked_by_hand() -> None:
    """Ten samples tell them apart, two of them for the first: 2 (1 + 10 + 45) / 1024."""
    test = McNemar(samples=100, first_only=2, second_only=8)
    assert test.exact
    assert test.p_value == pytest.approx(112 / 1024)
    assert test.difference_percent == 6
    assert test.standard_error_percent == pytest.approx(100 * math.sqrt(10 - 36 / 100) / 100)
    assert McNemar(samples=100, first_only=8, second_only=2).p_value == test.p_value
    assert McNemar(samples=9, first_only=0, second_only=0).p_value == 1
    assert McNemar(samples=9, first_only=3, second_only=3).p_value == 1
    assert McNemar(samples=9, first_only=0, second_only=5).p_value == 2 / 2**5


def test_mcnemar_with_many_discordant_samples() -> None:
    """Chi-squared (|577 - 648| - 1)^2 / (577 + 648) = 4 = 2^2: of a normal distribution, 4.5500 % is beyond two deviations."""
    test = McNemar(samples=16_000, first_only=577, second_only=648)
    assert not test.exact
    assert test.p_value == pytest.approx(0.045500, abs=5e-7)
    # The exact test agrees to a hundredth, summed here.
    exact = 2 * sum(math.comb(1225, hits) for hits in range(578)) / 2**1225
    assert test.p_value == pytest.approx(exact, rel=0.01)


def test_the_error_of_a_difference_is_that_of_paired_samples() -> None:
    """Against numpy's variance of the differences, which are -1, 0 or 1."""
    differences = np.array([1] * 8 + [-1] * 2 + [0] * 90)
    expected = 100 * differences.std() / math.sqrt(100)
    assert McNemar(samples=100, first_only=2, second_only=8).standard_error_percent == pytest.approx(expected)


def test_two_evaluations_are_compared_on_the_samples_that_both_have() -> None:
    """The first left out sample 1, the second samples 0 and 4: compared by place in the list, other samples would meet."""
    first = predictions([0, 2, 0, 1, 2], [0, 0, 0, 0, 2], positions=[0, 2, 3, 4, 5])
    second = predictions([1, 2, 0, 2], [1, 2, 1, 2], positions=[1, 2, 3, 5])
    test = first.compare(second)
    # Sample 2 only the second has right, sample 3 only the first, sample 5 both.
    assert (test.samples, test.first_only, test.second_only) == (3, 1, 1)
    assert second.compare(first) == test
    with pytest.raises(TidaliError, match="no sample in common"):
        first.compare(predictions([0], [0], positions=[1]))


def test_confident_mistakes_are_wrong_and_in_order() -> None:
    found = predictions([0, 1, 2, 0], [0, 0, 1, 2], confidences=[0.99, 0.6, 0.9, 0.7])
    assert found.confident_mistakes(2) == [2, 3]
    assert found.confident_mistakes(9) == [2, 3, 1]
    assert predictions([0], [0]).confident_mistakes(9) == []
