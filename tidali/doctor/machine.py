"""Everything that ``tidali doctor`` checks, in order: the machine, the work of training, and the user's own files."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from tidali.config import CacheChoice, DecoderChoice, DeviceChoice
from tidali.dataset.contract import Dataset
from tidali.dataset.source import open_data
from tidali.doctor import checks, run_checks
from tidali.doctor import files as doctor_files
from tidali.doctor.findings import Finding, failure, ok, run_check, warning
from tidali.doctor.gpu import driver_fault, driver_version, gpu_fault
from tidali.doctor.parity import parity_table
from tidali.errors import TidaliError, counted, first_line
from tidali.hardware.device import DevicePlan, plan_device
from tidali.hardware.limits import affinity_count, cpu_count, free_memory, raise_open_files_limit
from tidali.hardware.versions import dali_package, versions
from tidali.loading import native
from tidali.loading.data import free_memory_bytes
from tidali.loading.stream import dali_is_installed

MIN_TEMPORARY_MIB = 512
"""A run of one epoch writes two sets of weights of 45 MB and a state of 134 MB, and keeps the old state until the new one is
written."""
MIN_FREE_MEMORY_GIB = 2.0
"""For a process that has imported torch and DALI and trains at 64 px: the doctor itself peaked at 1.4 GiB on a CPU."""
OPEN_FILES, OPEN_FILES_PER_CORE = 32, 8
"""For ``tidali shard``: with 3 workers 24 were enough and 16 were not. Training on 1,240 shards needs fewer than 12."""
_REPORT = "report it with these versions"


def examine(
    make_samples: Callable[[Path], Dataset],
    verify: Callable[[str], Sequence[str]],
    *,
    device: DeviceChoice = "auto",
    out: Path = Path("runs"),
    data: str | None = None,
    checkpoint: str | None = None,
) -> Iterator[Finding]:
    """Yield each finding as soon as it is made. When one check fails, the others still run.

    Args:
        make_samples: makes a small data set in a new folder, with the splits train and val. This and ``verify`` are passed in
            because they are of the package `shards`, which must not be imported here.
        verify: returns everything that is wrong with the data set in a folder or behind a URL, one line for each fault.
        out: folder for run folders.
        data: a packed data set to check too.
        checkpoint: one to check too.
    """
    found = versions()
    cores = counted(cpu_count(), "core") + (f" of {affinity_count()}, by a CPU quota" if cpu_count() < affinity_count() else "")
    python = f"{platform.python_version()} on {platform.platform()}, {cores}; tidali {found['tidali']}"
    yield run_check("python", lambda: python)
    yield run_check("torch", lambda: f"{found['torch']}, torchvision {found['torchvision']}")
    yield run_check("GPU", lambda: _gpu(device))
    plan = plan_device("cpu", "auto", "auto")

    def chosen_device() -> str:
        nonlocal plan
        plan = plan_device(device, "auto", "auto")
        text = f"{plan.device}: {plan.name}; {plan.dtype_name}: {plan.amp_reason}"
        return f"{text}; compile {'on' if plan.compile else 'off'}: {plan.compile_reason}"

    yield run_check("device", chosen_device)
    yield run_check("memory", lambda: _memory(plan.device))
    needed = OPEN_FILES + OPEN_FILES_PER_CORE * cpu_count()
    if (allowed := raise_open_files_limit()) < needed:
        found_few = warning(f"this process may open {allowed} files, too few to pack", f"allow {needed} with 'ulimit -n'")
        yield replace(found_few, name="open files")
    yield run_check("C compiler", _compiler)
    yield run_check("DALI", lambda: _dali(found[dali_package()]))
    if dali_is_installed():
        yield run_check("resampling", _resampling)
    yield from _checks(plan, make_samples)
    yield run_check("several ranks", lambda: _ranks(plan.device), "install torch's Linux build; one process can train without")
    yield run_check("run folder", lambda: doctor_files.run_folder(out))
    dataset: Dataset | None = None
    if data is not None:

        def opened_data() -> Finding:
            nonlocal dataset
            dataset = open_data(data)
            return doctor_files.data(data, dataset, plan.device, verify)

        yield run_check("data", opened_data, "pack the source again: intact shards are kept")
    if checkpoint is not None:
        fix = "give the best or last .safetensors file of a run, or the run folder; 'tidali train' makes one"
        yield run_check("checkpoint", lambda: doctor_files.checkpoint(checkpoint, dataset, plan), fix)


def _gpu(device: DeviceChoice) -> Finding:
    driver, cuda = driver_version(), torch.version.cuda
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        text = f"{names}; torch's CUDA {cuda}, driver {driver or 'unknown'}"
        fault = driver_fault(driver, cuda) or gpu_fault(torch.cuda.get_device_capability(), torch.cuda.get_arch_list())
        return ok(text) if fault is None else failure(f"{text}: {fault[0]}", fault[1])
    if driver is None:
        text = "no NVIDIA driver is loaded: training runs on the CPU"
        fix = "for a GPU, install NVIDIA's driver; in a container, let it see the GPU (--gpus all)"
        return failure(text, fix) if device == "cuda" else warning(text, fix)
    if cuda is None:
        text = f"driver {driver} is loaded, but this torch is built without CUDA: training runs on the CPU"
        return failure(text, "install a CUDA build of torch (pytorch.org, 'Get started')")
    text = f"driver {driver} is loaded, but torch's CUDA {cuda} cannot use it"
    fault = driver_fault(driver, cuda)
    if fault is not None:
        return failure(f"{text}: {fault[0]}", fault[1])
    return failure(text, "let the container see the GPU (--gpus all), and look at what nvidia-smi says")


def _memory(device: torch.device) -> Finding:
    free_gib = free_memory_bytes(device) / 2**30
    text = f"{free_gib:.1f} GiB free for tidali on {device}"
    if device.type == "cuda":
        total_gib = torch.cuda.mem_get_info(device)[1] / 2**30
        text += f", of {total_gib:.1f}"
        if free_gib < 0.5 * total_gib:
            fix = "stop the other programs that use the GPU; nvidia-smi lists them"
            return warning(f"{text}: other programs use the rest", fix)
    elif limit := free_memory().limited_by:
        text += f", by the limit in {limit}"
    if free_gib < MIN_FREE_MEMORY_GIB:
        free_some = "raise the limit, stop other programs or lower --batch-size"
        return warning(text, f"{MIN_FREE_MEMORY_GIB:g} GiB are enough for 64 px: {free_some}")
    return ok(text)


def _compiler() -> Finding:
    try:
        native.build()
    except TidaliError as error:
        text, _, fix = str(error).partition("; ")
        return warning(f"{text}: on a CPU images are resized by torch, at half the speed or less", fix)
    return ok("found: images are resized by compiled code on a CPU")


def _dali(version: str) -> Finding:
    if not dali_is_installed():
        text = "not installed: photographs are decoded whole, by libjpeg-turbo and PIL, not a crop's part alone"
        fix = "on Linux: pip install nvidia-dali-cuda120"
        return failure(text, fix) if sys.platform.startswith("linux") else warning(text, fix)
    import tidali.loading.dali  # noqa: F401  is the import that can fail

    return ok(version)


def _resampling() -> Finding:
    rows = tuple(parity_table())
    wrong = next((row for row in rows if not row.within_tolerance), None)
    if wrong is None:
        worst = max((row for row in rows if row.comparison.route == "matrix"), key=lambda row: row.largest)
        text = f"tidali's resize is at most {worst.largest:.2f} of 255 grey levels from DALI's, at {worst.res} px"
        return replace(ok(text), rows=rows)
    pair = wrong.comparison
    text = f"{pair.route} and {pair.against} differ by {wrong.largest:.2f} grey levels at {wrong.res} px"
    return replace(failure(text, f"expected {pair.largest_allowed:g} at most: {_REPORT}"), rows=rows)


def _ranks(device: torch.device) -> str:
    if not distributed.is_available():
        raise TidaliError("this torch is built without torch.distributed")
    return checks.ranks_communicate(device.type, torch.cuda.device_count() if device.type == "cuda" else 1)


def _checks(plan: DevicePlan, make_samples: Callable[[Path], Dataset]) -> Iterator[Finding]:
    """The checks that the tests run too, on a small data set made for them."""
    device = plan.device
    tried = checks.precisions(device, plan.amp_dtype)
    yield run_check(
        "training step",
        lambda: "; ".join(checks.steps_lower_the_loss(device, amp) for amp in tried),
        f"train with --amp off --compile off, and {_REPORT}",
    )
    if plan.compile:
        yield run_check(
            "compile",
            lambda: f"{checks.compiled_matches_eager(device)}; {checks.steps_lower_the_loss(device, 'auto', 'on')}",
            "train with --compile off",
        )
    try:
        with tempfile.TemporaryDirectory(prefix="tidali-doctor-") as folder:
            free_mib = shutil.disk_usage(folder).free / 2**20
            if free_mib < MIN_TEMPORARY_MIB:
                raise TidaliError(f"{free_mib:.1f} MiB free in {Path(folder).parent}")
            samples = make_samples(Path(folder) / "samples")
            yield from _checks_on(samples, device, Path(folder))
    except (OSError, TidaliError) as error:
        fix = f"the checks of loading and training need {MIN_TEMPORARY_MIB} MiB: free some, or set TMPDIR to another folder"
        yield replace(failure(first_line(error), fix), name="temporary folder")


def _checks_on(samples: Dataset, device: torch.device, folder: Path) -> Iterator[Finding]:
    yield run_check("pixels", lambda: checks.routes_agree(samples, device), _REPORT)
    yield run_check("epochs", lambda: checks.epochs_are_complete(samples, device), _REPORT)
    yield run_check("evaluation", lambda: checks.evaluation_counts_once(samples, device), _REPORT)
    on_gpu = device.type == "cuda"
    caches: list[CacheChoice] = ["device", "off"] if on_gpu else ["device"]
    yield run_check(
        "training run",
        lambda: "; ".join(run_checks.eval_matches_training(samples, device, cache, folder / cache) for cache in caches),
        _REPORT,
    )
    if not on_gpu:  # the tests show the rest on a CPU
        return
    yield run_check("export", lambda: run_checks.exported_runs_on(samples, device, folder / "device"), _REPORT)
    yield run_check(
        "repeated run",
        lambda: "; ".join(run_checks.runs_repeat(samples, device, cache, folder / f"again-{cache}") for cache in caches),
        _REPORT,
    )
    decoders: list[DecoderChoice] = ["cpu", "mixed"] if dali_is_installed() else ["cpu"]
    yield run_check(
        "held batches",
        lambda: "; ".join(run_checks.held_batches_stay(samples, device, decoder) for decoder in decoders),
        f"train with --cache device or --decoder cpu, and {_REPORT}",
    )
