"""The libjpeg-turbo that Pillow brings, called by `tidali/loading/jpeg.c` in a loop without the interpreter.

simplejpeg makes a decompressor for each image and reads each header twice: with the interpreter's work in between that is 9 of
39 us of processor time at 64 px. The pixels are the same. Nothing but speed depends on it.
"""

from __future__ import annotations

import ctypes
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg

from tidali.errors import TidaliError
from tidali.loading import native

_FUNCTIONS = (
    *("std_error", "CreateDecompress", "mem_src", "read_header", "start_decompress", "read_scanlines"),
    *("finish_decompress", "abort_decompress", "destroy_decompress"),
)  # in the order of `struct functions`


@cache
def load() -> Any | None:
    """What `native.jpegs` takes, or None: no compiler, Pillow brings no libjpeg, or it gives other pixels than simplejpeg."""
    library = native.load()
    for path in sorted(Path(PIL.__file__).parents[1].glob("[Pp]illow.libs/libjpeg*")) if library is not None else ():
        try:
            libjpeg = ctypes.CDLL(str(path))
            functions = [ctypes.cast(getattr(libjpeg, f"jpeg_{name}"), ctypes.c_void_p) for name in _FUNCTIONS]
            found = (ctypes.c_void_p * len(functions))(*functions)
            if _works(library, found):
                return found
        except (OSError, AttributeError, TidaliError):
            continue
    return None


def _works(library: Any, functions: Any) -> bool:
    pixels = np.random.default_rng(0).integers(256, size=(40, 56, 3), dtype=np.uint8)
    data = np.frombuffer(simplejpeg.encode_jpeg(pixels, colorsubsampling="420"), np.uint8)
    out = np.empty((1, *pixels.shape), np.uint8)
    encoded = native.Encoded(
        np.array([data.ctypes.data], np.uint64),
        np.array([len(data)], np.uint64),
        np.array([zlib.crc32(data.tobytes())], np.uint32),
    )
    done = native.jpegs(library, functions, encoded, out)
    return bool(done.all()) and np.array_equal(out[0], simplejpeg.decode_jpeg(data))
