"""How a rate is measured: warm-up, the device drained on both sides of the clock, interleaved cases, median and spread."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from tidali.console import progress_bar
from tidali.errors import TidaliError
from tidali.hardware.limits import affinity_count
from tidali.hardware.timing import Lead, Stopwatch, WaitTimer

MIN_SECONDS = 1.0
"""Each measurement lasts at least this long, so that a fast case counts many batches and not one. So does the warm-up before
it: a DataLoader with two workers has four batches ready after a pause, a second's work for 256 images of 224 px, which would
count as speed; and memory that was idle for half a minute is slow at first."""

MIN_STEPS = 3
WARMUP_STEPS = 2
MAX_CYCLE_SECONDS = 20.0
"""A measurement that waits for the end of a cycle stops after this time."""

_STAT = Path("/proc/stat")

Key = TypeVar("Key", bound=Hashable)


class CaseFailed(TidaliError):
    """A case that cannot be measured. The message is the reason, without the name of the case."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """All measurements of one case."""

    per_s: tuple[float, ...]
    first_step_s: float = 0.0
    """Duration of the very first step: compilation, start-up and first allocations. Part of the warm-up, so in no rate."""
    warmup_steps: int = 0
    warmup_s: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    wait_share: float | None = None
    """Fraction of the measured time that the step waited for its data, 0..1; None if the case has no `WaitTimer`."""
    idle_share: float | None = None
    """Fraction of the cores' time that no process used, 0..1; None if the kernel does not report it."""
    others_share: float | None = None
    """Fraction of the cores' time that processes other than this one and its own used, 0..1; None likewise."""

    @property
    def median(self) -> float:
        return statistics.median(self.per_s)

    @staticmethod
    def combined(parts: Sequence[Rates]) -> Rates:
        """Several measurements of one case, in the order in which they were made, as one."""
        sums = {name: sum(getattr(part, name) for part in parts) for name in ("warmup_steps", "warmup_s", "steps", "seconds")}

        def share(name: str) -> float | None:
            """Fraction of the total time; None if a part does not have it."""
            shares = [getattr(part, name) for part in parts]
            if None in shares:
                return None
            return float(sum(part.seconds * value for part, value in zip(parts, shares, strict=True)) / sums["seconds"])

        return Rates(
            per_s=tuple(rate for part in parts for rate in part.per_s),
            first_step_s=parts[0].first_step_s,
            wait_share=share("wait_share"),
            idle_share=share("idle_share"),
            others_share=share("others_share"),
            **sums,
        )

    def to_dict(self) -> dict[str, float]:
        """Median, extremes, and quartiles by linear interpolation; of a single measurement, all are that measurement."""
        first, _, third = statistics.quantiles(self.per_s * (2 if len(self.per_s) == 1 else 1), n=4, method="inclusive")
        return {"median": self.median, "min": min(self.per_s), "max": max(self.per_s), "q1": first, "q3": third}

    def measured(self) -> dict[str, float | int]:
        """How much was measured, and how much was left out as warm-up."""
        names = ("first_step_s", "warmup_steps", "warmup_s", "steps", "seconds")
        return {name: getattr(self, name) for name in names}


class Measurable(Protocol):
    """A case, in this process (`Case`) or in one of its own (`bench.case_process.CaseProcess`)."""

    def measure(self) -> Rates:
        """Measure once.

        Raises:
            CaseFailed: it cannot be measured.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """Work that is measured in this process."""

    step: Callable[[], float]
    """Does one batch and returns the number of its images; for a ceiling, of its bytes or floating-point operations."""
    device: torch.device | None = None
    """Drained before the clock is read; None for work on the host."""
    wait: WaitTimer | None = None
    """Runs while the step waits for its data."""
    cycle_steps: int = 1
    """A measurement ends after a multiple of this many steps. For a loader it is an epoch: the start of an epoch is slower than
    the rest, and every measurement should contain its part of it. Workers also deliver in bursts: the rate of three batches is
    partly luck."""
    min_seconds: float | None = None
    """None: `MIN_SECONDS`."""

    def measure(self) -> Rates:
        """Warm up, then measure once."""
        min_seconds = MIN_SECONDS if self.min_seconds is None else self.min_seconds
        lead = Lead(self.device)
        warm_up, warmup_steps, first_step_s = Stopwatch(self.device), 0, 0.0
        while warmup_steps < WARMUP_STEPS or warm_up.peek_s() < min_seconds:
            self.step()
            lead.step_queued()
            warmup_steps += 1
            if warmup_steps == 1:
                first_step_s = warm_up.elapsed_s()
        warmup_s = warm_up.elapsed_s()

        waited_s = self.wait.total_s if self.wait is not None else 0.0
        idle_before_s, own_before_s, watch = idle_s(), own_cpu_s(), Stopwatch(self.device)
        images, steps = 0.0, 0
        while not self._may_end(steps, watch.peek_s(), min_seconds):
            images += self.step()
            lead.step_queued()
            steps += 1
        seconds, idle_after_s = watch.elapsed_s(), idle_s()
        idle_share, others_share = None, None
        if idle_before_s is not None and idle_after_s is not None:
            cores_s = seconds * affinity_count()
            idle_share = min((idle_after_s - idle_before_s) / cores_s, 1.0)
            others_share = min(max(1 - idle_share - (own_cpu_s() - own_before_s) / cores_s, 0.0), 1.0)
        return Rates(
            per_s=(images / seconds,),
            first_step_s=first_step_s,
            warmup_steps=warmup_steps,
            warmup_s=warmup_s,
            steps=steps,
            seconds=seconds,
            wait_share=(self.wait.total_s - waited_s) / seconds if self.wait is not None else None,
            idle_share=idle_share,
            others_share=others_share,
        )

    def _may_end(self, steps: int, seconds: float, min_seconds: float) -> bool:
        if steps < MIN_STEPS or seconds < min_seconds:
            return False
        return steps % self.cycle_steps == 0 or seconds >= MAX_CYCLE_SECONDS


def measure(
    cases: Mapping[Key, Measurable],
    *,
    repeats: int,
    title: str = "measuring",
    on_failed: Callable[[Key, CaseFailed], None] | None = None,
) -> dict[Key, Rates]:
    """Measure every case `repeats` times. The cases take turns, so that a slow spell of the machine affects all of them.

    Args:
        title: of the progress bar.
        on_failed: called for a case that fails, which is then measured no further and left out of the result. None: raise.

    Raises:
        CaseFailed: a case failed, and there is no `on_failed`.
    """
    found: dict[Key, list[Rates]] = {name: [] for name in cases}
    with progress(title, repeats * len(cases)) as begin:
        for _ in range(repeats):
            for name, case in cases.items():
                begin(str(name))
                if name not in found:
                    continue
                try:
                    found[name].append(case.measure())
                except CaseFailed as error:
                    if on_failed is None:
                        raise
                    del found[name]
                    on_failed(name, error)
    return {name: Rates.combined(parts) for name, parts in found.items()}


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar. What it yields is called with the name of each piece of work when that begins."""
    with progress_bar() as bar:
        task = bar.add_task(title, total=total)

        def begin(name: str) -> None:
            bar.update(task, advance=1, notes=(name,))

        yield begin


def idle_s() -> float | None:
    """Seconds that the cores of this process were idle since the machine was started, summed over the cores; None if the kernel
    does not report it.

    Shows what a step loses to waiting, as opposed to other work on the machine: the kernel's count (``idle`` and ``iowait`` of
    /proc/stat) covers all processes, so a step that another process displaces leaves no core idle, and a step that sleeps does.
    """
    try:
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in _STAT.read_text().splitlines()]
        ticks = sum(int(line[4]) + int(line[5]) for line in lines if line and line[0] in cores)
    except (OSError, AttributeError, IndexError, ValueError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def own_cpu_s() -> float:
    """Processor time of this process and of all that it started, ended ones included, in seconds; 0 without /proc."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for stat in _STAT.parent.glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it ended in this moment
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()  # behind the name, which may hold anything
            process = int(stat.parent.name)
            ticks[process] = sum(map(int, fields[11:15]))  # in user and kernel mode, its own and its ended children's
            children.setdefault(int(fields[1]), []).append(process)
    found, own = [os.getpid()], 0
    while found:
        process = found.pop()
        own += ticks.get(process, 0)
        found += children.get(process, [])
    return own / os.sysconf("SC_CLK_TCK")
