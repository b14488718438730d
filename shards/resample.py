"""Offline resize of whole images: to a square, which is the study's step 2, or by the shorter side."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

_OPENCV_A = -0.75  # OpenCV imgproc/src/resize.cpp, interpolateCubic
_OPENCV_SCALE = 1 << 11  # the same file's INTER_RESIZE_COEF_SCALE: weights are integers over 2048


def shrink(rgb: np.ndarray, shorter_side_px: int) -> np.ndarray:
    """Resize (H, W, 3) or (H, W) uint8 so that its shorter side is ``shorter_side_px``, which is less than it was.

    By PIL's BICUBIC (a = -0.5, antialiased); the longer side is in proportion, rounded to the nearest pixel, halves up.
    """
    height, width = rgb.shape[:2]
    shorter = min(height, width)
    new_height, new_width = ((2 * side * shorter_side_px + shorter) // (2 * shorter) for side in (height, width))
    return np.asarray(Image.fromarray(rgb).resize((new_width, new_height), Image.Resampling.BICUBIC))


def resize(rgb: np.ndarray, size_px: int, kernel: str) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size_px, size_px, 3) uint8.

    ``pil``: PIL's BICUBIC, a = -0.5, which widens the kernel where it shrinks (antialiased). ``opencv``: the definition behind
    ``cv2.resize(..., INTER_CUBIC)``, a = -0.75 over four taps, never antialiased, in OpenCV's integer arithmetic.
    """
    if kernel == "pil":
        return np.asarray(Image.fromarray(rgb).resize((size_px, size_px), Image.Resampling.BICUBIC))
    rows = _apply_taps(rgb.astype(np.int32).transpose(1, 0, 2), size_px)  # (size, H, 3)
    both = _apply_taps(rows.transpose(1, 0, 2), size_px)  # (size, size, 3)
    half = _OPENCV_SCALE * _OPENCV_SCALE // 2
    return np.clip((both + half) // (2 * half), 0, 255).astype(np.uint8)


def _apply_taps(lines: np.ndarray, size_px: int) -> np.ndarray:
    """Resample axis 0 of an int32 array to ``size_px``, scaled by 2048; borders are repeated."""
    index, weight = _cubic_taps(len(lines), size_px)
    total = np.zeros((size_px, *lines.shape[1:]), np.int32)
    for tap in range(4):
        total += lines[index[:, tap]] * weight[:, tap, None, None]
    return total


def _cubic_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Source positions (size_out, 4) and integer weights (size_out, 4) int32; pixel centres at half integers."""
    index = np.empty((size_out, 4), np.int64)
    weight = np.empty((size_out, 4), np.int32)
    for out in range(size_out):
        centre = (out + 0.5) * size_in / size_out - 0.5
        first = math.floor(centre)
        index[out] = np.clip(np.arange(first - 1, first + 3), 0, size_in - 1)
        weight[out] = [round(w * _OPENCV_SCALE) for w in _cubic_weights(centre - first)]
    return index, weight


def _cubic_weights(t: float) -> tuple[float, float, float, float]:
    """Keys' cubic convolution weights of the four neighbours at fraction ``t`` (Keys 1981, with a free)."""
    a = _OPENCV_A
    before = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a
    left = ((a + 2) * t - (a + 3)) * t * t + 1
    s = 1 - t
    right = ((a + 2) * s - (a + 3)) * s * s + 1
    return before, left, right, 1 - before - left - right
