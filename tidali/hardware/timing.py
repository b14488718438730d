"""The only module that reads the clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

now_s: Callable[[], float] = time.perf_counter


def synchronize(device: torch.device | None) -> None:
    """Wait until the device has finished all queued work, so that the clock measures the work and not its queueing."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


class Lead:
    """Keeps the host at most ``steps`` steps ahead of the device.

    A CUDA stream takes about a thousand launches before it makes the host wait. If each is a long one, such as a product of
    large matrices, what is queued when the clock says that time is up can go on for half a minute.
    """

    def __init__(self, device: torch.device | None, steps: int = 8) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._steps = steps
        self._queued: deque[torch.cuda.Event] = deque()

    def step_queued(self) -> None:
        """Call after each step. On a CPU it does nothing."""
        if self._device is None:
            return
        import torch

        self._queued.append(torch.cuda.current_stream(self._device).record_event())
        if len(self._queued) > self._steps:
            self._queued.popleft().synchronize()


class Stopwatch:
    """Seconds since construction; waits for the device at the start and at the end."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        synchronize(device)
        self._start_s = now_s()

    def peek_s(self) -> float:
        """Seconds so far on the host's clock, without waiting for the device."""
        return now_s() - self._start_s

    def elapsed_s(self) -> float:
        synchronize(self._device)
        return now_s() - self._start_s


class WaitTimer:
    """Adds up the time spent inside ``with`` blocks, such as waiting for data. Host time, without waiting for the device."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def __enter__(self) -> None:
        self._entered_s = now_s()

    def __exit__(self, *exc_info: object) -> None:
        self.total_s += now_s() - self._entered_s
