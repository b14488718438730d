"""Batches from shards: what the engine iterates over."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tidali.config import Kernel
from tidali.dataset.contract import Dataset, Split
from tidali.errors import TidaliError, UsageError
from tidali.hardware.cpu_memory import keep_freed_memory
from tidali.hardware.device import rank_threads
from tidali.loading.augment import take
from tidali.loading.dali import Placement, ShardFiles, batch_pipeline, decode_pipeline
from tidali.loading.order import check_order, refuse_partial_batch
from tidali.loading.resample import Resample
from tidali.loading.route import why_not_streamable
from tidali.loading.sizes import SizePlan


class StreamBatches:
    """Batches that are read, decoded and resized while they are used. Each iteration is one epoch.

    DALI does all of it on a GPU. On a CPU, where images are of one size, it decodes alone, and `tidali.loading.resample`
    resizes and normalises as it does from the cache: 1.2 times the rate at 64 px, 3.8 at 128 and 4.6 at 224, on two cores.

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
        kernel: Kernel = "pil",
        sizes: SizePlan | None = None,
    ) -> None:
        """
        Args:
            res: side of the images given, in pixels.
            batch_size: of this rank.
            mean, std: per RGB channel on a 0..1 scale; the defaults give pixels in 0..1.
            num_threads: of DALI; this rank's share of the cores by default.
            kernel, sizes: as in `tidali.loading.cache.CachedBatches`; where DALI resizes, its own kernel and one size alone.

        Raises:
            DatasetError: there is no such split.
            UsageError: the split has no labels, fewer samples than one training batch, or a kernel or sizes that DALI lacks.
            TidaliError: DALI could not build the pipeline.
        """
        self._dataset, self._split = dataset, split
        self._train, self._batch_size, self._rank, self._world_size = train, batch_size, rank, world_size
        self._pipeline_settings: dict[str, Any] = dict(
            batch_size=batch_size,
            res=res,
            resize=needs_resize(dataset.labelled_split(split), res),
            mean=mean,
            std=std,
            flip=flip,
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
        self._num_threads = num_threads or rank_threads()
        self._placement = placement_on(device)
        self._resample: dict[int, Resample] = {}  # by side; empty where DALI resizes
        self._sizes = sizes if sizes is not None else SizePlan.of(res)
        size = dataset.split(split).single_image_size
        if not self._placement.on_gpu:
            keep_freed_memory()
            if size is not None:
                self._resample = {side: Resample(size, side, mean=mean, std=std, kernel=kernel) for side in self._sizes.sides}
        obstacle = why_not_streamable(dataset.split(split), device, kernel=kernel, sides=self._sizes.sides)
        if obstacle is not None:
            raise UsageError(obstacle)
        self._epoch, self._run = 0, 0  # where the consumer is; runs are the pipeline's batches, dropped ones included
        self._resumed = False
        self._open(None)

    def _open(self, checkpoint: bytes | None) -> None:
        """Build the pipeline, at its start or at a checkpoint."""
        info, split = self._dataset.split(self._split), self._split
        if self._train:
            refuse_partial_batch(split, info.samples, self._batch_size, self._world_size)
        settings = self._pipeline_settings
        if info.samples >= self._world_size:
            self._samples = rank_samples(info.samples, self._rank, self._world_size)
            largest = -(-info.samples // self._world_size)
        else:  # DALI refuses to share them: every rank reads all, and the first alone gives them
            settings = {**settings, "rank": 0, "world_size": 1}
            self._samples = info.samples if self._rank == 0 else 0
            largest = info.samples
        smallest = info.samples // self._world_size
        # The reader goes on to the next epoch only after its padded last batch, also where training drops it.
        self._runs_per_epoch = -(-largest // self._batch_size)
        self._steps = smallest // self._batch_size if self._train else self._runs_per_epoch
        self._pipe = batch_pipeline(
            shard_files(self._dataset, split),
            **settings,
            shuffle_buffer=largest if self._train else 0,
            num_threads=self._num_threads,
            placement=self._placement,
            checkpoint=checkpoint,
            as_stored=bool(self._resample),
        )
        build(self._pipe, self._dataset, split)

    def __len__(self) -> int:
        return self._steps

    @property
    def samples(self) -> int:
        """Of the split, over all ranks."""
        return self._dataset.split(self._split).samples

    def set_epoch(self, epoch: int) -> None:
        """A stream's epochs follow each other: those in between are read and dropped.

        Raises:
            UsageError: the epoch has passed.
        """
        if epoch < self._epoch:
            raise UsageError(f"epoch {epoch} of a stream that is at {self._epoch}: it cannot be rewound")
        while self._epoch < epoch:
            self._skip_rest()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._run and not self._resumed:  # an epoch that was left early
            self._skip_rest()
        self._resumed = False
        for step in range(self._run, self._runs_per_epoch):
            outputs = self._next_run()
            if step < self._steps:
                left = self._batch_size if self._train else max(self._samples - step * self._batch_size, 0)
                yield self._finish([output[:left] for output in outputs], self._sizes.at(self._epoch, step))
        self._skip_rest()

    def _finish(self, outputs: list[Tensor], side: int) -> tuple[Tensor, Tensor]:
        """What the pipeline gave as the images (N, 3, side, side) float32, channels_last, and labels (N,) to be given."""
        images, labels, *mirrored = outputs
        if not self._resample:
            return images.permute(0, 3, 1, 2), labels.reshape(-1)  # HWC memory seen as CHW is channels_last: no copy
        if mirrored:
            images = take(images, torch.arange(len(images)), mirrored[0].reshape(-1).bool())
        return self._resample[side](images), labels.reshape(-1)

    def state_dict(self) -> dict[str, Any]:
        checkpoint = base64.b64encode(self._pipe.checkpoint()).decode("ascii")
        return {"epoch": self._epoch, "run": self._run, "dali": checkpoint, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_order(state["order"], self._order())
        self._open(base64.b64decode(state["dali"]))
        self._epoch, self._run, self._resumed = state["epoch"], state["run"], True

    def _order(self) -> dict[str, Any]:
        """All that decides which samples come when. DALI restores a checkpoint under other settings without a word."""
        names = ("batch_size", "flip", "rank", "seed", "world_size")
        content = self._dataset.split(self._split).content
        return {
            "route": "stream",
            "shards": hashlib.sha256(content.encode()).hexdigest(),
            **{name: self._pipeline_settings[name] for name in names},
        }

    def _skip_rest(self) -> None:
        """On to the next epoch: the reader cannot be rewound, only read to its end."""
        while self._run < self._runs_per_epoch:
            self._next_run()
        self._epoch, self._run = self._epoch + 1, 0

    def _next_run(self) -> list[Tensor]:
        outputs = run(self._pipe)
        self._run += 1
        return [torch.from_dlpack(output.as_tensor()) for output in outputs]


def decoded_forever(
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    square: int | None = None,
    device: torch.device | None = None,
    num_threads: int | None = None,
) -> Iterator[Any]:
    """Read and decode a split for ever, in stored order and nothing more.

    Args:
        square: side that every image is brought to, in pixels; None keeps each as stored.

    Yields:
        DALI's outputs: images (H, W, 3) uint8 on the device, labels int64 on the CPU; an epoch's last batch is padded.
    """
    dataset.labelled_split(split)
    pipe = decode_pipeline(
        shard_files(dataset, split),
        batch_size=batch_size,
        square=square,
        rank=0,
        world_size=1,
        num_threads=num_threads or rank_threads(),
        placement=placement_on(device),
    )
    build(pipe, dataset, split)
    while True:
        yield run(pipe)


def decoded_once(
    dataset: Dataset, split: str, *, square: int | None, device: torch.device | None = None, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample of a split, once, in stored order: pixels (n, H, W, 3) uint8 on the device and labels (n,) int64 on the CPU.

    Args:
        square: side that every image is brought to, in pixels; None where all are of one size.
    """
    left = dataset.split(split).samples
    for outputs in decoded_forever(dataset, split, batch_size=batch_size, square=square, device=device):
        pixels, labels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        yield pixels[:left], labels.reshape(-1)[:left]
        left -= len(labels)
        if left <= 0:
            return


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
