"""The one way that files are opened with PIL: its limits and warnings off, and every error one reason."""

from __future__ import annotations

import io
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from tidali.images.errors import Unusable

_LOCK = threading.RLock()
_SWAPPED = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
"""Order of the bytes of 16-bit samples in PIL's names of raw modes -> the other order."""


@contextmanager
def silent() -> Iterator[None]:
    """PIL without a limit of its own on pixels and without its warnings about metadata.

    PIL keeps both in global variables, so one thread at a time is inside. Pixels are decoded outside.
    """
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


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
        raise Unusable(f"damaged {kind}: {' '.join(str(error).split()) or type(error).__name__}") from None


def open_file(data: bytes, kind: str) -> Image.Image:
    """The image that a file of a known format begins with; only its header has been read.

    Raises:
        Unusable: the header is damaged, or this PIL does not have the format.
    """
    with one_reason(kind), silent():
        Image.init()
        factory, accept = Image.OPEN.get(kind, (None, None))
        refused = accept(data[:16]) if accept is not None else True
        if factory is None or isinstance(refused, str):
            raise Unusable(f"{kind}, which the installed PIL cannot read; convert it to JPEG or PNG")
        return factory(io.BytesIO(data), "")


def load(image: Image.Image, kind: str) -> None:
    """Decode the pixels.

    Raises:
        Unusable: they are damaged, or some are missing.
    """
    with one_reason(kind):
        if kind != "TIFF":
            image.load()
            return
        places = {tile[1] for tile in image.tile}  # type: ignore[attr-defined]
        if sum((right - left) * (lower - upper) for left, upper, right, lower in places) < image.width * image.height:
            raise Unusable("damaged TIFF: a part of its pixels is missing")  # PIL leaves it black
        with silent():  # it reads tags again, and warns again
            image.load()


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
    image.load()
    return np.asarray(image)[:, :, :3]
