"""The one way that files are opened with PIL: its limits and warnings off, and every error one reason."""

from __future__ import annotations

import io
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, ImageFile

from tidali.images.errors import TooLarge, Unusable

_LOCK = threading.RLock()
_UNKNOWN_VARIANT = ("unknown pixel mode", "unknown data organization")
"""What PIL says of a whole TIFF that it has no decoder for."""
_SWAPPED = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
"""Order of the bytes of 16-bit samples in PIL's names of raw modes -> the other order."""


@contextmanager
def silent(max_pixels: int | None = None) -> Iterator[None]:
    """PIL with this limit on pixels in place of its own, without its warnings about metadata, and strict about missing pixels.

    All three are global variables, so one thread at a time is inside. Pixels are decoded outside.
    """
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, lenient


@contextmanager
def one_reason(kind: str) -> Iterator[None]:
    """Whatever PIL's decoders raise on damaged bytes becomes `Unusable`."""
    try:
        yield
    except Unusable:
        raise
    except MemoryError:
        raise Unusable(f"{kind} that needs more memory than there is") from None
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if text in _UNKNOWN_VARIANT:
            raise Unusable(f"{kind} of a variant that PIL does not read ({text}); convert it to JPEG or PNG") from None
        raise Unusable(f"damaged {kind}: {text}") from None


def open_file(data: bytes, kind: str, max_pixels: int | None = None) -> Image.Image:
    """The image that a file of a known format begins with; only its header has been read.

    Raises:
        TooLarge: it declares so many pixels that PIL would not open it: for some formats it makes room for them at once.
        Unusable: the header is damaged, or this PIL does not have the format.
    """
    with one_reason(kind), silent(max_pixels):
        try:
            return open_unguarded(data, kind)
        except Image.DecompressionBombError:
            raise TooLarge(f"declares more than twice as many pixels as the limit of {max_pixels}") from None


def open_unguarded(data: bytes, kind: str) -> Image.Image:
    """
    Raises:
        Unusable: this PIL does not have the format.
        Exception: any, of a damaged header.
    """
    Image.init()
    factory, accept = Image.OPEN.get(kind, (None, None))
    if factory is None or (accept is not None and isinstance(accept(data[:16]), str)):  # the text says so
        raise Unusable(f"{kind}, which the installed PIL cannot read; convert it to JPEG or PNG")
    return factory(io.BytesIO(data), "")


def load(image: Image.Image, kind: str) -> None:
    """Decode the pixels.

    Raises:
        Unusable: they are damaged, or some are missing.
    """
    with one_reason(kind):
        if kind == "TIFF":
            places = {tile[1] for tile in image.tile}  # type: ignore[attr-defined]
            if sum((right - left) * (lower - upper) for left, upper, right, lower in places) < image.width * image.height:
                raise Unusable("damaged TIFF: a part of its pixels is missing")  # PIL leaves it black
        # A TIFF's tags are read again, with warnings; a calling program may have told PIL to be lenient.
        with silent() if kind == "TIFF" or ImageFile.LOAD_TRUNCATED_IMAGES else nullcontext():
            image.load()


def has_transparent_pixels(image: Image.Image) -> bool:
    """Of a loaded image; by its palette or key colour, one that may have some."""
    if image.getbands()[-1] in ("A", "a"):
        return int(np.asarray(image)[..., -1].min()) < 255
    return image.has_transparency_data


def low_bytes(reopen: Callable[[], Image.Image]) -> np.ndarray | None:
    """Of an image whose 16-bit samples PIL reduces to their high bytes: the low bytes, (H, W, C) uint8.

    PIL is told the other byte order, so that it takes the other byte. None if it has no such mode.

    Args:
        reopen: returns the image anew, not yet loaded.
    """
    image = reopen()
    tiles = []
    for tile in image.tile:  # type: ignore[attr-defined]
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        name = args[0]
        if not name.startswith("RGB") or name[-4:-1] != ";16":
            return None
        swapped = name[:-1] + _SWAPPED[name[-1]]
        tiles.append(tile._replace(args=(swapped, *args[1:]) if isinstance(tile[3], tuple) else swapped))
    image.tile = tiles  # type: ignore[attr-defined]
    load(image, image.format or "image")
    return np.asarray(image)[:, :, :3]
