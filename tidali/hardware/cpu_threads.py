"""How OpenMP's threads wait for each other on a CPU, spinning briefly and then sleeping, and how many there are.

By default libgomp's threads spin, which starves every other thread of a small machine. A ResNet-18 step on two cores beside one
busy process ran at 13 images/s spinning and at 46 sleeping at once; alone at 91 and 76. Spinning briefly first recovers the
difference: alone, steps of 270 ms took 250 (247 spinning always), in bf16 on two cores of a Zen 4; beside a busy process, steps
took 1.03 times as long as with sleeping at once in one run and 0.93 times in another.

This can go when the OpenMP that torch's wheels bring (libgomp on Linux) sleeps after a short spin by default. OpenMP reads its
variables when torch is imported, so nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from tidali.hardware.limits import affinity_count, cpu_count

WAITING: Mapping[str, str] = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""Environment variables: spin 1000 times, which is some microseconds, then sleep."""


def wait_briefly() -> None:
    """Set `WAITING` for this process and its children, unless the user has set how threads wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)


def limit_threads() -> None:
    """Have OpenMP use no more threads than a container's CPU quota has cores, in this process and its children, unless the user
    has set their number: it looks only at the cores that it may run on, and the kernel then stops all of its threads for most
    of each tenth of a second."""
    if cpu_count() < affinity_count():
        os.environ.setdefault("OMP_NUM_THREADS", str(cpu_count()))
