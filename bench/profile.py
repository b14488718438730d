"""Where a step's time goes, by torch's profiler: a trace for a viewer and ten lines for people."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tidali.errors import TidaliError

STEPS = 3
_TOP = 8


def profile_step(step: Callable[[], object], device: torch.device, path: Path) -> list[str]:
    """Run a step a few times under the profiler, after one that is not looked at.

    Args:
        path: gets the trace, in Chrome's format: chrome://tracing or ui.perfetto.dev shows it.

    Returns:
        Ten lines: what it is, the operators that took most of the time by themselves, and where the trace is.

    Raises:
        TidaliError: the trace cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes of its own doings, and of GPUs that are not there
    step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        found.export_chrome_trace(str(temporary))
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise TidaliError(f"{path}: the trace cannot be written ({error})") from None
    events = found.key_averages()
    spent_us = {event.key: float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events}
    count = {event.key: event.count for event in events}
    total_us = sum(spent_us.values())
    top = sorted(spent_us, key=lambda name: -spent_us[name])[:_TOP]
    lines = [f"{path.stem}: {total_us / STEPS / 1e3:,.1f} ms a step on the {'GPU' if on_gpu else 'CPU'}, by operator"]
    for name in top:
        share = 100 * spent_us[name] / total_us
        lines.append(f"  {share:5.1f} %  {spent_us[name] / STEPS / 1e3:9.2f} ms  {count[name] / STEPS:6.0f} calls  {name}")
    return [*lines, f"  trace: {path}"]
