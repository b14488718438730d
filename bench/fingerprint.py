"""On what a figure was measured. It is worth nothing without."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tidali.hardware.cpu_threads import WAITING
from tidali.hardware.device import DevicePlan, cpu_count, describe_device
from tidali.hardware.versions import versions

SCHEMA_VERSION = 2
"""Of the documents; bench/schema.json describes this one."""

PACKAGES = Path(__file__).resolve().parent.parent
"""The folder that ``bench`` and ``tidali`` are imported from. Where a process of ours is started by ``python -m``, its working
directory comes first on the path, and many a project has a folder ``bench`` of its own."""

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
_SETTINGS = (*WAITING, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "LD_PRELOAD")


def environment(plan: DevicePlan) -> dict[str, Any]:
    """The head of every document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["tidali", *sys.argv[1:]]),
        "versions": versions(),
        "machine": machine(plan),
        "device": {"type": plan.device.type, "name": plan.name},
        "cores": cpu_count(),
        "dtype": plan.dtype_name,
        "compile": plan.compile,
        "settings": {
            **{name: os.environ.get(name) for name in _SETTINGS},
            "torch_threads": torch.get_num_threads(),
            "load_average_1_min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
    }


def machine(plan: DevicePlan) -> dict[str, Any]:
    """The hardware, and the GPU's driver."""
    cpu = describe_device("cpu")
    found: dict[str, Any] = {
        "cpu": cpu.name,
        "cpu_flags": [flag for flag in _FLAGS if flag in cpu.cpu_flags],
        "cores": cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(),
        "gpu": None,
        "gpu_memory_gib": None,
        "driver": None,
    }
    if plan.device.type == "cuda":
        from tidali.doctor.gpu import driver_version

        properties = torch.cuda.get_device_properties(plan.device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"driver": driver_version()}
    return found


def commit() -> str | None:
    """The commit of the checkout that the program runs from, with ``-dirty`` where it was changed; None where installed."""
    if not (PACKAGES / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGES), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
