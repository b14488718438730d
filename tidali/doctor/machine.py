"""What ``tidali doctor`` looks at: whether this machine can do each part of the job, and what to do where it cannot."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

from tidali.config import CacheChoice, DeviceChoice
from tidali.dataset.contract import Dataset
from tidali.dataset.source import open_data
from tidali.doctor import checks
from tidali.doctor import files as doctor_files
from tidali.doctor.findings import REINSTALL, Finding, Status, guard, of_error, ok
from tidali.doctor.gpu import driver_fault, driver_version, gpu_fault
from tidali.doctor.parity import parity_table
from tidali.errors import TidaliError, first_line
from tidali.hardware.device import DevicePlan, cpu_count, plan_device
from tidali.hardware.versions import versions
from tidali.loading import native
from tidali.loading.data import dali_is_installed, free_memory_bytes

MIN_TEMPORARY_MIB = 512
"""A run of one epoch writes two sets of weights of 45 MB and a state of 134 MB, the last one beside the old one."""
MIN_FREE_MEMORY_GIB = 2.0
"""What a process takes that has torch and DALI imported and trains at 64 px: doctor itself peaked at 1.4 GiB on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What to look at beside the machine."""

    device: DeviceChoice = "auto"
    out: Path = Path("runs")
    """Where run folders will be made."""
    data: str | None = None
    """A packed data set."""
    checkpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class PackingTool:
    """What the packing tool does here. It is handed in: the dependency points the other way."""

    make_samples: Callable[[Path], Dataset]
    """Make a small data set in a new folder, with the splits train and val."""
    verify: Callable[[str], Sequence[str]]
    """Every fault of the data set in a folder or behind a URL, a line each."""


def examine(wishes: Wishes, packing: PackingTool) -> Iterator[Finding]:
    """Every finding, as it is made. One part's failure leaves the others to be looked at."""
    found = versions()
    python = f"{platform.python_version()} on {platform.platform()}, {cpu_count()} cores; tidali {found['tidali']}"
    yield Finding(name="python", status="ok", text=python)
    yield Finding(name="torch", status="ok", text=f"{found['torch']}, torchvision {found['torchvision']}")
    yield _gpu(wishes.device)
    try:
        plan = plan_device(wishes.device, "auto", "auto")
        text = f"{plan.device}: {plan.name}; {plan.dtype_name} ({plan.amp_reason})"
        text += f"; compile {'on' if plan.compile else 'off'} ({plan.compile_reason})"
        yield Finding(name="device", status="ok", text=text)
    except TidaliError as error:
        yield of_error("device", error, REINSTALL)
        plan = plan_device("cpu", "auto", "auto")
    yield guard("memory", lambda: _memory(plan.device))
    yield guard("C compiler", _compiler)
    yield guard("DALI", lambda: _dali(found["nvidia-dali-cuda120"]))
    if dali_is_installed():
        yield guard("resampling", _resampling)
    yield from _checks(plan, packing)
    yield guard("several ranks", lambda: _ranks(plan.device), "install torch's Linux build; one process can train without")
    yield guard("run folder", lambda: doctor_files.run_folder(wishes.out))
    dataset: Dataset | None = None
    if wishes.data is not None:
        location = wishes.data
        try:
            dataset = open_data(location)
        except TidaliError as error:
            yield of_error("data", error, "pack the source again: what is right is kept")
        else:
            there = dataset
            yield guard("data", lambda: doctor_files.data(location, there, plan.device, packing.verify))
    if wishes.checkpoint is not None:
        given = wishes.checkpoint
        fix = "give the best or last .safetensors of a run, or the run's folder; 'tidali train' makes one"
        yield guard("checkpoint", lambda: doctor_files.checkpoint(given, dataset, plan), fix)


# --------------------------------------------------------------------------------------------------------------- the machine


def _gpu(device: DeviceChoice) -> Finding:
    driver, cuda = driver_version(), torch.version.cuda
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        text = f"{names}; torch's CUDA {cuda}, driver {driver or 'unknown'}"
        fault = driver_fault(driver, cuda) or gpu_fault(torch.cuda.get_device_capability(), torch.cuda.get_arch_list())
        if fault is None:
            return Finding(name="GPU", status="ok", text=text)
        return Finding(name="GPU", status="failure", text=f"{text}: {fault[0]}", fix=fault[1])
    if driver is None:
        status: Status = "failure" if device == "cuda" else "warning"
        text = "no NVIDIA driver is loaded: training runs on the CPU"
        fix = "for a GPU, install NVIDIA's driver; in a container, let it see the GPU (--gpus all)"
        return Finding(name="GPU", status=status, text=text, fix=fix)
    if cuda is None:
        text = f"driver {driver} is loaded, and this torch is built without CUDA: training runs on the CPU"
        fix = "install a CUDA build of torch (pytorch.org, 'Get started')"
        return Finding(name="GPU", status="failure", text=text, fix=fix)
    text = f"driver {driver} is loaded, and torch's CUDA {cuda} cannot use it"
    fault = driver_fault(driver, cuda)
    if fault is None:
        fix = "let the container see the GPU (--gpus all), and look at what nvidia-smi says"
        return Finding(name="GPU", status="failure", text=text, fix=fix)
    return Finding(name="GPU", status="failure", text=f"{text}: {fault[0]}", fix=fault[1])


def _memory(device: torch.device) -> Finding:
    free_gib = free_memory_bytes(device) / 2**30
    text = f"{free_gib:.1f} GiB free for tidali on {device}"
    if device.type == "cuda":
        total_gib = torch.cuda.mem_get_info(device)[1] / 2**30
        text += f", of {total_gib:.1f}"
        if free_gib < 0.5 * total_gib:
            fix = "end what else uses the GPU, nvidia-smi lists it"
            return Finding(name="", status="warning", text=f"{text}: another program holds the rest", fix=fix)
    if free_gib < MIN_FREE_MEMORY_GIB:
        fix = f"{MIN_FREE_MEMORY_GIB:g} GiB are enough for 64 px: end other programs, and lower --batch-size"
        return Finding(name="", status="warning", text=text, fix=fix)
    return Finding(name="", status="ok", text=text)


def _compiler() -> Finding:
    if native.load() is not None:
        return Finding(name="", status="ok", text="found: images are resampled by compiled code on a CPU")
    text = "none works: on a CPU images are resampled by torch, at half the speed or less"
    return Finding(name="", status="warning", text=text, fix="install gcc")


def _dali(version: str) -> Finding:
    if not dali_is_installed():
        status: Status = "failure" if sys.platform.startswith("linux") else "warning"
        text = "not installed: images are decoded by PIL, and large data sets cannot be streamed"
        return Finding(name="", status=status, text=text, fix="on Linux: pip install nvidia-dali-cuda120")
    import tidali.loading.dali  # noqa: F401  is the import that can fail

    return Finding(name="", status="ok", text=version)


def _resampling() -> Finding:
    rows = tuple(parity_table())
    worst = max((row for row in rows if row.comparison.route == "matrix"), key=lambda row: row.largest)
    broken = next((row for row in rows if not row.holds), None)
    if broken is None:
        text = f"the matrix route is {worst.largest:.2f} of 255 grey levels from the DALI graph at most, at {worst.res} px"
        return Finding(name="", status="ok", text=text, rows=rows)
    pair = broken.comparison
    text = f"{pair.route} and {pair.against} differ by {broken.largest:.2f} grey levels at {broken.res} px"
    fix = f"expected {pair.largest_allowed:g} at most: report it with these versions"
    return Finding(name="", status="failure", text=text, fix=fix, rows=rows)


def _ranks(device: torch.device) -> Finding:
    kind = device.type
    if not distributed.is_available():
        raise TidaliError("this torch is built without torch.distributed")
    return Finding(name="", status="ok", text=checks.ranks_can_talk(kind, torch.cuda.device_count() if kind == "cuda" else 1))


# ------------------------------------------------------------------------------------------------------------ the work itself


def _checks(plan: DevicePlan, packing: PackingTool) -> Iterator[Finding]:
    """The checks that the tests hold too, on a small data set made for them."""
    device = plan.device
    tried = checks.precisions(device, plan.amp_dtype)
    fix = "train with --amp off --compile off, and report it with these versions"

    def steps() -> Finding:
        return ok("; ".join(checks.steps_lower_the_loss(device, amp) for amp in tried))

    yield guard("training step", steps, fix)
    if plan.compile:

        def compiled() -> Finding:
            return ok(f"{checks.compiled_is_eager(device)}; {checks.steps_lower_the_loss(device, 'auto', compile=True)}")

        yield guard("compile", compiled, "train with --compile off")
    try:
        with tempfile.TemporaryDirectory(prefix="tidali-doctor-") as folder:
            free_mib = shutil.disk_usage(folder).free / 2**20
            if free_mib < MIN_TEMPORARY_MIB:
                raise TidaliError(f"{free_mib:.1f} MiB free in {Path(folder).parent}")
            samples = packing.make_samples(Path(folder) / "samples")
            yield from _checks_on(samples, device, Path(folder))
    except (OSError, TidaliError) as error:
        fix = f"the checks of the loader and of training need {MIN_TEMPORARY_MIB} MiB: make room, or name another by TMPDIR"
        yield Finding(name="temporary folder", status="failure", text=first_line(error), fix=fix)


def _checks_on(samples: Dataset, device: torch.device, folder: Path) -> Iterator[Finding]:
    fix = "report it with these versions"
    if dali_is_installed():
        yield guard("pixels", lambda: ok(checks.routes_agree(samples, device)), fix)
    yield guard("epochs", lambda: ok(checks.epochs_are_whole(samples, device)), fix)
    yield guard("evaluation", lambda: ok(checks.evaluation_is_whole(samples, device)), fix)
    caches: list[CacheChoice] = ["device", "off"] if device.type == "cuda" and dali_is_installed() else ["device"]

    def runs() -> Finding:
        return ok("; ".join(checks.training_is_evaluation(samples, device, cache, folder / cache) for cache in caches))

    yield guard("training run", runs, fix)
