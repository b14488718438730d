"""One stored image: whether it decodes to what its record says, by every decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tidali.images.errors import Unusable
from tidali.images.read import read_picture

_REWRITE_FIX = "delete this file and pack the source again into this folder: the shard is written anew"

SecondDecoder = Callable[[bytes, np.ndarray], str | None]
"""From an image's bytes and its upright pixels, (H, W, 3) uint8: what is wrong with how it reads them, or None."""


def image_faults(
    data: bytes, size: tuple[int, int], extension: str | None, source: str, second_decoder: SecondDecoder | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with an image whose bytes are those that were packed, and how to fix it.

    Args:
        size: height and width, as displayed.
        extension: the one that its bytes must have; None if it has the name that another program gave it.
        source: its name inside the source.
    """
    try:
        picture = read_picture(data, max_pixels=size[0] * size[1])
    except Unusable as error:
        yield f"the image does not decode: {error}", _REWRITE_FIX
        return
    if picture.size != size:
        yield f"the image is {picture.size[0]} x {picture.size[1]}, its record says {size}", _REWRITE_FIX
    elif picture.kept is None or (extension is not None and picture.kept != extension):
        # Decoded further, bytes like these may end the process.
        yield "not every decoder reads its bytes alike: an earlier version packed it", _REWRITE_FIX
    elif second_decoder is not None and (text := second_decoder(data, picture.upright)) is not None:
        yield text, f"replace {source!r} in the source by a PNG of it, and pack that again"
