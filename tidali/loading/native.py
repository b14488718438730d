"""`tidali/loading/resample.c` and `jpeg.c`, compiled with the system's C compiler at first use and kept in its user's cache.

Two to three times as fast as the same in torch's operators, compiled by torch or not. Nothing but speed depends on it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tidali.errors import TidaliError
from tidali.files import cache_folder, remove_left_over, replacing

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("resample.c", "jpeg.c"))
# What of -ffast-math helps here. All of it would also have GCC's start-up code change how the whole process rounds denormals.
_MATHS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros")
_FLAGS = ("-O3", "-march=native", *_MATHS, "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 60


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("height", "width", "res")]


class _Axis(ctypes.Structure):
    _fields_ = [("first", ctypes.c_void_p), ("weights", ctypes.c_void_p), ("taps", ctypes.c_int64), ("shared", ctypes.c_int64)]


class _Images(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("pixels", "samples", "flips")]


class _Output(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("values", "lowest", "highest")), ("bfloat16", ctypes.c_int64)]


class _Piece(ctypes.Structure):
    _fields_ = [
        ("pixels", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("height", "width")),
        *((name, ctypes.c_float) for name in ("top", "left", "box_height", "box_width")),
    ]


Pass = Callable[[int, int], None]
"""Makes images begin..end - 1 of a batch, by the calling thread."""


class Chosen(NamedTuple):
    """Which stored images a batch is made of."""

    stored: Tensor
    """(M, H, W, 3) uint8."""
    rows: Tensor | None
    """(N,) int64, their places in ``stored``; None where they are all, in order."""
    flips: Tensor | None
    """(N,) bool, which are flipped horizontally; None: none."""

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.stored if self.rows is None else self.rows)


class Encoded(NamedTuple):
    """Where in memory the bytes of some files are, such as JPEGs. All (n,) and contiguous."""

    addresses: NDArray[np.uint64]
    sizes_bytes: NDArray[np.uint64]
    crc32s: NDArray[np.uint32]
    """That they should have."""

    def part(self, rows: slice) -> Encoded:
        return Encoded(self.addresses[rows], self.sizes_bytes[rows], self.crc32s[rows])


class Axis(NamedTuple):
    """A matrix by its non-zero elements: each row's stand side by side."""

    first: Tensor
    """(N or 1, res) int32, the source index of a row's first element; -taps..size. Beyond the image its border counts."""
    weights: Tensor
    """(N or 1, res, taps) float32; taps is a multiple of 2."""


def make_axis(first: Tensor, weights: Tensor, size: int) -> Axis:
    """Of (N, res) first indices and (N, res, taps) weights over ``size`` source pixels."""
    weights = functional.pad(weights, (0, -weights.shape[2] % 2)).contiguous()
    return Axis(first.clamp(-weights.shape[2], size).to(torch.int32).contiguous(), weights)


def resample(
    library: Any,
    images: Chosen,
    vertical: Axis,
    horizontal: Axis,
    *,
    colours: Tensor,
    lowest: Tensor,
    highest: Tensor,
    out: Tensor,
) -> Pass:
    """What makes the images. Until a part of it is run, nothing is read of the pixels.

    Args:
        library: `load`'s.
        colours: (N or 1, 3, 4) float32: what maps a pixel (R, G, B, 1) of 0..255 to a normalised one.
        lowest, highest: (3,) float32, what the images' channels are clamped to.
        out: (N, res, res, 3) float32 or bfloat16.
    """
    shape, taps = _Shape(*images.stored.shape[1:3], out.shape[1]), horizontal.weights.shape[2]
    assert all(len(axis.first) in (1, len(out)) and axis.first.shape[1] == shape.res for axis in (vertical, horizontal))
    check_for_c(images.stored, *vertical, *horizontal, out)
    library.tidali_scratch.restype = ctypes.c_int64
    floats = library.tidali_scratch(shape, ctypes.c_int64(vertical.weights.shape[2]), ctypes.c_int64(taps))
    axes = _struct(vertical), _struct(horizontal)
    return _map_colours(library.tidali_resample, images, (shape, *axes), colours, (lowest, highest), floats, out)


def colour(library: Any, images: Chosen, *, colours: Tensor, lowest: Tensor, highest: Tensor, out: Tensor) -> Pass:
    """As `resample`, of images that are res x res already."""
    res = out.shape[1]
    assert images.stored.shape[1:] == out.shape[1:]
    return _map_colours(library.tidali_colour, images, (ctypes.c_int64(res),), colours, (lowest, highest), 4 * res + 1, out)


def _map_colours(
    function: Any,
    images: Chosen,
    shape: Sequence[Any],
    colours: Tensor,
    bounds: tuple[Tensor, Tensor],
    floats: int,
    out: Tensor,
) -> Pass:
    """One of the two with what they have in common. ``floats``: of scratch memory that each thread needs."""
    n, res, _, _ = out.shape
    rows, flips = images.rows, images.flips
    assert images.num_images == n
    assert out.shape[1:] == (res, res, 3)
    assert rows is None or rows.dtype == torch.int64
    assert flips is None or (flips.dtype, flips.shape) == (torch.bool, (n,))
    assert colours.shape[1:] == (3, 4)
    assert len(colours) in (1, n)
    # Columns, each with a fourth element of 0, as `struct colour` has them.
    columns, lowest, highest = functional.pad(colours.transpose(1, 2), (0, 1)).contiguous(), *(b.repeat(res) for b in bounds)
    check_for_c(images.stored, *(tensor for tensor in (rows, flips) if tensor is not None), columns, lowest, highest, out)
    chosen = _Images(*(None if tensor is None else tensor.data_ptr() for tensor in images))
    output = _Output(out.data_ptr(), lowest.data_ptr(), highest.data_ptr(), out.dtype == torch.bfloat16)
    chosen.held, output.held = images, (out, lowest, highest)  # a pointer is no reference

    def run(begin: int, end: int) -> None:
        scratch = torch.empty(floats)
        part = map(ctypes.c_int64, (begin, end))
        function(chosen, *part, *shape, _pointer(columns), ctypes.c_int64(len(columns) == 1), _pointer(scratch), output)

    return run


def squares(library: Any, images: Sequence[Any], boxes: Sequence[Sequence[float]], a: float, out: Tensor) -> None:
    """Boxes of images of any size, resized by one thread, the caller's.

    Args:
        library: `load`'s.
        images: arrays (H, W, 3) uint8, contiguous.
        boxes: top, left, height and width of each one's box, in its pixels; pixels outside the box count at its edges.
        a: the cubic's free constant.
        out: (n, res, res, 3) uint8, contiguous.

    Raises:
        MemoryError: there is no memory for an image's rows.
    """
    pieces = (_Piece * len(images))(
        *(_Piece(image.ctypes.data, *image.shape[:2], *box) for image, box in zip(images, boxes, strict=True))
    )
    assert out.is_contiguous()
    assert out.shape[0] == len(images)
    assert all(image.flags.c_contiguous and image.dtype == "uint8" and image.shape[2] == 3 for image in images)
    sizes = map(ctypes.c_int64, (0, len(images), out.shape[1]))
    if library.tidali_squares(pieces, *sizes, ctypes.c_float(a), _pointer(out)):
        raise MemoryError("no memory to resize an image in")


def jpegs(library: Any, functions: Any, encoded: Encoded, out: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n,) which JPEGs have their CRC-32 and were decoded without a warning, in grey or three colours, by the caller's thread.

    Args:
        library: `load`'s.
        functions: `tidali.loading.libjpeg.load`'s.
        out: (n, H, W, 3), contiguous. What was not decoded may be written over.

    Raises:
        TidaliError: the functions are of a libjpeg with another binary interface.
    """
    done = np.zeros(len(out), np.bool_)
    assert out.flags.c_contiguous
    assert out.dtype == np.uint8
    assert out.shape[3] == 3
    assert all(array.flags.c_contiguous and len(array) == len(out) for array in encoded)
    numbers = map(ctypes.c_int64, out.shape[:3])
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in encoded)
    if library.tidali_jpegs(functions, *pointers, *numbers, *(ctypes.c_void_p(array.ctypes.data) for array in (out, done))):
        raise TidaliError("another libjpeg than libjpeg-turbo with version 6.2's binary interface")
    return done


def integers(library: Any, text: bytes, begin: int, count: int) -> NDArray[np.int64] | None:
    """The integers outside strings of a JSON array, nulls as -1; None where there are not ``count`` or other values are there.

    Args:
        library: `load`'s.
        text: a document.
        begin: where in it the array's first element begins.
    """
    found = np.empty(count, np.int64)
    start = ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p).value or 0
    library.tidali_integers.restype = ctypes.c_int64
    got = library.tidali_integers(
        ctypes.c_void_p(start + begin),
        ctypes.c_int64(len(text) - begin),
        ctypes.c_void_p(found.ctypes.data),
        ctypes.c_int64(count),
    )
    return found if got == count else None


def expect(library: Any, addresses: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> None:
    """Tell the kernel that pieces of mapped files are read next. Addresses are multiples of a page, lengths in bytes."""
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (addresses, lengths))
    library.tidali_expect(*pointers, ctypes.c_int64(len(addresses)))


def explain_bus_error(library: Any) -> None:
    """From now on the process ends with a line where a mapped file is shorter than it was, if nothing else handles that."""
    text = "tidali: a shard was cut off while it was read, or its disk failed; 'tidali verify DATA' names it\n"
    library.tidali_explain_bus_error(text.encode())


def in_parallel(run: Pass, samples: int) -> None:
    """``run`` ranges of the samples on as many threads as torch uses. They do not wait for each other after each operator, as
    torch's own do, which on a busy machine costs more than the work."""
    threads = max(min(torch.get_num_threads(), samples), 1)
    mine, *others = pairwise(samples * i // threads for i in range(threads + 1))
    parts = [_pool(threads).submit(run, *part) for part in others]
    run(*mine)
    for part in parts:
        part.result()


def check_for_c(pixels: Tensor, *tensors: Tensor) -> None:
    """What C would not notice."""
    assert pixels.dtype == torch.uint8
    assert tensors[-1].dtype in (torch.float32, torch.bfloat16)
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in (pixels, *tensors))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _struct(axis: Axis) -> _Axis:
    struct = _Axis(axis.first.data_ptr(), axis.weights.data_ptr(), axis.weights.shape[2], len(axis.first) == 1)
    struct.held = axis  # a pointer is no reference
    return struct


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tidali-resample")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool but none of its threads


@cache
def load() -> Any | None:
    """The compiled library, or None where `build` says that it cannot be had."""
    try:
        return build()
    except TidaliError:
        return None


def build() -> Any:
    """Compile the library, unless an earlier process did, and load it.

    Raises:
        TidaliError: there is no compiler, it fails, its result cannot be kept, or what it made cannot be loaded.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise TidaliError("no C compiler on PATH; install gcc")
    try:
        folder = cache_folder()
        built_from = (*(source.read_text() for source in _SOURCES), *_FLAGS, compiler, _processor())
        digest = hashlib.sha256("\n".join(built_from).encode()).hexdigest()
        path = folder / f"resample-{digest[:16]}.so"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: Python finds no home folder
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        fix = "set TIDALI_CACHE to a folder that you may write to"
        raise TidaliError(f"compiled code can be kept nowhere ({why}); {fix}") from None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # a disk mounted with noexec, or a damaged file
        fix = "remove it, or set TIDALI_CACHE to a folder on a disk that programs may be run from"
        raise TidaliError(f"the compiled code cannot be loaded ({error}); {fix}") from None


def _compile(compiler: str, path: Path) -> None:
    """Under another name first: processes that start together must not load half a file.

    Raises:
        OSError: the folder cannot be written.
        TidaliError: the compiler failed.
    """
    remove_left_over(path.parent)
    with replacing(path) as temporary:
        temporary.touch()  # so that only what the compiler is to blame for is said of the compiler
        try:
            command = [compiler, *_FLAGS, "-o", str(temporary), *map(str, _SOURCES)]
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            lines = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").splitlines()
            why = next((line for line in lines if "error" in line.lower()), lines[0])
            fix = "install gcc with the headers of the C library, such as Debian's build-essential"
            raise TidaliError(f"the C compiler {compiler} fails ({why.strip()}); {fix}") from None


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
