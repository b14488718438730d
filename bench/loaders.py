"""Loaders side by side: the same images to the same normalised float batches, in one run, taking turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import TaskID
from torch import Tensor

from bench.ffcv_peer import FfcvPeer
from bench.measure import Case, measure
from bench.memory import cache_memory
from bench.report import environment
from tidali.augment import Augment
from tidali.console import progress_bar, say
from tidali.contract import Dataset, iter_records
from tidali.data import Data
from tidali.device import cpu_count, plan_device
from tidali.loader import dali_defaults_forever

TORCHVISION = "torchvision ImageFolder + DataLoader"
DALI = "DALI webdataset reader, defaults"
SETTLE_S = 2.0
"""A DataLoader's workers and FFCV's threads prepare batches ahead, here up to 1.2 s of them, which would slow the next case."""

STREAMING, CACHED, CACHED_BF16 = "tidali streaming", "tidali cached", "tidali cached, bf16"


def bench_loaders(
    dataset: Dataset, *, resolutions: Sequence[int], batch_size: int = 256, repeats: int = 5, ffcv_python: str | None = None
) -> dict[str, Any]:
    """Measure on the CPU, and return the JSON document. Every loader shuffles, mirrors at random and normalises.

    Args:
        ffcv_python: a Python that has FFCV, which clashes with current torch; without it those rows are left out, and said so.

    Raises:
        TidaliError, DatasetError: the data cannot be used.
    """
    plan = plan_device("cpu", "off", "off")
    rows = []
    with tempfile.TemporaryDirectory(prefix="tidali-bench-") as name:
        folder = extract(dataset, Path(name) / "train")
        ffcv = FfcvPeer.start(ffcv_python, folder, Path(name), dataset.manifest.mean, dataset.manifest.std, batch_size)
        with progress_bar() as bar:
            for res in resolutions:
                peers = peer_cases(dataset, folder, res, batch_size)
                cases = tidali_cases(dataset, res, batch_size) + peers
                cases += ffcv.cases(res) if ffcv is not None else []
                task = bar.add_task(f"loaders at {res}", total=len(cases) * repeats, note="")

                def on_done(name: str, task: TaskID = task) -> None:
                    bar.update(task, advance=1, note=name)

                rates = measure(cases, repeats=repeats, settle_s=SETTLE_S, on_done=on_done)
                base = rates[TORCHVISION].median
                rows += [
                    {"res": res, "case": case, "images_per_s": rate.to_dict(), "times_torchvision": rate.median / base}
                    for case, rate in rates.items()
                ]
        memory = [cache_memory(dataset.root, res=res, batch_size=batch_size) for res in resolutions]
        if ffcv is None:
            say("FFCV is not among them: give a Python that has it by --ffcv-python")
        else:
            ffcv.stop()
    return {
        "benchmark": "loader",
        **environment(plan),
        "data": {"name": dataset.root.name, "train_samples": dataset.split("train").samples},
        "batch_size": batch_size,
        "repeats": repeats,
        "rows": rows,
        "memory": memory,
    }


def tidali_cases(dataset: Dataset, res: int, batch_size: int) -> list[Case]:
    """tidali's two routes; the cache also to bfloat16, which a training step under bf16 autocast takes."""
    device = torch.device("cpu")
    common: dict[str, Any] = dict(
        res=res,
        batch_size=batch_size,
        mean=dataset.manifest.mean,
        std=dataset.manifest.std,
        train=True,
        augment=Augment(flip="random"),
    )
    streamed = Data(dataset, ("train",), device, cache="off", max_res=res)
    cached = Data(dataset, ("train",), device, cache="device", max_res=res)
    routes = {
        STREAMING: streamed.batches("train", **common),
        CACHED: cached.batches("train", **common),
        CACHED_BF16: cached.batches("train", dtype=torch.bfloat16, **common),
    }
    return [Case(name=name, step=counting(forever(batches))) for name, batches in routes.items()]


def peer_cases(dataset: Dataset, folder: Path, res: int, batch_size: int) -> list[Case]:
    """What people use today.

    torchvision's workers are forked here, so call this while the process is small: of memory that a fork shares, each page is
    copied when it is next written. Forked later, they cost the stream beside them a third of its rate.
    """
    manifest = dataset.manifest
    files = torchvision_batches(folder, res, batch_size, manifest.mean, manifest.std)
    next(files)
    defaults = dali_defaults_forever(dataset, "train", res=res, batch_size=batch_size, mean=manifest.mean, std=manifest.std)
    return [
        Case(name=TORCHVISION, step=counting(files)),
        Case(name=DALI, step=counting(defaults)),
    ]


def torchvision_batches(
    folder: Path, res: int, batch_size: int, mean: Sequence[float], std: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """ImageFolder and DataLoader as torchvision's own training reference puts them together, a worker a core, for ever."""
    from torchvision import datasets, transforms

    steps: list[Any] = [transforms.Resize(res, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(res)]
    steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    images = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(
        images, batch_size=batch_size, shuffle=True, num_workers=cpu_count(), drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def forever(batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def counting(batches: Iterator[tuple[Tensor, Tensor]]) -> Callable[[], int]:
    """A step that takes a batch and counts its images."""
    return lambda: len(next(batches)[1])


def extract(dataset: Dataset, folder: Path) -> Path:
    """The train split as files, CLASS/KEY.jpg, for the loaders that take files."""
    for label in range(len(dataset.manifest.classes)):
        (folder / f"{label:04d}").mkdir(parents=True)
    for shard, record in iter_records(dataset, "train"):
        with (dataset.root / shard.name).open("rb") as tar:
            tar.seek(record.offset)
            (folder / f"{record.label:04d}" / f"{record.key}.{record.extension}").write_bytes(tar.read(record.size_bytes))
    return folder
