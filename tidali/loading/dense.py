"""Resampling by whole matrices, in as few operators as possible: for CUDA, where products are nearly free and launches are
not.

The matrix of an axis, ``A`` of `tidali.loading.bicubic`, is taken as a whole, zeros included. The taps beyond the image are
added to those of its border pixel, so that no pixel has to be repeated. The change of colour and the normalisation, a 3 x 4
matrix, is multiplied into the horizontal matrix: ``Y = A_y X (A_x x M)^T + b``, where a row of ``X`` is (column, channel).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tidali.config import Preprocess
from tidali.loading.bicubic import Affine, Taps, bicubic_taps, centre_crop, make_affine

_ALIGNMENT = 8
"""Elements: tensor cores take float16 operands whose rows begin at whole 16 bytes."""


def fold_borders(taps: Taps, size: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """Taps inside the image alone: the weights beyond it are added to its border pixel's.

    Args:
        size: of the source axis, int64, broadcast to (N, out, taps). Every row's window holds a pixel of the image, as that of
            a box inside the image does.
        period: at least the size and the number of taps.

    Returns:
        (N, out, taps) int64 source indices below ``period``, no two of a row alike, so that scattering them is deterministic;
        and (N, out, taps) float32 weights, 0 where the index is not of the image.
    """
    index = taps.first[..., None] + torch.arange(taps.weights.shape[2], device=taps.first.device)
    below, above = index < 0, index >= size
    inside = taps.weights.masked_fill(below | above, 0.0)
    first = (taps.weights * below).sum(-1, keepdim=True) * (index == 0)
    last = (taps.weights * above).sum(-1, keepdim=True) * (index == size - 1)
    return index.remainder(period), inside + first + last


class DenseMatrices(NamedTuple):
    """Both axes' matrices, by their non-zero elements."""

    columns: Tensor
    """(N or 1, 2, res, taps) int64."""
    weights: Tensor
    """(N or 1, 2, res, taps), in the dtype of the factors."""
    zero: Tensor
    """(1, 1, 1, period)."""

    def of(self, samples: slice) -> DenseMatrices:
        if len(self.columns) == 1:
            return self
        return self._replace(columns=self.columns[samples], weights=self.weights[samples])

    def whole(self) -> Tensor:
        """(N or 1, 2, res, period): vertical and horizontal."""
        n, axes, res, _ = self.columns.shape
        return self.zero.expand(n, axes, res, -1).scatter(3, self.columns, self.weights)


class DenseAffine(NamedTuple):
    """A change of colour and normalisation, for pixels of 0..255."""

    colours: Tensor
    """(N or 1, 3, 3) float32, from a pixel's channel (row) to an image's (column)."""
    offset: Tensor
    """(N or 1, 1, 3) float32."""
    factors: Tensor
    """(N or 1, 1, 3, 1, 3): the colours in the dtype of the factors."""
    row_offset: Tensor
    """(N or 1, 1, 3 * res): the offset of each element of an image's row, in the dtype of the factors."""
    lowest: Tensor
    """(3 * res,), in the dtype of the factors."""
    highest: Tensor
    rows: tuple[Tensor, Tensor] | None
    """If no image has a matrix of its own: scale and offset (3 * res,) float32 of each element of an image's row."""

    def of(self, samples: slice) -> DenseAffine:
        if len(self.colours) == 1:
            return self
        colours, offset, factors, row_offset = (value[samples] for value in self[:4])
        return DenseAffine(colours, offset, factors, row_offset, self.lowest, self.highest, None)


class Dense(NamedTuple):
    """What `DenseResample` multiplies the pixels of some samples with."""

    matrices: DenseMatrices | None
    """None: the pixels have the right size already."""
    affine: DenseAffine

    def of(self, samples: slice) -> Dense:
        return Dense(None if self.matrices is None else self.matrices.of(samples), self.affine.of(samples))


class DenseResample:
    """As `tidali.loading.resample.Resample`, in two products for each image; what they need is prepared for many batches at
    once."""

    def __init__(
        self,
        size: tuple[int, int],
        preprocess: Preprocess,
        *,
        dtype: torch.dtype = torch.float32,
        antialias: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """The arguments of `Resample`.

        Half-precision images are made of float16 factors, also bfloat16 ones: float16's 11 bits are eight times finer than
        bfloat16's 8, at the same speed, and normalised pixels fit its range.
        """
        res, crop_fraction = preprocess.res, preprocess.crop_fraction
        self._size, self._res, self._dtype = size, res, dtype
        self._factors = torch.float32 if dtype == torch.float32 else torch.float16
        self._kernel = preprocess.kernel
        self._antialias = antialias
        self._affine = make_affine(preprocess.mean, preprocess.std, device)
        matrices = None
        if size != (res, res) or crop_fraction != 1:
            start, scale = zip(*(centre_crop(size, res, axis, crop_fraction) for axis in (0, 1)), strict=True)
            matrices = self._matrices(torch.tensor([start], device=device), torch.tensor([scale], device=device), max(scale))
        self._unchanged = Dense(matrices, self._dense(self._affine))

    def prepare(self, boxes: Tensor | None = None, colour: Tensor | None = None) -> Dense:
        """
        Args:
            boxes: (N, 4) float32: see `Resample`.
            colour: (N, 3, 4) float32: see `Resample`.
        """
        matrices, affine = self._unchanged
        if boxes is not None:
            matrices = self._matrices(boxes[:, :2], boxes[:, 2:] / self._res, max(self._size) / self._res)
        return Dense(matrices, affine if colour is None else self._dense(self._affine.after(colour)))

    def apply(self, pixels: Tensor, prepared: Dense) -> Tensor:
        """
        Args:
            pixels: (N, H, W, 3) uint8, contiguous.

        Returns:
            (N, 3, res, res), channels_last.
        """
        (n, height, width, _), (matrices, affine) = pixels.shape, prepared
        if matrices is None:
            # In float32: three products a pixel are no work for tensor cores, and its memory traffic is small beside a step's.
            x = pixels.to(torch.float32)
            if affine.rows is not None:
                scale, offset = affine.rows
                images = torch.addcmul(offset, x.view(n, height, 3 * width), scale)
            else:
                images = torch.baddbmm(affine.offset, x.view(n, -1, 3), affine.colours).view(n, height, 3 * width)
        else:
            whole = matrices.whole()
            vertical, horizontal = whole[:, 0, :, :height], whole[:, 1, :, :width]
            rows = torch.bmm(vertical.expand(n, -1, -1), pixels.view(n, height, 3 * width).to(self._factors))
            images = self._columns(rows, horizontal, affine)
        out = torch.empty_like(images, dtype=self._dtype)
        torch.clamp(images, affine.lowest, affine.highest, out=out)
        return out.view(n, self._res, self._res, 3).permute(0, 3, 1, 2)

    def _columns(self, rows: Tensor, horizontal: Tensor, affine: DenseAffine) -> Tensor:
        """(n, res, 3 * width) rows -> (n, res, 3 * res) images."""
        width, count = horizontal.shape[2], max(len(horizontal), len(affine.factors))
        coloured = rows.new_empty(count, width, 3, self._res, 3)  # given, or torch would permute it as the matrix is
        torch.mul(horizontal.transpose(1, 2)[:, :, None, :, None], affine.factors, out=coloured)
        coloured = coloured.view(count, 3 * width, 3 * self._res)
        if count == 1:
            return torch.addmm(affine.row_offset[0], rows.flatten(0, 1), coloured[0]).view(len(rows), self._res, -1)
        return torch.baddbmm(affine.row_offset, rows, coloured)

    def _matrices(self, start: Tensor, scale: Tensor, max_scale: float) -> DenseMatrices:
        """Of both axes at once, and so with equally many taps; ``start`` and ``scale`` (N, 2)."""
        taps = bicubic_taps(
            self._res,
            start.flatten(),
            scale.flatten(),
            max_scale=max_scale,
            kernel=self._kernel,
            antialias=self._antialias,
        )
        count = taps.weights.shape[2]
        period = max(*self._size, count)
        period += -period % _ALIGNMENT
        size = torch.full((2,), self._size[0], device=start.device)
        size[1] = self._size[1]  # not `torch.tensor`, for whose copy to a GPU the host would wait
        folded = fold_borders(taps, size.repeat(len(start))[:, None, None], period)
        columns, weights = (one.view(-1, 2, self._res, count) for one in folded)
        zero = torch.zeros(1, 1, 1, period, dtype=self._factors, device=start.device)
        return DenseMatrices(columns, weights.to(self._factors), zero)

    def _dense(self, affine: Affine) -> DenseAffine:
        colours, offset = affine.colours[:, :, :3].transpose(1, 2), affine.colours[:, None, :, 3]
        return DenseAffine(
            colours=colours,
            offset=offset,
            factors=colours.to(self._factors)[:, None, :, None],
            row_offset=offset.repeat(1, 1, self._res).to(self._factors),
            lowest=affine.lowest.repeat(self._res).to(self._factors),
            highest=affine.highest.repeat(self._res).to(self._factors),
            rows=(affine.scale.repeat(self._res), affine.offset.repeat(self._res)) if affine is self._affine else None,
        )
