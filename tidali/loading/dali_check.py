"""Whether DALI, on a CPU, reads an image as it was read to be packed: for ``tidali verify --decode``, without torch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

_TOLERANCE = 1  # grey level: decoders convert four inks to RGB with roundings of their own


def dali_fault(data: bytes, expected: np.ndarray) -> str | None:
    """What is wrong, if anything.

    Args:
        data: the image's bytes. Only those of which `tidali.images.read.Picture.kept` is true: others may end the process.
        expected: (H, W, 3) uint8, upright.
    """
    try:
        pixels = _decode(data)
    except RuntimeError as error:
        _pipeline.cache_clear()  # one that has failed stays unusable
        return f"DALI fails on it ({' '.join(str(error).partition('encountered:')[2].split())[:200] or 'no reason given'})"
    if pixels.shape != expected.shape:
        return f"DALI reads {pixels.shape[0]} x {pixels.shape[1]} pixels"
    difference = int(np.abs(pixels.astype(np.int16) - expected).max())
    return f"DALI reads other pixels, by up to {difference} grey levels" if difference > _TOLERANCE else None


def _decode(data: bytes) -> np.ndarray:
    pipeline = _pipeline()
    pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8)])
    (images,) = pipeline.run()
    return np.asarray(images.at(0))


@functools.cache
def _pipeline() -> Any:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
    def define() -> Any:
        return fn.decoders.image(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1), output_type=types.RGB)

    pipeline = define()
    pipeline.build()
    return pipeline
