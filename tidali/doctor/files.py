"""What ``tidali doctor`` says of a user's own files: the run folder, a data set, a checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tidali.dataset.contract import Dataset
from tidali.doctor.findings import Finding, ok
from tidali.hardware.device import DevicePlan
from tidali.hardware.timing import Stopwatch
from tidali.loading.data import dali_is_installed, free_memory_bytes
from tidali.loading.route import choose_route
from tidali.model.checkpoint import find_checkpoint, load_model
from tidali.training.evaluation import check_classes

MIN_FREE_DISK_MIB = 1024
"""A run folder holds two sets of weights of 45 MB and a state of 134 MB, each written beside the old one first."""
_WRITE_MIB = 64


def run_folder(out: Path) -> Finding:
    there = out
    room = f"a run needs up to {MIN_FREE_DISK_MIB} MiB: make room, or choose another disk with --out"
    try:
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        with tempfile.NamedTemporaryFile(dir=there, prefix=".tidali-doctor-") as file:
            free_mib = shutil.disk_usage(there).free / 2**20
            if free_mib < 2 * _WRITE_MIB:  # what is left is not for doctor to fill
                return Finding(name="", status="failure", text=f"{there}: {free_mib:.1f} MiB free", fix=room)
            block = os.urandom(1 << 20)
            watch = Stopwatch()
            for _ in range(_WRITE_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = watch.elapsed_s()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        text = f"{there}: cannot be written ({error.strerror})"
        return Finding(name="", status="failure", text=text, fix=room if full else "choose a folder of yours with --out")
    text = f"{out}: {_WRITE_MIB / seconds:,.0f} MiB/s to disk, {free_mib / 1024:,.1f} GiB free"
    if free_mib < MIN_FREE_DISK_MIB:
        return Finding(name="", status="warning", text=text, fix=room)
    return ok(text)


def data(location: str, dataset: Dataset, device: torch.device, verify: Callable[[str], Sequence[str]]) -> Finding:
    manifest = dataset.manifest
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in manifest.splits.items())
    text = f"{location}: {len(manifest.classes)} classes; {splits}"
    faults = verify(location)
    if faults:
        more = f", and {len(faults) - 1} more faults" if len(faults) > 1 else ""
        fix = f"'tidali verify {location}' lists all; pack the source again: what is right is kept"
        return Finding(name="", status="failure", text=f"{location}: {faults[0].partition('; ')[0]}{more}", fix=fix)
    if not ({"val", "heldout"} & {name for name, split in manifest.splits.items() if split.samples and split.labelled}):
        fix = "pack it again with --val-fraction 0.1 --overwrite, which holds out a tenth of train"
        return Finding(name="", status="failure", text=f"{text}; no split to evaluate on", fix=fix)
    empty = [
        class_.id for class_, count in zip(manifest.classes, dataset.split("train").class_counts, strict=True) if not count
    ]
    if empty:
        fix = "add images of them to the source, or leave them out by --classes, and pack it again with --overwrite"
        return Finding(name="", status="warning", text=f"{text}; no training image of {', '.join(empty[:5])}", fix=fix)
    route = choose_route(
        "auto",
        [split for name, split in manifest.splits.items() if name in ("train", "val")],
        max_res=dataset.default_res,
        free_bytes=free_memory_bytes(device),
        has_dali=dali_is_installed(),
    )
    return ok(f"{text}; every hash is right; {'cached' if route.cached else 'streamed'}, as {route.reason}")


def checkpoint(given: str, dataset: Dataset | None, plan: DevicePlan) -> Finding:
    path = find_checkpoint(given)
    model, card = load_model(path)
    if dataset is not None:
        check_classes(card, dataset, given)
    broken = [name for name, tensor in model.state_dict().items() if not _is_finite(tensor)]
    if broken:
        text = f"{path}: {len(broken)} tensors are not finite, {broken[0]} is the first"
        return Finding(name="", status="failure", text=text, fix="take an earlier checkpoint, or train again with a lower --lr")
    images = torch.zeros(2, 3, card.res, card.res, device=plan.device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), plan.autocast():
        logits = model.to(plan.device)(images)
    if not _is_finite(logits):
        text = f"{path}: its output is not finite in {plan.dtype_name}"
        return Finding(name="", status="failure", text=text, fix="use it with --amp off")
    top1 = {name.removesuffix("_top1_percent"): value for name, value in card.metrics.items() if name.endswith("_top1_percent")}
    scored = "".join(f", {value:.2f} % top-1 on {split} when it was saved" for split, value in top1.items() if split != "train")
    fits = "" if dataset is None else "; its classes are the data set's"
    return ok(f"{path}: ResNet-18, {card.stem} stem, {len(card.classes)} classes, {card.res} px{scored}{fits}")


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
