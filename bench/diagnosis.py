"""What limits training, in one line, from the measured rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.ceilings import Ceiling
from bench.measure import Rates
from tidali.errors import counted

Culprit = Literal["the loader", "the step", "the loop around the step", "not known"]

MIN_REPEATS = 3
BUSY_SHARE = 0.25
"""With more of the cores' time used by other processes, differences between cases are those of what was left to them."""

LOST_SHARE = 0.15
"""How much slower than the step on synthetic data end-to-end training must be before the step alone no longer explains its
rate. On a shared machine two measurements of the same step differ by as much."""
IDLE_SHARE = 0.4
"""A step on a CPU that leaves its cores idle for a larger fraction of its time is waiting for something."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The findings at one resolution."""

    res: int
    culprit: Culprit
    data_wait_share: float
    """Fraction of the end-to-end time spent waiting for the next batch, 0..1, on the host's clock."""
    end_to_end_of_step: float
    """Rate of end-to-end training as a fraction of the rate of the step on synthetic data."""
    host_synchronisations: int | None
    """How often a step makes the host wait for the GPU; None on a CPU."""
    line: str


def diagnose(
    res: int,
    *,
    loader: Rates,
    step: Rates,
    end_to_end: Rates,
    loader_ceiling: Ceiling | None,
    step_ceiling: Ceiling | None,
    step_on_host: bool,
    synchronisations: int | None = None,
) -> Diagnosis:
    """Name the culprit, where the figures show one, and the figures.

    Args:
        loader, step, end_to_end: the loader alone, the step on data that is already on the device, and both, in images/s.
        loader_ceiling, step_ceiling: their lowest ceilings; None if none was measured.
        step_on_host: the step runs on this process's cores, so their idle time is the step's own.
        synchronisations: `bench.profile.host_synchronisations` of a step on a GPU.
    """
    reached, wait = end_to_end.median / step.median, end_to_end.wait_share or 0.0
    # A loader that prefetches makes nobody wait, and still uses cores that the step could use.
    costly_loader = step.median / loader.median > LOST_SHARE
    culprit: Culprit
    unknown = _why_unknown(loader, step, end_to_end)
    if unknown is not None:
        culprit, why = "not known", f"what limits it is not known: {unknown}"
    elif reached >= 1 - LOST_SHARE and wait <= LOST_SHARE:
        culprit = "the step"
        why = f"the step is the bottleneck{_share_of(step_ceiling, step)}"
        if step_on_host and step.idle_share is not None and step.idle_share > IDLE_SHARE:
            why += f", and the cores are idle for {100 * step.idle_share:.0f} % of it: something in it waits"
        if synchronisations:
            times = "once" if synchronisations == 1 else f"{synchronisations} times"
            why += f", and it makes the host wait for the GPU {times} per step: something in it synchronises"
    elif wait > LOST_SHARE or costly_loader:
        culprit = "the loader"
        why = (
            f"the loader is the bottleneck, with {loader.median:,.0f} images/s for a step that can take "
            f"{step.median:,.0f}{_share_of(loader_ceiling, loader)}"
        )
    else:
        culprit = "the loop around the step"
        why = (
            f"the loop around the step is the bottleneck: end to end reaches {100 * reached:.0f} % of the step on data that is "
            "already on the device, but it neither waits for the loader nor loses many of its cores to it"
        )
    return Diagnosis(
        res=res,
        culprit=culprit,
        data_wait_share=wait,
        end_to_end_of_step=reached,
        host_synchronisations=synchronisations,
        line=f"{res} px: waiting for data {100 * wait:.1f} %: {why}",
    )


def _why_unknown(loader: Rates, step: Rates, end_to_end: Rates) -> str | None:
    """Why the figures do not support a verdict; None if they do."""
    every = (loader, step, end_to_end)
    repeats, busy = min(len(one.per_s) for one in every), max(one.others_share or 0.0 for one in every)
    if repeats < MIN_REPEATS:
        return f"{counted(repeats, 'measurement')} of each case cannot show it; give --repeats 5"
    if busy > BUSY_SHARE:
        return f"other processes used up to {100 * busy:.0f} % of the cores; measure again when the machine is free"
    if end_to_end.median > (1 + LOST_SHARE) * step.median:
        return (
            f"end to end reached {end_to_end.median:,.0f} images/s and the step, which is a part of it, {step.median:,.0f}: "
            "the machine's speed changed meanwhile; measure again"
        )
    lost = end_to_end.median < (1 - LOST_SHARE) * step.median
    if lost and (end_to_end.wait_share or 0.0) <= LOST_SHARE and max(end_to_end.per_s) >= min(step.per_s):
        return "the measurements of the step and of end to end overlap; give more --repeats"
    return None


def _share_of(ceiling: Ceiling | None, rates: Rates) -> str:
    return f", at {100 * ceiling.share(rates):.0f} % of this machine's {ceiling.name} rate" if ceiling is not None else ""
