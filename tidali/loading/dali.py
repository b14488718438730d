"""The DALI graph, and batches through it.

tidali chooses the samples and hands DALI their encoded bytes; DALI decodes them, on a GPU or on a CPU. Where images are of
unequal size it is also given a box of each: on a GPU it resizes the box to a square, on a CPU it decodes the box's pixels alone
and `tidali.loading.resample` makes the square, several times as fast as DALI's own resize there.
"""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, backend, fn, pipeline_def, types
from PIL import Image
from torch import Tensor

from tidali.console import warn
from tidali.errors import TidaliError
from tidali.images.read import read_picture
from tidali.loading.dali_check import dali_fault
from tidali.loading.resample import squares_of
from tidali.loading.thread_decoder import WRONG_CRC, Job, ThreadDecoder

Work = Literal["decode", "decode boxes", "resize boxes"]
"""What the graph does: whole images; of each image the pixels of a box; a square of each image's box."""

QUEUE_DEPTH = 3
"""Batches that DALI has in hand at once."""
_MARGIN = 2
"""The cubic's support on each side of a box, in source pixels; times the scale where the image is reduced."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the graph runs."""

    device_id: int | None
    """The GPU's number; None on a CPU."""

    @staticmethod
    def on(device: torch.device) -> Placement:
        return Placement(device_id=(device.index or 0) if device.type == "cuda" else None)

    @property
    def decoder(self) -> Literal["cpu", "mixed"]:
        """``mixed`` takes bytes on the CPU and gives pixels on the GPU."""
        return "cpu" if self.device_id is None else "mixed"


def define_graph(placement: Placement, work: Work, *, batch_size: int, num_threads: int) -> Pipeline:
    """From encoded bytes to pixels, unbuilt. Output: (H, W, 3) uint8 RGB, upright by its EXIF orientation.

    Inputs, named arguments of `feed`: ``encoded`` bytes; for boxes on a CPU ``start`` and ``shape`` (2,) int32, top and left,
    height and width in whole pixels; for squares ``roi_start`` and ``roi_end`` (2,) float32 and ``size`` (2,) float32.

    Args:
        batch_size: the most samples of a batch.
    """

    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=placement.device_id,
        prefetch_queue_depth=QUEUE_DEPTH,
        seed=0,
    )
    def define() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        if work == "decode boxes":
            start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
            # Not on a GPU: nvImageCodec 0.9 crashes on Hopper when it decodes a region (its issue 55).
            return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], output_type=types.RGB)
        # Fancy upsampling is what libjpeg-turbo does on a CPU; without it the GPU's decoder repeats chroma pixels.
        images = fn.decoders.image(encoded, device=placement.decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)
        if work == "decode":
            return images
        start, end, size = (
            fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("roi_start", "roi_end", "size")
        )
        return fn.resize(images, size=size, roi_start=start, roi_end=end, interp_type=types.INTERP_CUBIC, antialias=True)

    return define()


@dataclass(eq=False)
class Queued:
    """A batch that DALI has in hand, or had."""

    part: Job
    """Its sound samples."""
    bad: dict[int, str]
    """The others: number in the batch -> what is wrong."""
    starts: NDArray[np.int32] | None = None
    """(n, 2): top and left of each image's decoded part; None where that is all of it."""
    pixels: Any = None
    """DALI's list of tensors; None until it is taken, and where DALI failed."""


class DaliDecoder:
    """Batches decoded by DALI, which works on the next ones while one is used."""

    def __init__(self, threads: ThreadDecoder, device: torch.device, *, batch_size: int, num_threads: int) -> None:
        """
        Args:
            threads: reads the samples, and decodes those of a batch that DALI fails on.
            device: where DALI's pixels are.
            batch_size: the most samples of a batch.

        Raises:
            TidaliError: DALI cannot work here.
        """
        self._threads, self._device = threads, device
        self._sizes = threads.table.sizes.numpy()
        self._work: Work = "decode"
        if threads.table.info.single_image_size is None:
            self._work = "decode boxes" if device.type == "cpu" else "resize boxes"
        self._queue: deque[Queued] = deque()
        self._named: set[int] = set()
        """Samples, by their position, that were named as ones that DALI alone fails on."""
        self._in_use: deque[tuple[torch.cuda.Event, Any]] = deque()
        """DALI's pixels that a queued copy still reads, and what tells its end."""
        self._pipe: Any = define_graph(Placement.on(device), self._work, batch_size=batch_size, num_threads=num_threads)
        try:
            self._pipe.build()
            self._fill_queue()
        except RuntimeError as error:
            raise TidaliError(f"DALI cannot work here: {message_of(error)}; use --decoder cpu") from None

    def _fill_queue(self) -> None:
        """Run as many batches of one pixel as DALI's queue is long: its first run takes that many, and needs all of them."""
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, "PNG")
        box = Job(np.empty(0, np.int64), np.array([[0, 0, 1, 1]], np.float32), 1)
        for _ in range(QUEUE_DEPTH):
            self._feed([memoryview(file.getvalue())], box, np.array([[1, 1]]))
        self._pipe.schedule_run()
        for _ in range(QUEUE_DEPTH):
            self._pipe.outputs()

    def _feed(self, encoded: Sequence[memoryview], job: Job, sizes: NDArray[Any]) -> NDArray[np.int32] | None:
        """Feed one batch. Returns the top and left of each image's decoded region, if only a region is decoded."""
        self._pipe.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        if self._work == "decode" or job.boxes is None:
            return None
        starts, inputs = None, {}
        if self._work == "decode boxes":
            starts, shapes = regions(job.boxes, sizes, job.side)
            inputs = {"start": starts, "shape": shapes}
        else:
            ends = job.boxes[:, :2] + job.boxes[:, 2:]
            inputs = {"roi_start": job.boxes[:, :2], "roi_end": ends, "size": np.full_like(ends, job.side)}
        for name, values in inputs.items():
            self._pipe.feed_input(name, np.ascontiguousarray(values))
        return starts

    def start(self, job: Job) -> Queued:
        """Check a batch's bytes and queue it; `finish` gives its pixels."""
        data: dict[int, memoryview] = {}

        def check(chunk: range) -> dict[int, str]:
            found = dict(zip(chunk, self._threads.table.read(job.positions[chunk.start : chunk.stop]), strict=True))
            data.update((number, read) for number, read in found.items() if read is not None)
            return {number: WRONG_CRC for number, read in found.items() if read is None}

        checked = self._threads.in_chunks(len(job.positions), check)
        bad = {number: why for chunk in checked for number, why in chunk.result().items()}
        sound = sorted(data)
        part = Job(job.positions[sound], None if job.boxes is None else job.boxes[sound], job.side)
        queued = Queued(part, bad)
        if sound:
            if len(self._queue) == QUEUE_DEPTH:
                self._take_oldest()
            queued.starts = self._feed([data[number] for number in sound], part, self._sizes[part.positions])
            self._pipe.schedule_run()
            self._queue.append(queued)
        return queued

    def _take_oldest(self) -> None:
        """Take DALI's next batch and keep it for whoever queued it: DALI returns batches in the order they were queued."""
        queued = self._queue.popleft()
        with suppress(RuntimeError):  # the message names one sample at best; `finish` decodes the batch another way
            (queued.pixels,) = self._pipe.outputs(cuda_stream=self._stream())

    def _stream(self) -> torch.cuda.Stream | None:
        """The stream that waits for DALI's work in place of the host, which would wait for the prefetched batches' too."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def _copied(self, queued: Queued) -> Tensor:
        """DALI's pixels in torch's memory.

        DALI gives the memory of a batch back as soon as nobody refers to it, ordered after the work of the stream that it was
        bound to when it was handed out, but not after what a view of it was used for on another stream or later
        (dali/pipeline/data/buffer.h of its public source; not tried on a GPU). A copy is torch's, whose allocator is told of
        other streams; DALI's own pixels live until the copy is done.
        """
        while self._in_use and self._in_use[0][0].query():
            self._in_use.popleft()
        copy = torch.from_dlpack(queued.pixels.as_tensor()).clone()
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        self._in_use.append((done, queued.pixels))
        queued.pixels = None
        return copy

    def finish(self, job: Job, queued: Queued) -> tuple[Tensor, dict[int, str]]:
        """As `ThreadDecoder.finish`; the pixels are on DALI's device."""
        while queued in self._queue:
            self._take_oldest()
        part, bad, starts, pixels = queued.part, queued.bad, queued.starts, queued.pixels
        if pixels is None:  # DALI failed: the threads find out which samples cannot be decoded, if any
            decoded, worse = self._threads.finish(part, self._threads.start(part))
            if not worse and self._named.isdisjoint(part.positions.tolist()):
                self._name_failing(part)
            number_of = {position: number for number, position in enumerate(job.positions.tolist())}
            worse = {number_of[part.positions[number]]: why for number, why in worse.items()}
            return decoded.to(self._device, non_blocking=True), bad | worse
        if self._device.type == "cuda":
            return self._copied(queued), bad
        if self._work != "decode boxes":
            return torch.from_dlpack(pixels.as_tensor()), bad  # a view, valid as long as it is held
        out = self._threads.empty(len(part.positions), job.side, job.side)
        assert part.boxes is not None
        assert starts is not None
        boxes = part.boxes - np.pad(starts, ((0, 0), (0, 2)))  # of the decoded part of each image

        def resize(chunk: range) -> dict[int, str]:
            images, part = [np.asarray(pixels.at(number)) for number in chunk], slice(chunk.start, chunk.stop)
            squares_of(images, boxes[part].tolist(), job.side, self._threads.kernel, out[part])
            return {}

        for done in self._threads.in_chunks(len(out), resize):
            done.result()
        return out, bad

    def _name_failing(self, part: Job) -> None:
        """Print the samples of a batch that DALI alone fails on. The batch was decoded without it, which is slower."""
        table = self._threads.table
        for position, read in zip(part.positions.tolist(), table.read(part.positions), strict=True):
            data = bytes(read or b"")
            picture = read_picture(data, max_pixels=sys.maxsize)
            fault = dali_fault(data, picture.upright) if picture.kept else "not every decoder reads its bytes alike"
            if fault is not None:
                self._named.add(position)
                text = "DALI fails on its batch, which is decoded without it; 'tidali verify --decode' says how to fix it"
                warn(f"{table.describe(position)}: {fault}. {text}", every_rank=True)

    def close(self) -> None:
        """End decoding. DALI keeps freed memory for later pipelines, until it is asked to return it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what is queued may still read it
        self._in_use.clear()
        self._queue.clear()
        self._pipe = None
        backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]  # which its stubs leave out
        self._threads.close()


def regions(boxes: np.ndarray, sizes: np.ndarray, res: int) -> tuple[np.ndarray, np.ndarray]:
    """The rectangles of whole pixels that a resize of the boxes reads.

    Args:
        boxes: (n, 4) float: top, left, height, width.
        sizes: (n, 2): height and width of the images.
        res: side of the squares, in pixels.

    Returns:
        Start (n, 2) and shape (n, 2), int32.
    """
    margin = _MARGIN * np.maximum(boxes[:, 2:] / res, 1) + 1
    start = np.clip(np.floor(boxes[:, :2] - margin), 0, sizes - 1).astype(np.int32)
    end = np.clip(np.ceil(boxes[:, :2] + boxes[:, 2:] + margin), start + 1, sizes).astype(np.int32)
    return start, end - start


def message_of(error: RuntimeError) -> str:
    """The one line of DALI's multi-line report that says what went wrong."""
    text = str(error)
    _, found, tail = text.partition("encountered:")
    lines = [line.strip() for line in (tail if found else text).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
