"""Samples of more than 8 bits as 8: by the depth that the file declares, else by its high byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImagePalette

from tidali.images.errors import Unusable
from tidali.images.pil import low_bytes

_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE, _PLANAR, _COLOURS, _SAMPLE_FORMAT = 258, 262, 281, 284, 320, 339
"""TIFF 6.0's tags."""
_MIN_IS_WHITE, _SEPARATE_PLANES, _SIGNED = 0, 2, 2
_DARK_LIMIT = 1 << 13
"""An eighth of the range of 16 bits: what stays below it may be samples of 12 bits that no field declares."""

WIDE, DARK = "sixteen_bit", "sixteen_bit_dark"
"""What is counted: images of more than 8 bits, and those of them that are nearly black in 8 bits."""


def is_wide(image: Image.Image) -> bool:
    """Whether an image that is not yet loaded has samples of more than 8 bits."""
    names = [str(tile[3][0] if isinstance(tile[3], tuple) else tile[3]) for tile in getattr(image, "tile", [])]
    return image.mode.startswith("I") or any(";16" in name and name.startswith(("RGB", "CMYK", "LA")) for name in names)


def refuse_without_scale(image: Image.Image, kind: str) -> None:
    """
    Raises:
        Unusable: the samples have no defined 8-bit scale, or PIL reads them wrongly.
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, ())
    # PIL reads 16 bits of a PNG and PPM as "I" too, and signed ones of a TIFF.
    if image.mode == "F" or (image.mode == "I" and kind not in ("PNG", "PPM") and max(bits, default=32) > 16):
        raise Unusable(f"{kind} with 32-bit samples, which have no defined 8-bit scale; convert it to 8 or 16 bits")
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise Unusable(f"{kind} with signed samples, which have no defined 8-bit scale; convert it to 8 or 16 bits")
    if image.mode == "LAB":
        raise Unusable(f"{kind} with Lab colours, which are not read here; convert it to RGB")
    if len(bits) > 1 and max(bits) > 8 and tags.get(_PLANAR) == _SEPARATE_PLANES:
        raise Unusable(f"{kind} with {max(bits)}-bit samples in separate planes, which PIL reads wrongly; convert it to PNG")


def fix_palette(image: Image.Image) -> None:
    """Give a TIFF its colours whose palette has values of 8 bits in place of 16, as some writers make it."""
    colours = getattr(image, "tag_v2", {}).get(_COLOURS, ())
    if image.mode in ("P", "PA") and colours and max(colours) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def eight_bit_rgb(
    image: Image.Image, *, wide: bool, declared_bits: int = 16, reopen: Callable[[], Image.Image] | None = None
) -> tuple[np.ndarray, list[str]]:
    """(H, W, 3) uint8 of a loaded image without transparency in its ``info``, and what is counted.

    Args:
        wide: what `is_wide` said before it was loaded.
        declared_bits: of a sample, as a PNG says; a TIFF's own tags are read here.
        reopen: returns the image anew, not yet loaded; without it, colours of more than 8 bits are their high byte.
    """
    if not wide:
        # PIL cannot convert premultiplied grey at once.
        return np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGB")), []
    tags: Any = getattr(image, "tag_v2", {})
    from_tags = _tiff_bits(tags)
    bits = min(declared_bits, from_tags)
    samples: np.ndarray
    if image.mode.startswith("I"):
        samples = np.asarray(image).astype(np.uint16)[:, :, None]
    else:
        high = np.asarray(image.convert("RGB"))
        samples = high.astype(np.uint16) << 8
        low = None
        if bits < 16 and reopen is not None and int(high.max()) < 1 << max(bits - 8, 0):
            low = low_bytes(reopen)
        if low is not None:
            samples |= low
    rgb, flags = narrow(samples, bits, certain=from_tags == bits)
    return 255 - rgb if tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE else rgb, flags


def narrow(samples: np.ndarray, bits: int, *, certain: bool) -> tuple[np.ndarray, list[str]]:
    """(H, W, 3) uint8 of (H, W, 1 or 3) uint16 samples, and what is counted.

    Args:
        bits: of a sample, as declared; 16 where nothing is.
        certain: the samples fill the low bits. A PNG's should fill the high bits, and 12 bits as they came from a camera are
            told from them by the bits below, which then are zero or repeat the upper ones.
    """
    largest = int(samples.max(initial=0))
    if bits < 16 and largest < 1 << bits and (certain or np.any(samples & ((1 << 16 - bits) - 1))):
        eight = (samples >> bits - 8 if bits >= 8 else samples << 8 - bits).astype(np.uint8)
        flags = [WIDE]
    else:
        eight = (samples >> 8).astype(np.uint8)
        flags = [WIDE, DARK] if largest < _DARK_LIMIT and bits == 16 else [WIDE]
    return np.repeat(eight, 3, axis=2) if eight.shape[2] == 1 else eight, flags


def _tiff_bits(tags: Any) -> int:
    """Bits of a sample by a TIFF's tags; 16 where it does not say."""
    declared = [16, *(bits for bits in tags.get(_BITS_PER_SAMPLE, ()) if bits > 8)]
    largest = tags.get(_MAX_SAMPLE_VALUE, ())
    largest = largest if isinstance(largest, tuple) else (largest,)
    if largest and all(isinstance(value, int) and value > 255 for value in largest):
        declared.append(max(largest).bit_length())
    return min(declared)
