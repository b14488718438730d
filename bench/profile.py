"""Where the time of a step goes: torch's profiler, and how often a step makes the host wait for the GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tidali.errors import TidaliError
from tidali.files import replacing

STEPS = 3
_TOP = 8
_NAME_CHARACTERS = 100
"""Names of kernels contain their template arguments: some are longer than a page."""
_WARNING = "called a synchronizing CUDA operation"
"""torch's own wording, in c10/cuda/CUDAFunctions.cpp."""


def profile_step(step: Callable[[], object], device: torch.device, path: Path) -> list[str]:
    """Run a step a few times under the profiler, after one step to warm up.

    Args:
        path: where the trace is written, in Chrome's format: chrome://tracing or ui.perfetto.dev shows it.

    Returns:
        Ten lines: a title, the operators that took most of the time by themselves, and where the trace is.

    Raises:
        TidaliError: the trace cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs its own state, and that it finds no GPU
    step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    try:
        with replacing(path) as temporary:
            found.export_chrome_trace(str(temporary))
    except (OSError, RuntimeError) as error:
        raise TidaliError(f"{path}: the trace cannot be written ({error})") from None
    return [*summary(found.key_averages(), on_gpu=on_gpu, title=path.stem), f"  trace: {path}"]


def summary(events: Iterable[Any], *, on_gpu: bool, title: str) -> list[str]:
    """Nine lines: the time of a step, and the operators or kernels that took most of it.

    Args:
        events: the profiler's averages over `STEPS` steps. On a GPU only kernels count: the profiler adds each kernel's time
            also to the operator that launched it, and again to annotations such as the optimizer's step.
    """
    if on_gpu:
        own = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    else:
        own = [event for event in events if event.device_type == DeviceType.CPU]
    spent_us = [(float(event.self_device_time_total if on_gpu else event.self_cpu_time_total), event) for event in own]
    total_us = sum(spent for spent, _ in spent_us) or 1.0
    device, unit = ("GPU", "kernel") if on_gpu else ("CPU", "operator")
    lines = [f"{title}: {total_us / STEPS / 1e3:,.1f} ms a step on the {device}, by {unit}"]
    for spent, event in sorted(spent_us, key=lambda pair: -pair[0])[:_TOP]:
        share, each_ms = 100 * spent / total_us, spent / STEPS / 1e3
        lines.append(f"  {share:5.1f} %  {each_ms:9.2f} ms  {event.count / STEPS:6.0f} calls  {event.key[:_NAME_CHARACTERS]}")
    return lines


def host_synchronisations(step: Callable[[], object], device: torch.device) -> int | None:
    """How often one step makes the host wait for the GPU: ``.item()``, copies to pageable memory and the like. Each time the
    GPU runs dry until the host has queued work again. Counted by torch's synchronisation debug mode.

    Returns:
        None on a CPU.
    """
    if device.type != "cuda":
        return None
    step()  # what is allocated or compiled once does not count
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(_WARNING in str(warning.message) for warning in caught)
