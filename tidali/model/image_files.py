"""Finds image files by path, folder or pattern, and reads them into pixels."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tidali.errors import TidaliError, UsageError, first_line
from tidali.loading.decode import upright_rgb

_NOT_OPENED = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that PIL only identifies, or decodes with Ghostscript or on Windows."""


class ImageError(TidaliError):
    """An image that cannot be read."""

    def __init__(self, source: object, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source, self.reason = source, reason


def find_images(given: Sequence[str]) -> list[Path]:
    """The files that the arguments name, in order: a file itself, all images below a folder, or the files that match a pattern
    (``*``, ``?``, ``[...]``, ``**`` for any depth).

    In a folder, images are found by suffix and sorted by path; hidden ones are skipped.

    Raises:
        UsageError: an argument that names no image.
    """
    found: list[Path] = []
    for argument in given:
        path = Path(argument)
        if path.is_dir():
            files = _below(path)
        elif path.exists():
            files = [path]
        elif glob.has_magic(argument):
            files = [Path(match) for match in sorted(glob.glob(argument, recursive=True)) if os.path.isfile(match)]
        else:
            raise UsageError(f"{argument}: no such file or folder")
        if not files:
            raise UsageError(f"{argument}: no images found")
        found += files
    return found


def _below(folder: Path) -> list[Path]:
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in _formats()}
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                found.append(Path(root) / name)
    return sorted(found)


def read_pixels(source: Any) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright, of one image.

    Args:
        source: a path; a PIL image; or an array or CPU tensor (H, W, 3) uint8 RGB, with a fourth channel that is dropped, or
            (H, W) grey.

    Raises:
        ImageError: none of these, or a corrupt image.
    """
    try:
        if isinstance(source, Image.Image):
            return np.asarray(upright_rgb(source))
        if isinstance(source, (str, os.PathLike)):
            with Image.open(source, formats=_formats()) as image:
                return np.asarray(upright_rgb(image))
    except OSError as error:
        identified = type(error).__name__ != "UnidentifiedImageError"
        reason = (error.strerror or first_line(error)) if identified else "not an image of a known format"
        raise ImageError(source, reason) from None
    except Exception as error:  # PIL's decoders raise whatever hostile bytes lead them to
        raise ImageError(source, first_line(error)) from None
    return _array_pixels(source)


def _array_pixels(source: Any) -> np.ndarray:
    pixels = np.asarray(source)
    what = f"array of {pixels.dtype} {pixels.shape}"
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not pixels.size or not is_image:
        raise ImageError(what, "give a path, a PIL image, or uint8 pixels (H, W, 3) or (H, W)")
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels[:, :, :3]


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name not in _NOT_OPENED]
