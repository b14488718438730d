"""What holds training back, in one line, from what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bench.ceilings import Bound
from bench.measure import Rates

Culprit = Literal["the loader", "the step", "the loop around the step"]

LOST_SHARE = 0.15
"""What end to end must lose against the step on synthetic data before the step is no longer all of the explanation. Two
measurements of the same step differ by as much on a shared machine."""
IDLE_SHARE = 0.4
"""A step on a CPU that leaves its cores idle for a larger part of its time waits for something."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found of one resolution."""

    res: int
    culprit: Culprit
    data_wait_share: float
    """Part of the end-to-end time spent waiting for the next batch, 0..1, on the host's clock."""
    end_to_end_of_step: float
    """Rate end to end as a part of the step's on synthetic data."""
    host_synchronisations: int | None
    """How often a step makes the host wait for the GPU; None on a CPU."""
    line: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(
    res: int,
    *,
    loader: Rates,
    step: Rates,
    end_to_end: Rates,
    loader_bound: Bound | None,
    step_bound: Bound | None,
    step_on_host: bool,
    synchronisations: int | None = None,
) -> Diagnosis:
    """Name the culprit, and the figures that say so.

    Args:
        loader, step, end_to_end: the loader alone, the step on data that is already there, and both, in images/s.
        loader_bound, step_bound: the ceilings that they stand under; None where none was measured.
        step_on_host: the step runs on this process's cores, so that their idle time is its own.
        synchronisations: of `bench.host_sync`, of a step on a GPU.
    """
    reached, wait = end_to_end.median / step.median, end_to_end.wait_share or 0.0
    # A loader that prefetches makes nobody wait, and still takes its share of the cores that the step runs on.
    costly_loader = step.median / loader.median > LOST_SHARE
    if reached >= 1 - LOST_SHARE and wait <= LOST_SHARE:
        culprit: Culprit = "the step"
        why = f"the step is what binds{_at(step_bound, step)}"
        if step_on_host and step.idle_share is not None and step.idle_share > IDLE_SHARE:
            why += f", and the cores are idle for {100 * step.idle_share:.0f} % of it: something in it waits"
        if synchronisations:
            times = "once" if synchronisations == 1 else f"{synchronisations} times"
            why += f", and it makes the host wait for the GPU {times} a step: something in it synchronises"
    elif wait > LOST_SHARE or costly_loader:
        culprit = "the loader"
        why = (
            f"the loader is what binds, with {loader.median:,.0f} images/s for a step that takes "
            f"{step.median:,.0f}{_at(loader_bound, loader)}"
        )
    else:
        culprit = "the loop around the step"
        why = (
            f"the loop around the step is what binds: end to end runs at {100 * reached:.0f} % of the step on data that is "
            "already there, and it neither waits for the loader nor shares much of the cores with it"
        )
    return Diagnosis(
        res=res,
        culprit=culprit,
        data_wait_share=wait,
        end_to_end_of_step=reached,
        host_synchronisations=synchronisations,
        line=f"{res} px: waiting for data {100 * wait:.1f} %: {why}",
    )


def _at(bound: Bound | None, rates: Rates) -> str:
    return f", at {100 * bound.share(rates):.0f} % of this machine's {bound.ceiling} rate" if bound is not None else ""
