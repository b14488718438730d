"""Memory for large tensors on a CPU, used again instead of being mapped anew for each batch.

glibc returns freed blocks of more than 32 MiB to the kernel, so the pages of each new batch are faulted in again. Batches of
256 images of 224 px (147 MiB) from `CachedBatches`, two busy cores, median of three runs: 2,460 images/s in `ReusedMemory`; 930
in ``torch.empty``; 3,060 in ``torch.empty`` and 2,660 in `ReusedMemory` after `keep_freed_memory`, which leaves no difference
that this machine's noise would show. The peak of the process was 750 MiB with `ReusedMemory` every time, and up to 1,480 MiB
with ``torch.empty`` after `keep_freed_memory`, as the C allocator cuts small pieces off a large freed block and then needs
another. Batches of 256 images of 64 px (12 MiB), which glibc keeps by itself, were as fast every way.

So loaders, which may not change the program that uses them, reuse their own blocks; training and the command line also keep
freed memory, for the activations and gradients of each step. Both can go when torch caches freed CPU memory as it caches
CUDA's."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import weakref
from contextlib import suppress

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>
_INT_MAX = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks of every size instead of returning them to the kernel, for the rest of this process.

    Writing 512 new float32 images of 224 px ran at 4,100 images/s on two cores, and at 39,000 with this. The process then holds
    its peak for as long as it lives, so only training, the command line and the benchmark's processes call this, never a
    loader. Call it after the large tensors that are made once, and before those that each step makes.

    Returns:
        Whether it was done: only glibc on Linux has the switch.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return False
    malloc_trim(0)  # returns what is free now: 90 MiB of decoding buffers after a cache of 1.2 GB was filled
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _INT_MAX))


def map_memory(size_bytes: int) -> mmap.mmap:
    """Zeroed memory that no forked process shares, in pages of 2 MiB where the kernel has them.

    In pages of 4 KiB a cache took an eighth longer to fill, two cores.
    """
    block = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # no Linux, or a kernel that was built without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


class ReusedMemory:
    """Empty CPU tensors in blocks of memory, each used again once the last tensor in it is gone.

    A tensor's storage owns a memoryview of its block that nothing else refers to. torch drops it when the storage is freed,
    with the last view, NumPy array or saved activation of the tensor; its finalizer then returns the block. No reference is
    counted."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised, contiguous CPU tensor."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        size_bytes = count * dtype.itemsize
        place = next((i for i, block in enumerate(self._free) if len(block) >= size_bytes), None)
        block = map_memory(size_bytes) if place is None else self._free.pop(place)
        lease = memoryview(block)
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)
