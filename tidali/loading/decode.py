"""One encoded image to pixels on a CPU."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

_JPEG_START = b"\xff\xd8"
_EXIF_HEADER = b"Exif\0\0"
_FOUR_INKS = ("CMYK", "YCCK")  # libjpeg-turbo's RGB of them is a grey level off PIL's and DALI's
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (TIFF 6.0, tag 274)."""


def decode_rgb(data: memoryview, *, plain: bool, out: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright by its EXIF orientation; the pixels that DALI's decoder gives on a CPU.

    JPEG by libjpeg-turbo, which releases the interpreter's lock: two threads decode 64 px images twice as fast as DALI's
    operator that is handed bytes. CMYK, turned images, what it refuses, and other formats by PIL.

    Args:
        plain: no JPEG of the data set is CMYK or has an EXIF orientation, so that neither has to be looked for.
        out: (H, W, 3) uint8, where the pixels go.

    Raises:
        OSError, SyntaxError, ValueError, ...: it cannot be decoded, or ``out`` is of another size.
    """
    if data[:2] == _JPEG_START:
        try:
            if plain or (_EXIF_HEADER not in bytes(data) and simplejpeg.decode_jpeg_header(data)[2] not in _FOUR_INKS):
                return _of_size(simplejpeg.decode_jpeg(data, buffer=out), out)
        except ValueError:
            pass
    pixels = _of_size(np.asarray(upright_rgb(Image.open(io.BytesIO(data)))), out)
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


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any image as the packer stores it and DALI decodes it: RGB, upright by its EXIF orientation, alpha dropped, of 16-bit
    samples the high byte (PIL's own conversion cuts grey ones off at 255), of an animation the first frame.

    Raises:
        ValueError: 32-bit samples, which have no defined 8-bit scale.
        OSError, SyntaxError, ...: PIL's decoders raise whatever damaged bytes lead them to.
    """
    image.load()
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # those two give 16 bits as "I"
        raise ValueError("32-bit samples, which have no defined 8-bit scale")
    if image.mode.startswith("I"):
        rgb = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = _UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF is no damaged image
        return 1
