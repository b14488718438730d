"""Inspect one image file: whether it is usable, the bytes to store, its displayed size, its pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from shards.resample import resize
from tidali.images.errors import TooLarge, Unusable
from tidali.images.read import read_picture

__all__ = ["JPEG_QUALITY", "Inspected", "Unusable", "inspect"]

JPEG_QUALITY = 95
"""Of resized images: what OpenCV's ``imwrite`` uses, which the study's step 2 used."""


@dataclass(slots=True)
class Inspected:
    """A usable image."""

    rgb: np.ndarray
    """(H, W, 3) uint8 pixels of ``data``, before its EXIF orientation."""
    extension: str
    data: bytes
    """What is stored: the source's bytes, or an encoding of their pixels that DALI and PIL agree on."""
    flags: list[str]
    """What the manifest counts: what `tidali.images.read.Picture` names, 'reencoded' and 'resized'."""
    size: tuple[int, int]
    """Height and width as displayed, after the EXIF orientation."""


def inspect(data: bytes, *, max_pixels: int, size_px: int | None = None, kernel: str = "pil") -> Inspected:
    """Decode an image and choose the bytes to store: its own where every decoder reads the same from them, else an upright PNG.

    Raises:
        Unusable: empty, no image, truncated, corrupt, or more than ``max_pixels`` by its header.
    """
    try:
        picture = read_picture(data, max_pixels=max_pixels)
    except TooLarge as error:
        raise Unusable(f"{error} that --max-pixels sets") from None
    if size_px is not None:
        rgb = resize(picture.upright, size_px, kernel)
        jpeg = simplejpeg.encode_jpeg(rgb, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")
        return Inspected(rgb, "jpg", jpeg, [*picture.flags, "resized"], (size_px, size_px))
    if picture.kept is not None:
        return Inspected(picture.rgb, picture.kept, data, picture.flags, picture.size)
    png = io.BytesIO()
    Image.fromarray(picture.upright).save(png, format="PNG")
    return Inspected(picture.upright, "png", png.getvalue(), [*picture.flags, "reencoded"], picture.size)
