"""The one place that reads the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

now_s: Callable[[], float] = time.perf_counter


def synchronize(device: torch.device | None) -> None:
    """Wait until the device has done all that was asked of it, so that the clock shows work and not its queueing."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds since construction, with the device's queue drained on both sides."""

    def __init__(self, device: torch.device | None = None, clock_s: Callable[[], float] | None = None) -> None:
        self._device = device
        self._clock_s = clock_s or now_s
        synchronize(device)
        self._start_s = self._clock_s()

    def peek_s(self) -> float:
        """Host time so far, without waiting for the device."""
        return self._clock_s() - self._start_s

    def elapsed_s(self) -> float:
        synchronize(self._device)
        return self._clock_s() - self._start_s


class WaitTimer:
    """Adds up the time spent inside ``with`` blocks: how long a loop waited for its data. Host time, no synchronisation."""

    def __init__(self, clock_s: Callable[[], float] | None = None) -> None:
        self._clock_s = clock_s or now_s
        self.total_s = 0.0

    def __enter__(self) -> None:
        self._entered_s = self._clock_s()

    def __exit__(self, *exc_info: object) -> None:
        self.total_s += self._clock_s() - self._entered_s
