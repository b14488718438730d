"""tidali's routes from shards to batches, as cases to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measure import Case
from tidali.config import Augment, Preprocess
from tidali.dataset.contract import Dataset
from tidali.errors import UsageError
from tidali.loading.batches import Training
from tidali.loading.data import Data
from tidali.loading.route import Route

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
    steps = {
        DECODED: counting(Decoded(streamed, settings)),
        STREAMING: counting(streamed.batches("train", **settings)),
        CACHED: counting(cached.batches("train", **settings)),
        CACHED_BF16: counting(cached.batches("train", dtype=torch.bfloat16, **settings)),
    }
    epoch_steps = dataset.split("train").samples // batch_size
    return {name: Case(step=step, cycle_steps=epoch_steps) for name, step in steps.items()}


def batch_settings(dataset: Dataset, res: int, batch_size: int) -> dict[str, Any]:
    """The arguments for a training batch, the same for every route."""
    preprocess = Preprocess(res=res, mean=dataset.manifest.mean, std=dataset.manifest.std)
    return dict(preprocess=preprocess, batch_size=batch_size, training=Training(augment=Augment(flip="random")))


class Decoded:
    """The train split's pixels as they come from the shards, in stored order, epoch after epoch."""

    def __init__(self, data: Data, settings: dict[str, Any]) -> None:
        self._data, self._settings = data, settings

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._data.decoded("train", self._settings["preprocess"], self._settings["batch_size"])


def endless(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from batches


def counting(batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], int]:
    """A step that takes the next batch and returns the number of its images."""
    endlessly = endless(batches)
    return lambda: len(next(endlessly)[1])


def batch_bytes(route: Route, samples: int, res: int, dtype: torch.dtype = torch.float32) -> float:
    """The least memory traffic per image of a batch: the stored pixels are read and the image is written, once. In bytes of a
    copy, which both reads and writes each byte.

    Args:
        samples: of the split, whose pixels take the route's bytes.
    """
    stored = route.pixel_bytes / samples
    return (stored + 3 * res * res * dtype.itemsize) / 2
