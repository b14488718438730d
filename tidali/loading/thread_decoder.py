"""Batches decoded on a CPU by threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tidali.config import Kernel
from tidali.errors import first_line
from tidali.hardware.cpu_memory import ReusedMemory
from tidali.loading import libjpeg, native
from tidali.loading.decode import decode_rgb
from tidali.loading.resample import PIECE_IMAGES, Pieces, squares_of
from tidali.loading.samples import SampleTable

WRONG_CRC = "its CRC-32 is not its record's"


class Job(NamedTuple):
    """One batch that is to be decoded."""

    positions: NDArray[np.int64]
    """(n,): of the samples in the split's stored order."""
    boxes: NDArray[np.float32] | None
    """(n, 4): see `Request`."""
    side: int
    pieces: Pieces | None = None
    """See `Request`."""
    out: Tensor | None = None
    """See `Request`."""
    shards: Any = ()
    """What `SampleTable.expect` returned: it is referred to until the batch is decoded."""


class ThreadDecoder:
    """Decoding and resizing by threads of this process, each image by one of them."""

    def __init__(self, table: SampleTable, kernel: Kernel, num_threads: int, *, pinned: bool = False) -> None:
        """
        Args:
            pinned: the pixels are in memory that a GPU copies from while the host goes on.
        """
        self.table, self.kernel, self._pinned = table, kernel, pinned
        self._memory = ReusedMemory()
        self._threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tidali-decode")
        counts = table.dataset.manifest.counts
        self._plain = not (counts.get("exif_rotated", 0) or counts.get("cmyk", 0))
        self._libjpeg = libjpeg.load() if self._plain and table.info.single_image_size is not None else None

    def start(self, job: Job) -> Any:
        """The batch's pixels (n, H, W, 3) uint8, or its pieces' images, not yet written, and the work that writes them."""
        out = job.out if job.pieces is None else job.pieces.images
        if out is None or out.device.type != "cpu":
            out = self.empty(len(job.positions), *(self.table.info.single_image_size or (job.side, job.side)))
        decode = self._whole if job.boxes is None else self._squares
        return out, self.in_chunks(len(job.positions), lambda chunk: decode(job, chunk, out))

    def empty(self, count: int, height: int, width: int) -> Tensor:
        """(count, height, width, 3) uint8, uninitialised. torch keeps pinned memory until a copy from it is done."""
        shape = (count, height, width, 3)
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return self._memory.empty(shape, torch.uint8)

    def in_chunks(self, count: int, work: Callable[[range], dict[int, str]]) -> list[Future[dict[int, str]]]:
        """One piece a thread, as one that is done early goes on with the next batch. Four pieces each made a stream of 64 px
        images a tenth slower on two cores."""
        chunks = min(self._threads, count)
        return [
            self._pool.submit(work, range(count * chunk // chunks, count * (chunk + 1) // chunks)) for chunk in range(chunks)
        ]

    def finish(self, job: Job, decoding: Any) -> tuple[Tensor, dict[int, str]]:
        """`start`'s pixels or images of the batch's samples, and why some have none, by their number in the batch, which are
        left out."""
        out, chunks = decoding
        bad = {number: reason for chunk in chunks for number, reason in chunk.result().items()}
        return (out[[number for number in range(len(out)) if number not in bad]] if bad else out), bad

    def close(self) -> None:
        self._pool.shutdown()

    def decode(self, data: memoryview | None, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8] | str:
        """(H, W, 3) uint8 of a sample's bytes, or why it has no pixels."""
        if data is None:
            return WRONG_CRC
        try:
            return decode_rgb(data, plain=self._plain, out=out)
        except Exception as error:  # PIL's decoders raise whatever damaged bytes lead them to
            return first_line(error)

    def _whole(self, job: Job, chunk: range, out: Tensor) -> dict[int, str]:
        decoded, make, bad = out, None, dict[int, str]()
        if job.pieces is not None:
            decoded = torch.empty(PIECE_IMAGES, *(self.table.info.single_image_size or ()), 3, dtype=torch.uint8)
            make = job.pieces.made_from(decoded)
        positions = job.positions[chunk.start : chunk.stop]
        encoded = self.table.in_memory(positions) if self._libjpeg is not None else None
        pixels, begin = decoded.numpy(), chunk.start
        while begin < chunk.stop:
            row = begin % len(pixels)
            end = min(begin + len(pixels) - row, chunk.stop)
            images, part = pixels[row : row + end - begin], slice(begin - chunk.start, end - chunk.start)
            left = np.arange(len(images))
            if encoded is not None:
                left = np.flatnonzero(~native.jpegs(native.load(), self._libjpeg, encoded.part(part), images))
            for number, data in zip(left.tolist(), self.table.read(positions[part][left]) if len(left) else (), strict=True):
                image = self.decode(data, images[number])
                if isinstance(image, str):
                    bad[begin + number] = image
            if make is not None:
                make(begin, end)
            begin = end
        return bad

    def _squares(self, job: Job, chunk: range, out: Tensor) -> dict[int, str]:
        assert job.boxes is not None
        bad = {}
        for number, data in zip(chunk, self.table.read(job.positions[chunk.start : chunk.stop]), strict=True):
            image = self.decode(data)
            if isinstance(image, str):
                bad[number] = image
            else:
                squares_of([image], job.boxes[number : number + 1].tolist(), job.side, self.kernel, out[number : number + 1])
        return bad
