"""A split's pixels read from its shards while they are used."""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tidali.config import DecoderChoice, Kernel
from tidali.errors import UsageError
from tidali.hardware.limits import rank_threads
from tidali.loading.corrupt import CorruptSamples
from tidali.loading.resample import Pieces
from tidali.loading.samples import SampleTable
from tidali.loading.thread_decoder import Job, ThreadDecoder

_AHEAD = 2
"""Batches that are decoded while one is used."""
_SMALL_PIXELS = 128 * 128


class Request(NamedTuple):
    """One batch that is wanted of a source."""

    samples: Tensor
    """(n,) int64, positions in the split's stored order, on the source's `order_device`."""
    side: int
    """Of the squares, in pixels, where the images are of unequal size."""
    boxes: Tensor | None
    """(n, 4) float32, top, left, height and width of what becomes each one's square, in its own pixels; None for whole
    images of one size."""
    pieces: Pieces | None = None
    """What makes the batch's images of them, if a source that `takes_pieces` can do that while it decodes."""
    out: Tensor | None = None
    """(n, H, W, 3) uint8: where a source may put the pixels, and says so by returning this very tensor as `Pixels.stored`."""


class Pixels(NamedTuple):
    """What a source gives for a request: rows of stored pixels."""

    samples: Tensor
    """(n,) int64 on the source's `order_device`: those asked for, without corrupt ones."""
    stored: Tensor
    """(M, H, W, 3) uint8 on the device."""
    rows: Tensor | None
    """(n,) int64 on the device: the samples' places in ``stored``; None where those are all, in order."""
    images: Tensor | None = None
    """(n, res, res, 3): the request's pieces, in place of ``stored``."""


class Source(Protocol):
    """Where a split's pixels come from: the device's memory or the shards."""

    @property
    def device(self) -> torch.device:
        """Of the pixels."""
        ...

    @property
    def order_device(self) -> torch.device:
        """Where requests' samples have to be."""
        ...

    @property
    def labels(self) -> Tensor:
        """(N,) int64 on `device`."""
        ...

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of all images in pixels; None where they differ, and squares are given."""
        ...

    @property
    def identity(self) -> str:
        """What the samples and their order are: a hash of the shards."""
        ...

    @property
    def takes_boxes(self) -> bool:
        """Whether requests have boxes."""
        ...

    @property
    def takes_pieces(self) -> bool:
        """Whether requests may have pieces."""
        ...

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether DALI decodes on the GPU whenever pixels are asked for."""
        ...

    @property
    def corrupt(self) -> CorruptSamples:
        """Samples that are known to have no pixels."""
        ...

    def sizes_of(self, samples: Tensor) -> Tensor:
        """(n, 2) int32: height and width of images of unequal size, where requests have boxes."""
        ...

    def read(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Pixels]]:
        """The pixels of each request, in their order."""
        ...


class ShardSource:
    """Pixels decoded from the shards, some batches ahead of their use.

    Images of one size are decoded whole. Of images of unequal size a box becomes a square, bicubic and rounded to uint8.
    """

    def __init__(
        self,
        table: SampleTable,
        device: torch.device,
        corrupt: CorruptSamples,
        *,
        batch_size: int,
        decoder: DecoderChoice = "auto",
        kernel: Kernel = "pil",
        num_threads: int | None = None,
    ) -> None:
        """
        Args:
            batch_size: the most samples of a request.
            num_threads: that decode; this rank's share of the cores by default.

        Raises:
            UsageError: a decoder that the device does not have.
            TidaliError: DALI cannot work here.
        """
        self.table, self.device, self.corrupt = table, device, corrupt
        self.order_device = torch.device("cpu")
        self.labels = table.labels.to(device)
        self.size = table.info.single_image_size
        self.identity = table.identity
        self.takes_boxes = self.size is None
        self.takes_pieces = self.size is not None and device.type == "cpu"  # so threads decode
        self.names_corrupt = True
        """Whether this rank prints which samples are corrupt even if it is not the main one: no other reads them."""
        threads = num_threads or decoding_threads(device)
        self.decodes_on_gpu = False
        self._decoder: Any = ThreadDecoder(table, kernel, threads, pinned=device.type == "cuda")
        if choose_decoder(decoder, device, self.size) == "dali":
            from tidali.loading.dali import DaliDecoder

            where = torch.device("cpu") if decoder == "cpu" or (kernel != "pil" and self.takes_boxes) else device
            self.decodes_on_gpu = where.type == "cuda"
            # On a GPU DALI 2.4 has two pools of so many threads: its own and its JPEG decoder's.
            dali_threads = threads if where.type == "cpu" else max(threads // 2, 1)
            self._decoder = DaliDecoder(self._decoder, where, batch_size=batch_size, num_threads=dali_threads)

    def close(self) -> None:
        """End decoding, and return the memory that DALI keeps for it on a GPU."""
        self._decoder.close()

    def sizes_of(self, samples: Tensor) -> Tensor:
        return self.table.sizes.index_select(0, samples)

    def read(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Pixels]]:
        started: deque[tuple[Request, Job, Any]] = deque()
        for request in requests:
            job = self._job(request)
            started.append((request, job, self._decoder.start(job)))
            if len(started) > _AHEAD:
                yield self._finish(*started.popleft())
        while started:
            yield self._finish(*started.popleft())

    def _job(self, request: Request) -> Job:
        samples, boxes = request.samples.numpy(), None if request.boxes is None else request.boxes.numpy()
        pieces, out = request.pieces, request.out
        if self.corrupt.positions:
            kept = np.isin(samples, sorted(self.corrupt.positions), invert=True)
            samples, boxes = samples[kept], None if boxes is None else boxes[kept]
            pieces, out = (pieces, out) if kept.all() else (None, None)
        return Job(samples, boxes, request.side, pieces, out, self.table.expect(samples))

    def _finish(self, request: Request, job: Job, decoding: Any) -> tuple[Request, Pixels]:
        stored, bad = self._decoder.finish(job, decoding)
        for number, reason in sorted(bad.items()):
            self.corrupt.add(int(job.positions[number]), reason, every_rank=self.names_corrupt)
        samples = request.samples
        if len(stored) < len(samples):
            samples = torch.from_numpy(np.delete(job.positions, list(bad)))
        if job.pieces is not None:
            return request, Pixels(samples, stored, None, images=stored)
        return request, Pixels(samples, stored.to(self.device, non_blocking=True), None)


def decoding_threads(device: torch.device) -> int:
    """This rank's cores; on a GPU less one, which the thread that launches its kernels needs for itself."""
    return max(rank_threads() - (1 if device.type == "cuda" else 0), 1)


def choose_decoder(
    choice: DecoderChoice, device: torch.device, size: tuple[int, int] | None, *, has_dali: bool | None = None
) -> Literal["threads", "dali"]:
    """Who decodes: DALI, or libjpeg-turbo in threads of this process.

    On a CPU, DALI decodes the part of an image that its box needs, which is 1.3 times as fast as the whole image for random
    crops of photographs, and threads decode whole images of one size, twice as fast as DALI that is handed their bytes. On a
    GPU ``auto`` leaves images of up to 128 x 128 to the CPU: ``mixed`` does their Huffman decoding there too and has a cost
    for each image besides (not measured on a GPU).

    Args:
        size: of all images, None where they differ.

    Raises:
        UsageError: ``mixed`` without a GPU or without DALI.
    """
    has_dali = dali_is_installed() if has_dali is None else has_dali
    if choice == "mixed":
        if device.type == "cpu":
            raise UsageError("--decoder mixed decodes on a GPU, and the device is the CPU; leave --decoder at auto")
        if not has_dali:
            raise UsageError("--decoder mixed needs NVIDIA DALI, which is not installed here; use --decoder cpu")
    if not has_dali:
        return "threads"
    if choice == "mixed":
        return "dali"
    if device.type == "cpu" or choice == "cpu":
        return "dali" if size is None else "threads"
    return "threads" if size is not None and size[0] * size[1] <= _SMALL_PIXELS else "dali"


def dali_is_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the namespace that it shares with other packages
        return False
