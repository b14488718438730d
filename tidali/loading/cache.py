"""Pixels decoded once and kept on the training device, and batches made from them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tidali.config import Kernel
from tidali.errors import TidaliError
from tidali.hardware.cpu_memory import keep_freed_memory
from tidali.loading.augment import Augment, crop_boxes, erase, erase_boxes, flip_flags, shift_offsets, shift_pixels, take
from tidali.loading.order import ORDER_VERSION, check_order, epoch_order, num_steps, rank_slice
from tidali.loading.resample import Resample
from tidali.loading.sizes import SizePlan


@dataclass(frozen=True, kw_only=True)
class PixelCache:
    """A split's decoded images, all of one size, and its labels, on one device and in stored order."""

    pixels: Tensor
    """(N, H, W, 3) uint8, contiguous."""
    labels: Tensor
    """(N,) int64."""
    identity: str
    """What the data is, for checkpoints: a hash of the shards, say."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the stored images, in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def __len__(self) -> int:
        return len(self.labels)


def fill_cache(
    batches: Iterable[tuple[Tensor, Tensor]],
    samples: int,
    size: tuple[int, int],
    *,
    identity: str,
    device: torch.device | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> PixelCache:
    """Put every sample of a split on the device.

    Args:
        batches: (n, H, W, 3) uint8 pixels and (n,) integer labels in stored order, each sample once, on any device.
        on_batch: called with the samples stored so far, to show progress.

    Raises:
        TidaliError: the batches held another number of samples.
    """
    pixels = torch.empty(samples, *size, 3, dtype=torch.uint8, device=device)
    labels = torch.empty(samples, dtype=torch.int64, device=device)
    done = 0
    for images, targets in batches:
        if done + len(targets) <= samples:
            pixels[done : done + len(images)].copy_(images)
            labels[done : done + len(targets)].copy_(targets)
        done += len(targets)
        if on_batch is not None:
            on_batch(done)
    if done != samples:
        raise TidaliError(f"decoded {done} samples, the split has {samples}; run 'tidali verify' on the data set")
    return PixelCache(pixels=pixels, labels=labels, identity=identity)


class CachedBatches:
    """Batches from a `PixelCache`: images (N, 3, res, res) channels_last and labels (N,) int64, on its device.

    Training takes every sample at most once an epoch, in a new order each epoch, and gives every rank as many steps;
    evaluation takes every sample exactly once, in stored order. The order and each image's augmentation are pure functions of
    the seed, the epoch and the sample (`tidali.loading.order`, `tidali.loading.augment`), so nothing but the
    position needs saving.
    """

    def __init__(
        self,
        cache: PixelCache,
        *,
        res: int,
        batch_size: int,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        dtype: torch.dtype = torch.float32,
        train: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        kernel: Kernel = "pil",
        antialias: bool = True,
        sizes: SizePlan | None = None,
    ) -> None:
        """
        Args:
            res: side of the images given, in pixels.
            sizes: the side of each step's images instead.
            batch_size: of this rank.
            mean, std: per RGB channel on a 0..1 scale; the defaults give pixels in 0..1.
            augment: of training images; evaluation takes none.

        Raises:
            UsageError: training on fewer samples than ranks.
        """
        self._cache, self._batch_size, self._train = cache, batch_size, train
        self._augment = augment if train and augment is not None else Augment()
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._steps = num_steps(len(cache), batch_size, world_size, train=train)
        self._sizes = sizes if sizes is not None else SizePlan.of(res)
        self._resample = {
            side: Resample(
                cache.size, side, mean=mean, std=std, dtype=dtype, kernel=kernel, antialias=antialias, device=cache.device
            )
            for side in self._sizes.sides
        }
        self._epoch, self._step = 0, 0  # of the next batch that the consumer gets
        self._underway = False
        if cache.device.type == "cpu":
            keep_freed_memory()

    def __len__(self) -> int:
        return self._steps

    @property
    def samples(self) -> int:
        """Of the split, over all ranks."""
        return len(self._cache)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, counted from 0. A restored position in that epoch stays."""
        if epoch != self._epoch or self._underway:
            self._epoch, self._step, self._underway = epoch, 0, False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._underway:  # the last epoch was left early
            self._next_epoch()
        self._underway = True
        for batch in prefetch(self._rest_of_epoch(self._epoch, self._step), self._cache.device):
            self._step += 1
            yield batch
            del batch  # or this frame would hold it while the next one is made
        self._next_epoch()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "step": self._step, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position, also on another number of ranks where the batch over all of them is the same.

        Raises:
            UsageError: the state is of another order; names the difference.
        """
        check_order(state["order"], self._order())
        self._epoch, self._step, self._underway = state["epoch"], state["step"], False

    def _order(self) -> dict[str, Any]:
        settings = {
            "route": "cache",
            "version": ORDER_VERSION,
            "data": self._cache.identity,
            "samples": len(self._cache),
            "train": self._train,
            "seed": self._seed,
            "global_batch_size": self._batch_size * self._world_size,
            **asdict(self._augment),
        }
        return dict(json.loads(json.dumps(settings)))  # as it comes back from a file: lists for tuples

    def _next_epoch(self) -> None:
        self._epoch, self._step, self._underway = self._epoch + 1, 0, False

    def _rest_of_epoch(self, epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self._cache), self._cache.device
        order = epoch_order(count, self._seed, epoch, device) if self._train else torch.arange(count, device=device)
        for step in range(first_step, self._steps):
            samples = order[rank_slice(count, step, self._batch_size, self._rank, self._world_size)]
            yield self._images(samples, epoch, self._sizes.at(epoch, step)), self._cache.labels.index_select(0, samples)

    def _images(self, samples: Tensor, epoch: int, side: int) -> Tensor:
        """From stored pixels to what the network sees. Nothing in it makes the host wait for the device."""
        augment, size = self._augment, self._cache.size
        key = {"seed": self._seed, "epoch": epoch}
        mirrored = flip_flags(augment.flip, samples, **key) if augment.flip != "none" else None
        pixels = take(self._cache.pixels, samples, mirrored)
        if augment.shift_px:
            pixels = shift_pixels(pixels, shift_offsets(augment.shift_px, samples, **key))
        boxes = None
        if augment.crop_scale is not None:
            boxes = crop_boxes(size, augment.crop_scale, augment.crop_ratio, samples, **key)
        images = self._resample[side](pixels, boxes)
        if augment.erase:
            erase(images, erase_boxes((side, side), augment.erase, samples, **key))
        return images


def prefetch(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """On CUDA, queue the next batch on a stream of its own before the current one is used, so that making it overlaps with the
    step (not measured). On a CPU, batches as they are: making one took 0.15 % of a ResNet-18 step's time at 64 and at 224 px,
    and a thread could not save more.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # the cache may still be on its way

    def queue_next() -> tuple[Tensor, Tensor] | None:
        with torch.cuda.stream(side):
            return next(batches, None)

    batch = queue_next()
    while batch is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for tensor in batch:
            tensor.record_stream(current)  # the allocator must not give it to the side stream while the step still reads it
        following = queue_next()
        yield batch
        batch = following


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: the allocator keeps the freed memory of each stream for that stream alone."""
    return torch.cuda.Stream(device)
