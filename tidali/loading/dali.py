"""The DALI graph: from shards to batches. One definition for CPU and GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tidali.dataset.shard_bytes import LABEL_EXTENSION
from tidali.errors import TidaliError

try:
    from nvidia.dali import Pipeline, fn, pipeline_def, types
except ImportError as error:  # pragma: no cover - an installation without DALI
    raise TidaliError(f"NVIDIA DALI cannot be imported ({error}); on Linux: pip install nvidia-dali-cuda120") from None


TENSOR_INIT_BYTES = 4096
"""Address space that each sample in the shuffle buffer reserves. At DALI's default, 1 MiB, a buffer of 20,000 takes 44 GB."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the graph's operators run: the only difference between a CPU and a GPU pipeline."""

    decoder: str
    """``cpu``, or ``mixed``: Huffman decoding on the CPU, the rest on the GPU."""
    device_id: int | None
    """None builds without a CUDA driver."""

    @property
    def on_gpu(self) -> bool:
        return self.device_id is not None

    @staticmethod
    def of(device_type: str, index: int | None) -> Placement:
        if device_type == "cuda":
            return Placement(decoder="mixed", device_id=index or 0)
        return Placement(decoder="cpu", device_id=None)


@dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """What a reader opens: one split's tars, their indexes, and what is in them."""

    tars: Sequence[Path]
    indexes: Sequence[Path]
    extensions: Sequence[str]
    """Of the image members."""
    num_digits: int
    """Of a label."""


def decode_graph(encoded: Any, decoder: str) -> Any:
    """Encoded bytes -> (H, W, 3) uint8 RGB, upright (the EXIF orientation applied)."""
    # Without jpeg_fancy_upsampling the GPU decoder replicates chroma instead of filtering it, as libjpeg does on the CPU.
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)


def resize_graph(images: Any, shorter: int) -> Any:
    """Resize the shorter side to this many pixels by DALI's cubic kernel: a = -0.5, antialiased, as PIL's. Keeps uint8."""
    return fn.resize(images, resize_shorter=shorter, interp_type=types.INTERP_CUBIC, antialias=True)


def image_graph(
    encoded: Any,
    *,
    decoder: str,
    res: int,
    resize: bool,
    mean: Sequence[float],
    std: Sequence[float],
    mirror: Any = 0,
) -> Any:
    """Encoded bytes -> (res, res, 3) float32 HWC, ``(pixel / 255 - mean) / std``.

    The shorter side is resized to ``res`` (see `resize_graph`), rounded to uint8, and the centre is cropped. ``resize=False``
    where every image has the size already: DALI would copy.
    """
    images = decode_graph(encoded, decoder)
    if resize:
        images = resize_graph(images, res)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="HWC",
        crop=(res, res) if resize else None,
        mirror=mirror,
        mean=[255.0 * m for m in mean],
        std=[255.0 * s for s in std],
    )


def label_graph(digits: Any, num_digits: int) -> Any:
    """Fixed-width ASCII digits (num_digits,) uint8 -> int64 scalar."""
    weights = types.Constant(np.array([10**k for k in reversed(range(num_digits))], np.int32))
    return fn.reductions.sum((fn.cast(digits, dtype=types.INT32) - ord("0")) * weights)


def read_graph(
    files: ShardFiles,
    *,
    shuffle_buffer: int,
    rank: int,
    world_size: int,
    use_mmap: bool = True,
) -> Any:
    """Encoded image bytes and label digits of this rank's samples, for ever; each epoch's last batch is padded, so that epochs
    start clean on every rank.

    Args:
        shuffle_buffer: 0 reads the stored order, each rank always its own range. Otherwise tars come in a new order each epoch
            and samples are drawn from a buffer of this many: a true permutation where it holds the rank's whole share.
        use_mmap: map the tars instead of reading them. Mapped pages count as the process's memory for as long as it reads.
    """
    shuffle = shuffle_buffer > 0
    return fn.readers.webdataset(
        name="reader",
        paths=[str(path) for path in files.tars],
        index_paths=[str(path) for path in files.indexes],
        ext=[";".join(files.extensions), LABEL_EXTENSION],
        missing_component_behavior="error",
        random_shuffle=shuffle,
        initial_fill=max(shuffle_buffer, 1),
        shuffle_after_epoch=shuffle,
        stick_to_shard=not shuffle,
        pad_last_batch=True,
        shard_id=rank,
        num_shards=world_size,
        tensor_init_bytes=TENSOR_INIT_BYTES,
        dont_use_mmap=not use_mmap,
    )


def batch_pipeline(
    files: ShardFiles,
    *,
    batch_size: int,
    res: int,
    resize: bool,
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool,
    shuffle_buffer: int,
    rank: int,
    world_size: int,
    seed: int,
    num_threads: int,
    placement: Placement,
    checkpoint: bytes | None = None,
    as_stored: bool = False,
) -> Pipeline:
    """From shards to batches, unbuilt. Outputs: images (res, res, 3) float32 HWC, labels int64 scalar.

    Args:
        as_stored: leave the images as decoded, (H, W, 3) uint8 HWC, for another resampler, and with ``flip`` give the mirror
            flags, int32 scalars on the CPU, as a third output.
    """

    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=placement.device_id,
        seed=seed + rank,  # ranks that share a seed would draw the same flips
        enable_checkpointing=True,  # always on: shuffle_after_epoch's order may depend on it
        checkpoint=checkpoint,
    )
    def define() -> Any:
        encoded, digits = read_graph(files, shuffle_buffer=shuffle_buffer, rank=rank, world_size=world_size)
        mirror = fn.random.coin_flip() if flip else 0
        labels = label_graph(digits, files.num_digits)
        labels = labels.gpu() if placement.on_gpu else labels
        if as_stored:
            images = decode_graph(encoded, placement.decoder)
            return (images, labels, mirror) if flip else (images, labels)
        images = image_graph(encoded, decoder=placement.decoder, res=res, resize=resize, mean=mean, std=std, mirror=mirror)
        return images, labels

    return define()


def decode_pipeline(
    files: ShardFiles,
    *,
    batch_size: int,
    square: int | None,
    rank: int,
    world_size: int,
    num_threads: int,
    placement: Placement,
) -> Pipeline:
    """Decoding alone, in stored order, unbuilt. Outputs: images (H, W, 3) uint8 RGB, labels int64 scalar on the CPU.

    Args:
        square: side of the square that every image becomes, its shorter side resized and its centre cropped; None keeps it.
    """

    @pipeline_def(batch_size=batch_size, num_threads=num_threads, device_id=placement.device_id, seed=0)
    def define() -> Any:
        encoded, digits = read_graph(files, shuffle_buffer=0, rank=rank, world_size=world_size, use_mmap=False)
        images = decode_graph(encoded, placement.decoder)
        if square is not None:
            images = fn.crop(resize_graph(images, square), crop=(square, square))
        return images, label_graph(digits, files.num_digits)

    return define()
