"""Checks of the user's own files: the folder for runs, a data set, a checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tidali.dataset.contract import Dataset
from tidali.doctor.findings import Finding, failure, ok, warning
from tidali.errors import counted
from tidali.hardware.device import DevicePlan
from tidali.hardware.timing import Stopwatch
from tidali.loading.data import free_memory_bytes
from tidali.loading.route import choose_route
from tidali.model.checkpoint import check_classes, find_checkpoint, load_model
from tidali.model.resnet import title_of

MIN_FREE_DISK_MIB = 1024
"""For a run folder: two sets of weights of 45 MB and a state of 134 MB. A new file is written before the old one is removed."""
_WRITE_MIB = 64


def run_folder(out: Path) -> Finding:
    """Write to the disk of the folder, or of the nearest parent folder that exists, and measure how fast."""
    existing = out
    free_space = f"a run needs up to {MIN_FREE_DISK_MIB} MiB: free some space, or choose another disk with --out"
    try:
        existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".tidali-doctor-") as file:
            free_mib = shutil.disk_usage(existing).free / 2**20
            if free_mib < 2 * _WRITE_MIB:  # the test file must not fill the disk
                return failure(f"{existing}: {free_mib:.1f} MiB free", free_space)
            block = os.urandom(1 << 20)
            watch = Stopwatch()
            for _ in range(_WRITE_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = watch.elapsed_s()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = free_space if full else "choose a folder that you may write to with --out"
        return failure(f"{existing}: cannot be written ({error.strerror})", fix)
    text = f"{out}: {_WRITE_MIB / seconds:,.0f} MiB/s to disk, {free_mib / 1024:,.1f} GiB free"
    return warning(text, free_space) if free_mib < MIN_FREE_DISK_MIB else ok(text)


def data(location: str, dataset: Dataset, device: torch.device, verify: Callable[[str], Sequence[str]]) -> Finding:
    """Whether the data set is intact and can be trained on, and how it would be loaded.

    Args:
        verify: see `tidali.doctor.machine.examine`.
    """
    manifest = dataset.manifest
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in manifest.splits.items())
    text = f"{location}: {counted(len(manifest.classes), 'class')}; {splits}"
    faults = verify(location)
    if faults:
        more = f", and {counted(len(faults) - 1, 'more fault')}" if len(faults) > 1 else ""
        fix = f"'tidali verify {location}' lists all; pack the source again: intact shards are kept"
        return failure(f"{location}: {faults[0].partition('; ')[0]}{more}", fix)
    if not ({"val", "heldout"} & {name for name, split in manifest.splits.items() if split.samples and split.labelled}):
        fix = "pack it again with --val-fraction 0.1 --overwrite, which holds out a tenth of train"
        return failure(f"{text}; no split to evaluate on", fix)
    counts = dataset.split("train").class_counts
    empty = [class_.id for class_, count in zip(manifest.classes, counts, strict=True) if not count]
    if empty:
        fix = "add images of them to the source, or choose other classes with --classes, and pack it again with --overwrite"
        return warning(f"{text}; no training images of {', '.join(empty[:5])}", fix)
    route = choose_route(
        "auto",
        dataset.split("train"),
        sides=(dataset.default_res,),
        crops=False,
        free_bytes=free_memory_bytes(device),
    )
    return ok(f"{text}; every hash is right; {route.describe()}")


def checkpoint(given: str, dataset: Dataset | None, plan: DevicePlan) -> Finding:
    """Whether the checkpoint can be used: its output is finite, and its classes are those of the data set."""
    path = find_checkpoint(given)
    model, card = load_model(path)
    if dataset is not None:
        check_classes(card, dataset, given)
    images = torch.zeros(2, 3, card.res, card.res, device=plan.device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), plan.autocast():
        logits = model.to(plan.device)(images)
    if not logits.isfinite().all():
        return failure(f"{path}: its output is not finite in {plan.dtype_name}", "use it with --amp off")
    top1 = {name.removesuffix("_top1_percent"): value for name, value in card.metrics.items() if name.endswith("_top1_percent")}
    scores = "".join(f", {value:.1f} % top-1 on {split} when it was saved" for split, value in top1.items() if split != "train")
    fits = "" if dataset is None else "; its classes are the data set's"
    return ok(
        f"{path}: {title_of(card.arch)}, {card.stem} stem, {counted(len(card.classes), 'class')}, {card.res} px{scores}{fits}"
    )
