"""How an image has to be turned for display: PIL's answer, and that of decoders that read only plain EXIF."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from PIL import Image

from tidali.images.pil import silent

TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (TIFF 6.0, tag 274)."""

# What the EXIF reader of OpenCV and nvImageCodec, which DALI decodes with, reads of the first directory. One such entry that
# points outside the block makes it ignore the whole block.
_TEXTS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298)
_RATIONALS = {0x011A: 1, 0x011B: 1, 0x013E: 2, 0x013F: 6, 0x0211: 3, 0x0214: 6}


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) uint8 pixels turned as an EXIF orientation of 1..8 says."""
    turn = _TURNS.get(orientation)
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def displayed(image: Image.Image) -> int:
    """PIL's answer, 1..8, as `PIL.ImageOps.exif_transpose` applies it: from EXIF with a value of any type, else from XMP.

    1 if there is none, it is out of range, or the metadata is damaged, which does not make the image unusable.
    """
    try:
        with silent():
            value = image.getexif().get(TAG, 1)
    except Exception:  # whatever damaged bytes lead PIL to
        return 1
    return int(value) if value in range(1, 9) else 1


def displayed_by(info: dict[str, Any]) -> int:
    """As `displayed`, of metadata as PIL names it: ``exif`` and ``xmp`` bytes, or texts of a PNG."""
    carrier = Image.Image()
    carrier.info.update(info)
    return displayed(carrier)


def plain(exif: bytes) -> int:
    """The answer of a decoder that reads an EXIF block (from its TIFF header on) by the EXIF specification alone, 1..8.

    0 where nvImageCodec ignores the block for a damaged entry behind the orientation, which OpenCV then still applies.
    """
    order = "<" if exif.startswith(b"II") else ">"  # whatever else it begins with
    found = None
    try:
        if _number(order + "H", exif, 2) != 42:
            return 1
        start = _number(order + "I", exif, 4)
        for number in range(_number(order + "H", exif, start)):
            entry = start + 2 + 12 * number
            tag = _number(order + "H", exif, entry)
            if tag == TAG:
                value = _number(order + "H", exif, entry + 8)
                found = value if found is None else found
            elif tag in _TEXTS:
                size = _number(order + "I", exif, entry + 4)
                _inside(exif, _number(order + "I", exif, entry + 8) if size > 4 else 8, size)
            elif tag in _RATIONALS:
                _inside(exif, _number(order + "I", exif, entry + 8), 8 * _RATIONALS[tag])
    except struct.error:
        return 1 if found is None else 0
    return found if found is not None and 1 <= found <= 8 else 1


def _number(form: str, data: bytes, at: int) -> int:
    value: int = struct.unpack_from(form, data, at)[0]
    return value


def _inside(data: bytes, at: int, size: int) -> None:
    if at + size > len(data):
        raise struct.error(f"{size} bytes at {at}")
