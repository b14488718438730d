"""Batches from shards: what the engine iterates over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tidali.contract import Dataset, Split
from tidali.device import cpu_count
from tidali.errors import TidaliError, UsageError
from tidali.pipeline import Placement, ShardFiles, batch_pipeline, decode_pipeline


class Batches(Protocol):
    """An epoch of batches: images (N, 3, H, W) float channels_last and labels (N,) int64, both on the loader's device."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class StreamBatches:
    """Batches that DALI reads, decodes and resizes while they are used. Each iteration is one epoch.

    Training drops the samples that do not fill a last batch; evaluation keeps them, so that every sample is seen exactly once.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        res: int,
        batch_size: int,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        train: bool = False,
        flip: bool = False,
        seed: int = 0,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int | None = None,
    ) -> None:
        """
        Args:
            res: side of the images given, in pixels.
            batch_size: of this rank.
            mean, std: per RGB channel on a 0..1 scale; the defaults give pixels in 0..1.
            num_threads: of DALI; the process's cores by default.

        Raises:
            DatasetError: there is no such split.
            UsageError: the split has no labels, or fewer samples than one training batch.
            TidaliError: DALI could not build the pipeline.
        """
        info = labelled_split(dataset, split)
        self._samples = rank_samples(info.samples, rank, world_size)
        smallest, largest = info.samples // world_size, -(-info.samples // world_size)
        # The reader goes on to the next epoch only after its padded last batch, also where training drops it.
        self._runs_per_epoch = -(-largest // batch_size)
        self._steps = smallest // batch_size if train else self._runs_per_epoch
        if not self._steps:
            raise UsageError(
                f"--batch-size {batch_size}: the {split!r} split has {smallest} samples a rank, not one full batch; "
                f"use at most --batch-size {smallest}"
            )
        self._run = 0  # batches taken from the pipeline in this epoch
        self._train, self._batch_size = train, batch_size
        self._pipe = batch_pipeline(
            shard_files(dataset, split),
            batch_size=batch_size,
            res=res,
            resize=needs_resize(info, res),
            mean=mean,
            std=std,
            flip=flip,
            shuffle_buffer=largest if train else 0,
            rank=rank,
            world_size=world_size,
            seed=seed,
            num_threads=num_threads or cpu_count(),
            placement=placement_on(device),
        )
        build(self._pipe, dataset, split)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self._run:  # an epoch that was left early: the reader cannot be rewound, only read to its end
            self._next_run()
        for step in range(self._runs_per_epoch):
            images, labels = self._next_run()
            if step < self._steps:
                keep = (
                    self._batch_size if self._train else max(0, min(self._batch_size, self._samples - step * self._batch_size))
                )
                # HWC memory seen as CHW is channels_last: no copy.
                yield images.permute(0, 3, 1, 2)[:keep], labels.reshape(-1)[:keep]

    def _next_run(self) -> tuple[Tensor, Tensor]:
        outputs = run(self._pipe)
        self._run = (self._run + 1) % self._runs_per_epoch
        images, labels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        return images, labels


def stream_decoded(
    dataset: Dataset, split: str, *, batch_size: int, device: torch.device | None = None, num_threads: int | None = None
) -> Iterator[int]:
    """Read and decode a split for ever, in stored order and nothing more: the ceiling of every loader.

    Yields:
        The images in each batch, padding included.
    """
    labelled_split(dataset, split)
    pipe = decode_pipeline(
        shard_files(dataset, split),
        batch_size=batch_size,
        resize_to=None,
        rank=0,
        world_size=1,
        num_threads=num_threads or cpu_count(),
        placement=placement_on(device),
    )
    build(pipe, dataset, split)
    while True:
        yield len(run(pipe)[0])


def labelled_split(dataset: Dataset, split: str) -> Split:
    """
    Raises:
        DatasetError: there is no such split.
        UsageError: it has no labels.
    """
    info = dataset.split(split)
    if not info.labelled:
        raise UsageError(f"{dataset.root}: the {split!r} split has no labels, so it can be neither trained nor evaluated on")
    return info


def shard_files(dataset: Dataset, split: str) -> ShardFiles:
    return ShardFiles(
        tars=dataset.tar_paths(split),
        indexes=dataset.index_paths(split),
        extensions=tuple(dataset.split(split).extensions),
        num_digits=dataset.manifest.label_digits,
    )


def placement_on(device: torch.device | None) -> Placement:
    """Where the graph runs for tensors on this device; None is the CPU."""
    return Placement.of(device.type, device.index) if device is not None else Placement.of("cpu", None)


def rank_samples(samples: int, rank: int, world_size: int) -> int:
    """How many samples DALI's reader gives a rank: it cuts at floor(rank * samples / world_size)."""
    return (rank + 1) * samples // world_size - rank * samples // world_size


def needs_resize(split: Split, res: int) -> bool:
    """Whether any image has another size than ``res`` x ``res``."""
    return set(split.image_sizes) != {f"{res}x{res}"}


def build(pipe: Any, dataset: Dataset, split: str) -> None:
    """
    Raises:
        TidaliError: DALI refused the files.
    """
    try:
        pipe.build()
    except RuntimeError as error:
        raise TidaliError(f"{dataset.root}: DALI cannot read the {split!r} split: {dali_message(error)}") from None


def run(pipe: Any) -> Any:
    """The pipeline's next batch.

    Raises:
        TidaliError: DALI failed on it, on an image that cannot be decoded for one.
    """
    try:
        return pipe.run()
    except RuntimeError as error:
        raise TidaliError(f"DALI failed on a batch: {dali_message(error)}; 'tidali verify --decode' names bad images") from None


def dali_message(error: RuntimeError) -> str:
    """The one line of DALI's multi-line report that says what went wrong."""
    text = str(error)
    _, found, tail = text.partition("encountered:")
    lines = [line.strip() for line in (tail if found else text).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
