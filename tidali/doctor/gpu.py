"""Whether a GPU, its driver and a build of torch fit together. Pure functions of given facts, so they are tested without a
GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_DALI_DRIVER = 525
"""CUDA 12's first driver branch (NVIDIA's CUDA compatibility guide), for which the DALI package is built."""
_CUDA_DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA major version -> the first driver branch that runs it, from the same guide."""


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the loaded NVIDIA kernel module, such as '550.54.15'; None if none is loaded."""
    try:
        first_line = path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first_line.split() if word[0].isdigit() and "." in word), None)


def driver_fault(driver: str | None, cuda: str | None) -> tuple[str, str] | None:
    """What is wrong with a driver for this torch and DALI, and how to fix it; None if nothing is, or if that is unknown.

    Args:
        driver: its version, such as '550.54.15'.
        cuda: the version that torch was built for, such as '13.0'.
    """
    if driver is None or cuda is None:
        return None
    branch, major = int(driver.partition(".")[0]), int(cuda.partition(".")[0])
    needed = max(_DALI_DRIVER, _CUDA_DRIVERS.get(major, 0))
    if branch >= needed:
        return None
    fix = f"install driver {needed} or newer"
    if branch >= _CUDA_DRIVERS[12] and major > 12:
        fix += ", or a torch built for CUDA 12 (pytorch.org, 'Get started')"
    return f"driver {branch} is older than CUDA {max(major, 12)} needs", fix


def gpu_fault(capability: tuple[int, int], built_for: Sequence[str]) -> tuple[str, str] | None:
    """Why this torch has no code for a GPU, and how to fix it; None if it has.

    Code for compute capability 8.0 runs on 8.x, and ``compute_80`` is compiled for any newer GPU when it is loaded (CUDA
    programming guide, binary and PTX compatibility).

    Args:
        built_for: what `torch.cuda.get_arch_list` returns, such as ``["sm_75", "sm_80", "compute_80"]``.
    """
    major, minor = capability
    all_older = True
    for entry in built_for:
        kind, _, digits = entry.partition("_")
        number = digits.rstrip("af")  # sm_90a and the like run on that capability only
        if not number.isdecimal():
            all_older = False
            continue
        built = (int(number[:-1]), int(number[-1]))
        all_older &= built < capability
        if kind == "sm" and (built == capability or (number == digits and built[0] == major and built[1] <= minor)):
            return None
        if kind == "compute" and number == digits and built <= capability:
            return None
    text = f"this torch has no code for compute capability {major}.{minor} (it has {', '.join(built_for) or 'none'})"
    age = "a newer" if all_older else "an older"
    return text, f"install {age} torch, or one built for another CUDA (pytorch.org, 'Get started')"
