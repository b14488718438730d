"""How a rate is measured: warmed up, the device drained on both sides, cases interleaved, median and spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.idle import IdleTimer
from tidali.hardware.device import cpu_count
from tidali.hardware.timing import Stopwatch, WaitTimer

MIN_SECONDS = 1.0
"""Each measurement goes on for at least this long, so that a fast case counts many batches and not one. So does the warm-up
before it: a DataLoader of two workers has four finished batches ready after a pause, which a fresh clock would take for speed
(a second's work of 256 images at 224 px), and memory that was idle for half a minute comes back slowly."""

MIN_STEPS = 3
WARMUP_STEPS = 2
MAX_CYCLE_SECONDS = 20.0
"""A measurement that could end goes on for as long as this to complete a cycle."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something that gives images, or moves bytes, or does arithmetic."""

    name: str
    step: Callable[[], float]
    """Does one batch and returns the images in it; of a ceiling, the bytes or the floating-point operations."""
    device: torch.device | None = None
    """Drained before the clock is read; None for work on the host."""
    wait: WaitTimer | None = None
    """Running while the step waits for its data."""
    cycle_steps: int = 1
    """A measurement ends after a multiple of these: a loader's epoch, whose start takes longer than what follows, so that every
    measurement has its part of it. Workers give their batches in bursts, too: the rate of three batches is partly luck."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """All measurements of one case."""

    per_s: tuple[float, ...]
    first_step_s: float = 0.0
    """The case's very first step: compilation, start-up and first allocations. Part of the warm-up, so in no rate."""
    warmup_steps: int = 0
    warmup_s: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    wait_share: float | None = None
    """Part of the measured time that the step waited for its data, 0..1; None where it takes none."""
    idle_share: float | None = None
    """Part of the cores' time that nobody used while this was measured, 0..1; None where the kernel does not say."""

    @property
    def median(self) -> float:
        return statistics.median(self.per_s)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third, by linear interpolation; of one measurement, itself."""
        if len(self.per_s) == 1:
            return self.per_s[0], self.per_s[0]
        first, _, third = statistics.quantiles(self.per_s, n=4, method="inclusive")
        return first, third

    @staticmethod
    def together(parts: Sequence[Rates]) -> Rates:
        """Measurements of one case that were made one at a time."""
        sums = {name: sum(getattr(part, name) for part in parts) for name in ("warmup_steps", "warmup_s", "steps", "seconds")}
        per_s = tuple(rate for part in parts for rate in part.per_s)

        def share(name: str) -> float | None:
            """Of all their time; None where one of them has none."""
            shares = [getattr(part, name) for part in parts]
            if None in shares:
                return None
            spent: float = sum(part.seconds * of_part for part, of_part in zip(parts, shares, strict=True))
            return spent / sums["seconds"]

        return Rates(
            per_s=per_s,
            first_step_s=parts[0].first_step_s,
            wait_share=share("wait_share"),
            idle_share=share("idle_share"),
            **sums,
        )

    def to_dict(self) -> dict[str, float]:
        first, third = self.quartiles
        return {"median": self.median, "min": min(self.per_s), "max": max(self.per_s), "q1": first, "q3": third}

    def measured(self) -> dict[str, float | int]:
        """What went into the rate and what was kept out of it."""
        names = ("first_step_s", "warmup_steps", "warmup_s", "steps", "seconds")
        return {name: getattr(self, name) for name in names}


def measure(
    cases: Sequence[Case],
    *,
    repeats: int,
    on_done: Callable[[str], None] | None = None,
    min_seconds: float = MIN_SECONDS,
) -> dict[str, Rates]:
    """Measure every case `repeats` times, taking turns, so that a slow spell of the machine falls on all of them.

    Args:
        on_done: called with a case's name after each of its measurements.
    """
    tallies = {case.name: _Tally() for case in cases}
    for _ in range(repeats):
        for case in cases:
            tallies[case.name].add(case, min_seconds)
            if on_done is not None:
                on_done(case.name)
    return {case.name: tallies[case.name].rates(case) for case in cases}


@dataclass
class _Tally:
    """The measurements of one case so far."""

    per_s: list[float] = field(default_factory=list)
    sums: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(("warmup_steps", "warmup_s", "steps", "seconds"), 0))
    first_step_s: float | None = None
    wait_s: float = 0.0
    idle_s: float | None = 0.0

    def add(self, case: Case, min_seconds: float) -> None:
        warm = Stopwatch(case.device)
        steps = 0
        while steps < WARMUP_STEPS or warm.peek_s() < min_seconds:
            case.step()
            steps += 1
            if self.first_step_s is None:
                self.first_step_s = warm.elapsed_s()
        self._count(warmup_steps=steps, warmup_s=warm.elapsed_s())

        waited_s = case.wait.total_s if case.wait is not None else 0.0
        idle, watch = IdleTimer(), Stopwatch(case.device)
        done, steps = 0.0, 0
        while not _may_end(steps, watch.peek_s(), min_seconds, case.cycle_steps):
            done += case.step()
            steps += 1
        seconds = watch.elapsed_s()
        idle_s = idle.elapsed_s()
        self.idle_s = None if idle_s is None or self.idle_s is None else self.idle_s + idle_s
        self.wait_s += case.wait.total_s - waited_s if case.wait is not None else 0.0
        self._count(steps=steps, seconds=seconds)
        self.per_s.append(done / seconds)

    def _count(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.sums[name] += amount

    def rates(self, case: Case) -> Rates:
        seconds = self.sums["seconds"]
        return Rates(
            per_s=tuple(self.per_s),
            first_step_s=self.first_step_s or 0.0,
            wait_share=self.wait_s / seconds if case.wait is not None else None,
            idle_share=None if self.idle_s is None else min(self.idle_s / (seconds * cpu_count()), 1.0),
            **self.sums,
        )


def _may_end(steps: int, seconds: float, min_seconds: float, cycle_steps: int) -> bool:
    if steps < MIN_STEPS or seconds < min_seconds:
        return False
    return steps % cycle_steps == 0 or seconds >= MAX_CYCLE_SECONDS
