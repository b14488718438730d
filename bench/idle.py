"""How much of the cores' time nobody used: what a step loses to waiting, and not to other work on the machine."""

from __future__ import annotations

import os
from pathlib import Path

_STAT = Path("/proc/stat")


class IdleTimer:
    """Seconds that this process's cores have had nothing to do since construction, summed over them.

    The kernel's count (``idle`` and ``iowait`` of /proc/stat) over all processes: a step that another process keeps from
    running leaves no core idle, one that sleeps does.
    """

    def __init__(self) -> None:
        self._start_s = idle_s()

    def elapsed_s(self) -> float | None:
        """None where the kernel does not say."""
        now_s = idle_s()
        return None if now_s is None or self._start_s is None else now_s - self._start_s


def idle_s() -> float | None:
    """Since the machine was started."""
    try:
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in _STAT.read_text().splitlines()]
        ticks = sum(int(line[4]) + int(line[5]) for line in lines if line and line[0] in cores)
    except (OSError, AttributeError, IndexError, ValueError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")
