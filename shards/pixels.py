"""Sums over pixels, for the mean and standard deviation of train: exact, so that nothing but the images decides them."""

from __future__ import annotations

import numpy as np

_CHUNK = (
    3 * 4096
)  # values added at a time, a multiple of the channels: a whole 64 x 64 image, and three buffers fit the L2 cache
_EXACT_ADDITIONS = 256  # 256 * 255**2 is below 2**24, up to which float32 holds every whole number


class ChannelSums:
    """Sum and sum of squares of each RGB channel over all pixels added, as whole numbers.

    Images are added value by value into float32 buffers, which are emptied into Python's integers before they could round. So
    the result depends neither on the order of images nor on a BLAS. 9 us for 64 x 64 pixels, where reducing each image by
    itself took 23 us, more than a quarter of all packing.
    """

    def __init__(self) -> None:
        self.pixels = 0
        self._values = np.empty(_CHUNK, np.float32)
        self._totals = np.zeros(_CHUNK, np.float32)
        self._squares = np.zeros(_CHUNK, np.float32)
        self._additions = 0
        self._sums = [0, 0, 0]
        self._square_sums = [0, 0, 0]

    def add(self, rgb: np.ndarray) -> None:
        """Add an image, (H, W, 3) uint8."""
        flat = rgb.reshape(-1)
        self.pixels += flat.size // 3
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            values = self._values[: part.size]
            np.copyto(values, part)
            self._totals[: part.size] += values
            np.multiply(values, values, out=values)
            self._squares[: part.size] += values
            self._additions += 1
            if self._additions == _EXACT_ADDITIONS:
                self._empty()

    def sums(self) -> tuple[list[int], list[int]]:
        """Of R, G, B: the sums, and the sums of squares, of values 0..255."""
        self._empty()
        return list(self._sums), list(self._square_sums)

    def _empty(self) -> None:
        for buffer, sums in ((self._totals, self._sums), (self._squares, self._square_sums)):
            for channel, value in enumerate(buffer.reshape(-1, 3).sum(axis=0, dtype=np.float64)):
                sums[channel] += int(value)  # at most 4096 * 2**24 in it: far below 2**53
            buffer[:] = 0
        self._additions = 0
