"""Inspect one image file: whether it is usable, the bytes to store, its displayed size, its pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from shards.resample import resize

JPEG_QUALITY = 95
"""Of resized images: what OpenCV's ``imwrite`` uses, which the study's step 2 used."""

# What the packer opens besides JPEG. A closed list: PIL would hand an EPS to Ghostscript.
_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_EXIF_ORIENTATION = 0x0112


class Unusable(Exception):
    """The bytes are not a usable image; the text says why."""


@dataclass(slots=True)
class Inspected:
    """A usable image."""

    rgb: np.ndarray
    """(H, W, 3) uint8 pixels, before the EXIF orientation."""
    extension: str
    data: bytes
    """What is stored: the source's bytes, or an encoding of their pixels that DALI and PIL agree on."""
    flags: list[str]
    """What the manifest counts: 'grey', 'cmyk', 'alpha', 'sixteen_bit', 'exif_rotated', 'reencoded'."""
    orientation: int = 1
    """EXIF's, 1..8."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as displayed, after the EXIF orientation."""
        height, width = self.rgb.shape[:2]
        return (width, height) if self.orientation >= 5 else (height, width)  # 5..8 turn by 90 degrees


def inspect(data: bytes, *, max_pixels: int, size_px: int | None = None, kernel: str = "pil") -> Inspected:
    """Decode an image and choose the bytes to store.

    A JPEG's bytes are kept. Where libjpeg-turbo warns (a missing end marker, a corrupt middle), DALI fails or silently shows
    other pixels, so the image is unusable. PNG of up to 8 bits, still WebP without EXIF and uncompressed BMP are kept: DALI
    2.4.0 and PIL give the same pixels for them, alpha dropped. Everything else is stored as PNG.

    Raises:
        Unusable: empty, no image, truncated, corrupt, or more than ``max_pixels`` by its header.
    """
    if not data:
        raise Unusable("empty file")
    image = _decode_jpeg(data, max_pixels) or _decode_other(data, max_pixels)
    return image if size_px is None else _resized(image, size_px, kernel)


def _decode_jpeg(data: bytes, max_pixels: int) -> Inspected | None:
    """None if libjpeg-turbo's header reader does not know the file: PIL then decides. Measured on 64-pixel images, one core:
    37,000 to 42,000 images/s, PIL 5,600 to 5,900."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, max_pixels)
    flags = []
    try:
        rgb = simplejpeg.decode_jpeg(data, strict=True)
    except ValueError as error:
        raise Unusable(f"damaged JPEG: {error}") from None
    if colorspace in ("CMYK", "YCCK"):
        flags.append("cmyk")
        with _open(data) as image, _decoding("JPEG"):
            rgb = np.asarray(image.convert("RGB"))  # libjpeg-turbo's own conversion is one grey level off PIL's and DALI's
    elif colorspace == "Gray":
        flags.append("grey")
    orientation = 1
    if b"Exif\0\0" in data:
        with _open(data) as image:
            orientation = _orientation(image)
    if orientation != 1:
        flags.append("exif_rotated")
    return Inspected(rgb, "jpg", data, flags, orientation)


def _decode_other(data: bytes, max_pixels: int) -> Inspected:
    with _open(data) as image:
        _check_size(image.width, image.height, max_pixels)
        with _decoding(image.format):
            image.load()
            orientation = _orientation(image)
            rgb = _rgb(image)
            flags = _flags(image, data)
            extension = _kept_extension(image, data)
        if orientation != 1:
            flags.append("exif_rotated")
    if extension:
        return Inspected(rgb, extension, data, flags, orientation)
    upright = _upright(rgb, orientation)
    png = io.BytesIO()
    Image.fromarray(upright).save(png, format="PNG")
    return Inspected(upright, "png", png.getvalue(), [*flags, "reencoded"])


def _resized(image: Inspected, size_px: int, kernel: str) -> Inspected:
    rgb = resize(_upright(image.rgb, image.orientation), size_px, kernel)
    data = simplejpeg.encode_jpeg(rgb, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")
    flags = [flag for flag in image.flags if flag != "reencoded"]
    return Inspected(rgb, "jpg", data, [*flags, "resized"])


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return rgb
    image = Image.fromarray(rgb)
    image.getexif()[_EXIF_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def _kept_extension(image: Image.Image, data: bytes) -> str | None:
    """The extension under which the bytes are kept; None if DALI 2.4.0 fails on them or decodes other pixels than PIL (both
    were run on every kind named here)."""
    if getattr(image, "n_frames", 1) > 1:
        return None
    match image.format:
        case "JPEG":
            return "jpg"
        case "PNG" if not _is_sixteen_bit_png(data):
            return "png"
        case "WEBP" if not image.info.get("exif"):
            return "webp"  # with an EXIF chunk DALI's parser reports an unexpected end of stream
        case "BMP" if data[30:34] == b"\0\0\0\0":
            return "bmp"
    return None


def _is_sixteen_bit_png(data: bytes) -> bool:
    return data[24] == 16  # bit depth: signature 8, chunk head 8, width and height 8


def _flags(image: Image.Image, data: bytes) -> list[str]:
    flags = []
    if image.mode in ("1", "L", "LA", "I;16", "I;16B", "I"):
        flags.append("grey")
    if image.mode == "CMYK":
        flags.append("cmyk")
    if image.has_transparency_data:
        flags.append("alpha")
    if image.mode.startswith("I") or (image.format == "PNG" and _is_sixteen_bit_png(data)):
        flags.append("sixteen_bit")
    return flags


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8. Of 16-bit samples the high byte, which is what PIL itself takes of 16-bit RGB."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise Unusable(f"{image.format} with 32-bit samples, which have no defined 8-bit scale")
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 if there is none or it is out of range, as decoders treat it."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # an image with damaged EXIF is still usable
        return 1
    return value if value in range(1, 9) else 1


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Unusable(f"declares {width} x {height} pixels, more than --max-pixels {max_pixels}")


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """PIL's view of the header, with PIL's own pixel limit off: ``max_pixels`` is the limit here."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on damaged metadata, which does not matter here
            try:
                image = Image.open(io.BytesIO(data), formats=_PIL_FORMATS)
            except Exception as error:
                known = type(error).__name__ != "UnidentifiedImageError"
                raise Unusable(f"damaged image: {error}" if known else "no image that can be identified") from None
            with image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _decoding(kind: str | None) -> Iterator[None]:
    """PIL's decoders raise any kind of exception on hostile bytes, also while they count frames or look for transparency."""
    try:
        yield
    except Unusable:
        raise
    except Exception as error:
        raise Unusable(f"damaged {kind}: {error}") from None
