"""What ``tidali doctor`` looks at: whether this machine can do each part of the job, and what to do where it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import distributed

from tidali import native
from tidali.config import DeviceChoice
from tidali.data import dali_is_installed, free_memory_bytes
from tidali.device import DevicePlan, cpu_count, plan_device
from tidali.engine import make_train_state, train_step
from tidali.environment import versions
from tidali.errors import TidaliError
from tidali.models import build_resnet18
from tidali.parity import Row, parity_table
from tidali.timing import Stopwatch

Status = Literal["ok", "warning", "failure"]

MIN_FREE_DISK_MIB = 1024
"""A run folder holds two sets of weights of 45 MB and a state of 134 MB, each written beside the old one first."""
_WRITE_MIB = 64
_MIN_DRIVER = 525
"""CUDA 12's first driver branch (NVIDIA's CUDA compatibility guide), for which the DALI package is built."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    text: str
    mend: str = ""
    """What to do about a warning or a failure."""


def examine(device: DeviceChoice, data: str | None, out: Path) -> Iterator[Finding]:
    """Every finding, as it is made.

    Args:
        data: a packed data set to look at too.
        out: where run folders will be made.
    """
    yield Finding(name="python", status="ok", text=f"{platform.python_version()} on {platform.platform()}, {cpu_count()} cores")
    found = versions()
    yield Finding(name="torch", status="ok", text=f"{found['torch']}, torchvision {found['torchvision']}")
    yield from _gpu(device)
    try:
        plan = plan_device(device, "auto", "auto")
        yield Finding(name="device", status="ok", text=f"{plan.device}: {plan.name}")
    except TidaliError as error:
        yield Finding(name="device", status="failure", text=str(error))
        plan = plan_device("cpu", "auto", "auto")
    free_gib = free_memory_bytes(plan.device) / 2**30
    yield Finding(name="memory", status="ok", text=f"{free_gib:.1f} GiB free for tidali on {plan.device.type}")
    yield _guard("C compiler", _compiler)
    yield _guard("DALI", lambda: _dali(found["nvidia-dali-cuda120"]))
    if dali_is_installed():
        yield _guard("resampling", _resampling)
    yield _guard("training step", lambda: _step(plan))
    yield _ranks(plan)
    yield _guard("run folder", lambda: _run_folder(out))
    if data is not None:
        yield _guard("data", lambda: _data(data))


def parity_rows() -> list[Row]:
    """The table behind the line ``resampling``: how far each route to a network's input is from the DALI graph."""
    return parity_table() if dali_is_installed() else []


def _guard(name: str, look: Callable[[], Finding]) -> Finding:
    """What was found, or what stopped the look: one part's failure leaves the others to be looked at."""
    try:
        return replace(look(), name=name)
    except TidaliError as error:
        return Finding(name=name, status="failure", text=str(error))
    except Exception as error:  # anything a broken installation can do
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Finding(name=name, status="failure", text=text, mend="install tidali anew in a new virtual environment")


def _gpu(device: DeviceChoice) -> Iterator[Finding]:
    driver = driver_version()
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Finding(name="GPU", status="ok", text=f"{names}; torch's CUDA {torch.version.cuda}, driver {driver or 'unknown'}")
        if driver is not None and int(driver.partition(".")[0]) < _MIN_DRIVER:
            text = f"driver {driver} is older than CUDA 12 needs"
            yield Finding(name="driver", status="failure", text=text, mend=f"install driver {_MIN_DRIVER} or newer")
    elif driver is None:
        status: Status = "failure" if device == "cuda" else "warning"
        text = "no NVIDIA driver is loaded: training runs on the CPU"
        yield Finding(name="GPU", status=status, text=text, mend="for a GPU, install NVIDIA's driver")
    elif torch.version.cuda is None:
        text = f"driver {driver} is loaded, and this torch is built without CUDA: training runs on the CPU"
        mend = "install a CUDA build of torch (pytorch.org, 'Get started')"
        yield Finding(name="GPU", status="failure", text=text, mend=mend)
    else:
        text = f"driver {driver} is loaded, and torch's CUDA {torch.version.cuda} cannot use it"
        mend = f"install driver {_MIN_DRIVER} or newer, or let the container see the GPU (--gpus all)"
        yield Finding(name="GPU", status="failure", text=text, mend=mend)


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Of the loaded NVIDIA kernel module, '550.54.15' for example; None where there is none."""
    try:
        first_line = path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first_line.split() if word[0].isdigit() and "." in word), None)


def _compiler() -> Finding:
    if native.load() is not None:
        return Finding(name="", status="ok", text="found: images are resampled by compiled code on a CPU")
    text = "none works: on a CPU images are resampled by torch, at half the speed or less"
    return Finding(name="", status="warning", text=text, mend="install gcc")


def _dali(version: str) -> Finding:
    if not dali_is_installed():
        status: Status = "failure" if sys.platform.startswith("linux") else "warning"
        text = "not installed: images are decoded by PIL, and large data sets cannot be streamed"
        return Finding(name="", status=status, text=text, mend="on Linux: pip install nvidia-dali-cuda120")
    import tidali.pipeline  # noqa: F401  is the import that can fail

    return Finding(name="", status="ok", text=version)


def _resampling() -> Finding:
    rows = parity_rows()
    worst = max((row for row in rows if row.comparison.route == "matrix"), key=lambda row: row.largest)
    text = f"cached and streamed pixels differ by {worst.largest:.2f} of 255 grey levels at most, at {worst.res} px"
    broken = [row for row in rows if not row.holds]
    if not broken:
        return Finding(name="", status="ok", text=text)
    row = broken[0]
    text = f"{row.comparison.route} and {row.comparison.against} differ by {row.largest:.2f} grey levels at {row.res} px"
    mend = f"expected {row.comparison.largest_allowed:g} at most; report it with these versions"
    return Finding(name="", status="failure", text=text, mend=mend)


def _step(plan: DevicePlan) -> Finding:
    """One training step of the real network on a few random images."""
    state = make_train_state(
        build_resnet18(10, "imagenet"),
        plan,
        lambda step: 0.01,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.1,
    )
    images = torch.randn(8, 3, 64, 64, device=plan.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8, device=plan.device)
    watch = Stopwatch(plan.device)
    logits = train_step(state, images, labels)
    seconds = watch.elapsed_s()
    how = f"{plan.dtype_name} ({plan.amp_reason}), compile {'on' if plan.compile else 'off'} ({plan.compile_reason})"
    if not bool(torch.isfinite(logits).all()):
        return Finding(name="", status="failure", text=f"{how}: not finite", mend="train with --amp off --compile off")
    return Finding(name="", status="ok", text=f"{how}; the first took {seconds:.1f} s")


def _ranks(plan: DevicePlan) -> Finding:
    backends = [
        name
        for name, there in (("nccl", distributed.is_nccl_available), ("gloo", distributed.is_gloo_available))
        if distributed.is_available() and there()
    ]
    needed = "nccl" if plan.device.type == "cuda" else "gloo"
    if needed in backends:
        return Finding(name="several ranks", status="ok", text=f"torchrun can use {' and '.join(backends)}")
    text = f"this torch has no {needed}: one process only"
    return Finding(name="several ranks", status="warning", text=text, mend="install torch's Linux build")


def _run_folder(out: Path) -> Finding:
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".tidali-doctor-") as file:
            block = os.urandom(1 << 20)
            watch = Stopwatch()
            for _ in range(_WRITE_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = watch.elapsed_s()
    except OSError as error:
        text = f"{there}: cannot be written ({error.strerror})"
        return Finding(name="", status="failure", text=text, mend="choose another --out, or make room")
    free_mib = shutil.disk_usage(there).free / 2**20
    text = f"{out}: {_WRITE_MIB / seconds:,.0f} MiB/s to disk, {free_mib / 1024:,.1f} GiB free"
    if free_mib < MIN_FREE_DISK_MIB:
        return Finding(name="", status="warning", text=text, mend=f"a run needs up to {MIN_FREE_DISK_MIB} MiB: make room")
    return Finding(name="", status="ok", text=text)


def _data(data: str) -> Finding:
    from tidali.source import open_data

    dataset = open_data(data)
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in dataset.manifest.splits.items())
    text = f"{data}: {len(dataset.manifest.classes)} classes; {splits}; every index fits its shard"
    return Finding(name="", status="ok", text=text)
