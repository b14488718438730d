"""How far an accuracy that was counted on some samples may be from the true one, and whether two differ by more than chance."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, erfc, sqrt

_Z95 = 1.959963984540054
"""A normal distribution has 95 % of its mass within this many standard deviations."""
EXACT_BELOW = 1000
"""Discordant samples below which McNemar's test is the exact binomial one. It is usual below 25; up to here its sum takes a
millisecond, and the approximation is far off where nearly all are on one side."""


def standard_error_percent(correct: int, samples: int) -> float:
    """Standard error of the accuracy ``correct / samples``, in percentage points: that of a binomial proportion.

    It is 0 where all or none are correct, which no number of samples can prove; `wilson_interval_percent` is not.
    """
    share = correct / max(samples, 1)
    return 100 * sqrt(share * (1 - share) / max(samples, 1))


def wilson_interval_percent(correct: int, samples: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy, in percent (Wilson, 1927). Right also for few samples, and near 0 and 100 %.

    Args:
        samples: at least 1.
    """
    share, z2 = correct / samples, _Z95**2
    middle = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = _Z95 / (1 + z2 / samples) * sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    # At 0 and 100 % one end is exactly that, and rounding may leave it just outside.
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def with_error(percent: float, standard_error: float) -> str:
    """'81.2 ± 6.9': an accuracy and its standard error."""
    return f"{percent:.1f} ± {standard_error:.1f}"


def interval_text(correct: int, samples: int) -> str:
    """'61.2 to 73.4': `wilson_interval_percent`, for people."""
    low, high = wilson_interval_percent(correct, samples)
    return f"{low:.1f} to {high:.1f}"


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """McNemar's test (1947) of two classifiers on the same samples. Only samples that one alone has right tell them apart."""

    samples: int
    first_only: int
    """Samples that only the first predicts correctly."""
    second_only: int
    """Samples that only the second predicts correctly."""

    @property
    def difference_percent(self) -> float:
        """Accuracy of the second minus that of the first, in percentage points."""
        return 100 * (self.second_only - self.first_only) / self.samples

    @property
    def standard_error_percent(self) -> float:
        """Of the difference, in percentage points. The samples that both have right or wrong do not contribute."""
        discordant, difference = self.first_only + self.second_only, self.second_only - self.first_only
        return 100 * sqrt(discordant - difference**2 / self.samples) / self.samples

    @property
    def exact(self) -> bool:
        """Whether `p_value` is the exact binomial test's."""
        return self.first_only + self.second_only < EXACT_BELOW

    @property
    def p_value(self) -> float:
        """Probability of a difference at least as large if both were equally good; two-sided.

        Below `EXACT_BELOW` discordant samples from the binomial distribution, else by chi-squared with continuity correction
        (Edwards, 1948).
        """
        few, discordant = min(self.first_only, self.second_only), self.first_only + self.second_only
        if self.exact:
            return min(2 * sum(comb(discordant, hits) for hits in range(few + 1)) / 2**discordant, 1.0)
        distance = max(abs(self.first_only - self.second_only) - 1, 0)
        return erfc(distance / sqrt(2 * discordant))  # chi-squared of one degree of freedom is a squared normal variable
