"""How a rate is measured: warmed up, the device drained on both sides, cases interleaved, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tidali.timing import Stopwatch

MIN_SECONDS = 1.0
"""Each measurement goes on for at least this long, so that a fast case counts many batches and not one. So does the warm-up
before it: a DataLoader of two workers has four finished batches ready after a pause, which a fresh clock would take for speed
(a second's work of 256 images at 224 px), and memory that was idle for half a minute comes back slowly."""

MIN_STEPS = 3
WARMUP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something that gives images."""

    name: str
    step: Callable[[], int]
    """Does one batch and returns the images in it."""
    device: torch.device | None = None
    """Drained before the clock is read; None for work on the host."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """All measurements of one case."""

    images_per_s: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.images_per_s)

    @property
    def spread_percent(self) -> float:
        """Largest minus smallest, as a share of the median."""
        return 100.0 * (max(self.images_per_s) - min(self.images_per_s)) / self.median

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": min(self.images_per_s), "max": max(self.images_per_s)}


def measure(
    cases: Sequence[Case],
    *,
    repeats: int,
    on_done: Callable[[str], None] | None = None,
    settle_s: float = 0.0,
    min_seconds: float = MIN_SECONDS,
) -> dict[str, Rates]:
    """Measure every case `repeats` times, taking turns, so that a slow spell of the machine falls on all of them.

    Args:
        settle_s: idle time before each measurement, for cases whose own processes go on filling their queues.
        on_done: called with a case's name after each of its measurements.
    """
    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            time.sleep(settle_s)
            rates[case.name].append(_measure_once(case, min_seconds))
            if on_done is not None:
                on_done(case.name)
    return {name: Rates(images_per_s=tuple(values)) for name, values in rates.items()}


def _measure_once(case: Case, min_seconds: float) -> float:
    _images_per_s(case, WARMUP_STEPS, min_seconds)
    return _images_per_s(case, MIN_STEPS, min_seconds)


def _images_per_s(case: Case, min_steps: int, min_seconds: float) -> float:
    watch = Stopwatch(case.device)
    images = steps = 0
    while steps < min_steps or watch.peek_s() < min_seconds:
        images += case.step()
        steps += 1
    return images / watch.elapsed_s()
