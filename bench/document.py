"""The JSON document of a benchmark: its rows, and the machine, the software and the settings that they were measured with."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceiling
from bench.measure import Rates
from tidali.console import say
from tidali.dataset.contract import Dataset
from tidali.hardware.cpu_threads import WAITING
from tidali.hardware.device import DevicePlan, describe_device
from tidali.hardware.limits import cpu_count
from tidali.hardware.versions import versions

SCHEMA_VERSION = 2
"""Version of the documents' schema; bench/schema.json describes this one."""

PACKAGES = Path(__file__).resolve().parent.parent
"""The folder that ``bench`` and ``tidali`` are imported from. Where ``python -m`` starts one of our processes, its working
directory comes first on the import path, and many projects have a folder ``bench`` of their own."""

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
_SETTINGS = (*WAITING, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "LD_PRELOAD")


def make_document(benchmark: str, plan: DevicePlan, dataset: Dataset | None = None, **fields: Any) -> dict[str, Any]:
    """A document with the fields that every benchmark has, and its own."""
    if dataset is not None:
        fields = {"data": {"name": dataset.root.name, "train_samples": dataset.split("train").samples}, **fields}
    return {"benchmark": benchmark, **environment(plan), **fields}


def make_row(case: str, rates: Rates, ceiling: Ceiling | None, **fields: Any) -> dict[str, Any]:
    """One measured case."""
    row = {"case": case, **fields, "images_per_s": rates.to_dict(), "measured": rates.measured()}
    row |= {"others_share": rates.others_share} if rates.others_share is not None else {}
    return {**row, **(ceiling.fields(rates) if ceiling is not None else {})}


def bench_all(
    benchmarks: Mapping[str, Callable[[], dict[str, Any]]], save: Callable[[dict[str, Any]], None] = lambda document: None
) -> dict[str, Any]:
    """Run all benchmarks, one after the other, and return one document with their documents as parts.

    Args:
        save: called with the document so far after each benchmark: together they take an hour, and the last may fail.
    """
    document: dict[str, Any] = {"benchmark": "all", "schema_version": SCHEMA_VERSION, "parts": []}
    for name, run in benchmarks.items():
        say(f"bench {name}")
        document["parts"].append(run())
        save(document)
    return document


def environment(plan: DevicePlan) -> dict[str, Any]:
    """The machine, the software, the settings and the command line."""
    return {
        "schema_version": SCHEMA_VERSION,
        "date": date.today().isoformat(),
        "commit": _commit(),
        "command": shlex.join(["tidali", *sys.argv[1:]]),
        "versions": versions(),
        "machine": _machine(plan),
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


def _machine(plan: DevicePlan) -> dict[str, Any]:
    """The hardware, and the GPU's driver."""
    cpu = describe_device("cpu")
    found: dict[str, Any] = {
        "cpu": cpu.name,
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in cpu.cpu_flags],
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
        memory_gib = round(properties.total_memory / 2**30, 1)
        found |= {"gpu": properties.name, "gpu_memory_gib": memory_gib, "driver": driver_version()}
    return found


def _commit() -> str | None:
    """The commit of the checkout that the program runs from, with ``-dirty`` if it has changes; None if it is installed."""
    if not (PACKAGES / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGES), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
