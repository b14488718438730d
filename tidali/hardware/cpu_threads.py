"""How OpenMP's threads wait for each other. It is read when torch is imported, so nothing here imports it."""

from __future__ import annotations

import os
from collections.abc import Mapping

WAITING: Mapping[str, str] = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""They look 1000 times, for some microseconds, whether it goes on, and then sleep.

Left alone they spin, which starves every other thread of a small machine: a ResNet-18 step on two cores gave 13 images/s
spinning and 46 sleeping at once beside one busy process; alone 91 and 76. Looking first gives that back: alone, steps of 270 ms
took 250, in bf16 on two cores of a Zen 4, and 247 spinning for good; beside a busy process, 1.03 times as long in one run and
0.93 times in another.
"""


def wait_briefly() -> None:
    """Have this process's threads wait so, and its children's, unless its user has said how they wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
