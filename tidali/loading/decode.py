"""One encoded image to pixels on a CPU."""

from __future__ import annotations

import sys

import numpy as np
import simplejpeg

from tidali.images.read import decode_kept, read_picture


def decode_rgb(data: memoryview, *, plain: bool, out: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright by its EXIF orientation; the pixels that DALI's decoder gives on a CPU.

    JPEG by libjpeg-turbo, which releases the interpreter's lock: two threads decode 64 px images twice as fast as DALI's
    operator that is handed bytes. CMYK and other formats by PIL.

    Args:
        plain: no JPEG of the data set is CMYK or has an EXIF orientation, so that neither has to be looked for.
        out: (H, W, 3) uint8, where the pixels go.

    Raises:
        Unusable: it cannot be decoded.
        ValueError: ``out`` is of another size.
    """
    if plain:
        try:
            return _of_size(simplejpeg.decode_jpeg(data, buffer=out), out)
        except ValueError:  # no JPEG, or a damaged one
            pass
    content = bytes(data)
    try:
        pixels = decode_kept(content)
    except Exception:  # of damaged bytes, or of those that an earlier version packed: the checks say which
        pixels = read_picture(content, max_pixels=sys.maxsize).upright  # the packer applied the user's limit
    _of_size(pixels, out)
    if out is None:
        return pixels
    out[:] = pixels
    return out


def _of_size(pixels: np.ndarray, expected: np.ndarray | None) -> np.ndarray:
    if expected is not None and pixels.shape != expected.shape:
        raise ValueError(
            f"{pixels.shape[0]} x {pixels.shape[1]} pixels, its record says {expected.shape[0]} x {expected.shape[1]}"
        )
    return pixels
