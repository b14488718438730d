"""tidali's routes from shards to batches, as cases to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measure import Case
from tidali.dataset.contract import Dataset
from tidali.errors import UsageError
from tidali.loading.augment import Augment
from tidali.loading.data import Data
from tidali.loading.stream import decoded_forever

DECODED, STREAMING, CACHED, CACHED_BF16 = "decode only", "streaming", "cached", "cached, bf16"
ROUTES = (DECODED, STREAMING, CACHED, CACHED_BF16)


def check_batch_size(dataset: Dataset, batch_size: int) -> None:
    """
    Raises:
        UsageError: the batch is larger than the train split.
    """
    samples = dataset.labelled_split("train").samples
    if batch_size > samples:
        raise UsageError(f"--batch-size {batch_size}: the train split has {samples} samples; give at most that many")


def route_cases(streamed: Data, cached: Data, res: int, batch_size: int) -> dict[str, Case]:
    """The routes at one resolution. The cache also in bfloat16, the input of a training step under bf16 autocast."""
    dataset = streamed.dataset
    settings = batch_settings(dataset, res, batch_size)
    decoded = decoded_forever(dataset, "train", batch_size=batch_size)
    steps = {
        DECODED: lambda: len(next(decoded)[0]),
        STREAMING: counting(streamed.batches("train", **settings)),
        CACHED: counting(cached.batches("train", **settings)),
        CACHED_BF16: counting(cached.batches("train", dtype=torch.bfloat16, **settings)),
    }
    epoch_steps = dataset.split("train").samples // batch_size
    return {name: Case(step=step, cycle_steps=epoch_steps) for name, step in steps.items()}


def batch_settings(dataset: Dataset, res: int, batch_size: int) -> dict[str, Any]:
    """The arguments for a training batch, the same for every route."""
    mean, std = dataset.manifest.mean, dataset.manifest.std
    return dict(res=res, batch_size=batch_size, mean=mean, std=std, train=True, augment=Augment(flip="random"))


def endless(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from batches


def counting(batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], int]:
    """A step that takes the next batch and returns the number of its images."""
    endlessly = endless(batches)
    return lambda: len(next(endlessly)[1])


def batch_bytes(data: Data, res: int, dtype: torch.dtype = torch.float32) -> float:
    """The least memory traffic per image of a batch: the stored pixels are read and the image is written, once. In bytes of a
    copy, which both reads and writes each byte."""
    stored = data.route.pixel_bytes / data.dataset.split("train").samples
    return (stored + 3 * res * res * dtype.itemsize) / 2
