"""Pixels decoded once and kept on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidali.hardware.ranks import Ranks
from tidali.loading.corrupt import CorruptSamples
from tidali.loading.order import centre_boxes
from tidali.loading.sharing import Sharing
from tidali.loading.stream import Pixels, Request, ShardSource

FILL_BATCH = 256
ANY_SIDE = 0


@dataclass(frozen=True, kw_only=True)
class PixelCache:
    """A split's decoded images and its labels, on one device and in stored order."""

    pixels: Mapping[int, Tensor]
    """(N, H, W, 3) uint8, contiguous. If all images have one size: the images, under `ANY_SIDE`. Otherwise: squares, under
    their side in pixels."""
    labels: Tensor
    """(N,) int64."""
    identity: str
    """What the samples and their order are, for checkpoints."""
    size: tuple[int, int] | None
    """Height and width of the stored images, in pixels; None where they differ."""
    corrupt: CorruptSamples
    """Samples that have no pixels."""

    takes_boxes = takes_pieces = decodes_on_gpu = False

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def order_device(self) -> torch.device:
        return self.labels.device

    def sizes_of(self, samples: Tensor) -> Tensor:
        raise AssertionError("its requests have no boxes")

    def read(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Pixels]]:
        for request in requests:
            samples = request.samples
            if self.corrupt.positions:  # on a GPU the host waits here, which is as rare as they are
                corrupt = torch.tensor(sorted(self.corrupt.positions), device=self.device)
                samples = samples[torch.isin(samples, corrupt, invert=True)]
            yield request, Pixels(samples, self.pixels[ANY_SIDE if self.size is not None else request.side], samples)


def fill_cache(
    source: ShardSource,
    sides: Sequence[int],
    crop_fraction: float,
    *,
    sharing: Sharing | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> PixelCache:
    """Decode a whole split into the memory of the source's device, together with the other ranks on the machine, which all have
    to call this.

    Args:
        sides: of the input, in pixels.
        crop_fraction: share of the shorter side that the square of an image keeps, where images are of unequal size.
        on_batch: called with the images that this rank has stored so far, to show progress.

    Raises:
        DatasetError: more samples are corrupt than may be left out.
    """
    sharing = sharing or Sharing.of(Ranks())
    source.names_corrupt = sharing.names_corrupt
    pixels, stored = {}, 0
    for side in sides if source.size is None else (ANY_SIDE,):
        pixels[side] = sharing.zeros((len(source.labels), *(source.size or (side, side)), 3), source.device)
        part = sharing.part(len(source.labels))
        for request, found in source.read(stored_order(source, side, crop_fraction, FILL_BATCH, part, pixels[side])):
            if len(found.samples) < len(request.samples):
                pixels[side].index_copy_(0, found.samples.to(source.device), found.stored)
            elif request.out is not None and found.stored is not request.out:
                request.out.copy_(found.stored)
            stored += len(request.samples)
            if on_batch is not None:
                on_batch(stored)
        sharing.exchange(pixels[side])
    source.corrupt.merge(sharing.ranks.gather(sorted(source.corrupt.positions)))  # and until then wait for all shares
    return PixelCache(pixels=pixels, labels=source.labels, identity=source.identity, size=source.size, corrupt=source.corrupt)


def stored_order(
    source: ShardSource,
    side: int,
    crop_fraction: float,
    batch_size: int,
    part: slice = slice(None),
    out: Tensor | None = None,
) -> Iterator[Request]:
    """A split, or a part of it, in stored order, each image's centre.

    Args:
        out: (N, H, W, 3) uint8, of the whole split: where the pixels may be put, see `Request`.
    """
    sizes = source.table.sizes
    for samples in torch.arange(len(sizes))[part].split(batch_size):
        boxes = centre_boxes(sizes[samples], side, crop_fraction) if source.takes_boxes else None
        yield Request(samples, side, boxes, out=None if out is None else out[samples[0] : samples[-1] + 1])
