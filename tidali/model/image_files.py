"""Finds image files by path, folder or pattern, and reads them into pixels."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tidali.dataset.file_names import describe_left_out, is_image_name, left_out_kind, suffix_kind, walk
from tidali.errors import TidaliError, UsageError
from tidali.images.errors import Unusable
from tidali.images.read import read_picture, read_pil_image

_MOST_PIXELS = 1 << 28
"""Of a file: its pixels take 768 MiB."""
_MOST_BYTES = 4 * _MOST_PIXELS
"""Of a file: a film that is named .jpg must not fill the memory."""


class ImageError(TidaliError):
    """An image that cannot be read."""

    def __init__(self, source: object, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source, self.reason = source, reason


def find_images(given: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    """The files that the arguments name, in order: a file itself, all images below a folder, or the files that match a pattern
    (``*``, ``?``, ``[...]``, ``**`` for any depth); and how many files in folders were left out, by kind.

    In a folder, images are found by suffix and sorted by path. Hidden and system folders are left out, as in ``tidali shard``.

    Raises:
        UsageError: an argument that names no image, or a folder that cannot be read.
    """
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for argument in given:
        path = Path(argument)
        mine: Counter[str] = Counter()
        if path.is_dir():
            files = _below(path, mine)
        elif path.exists():
            files = [path]
        elif glob.has_magic(argument):
            files = _matching(argument, mine)
        else:
            raise UsageError(f"{argument}: no such file or folder")
        if not files:
            raise UsageError(f"{argument}: no images found" + (f" (it holds {describe_left_out(mine)})" if mine else ""))
        found += files
        left_out += mine
    return found, left_out


def _below(folder: Path, left_out: Counter[str]) -> list[Path]:
    found = []
    for name, entry, is_folder in walk(folder, left_out):
        if is_image_name(name) and not is_folder:
            found.append(Path(os.fsdecode(entry.path)))
        elif not is_folder:
            left_out[suffix_kind(name)] += 1
    return sorted(found)


def _matching(pattern: str, left_out: Counter[str]) -> list[Path]:
    """Files in hidden and system folders only where the pattern itself names the folder."""
    found = []
    for match in map(Path, sorted(glob.glob(pattern, recursive=True))):
        if match.is_file():
            kinds = [left_out_kind(part) for part in match.parts if part not in Path(pattern).parts]
            if kind := next(filter(None, kinds), None):
                left_out[kind] += 1
            else:
                found.append(match)
    return found


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
            return read_pil_image(source).upright
        if isinstance(source, (str, os.PathLike)):
            size_bytes = os.stat(source).st_size
            if size_bytes > _MOST_BYTES:
                raise Unusable(f"{size_bytes:,} bytes, more than an image of {_MOST_PIXELS:,} pixels has")
            return read_picture(Path(source).read_bytes(), max_pixels=_MOST_PIXELS).upright
    except OSError as error:
        raise ImageError(source, error.strerror or str(error)) from None
    except Unusable as error:
        raise ImageError(source, str(error)) from None
    return _array_pixels(source)


def _array_pixels(source: Any) -> np.ndarray:
    pixels = np.asarray(source)
    what = f"array of {pixels.dtype} {pixels.shape}"
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not pixels.size or not is_image:
        raise ImageError(what, "give a path, a PIL image, or uint8 pixels (H, W, 3) or (H, W)")
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels[:, :, :3]
