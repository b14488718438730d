"""How often a step makes the host wait for the GPU: each time, the GPU runs dry until the host has queued work again."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

_WARNING = "called a synchronizing CUDA operation"
"""As torch words it in c10/cuda/CUDAFunctions.cpp."""


def host_synchronisations(step: Callable[[], object], device: torch.device) -> int | None:
    """Of one step, as torch's synchronisation debug mode counts them: ``.item()``, copies to pageable memory and the like.

    Returns:
        None where there is no GPU to wait for.
    """
    if device.type != "cuda":
        return None
    step()  # what is allocated or compiled once is no part of a step
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(_WARNING in str(warning.message) for warning in caught)
