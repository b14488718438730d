"""Resizing as a matrix: cached uint8 pixels to normalised images of any size.

Cropping and bicubic resizing are linear and separable: ``Y = A_y X A_x^T`` for each channel, where a row of ``A`` holds the
source weights of one output row or column. Its sum is 1, so normalisation may come first, where there are fewer pixels.
``A`` is the same for the whole batch, or one for each sample (random crops), made on the device.

``A`` is banded. On a CPU its rows are taken in blocks, each times the window of source rows that it needs: 13 of 64 for 28
output rows at 64 -> 224. On CUDA, where products are nearly free and launches are not, one block is all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["pil", "opencv"]

CUBIC_A = {"pil": -0.5, "opencv": -0.75}
"""The free constant of Keys' cubic: -0.5 in PIL, DALI and torch's antialiased bicubic; -0.75 in OpenCV and torch's plain."""

_SUPPORT = 2  # of the cubic on each side, in source pixels
_CPU_BLOCK_ROWS = 32
_CPU_CHUNK_BYTES = 3 << 20
"""Of float32 images that each CPU thread has in hand: 5 at 224 px, 64 at 64 px. More leave the cache, fewer are overhead."""
_GPU_ALIGNMENT = 8  # elements: tensor cores take float16 operands whose rows are whole 16 bytes


class Band(NamedTuple):
    """A matrix, or one for each sample, in blocks of rows with the window of columns outside which a block is zero."""

    weights: Tensor
    """(N or 1, blocks, rows of a block, window)."""
    columns: Tensor
    """(N or 1, blocks * window) int64. Border columns repeat where a window reaches beyond the image."""

    def of(self, samples: slice) -> Band:
        return self if len(self.weights) == 1 else Band(self.weights[samples], self.columns[samples])


def cubic(x: Tensor, a: float) -> Tensor:
    """Keys, "Cubic convolution interpolation for digital image processing" (1981), with its constant ``a`` free."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def bicubic_band(
    size: int,
    out: int,
    start: Tensor,
    scale: Tensor,
    *,
    max_scale: float,
    block_rows: int,
    kernel: Kernel = "pil",
    antialias: bool = True,
    align: int = 1,
) -> Band:
    """The matrix that resamples an axis of ``size`` pixels to ``out``.

    Pixel centres are at half-integers (``align_corners=False``). Both as DALI has it: beyond the image its border pixel is
    repeated, and at the edge of a box inside the image the pixels outside the box count.

    Args:
        start: (N,) float32, the box's edge in source pixels.
        scale: (N,) float32, source pixels for each output pixel.
        max_scale: a bound of ``scale`` known on the host: shapes depend on it.
        block_rows: a divisor of ``out``.
        antialias: widen the kernel by the scale where pixels get fewer.
        align: make windows a multiple of it.
    """
    device = start.device
    reach = math.ceil(_SUPPORT * (max(max_scale, 1.0) if antialias else 1.0))
    window = math.ceil((block_rows - 1) * max_scale) + 2 * reach + 1
    window += -window % align
    stretch = scale.clamp(min=1.0) if antialias else torch.ones_like(scale)

    centres = start[:, None] + (torch.arange(out, device=device) + 0.5) * scale[:, None] - 0.5
    first = torch.floor(centres - _SUPPORT * stretch[:, None]) + 1
    taps = first[..., None] + torch.arange(2 * reach, device=device)
    weights = cubic((taps - centres[..., None]) / stretch[:, None, None], CUBIC_A[kernel])
    weights /= weights.sum(-1, keepdim=True)

    taps = taps.to(torch.int64).unflatten(1, (-1, block_rows))  # (N, blocks, rows, taps)
    begins = taps[:, :, 0, 0]
    blocks = torch.zeros(*taps.shape[:3], window, device=device)
    blocks.scatter_(
        3, taps - begins[..., None, None], weights.unflatten(1, (-1, block_rows))
    )  # no index repeats: deterministic
    columns = begins[..., None] + torch.arange(window, device=device)
    return Band(blocks, columns.clamp(0, size - 1).flatten(1))


def apply_band(band: Band, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The matrix, or each sample's, times each sample: (N, size, M) -> (N, out, M), contiguous, ``out`` where given."""
    n, size, inner = x.shape
    _, blocks, rows, window = band.weights.shape
    samples = torch.arange(n, device=x.device)[:, None] * size
    windows = x.reshape(n * size, inner).index_select(0, (samples + band.columns).flatten())
    weights = band.weights.expand(n, -1, -1, -1).reshape(n * blocks, rows, window)
    if out is not None:
        out = out.view(n * blocks, rows, inner)
    return torch.bmm(weights, windows.view(n * blocks, window, inner), out=out).view(n, blocks * rows, inner)


class Resample:
    """uint8 pixels (N, H, W, 3) -> images (N, 3, res, res), normalised, channels_last."""

    def __init__(
        self,
        size: tuple[int, int],
        res: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        kernel: Kernel = "pil",
        antialias: bool = True,
        device: torch.device | None = None,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            size: height and width of the pixels that will be given.
            mean, std: per RGB channel on a 0..1 scale.
            dtype: of the images.
            kernel: ``pil`` (a = -0.5) or ``opencv`` (a = -0.75).
            product_dtype: of the factors. float32 by default; float16 on CUDA where the images are no float32: its 11 bits are
                eight times finer than bfloat16's 8, at the same speed, and normalised pixels fit its range.
        """
        self._size, self._res, self._dtype = size, res, dtype
        self._kernel: Kernel = kernel
        self._antialias = antialias
        on_gpu = device is not None and device.type == "cuda"
        self._product_dtype = product_dtype or (torch.float16 if on_gpu and dtype != torch.float32 else torch.float32)
        self._align = _GPU_ALIGNMENT if on_gpu else 1
        image_bytes = 3 * res * res * torch.float32.itemsize
        self._chunk = None if on_gpu else torch.get_num_threads() * max(_CPU_CHUNK_BYTES // image_bytes, 1)
        self._block_rows = res if on_gpu else max(rows for rows in range(1, _CPU_BLOCK_ROWS + 1) if res % rows == 0)

        self._mul = torch.tensor([1 / (255 * s) for s in std], device=device)
        self._add = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
        # The cubic overshoots at edges. DALI's uint8 pixels are clamped to 0..255, these to what that range becomes.
        self._lowest = self._add.repeat(res).to(self._product_dtype)
        self._highest = (255 * self._mul + self._add).repeat(res).to(self._product_dtype)
        self._centre = None if size == (res, res) else (self._centre_band(0), self._centre_band(1))

    def __call__(self, pixels: Tensor, boxes: Tensor | None = None) -> Tensor:
        """
        Args:
            pixels: (N, H, W, 3) uint8, contiguous.
            boxes: (N, 4) float32: top, left, height and width of what becomes res x res, in pixels, inside the image. By
                default the shorter side is resized to ``res`` and the centre cropped, as in the DALI graph.

        Returns:
            (N, 3, res, res) ``dtype``, channels_last, between what 0 and 255 are normalised to.
        """
        if pixels.shape[1:] != (*self._size, 3):
            raise ValueError(f"made for pixels of {self._size}, got {tuple(pixels.shape)}")
        images = torch.empty(len(pixels), self._res, self._res, 3, dtype=self._dtype, device=pixels.device)
        bands = self._centre if boxes is None else (self._box_band(boxes, 0), self._box_band(boxes, 1))
        chunk = self._chunk or max(len(pixels), 1)
        with torch.autocast(pixels.device.type, enabled=False):  # it would make the products bfloat16
            for i in range(0, len(pixels), chunk):
                part = slice(i, i + chunk)
                if bands is None:
                    self._normalise(pixels[part], images[part])
                else:
                    self._resample(pixels[part], bands[0].of(part), bands[1].of(part), images[part])
        return images.permute(0, 3, 1, 2)

    def _centre_band(self, axis: int) -> Band:
        """In the DALI graph's arithmetic: the longer side becomes a whole number of pixels, of the shorter side's scale and
        around the image's centre, and the crop begins at a whole pixel of them."""
        size, scale = self._size[axis], min(self._size) / self._res
        resized = int(size / scale + 0.5)
        start = (size - resized * scale) / 2 + math.ceil((resized - self._res) / 2) * scale
        device = self._mul.device
        return self._band(axis, torch.tensor([start], device=device), torch.tensor([scale], device=device), scale)

    def _box_band(self, boxes: Tensor, axis: int) -> Band:
        return self._band(axis, boxes[:, axis], boxes[:, axis + 2] / self._res, self._size[axis] / self._res)

    def _band(self, axis: int, start: Tensor, scale: Tensor, max_scale: float) -> Band:
        band = bicubic_band(
            self._size[axis],
            self._res,
            start,
            scale,
            max_scale=max_scale,
            block_rows=self._block_rows,
            kernel=self._kernel,
            antialias=self._antialias,
            align=self._align,
        )
        return Band(band.weights.to(self._product_dtype), band.columns)

    def _normalise(self, pixels: Tensor, out: Tensor) -> None:
        """For pixels of the right size. Whole rows at a time: a broadcast over three channels is not vectorised."""
        rows = pixels.flatten(2).to(torch.float32)
        mul, add = self._mul.repeat(self._res), self._add.repeat(self._res)
        if out.dtype == torch.float32:
            torch.addcmul(add, rows, mul, out=out.flatten(2))
        else:
            out.flatten(2).copy_(torch.addcmul(add, rows, mul))

    def _resample(self, pixels: Tensor, height_band: Band, width_band: Band, out: Tensor) -> None:
        """Columns first, while there are few rows. (h, w, c) -> (w, c, h) -> (res, c, h) -> (h, res, c) -> (res, res, c)."""
        n, height, width, _ = pixels.shape
        x = pixels.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format)
        x = torch.addcmul(self._add[:, None], x, self._mul[:, None]).to(self._product_dtype)
        x = apply_band(width_band, x.view(n, width, 3 * height))
        x = x.view(n, self._res, 3, height).permute(0, 3, 1, 2).contiguous()
        x = x.view(n, height, self._res * 3)
        if out.dtype == x.dtype:
            apply_band(height_band, x, out.flatten(2)).clamp_(self._lowest, self._highest)
        else:
            out.flatten(2).copy_(apply_band(height_band, x).clamp_(self._lowest, self._highest))
