"""The mathematics of resampling: the cubic kernel as a matrix by its non-zero elements, and normalisation as another.

Cropping and bicubic resizing are linear and separable: ``Y = A_y X A_x^T`` for each channel, where a row of ``A`` holds the
source weights of one output row or column. Its sum is 1, so normalisation may come first, where there are fewer pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tidali.config import Kernel

CUBIC_A = {"pil": -0.5, "opencv": -0.75}
"""The free constant of Keys' cubic: -0.5 in PIL, DALI and torch's antialiased bicubic; -0.75 in OpenCV and torch's plain."""

_SUPPORT = 2  # of the cubic on each side, in source pixels


class Taps(NamedTuple):
    """A matrix, or one for each sample, by its non-zero elements: those of a row stand side by side."""

    first: Tensor
    """(N or 1, out) int64, the source index of a row's first one. Beyond the image its border pixel counts."""
    weights: Tensor
    """(N or 1, out, taps) float32."""


def cubic(x: Tensor, a: float) -> Tensor:
    """Keys, "Cubic convolution interpolation for digital image processing" (1981), with its constant ``a`` free."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def bicubic_taps(
    out: int, start: Tensor, scale: Tensor, *, max_scale: float, kernel: Kernel = "pil", antialias: bool = True
) -> Taps:
    """The matrix that resamples an axis to ``out`` pixels.

    Pixel centres are at half-integers (``align_corners=False``). Both as DALI has it: beyond the image its border pixel is
    repeated, and at the edge of a box inside the image the pixels outside the box count.

    Args:
        start: (N,) float32, the box's edge in source pixels.
        scale: (N,) float32, source pixels for each output pixel.
        max_scale: a bound of ``scale`` known on the host: shapes depend on it.
        antialias: widen the kernel by the scale where pixels get fewer.
    """
    reach = math.ceil(_SUPPORT * (max(max_scale, 1.0) if antialias else 1.0))
    stretch = scale.clamp(min=1.0) if antialias else torch.ones_like(scale)
    centres = start[:, None] + (torch.arange(out, device=start.device) + 0.5) * scale[:, None] - 0.5
    first = torch.floor(centres - _SUPPORT * stretch[:, None]) + 1
    indices = first[..., None] + torch.arange(2 * reach, device=start.device)
    weights = cubic((indices - centres[..., None]) / stretch[:, None, None], CUBIC_A[kernel])
    return Taps(first.to(torch.int64), weights / weights.sum(-1, keepdim=True))


def centre_crop(size: tuple[int, int], res: int, axis: int, crop_fraction: float = 1.0) -> tuple[float, float]:
    """Start and scale, in source pixels, of an axis's part that becomes ``res`` pixels: the shorter side is resized to
    ``res / crop_fraction``, the centre cropped. In the arithmetic of resizing first and cropping then: the longer side becomes
    a whole number of pixels, of the shorter side's scale and around the image's centre, and the crop begins at one of them."""
    scale = min(size) * crop_fraction / res
    resized = int(size[axis] / scale + 0.5)
    return (size[axis] - resized * scale) / 2 + math.ceil((resized - res) / 2) * scale, scale


class Affine(NamedTuple):
    """Normalisation of pixels of 0..255, float32, and the range that it gives.

    The cubic overshoots at edges. DALI's uint8 pixels are clamped to 0..255, normalised ones to what that range becomes.
    """

    colours: Tensor
    """(1, 3, 4): the matrix from a pixel (R, G, B, 1) to a normalised one; (N, 3, 4) where each sample has its own."""
    lowest: Tensor
    """(3,), of each channel."""
    highest: Tensor
    """(3,)."""

    @property
    def scale(self) -> Tensor:
        """(3,), of each channel, where no channel depends on another."""
        return self.colours[0].diagonal()

    @property
    def offset(self) -> Tensor:
        """(3,)."""
        return self.colours[0, :, 3]

    def after(self, colour: Tensor) -> Affine:
        """Of pixels whose colours were changed before by ``colour`` (N, 3, 4), matrices on a 0..1 scale."""
        matrices = colour[:, :, :3] * self.scale[:, None]
        offsets = 255 * colour[:, :, 3] * self.scale + self.offset
        return self._replace(colours=torch.cat((matrices, offsets[..., None]), 2))


def make_affine(mean: Sequence[float], std: Sequence[float], device: torch.device | None) -> Affine:
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    colours = torch.cat((torch.diag(scale), offset[:, None]), 1)[None]
    return Affine(colours, offset, 255 * scale + offset)
