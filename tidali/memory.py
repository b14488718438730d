"""The C allocator, told to keep what it has."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>
_INT_MAX = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks of every size instead of handing them back to the kernel.

    A batch's tensors are larger than what glibc keeps, so each would be mapped, and its pages faulted in, anew: writing 512 new
    float32 images of 224 px ran at 4,100 images/s on two cores, and at 39,000 with this. The process then holds its peak for as
    long as it lives. Call it before the large tensors of the steps are made, after those that are made once.

    Returns:
        Whether it was done: only glibc on Linux has the switch.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _INT_MAX))
