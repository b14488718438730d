"""tidali's routes from shards to batches, as cases to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measure import Case
from tidali.dataset.contract import Dataset
from tidali.loading.augment import Augment
from tidali.loading.data import Data
from tidali.loading.stream import decoded_forever

DECODED, STREAMING, CACHED, CACHED_BF16 = "decode only", "streaming", "cached", "cached, bf16"
ROUTES = (DECODED, STREAMING, CACHED, CACHED_BF16)


def route_cases(streamed: Data, cached: Data, res: int, batch_size: int) -> list[Case]:
    """The routes of one resolution; the cache also to bfloat16, which a training step under bf16 autocast takes."""
    dataset = streamed.dataset
    common = batch_settings(dataset, res, batch_size)
    decoded = decoded_forever(dataset, "train", batch_size=batch_size)
    epoch_steps = dataset.split("train").samples // batch_size
    steps = {
        DECODED: lambda: len(next(decoded)[0]),
        STREAMING: counting(streamed.batches("train", **common)),
        CACHED: counting(cached.batches("train", **common)),
        CACHED_BF16: counting(cached.batches("train", dtype=torch.bfloat16, **common)),
    }
    return [Case(name=name, step=step, cycle_steps=epoch_steps) for name, step in steps.items()]


def batch_settings(dataset: Dataset, res: int, batch_size: int) -> dict[str, Any]:
    """Of a training batch as every route is asked for it."""
    manifest = dataset.manifest
    return dict(
        res=res,
        batch_size=batch_size,
        mean=manifest.mean,
        std=manifest.std,
        train=True,
        augment=Augment(flip="random"),
    )


def endless(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from batches


def counting(batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], int]:
    """A step that takes the next batch and counts its images."""
    endlessly = endless(batches)
    return lambda: len(next(endlessly)[1])


def batch_bytes(data: Data, res: int, dtype: torch.dtype = torch.float32) -> float:
    """What making one image of a batch moves at the least, as bytes of a copy, which reads each and writes each: the stored
    pixels are read and the image is written, once."""
    stored = data.route.pixel_bytes / data.dataset.split("train").samples
    return (stored + 3 * res * res * dtype.itemsize) / 2
