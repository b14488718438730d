"""Inspect one image file: whether it is usable, the bytes to store, its displayed size, its pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from shards.resample import resize, shrink
from tidali.images.errors import TooLarge, Unusable
from tidali.images.read import read_picture

__all__ = ["SQUARE_QUALITY", "Inspected", "Resizing", "Unusable", "inspect"]

SQUARE_QUALITY = 95
"""Of images resized to a square: what OpenCV's ``imwrite`` uses, which the study's step 2 used."""
_JPEG_SIDE_LIMIT = 65_500
"""libjpeg's JPEG_MAX_DIMENSION."""


@dataclass(frozen=True)
class Resizing:
    """What is done to images before they are stored; nothing by default. At most one of the sizes is set."""

    size_px: int | None = None
    """Every image becomes a square of this edge, by ``kernel``, 'pil' or 'opencv'."""
    kernel: str = "pil"
    shorter_side_px: int | None = None
    """Images whose shorter side is longer than this are shrunk to it, and encoded with ``quality``."""
    quality: int = 92


AS_IT_IS = Resizing()


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


def inspect(data: bytes, *, max_pixels: int, resizing: Resizing = AS_IT_IS) -> Inspected:
    """Decode an image and choose the bytes to store: its own where every decoder reads the same from them, else an upright PNG.
    A resized image is an upright JPEG.

    Raises:
        Unusable: empty, no image, truncated, corrupt, or more than ``max_pixels`` by its header.
    """
    try:
        picture = read_picture(data, max_pixels=max_pixels)
    except TooLarge as error:
        raise Unusable(f"{error} that --max-pixels sets") from None
    if resizing.size_px is not None:
        rgb = resize(picture.upright, resizing.size_px, resizing.kernel)
        return _encoded(rgb, SQUARE_QUALITY, [*picture.flags, "resized"])
    if resizing.shorter_side_px is not None and min(picture.size) > resizing.shorter_side_px:
        pixels = picture.upright[..., 0] if "grey" in picture.flags else picture.upright
        return _encoded(shrink(pixels, resizing.shorter_side_px), resizing.quality, [*picture.flags, "resized"])
    if picture.kept is not None:
        return Inspected(picture.rgb, picture.kept, data, picture.flags, picture.size)
    return _as_png(picture.upright, [*picture.flags, "reencoded"])


def _encoded(pixels: np.ndarray, quality: int, flags: list[str]) -> Inspected:
    """(H, W, 3) or, grey, (H, W) uint8 as a JPEG with halved chroma; as PNG where it is too long for one."""
    if max(pixels.shape[:2]) > _JPEG_SIDE_LIMIT:
        return _as_png(pixels, flags)
    if pixels.ndim == 3:
        jpeg = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")
        return Inspected(pixels, "jpg", jpeg, flags, pixels.shape[:2])
    grey = np.ascontiguousarray(pixels[..., None])
    jpeg = simplejpeg.encode_jpeg(grey, quality=quality, colorspace="GRAY", colorsubsampling="Gray")
    return Inspected(np.repeat(grey, 3, axis=2), "jpg", jpeg, flags, pixels.shape[:2])


def _as_png(pixels: np.ndarray, flags: list[str]) -> Inspected:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG")
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    return Inspected(rgb, "png", png.getvalue(), flags, pixels.shape[:2])
