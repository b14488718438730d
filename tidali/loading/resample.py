"""Resizing as a matrix: stored uint8 pixels to normalised images of any size.

The matrices are those of `tidali.loading.bicubic`: the same for the whole batch, or one for each sample (random crops), made
on the device. They are banded. On a CPU their rows are taken in blocks, each times the window of source rows that it needs: 13
of 64 for 28 output rows at 64 -> 224; and where there is a C compiler, their non-zero elements alone (`tidali.loading.native`).
On CUDA, where products are nearly free and launches are not, all of them (`tidali.loading.dense`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tidali.config import Kernel, Preprocess
from tidali.hardware.cpu_memory import ReusedMemory
from tidali.loading import native
from tidali.loading.bicubic import CUBIC_A, Affine, Taps, bicubic_taps, centre_crop, make_affine
from tidali.loading.dense import DenseResample
from tidali.loading.native import Chosen

PIECE_IMAGES = 16
"""At 64 px their pixels stay in the nearest cache. A stream of 64 px images was 5 % faster than when whole batches were
normalised after they had been decoded."""
_CPU_BLOCK_ROWS = 32
_CPU_CHUNK_BYTES = 3 << 20
"""Of float32 images that each CPU thread has in hand: 5 at 224 px, 64 at 64 px. More leave the cache, fewer are overhead."""


class Band(NamedTuple):
    """The same in blocks of rows with the window of columns outside which a block is zero."""

    weights: Tensor
    """(N or 1, blocks, rows of a block, window)."""
    columns: Tensor
    """(N or 1, blocks * window) int64. Border columns repeat where a window reaches beyond the image."""

    def of(self, samples: slice) -> Band:
        return self if len(self.weights) == 1 else Band(self.weights[samples], self.columns[samples])


def make_band(taps: Taps, size: int, *, max_scale: float, block_rows: int) -> Band:
    """
    Args:
        size: of the source axis.
        max_scale: as the taps were made with.
        block_rows: a divisor of the taps' rows.
    """
    device, width = taps.weights.device, taps.weights.shape[2]
    window = math.ceil((block_rows - 1) * max_scale) + width + 1
    first, weights = taps.first.unflatten(1, (-1, block_rows)), taps.weights.unflatten(1, (-1, block_rows))
    begins = first[:, :, :1]
    blocks = torch.zeros(*weights.shape[:3], window, device=device)
    # No index repeats, so this is deterministic on a GPU too.
    blocks.scatter_(3, (first - begins)[..., None] + torch.arange(width, device=device), weights)
    columns = begins + torch.arange(window, device=device)
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


def take(images: Chosen) -> Tensor:
    """(N, H, W, 3) uint8: a batch's images, flipped where flagged."""
    taken = images.stored if images.rows is None else images.stored.index_select(0, images.rows)
    return taken if images.flips is None else flip_where(taken, images.flips)


def flip_where(pixels: Tensor, flags: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 with the flagged samples flipped horizontally.

    Both sides are made and one is picked: ten times as fast on a CPU as `torch.where`, and no wait for a count on a GPU.
    """
    flipped = pixels.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)  # seen as NCHW, torch has a fast kernel for it
    both = torch.stack((pixels.flatten(1), flipped.flatten(1)), dim=1).flatten(0, 1)
    picked = 2 * torch.arange(len(pixels), device=pixels.device) + flags
    return both.index_select(0, picked).view_as(pixels)


class Products(Protocol):
    """How ``Y = A_y X A_x^T`` is computed."""

    def prepare(self, taps: Taps, size: int, max_scale: float) -> Any:
        """An axis's matrix in this one's own form."""
        ...

    def __call__(self, images: Chosen, matrices: tuple[Any, Any] | None, affine: Affine, out: Tensor) -> None:
        """(N, H, W, 3) uint8 pixels and two prepared matrices, vertical and horizontal, -> (N, res, res, 3) ``out``. None: both
        are the identity."""
        ...


class TorchProducts:
    """Two batched matrix products of float32 factors, of blocks of the matrix."""

    def __init__(self, res: int) -> None:
        self._res = res
        self._block_rows = max(rows for rows in range(1, _CPU_BLOCK_ROWS + 1) if res % rows == 0)
        image_bytes = 3 * res * res * torch.float32.itemsize
        self._chunk = torch.get_num_threads() * max(_CPU_CHUNK_BYTES // image_bytes, 1)

    def _normalise(self, pixels: Tensor, affine: Affine, out: Tensor) -> None:
        """Whole rows at a time: a broadcast over three channels is not vectorised."""
        chunk = self._chunk
        if len(affine.colours) > 1:
            for i in range(0, len(pixels), chunk):
                part = affine._replace(colours=affine.colours[i : i + chunk])
                coloured = _coloured(pixels[i : i + chunk].flatten(1, 2).to(torch.float32), part)
                out[i : i + chunk].flatten(1, 2).copy_(coloured.clamp_(part.lowest, part.highest))
            return
        scale, offset = affine.scale.repeat(self._res), affine.offset.repeat(self._res)
        for i in range(0, len(pixels), chunk):
            rows, normalised = pixels[i : i + chunk].flatten(2).to(torch.float32), out[i : i + chunk].flatten(2)
            if out.dtype == torch.float32:
                torch.addcmul(offset, rows, scale, out=normalised)
            else:
                normalised.copy_(torch.addcmul(offset, rows, scale))

    def prepare(self, taps: Taps, size: int, max_scale: float) -> Band:
        return make_band(taps, size, max_scale=max_scale, block_rows=self._block_rows)

    def __call__(self, images: Chosen, matrices: tuple[Band, Band] | None, affine: Affine, out: Tensor) -> None:
        pixels = take(images)
        if matrices is None:
            self._normalise(pixels, affine, out)
            return
        (vertical, horizontal), chunk = matrices, self._chunk
        for i in range(0, len(pixels), chunk):
            part = slice(i, i + chunk)
            own = affine if len(affine.colours) == 1 else affine._replace(colours=affine.colours[part])
            self._resample(pixels[part], vertical.of(part), horizontal.of(part), own, out[part].flatten(2))

    def _resample(self, pixels: Tensor, vertical: Band, horizontal: Band, affine: Affine, out: Tensor) -> None:
        """Columns first, while there are few rows. (h, w, c) -> (w, c, h) -> (res, c, h) -> (h, res, c) -> (res, res, c)."""
        n, height, width, _ = pixels.shape
        x = pixels.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format)
        if len(affine.colours) == 1:
            x = torch.addcmul(affine.offset[:, None], x, affine.scale[:, None])
        else:
            x = _coloured(x.permute(0, 1, 3, 2).flatten(1, 2), affine).view(n, width, height, 3).permute(0, 1, 3, 2)
            x = x.contiguous()
        x = apply_band(horizontal, x.reshape(n, width, 3 * height))
        x = x.view(n, self._res, 3, height).permute(0, 3, 1, 2).contiguous().view(n, height, self._res * 3)
        lowest, highest = (bound.repeat(self._res) for bound in (affine.lowest, affine.highest))
        if out.dtype == torch.float32:
            apply_band(vertical, x, out).clamp_(lowest, highest)
        else:
            out.copy_(apply_band(vertical, x).clamp_(lowest, highest))


def _coloured(pixels: Tensor, affine: Affine) -> Tensor:
    """(n, pixels, 3) float32 pixels of 0..255, each image by its own matrix."""
    return torch.baddbmm(affine.colours[:, None, :, 3], pixels, affine.colours[:, :, :3].transpose(1, 2))


class CompiledProducts:
    """One pass in C over the matrix's non-zero elements."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def over(
        self, images: Chosen, matrices: tuple[native.Axis, native.Axis] | None, affine: Affine, out: Tensor
    ) -> native.Pass:
        """The same, part by part."""
        if matrices is None:
            return native.colour(self._library, images, **affine._asdict(), out=out)
        return native.resample(self._library, images, *matrices, **affine._asdict(), out=out)

    def prepare(self, taps: Taps, size: int, max_scale: float) -> native.Axis:
        return native.make_axis(*taps, size=size)

    def __call__(self, images: Chosen, matrices: tuple[native.Axis, native.Axis] | None, affine: Affine, out: Tensor) -> None:
        native.in_parallel(self.over(images, matrices, affine, out), len(out))


def choose_products(res: int, dtype: torch.dtype) -> Products:
    """For images of ``dtype`` on a CPU."""
    library = native.load() if dtype in (torch.float32, torch.bfloat16) else None
    return TorchProducts(res) if library is None else CompiledProducts(library)


class Pieces(NamedTuple):
    """A batch whose images are made a few at a time, by the threads that decode their pixels."""

    images: Tensor
    """(N, res, res, 3), uninitialised."""
    made_from: Callable[[Tensor], native.Pass]
    """What makes images of pixels (`PIECE_IMAGES`, H, W, 3) uint8: image n of those at n % `PIECE_IMAGES`."""


class Resample:
    """uint8 pixels (N, H, W, 3) -> images (N, 3, res, res), normalised, channels_last."""

    def __init__(
        self,
        size: tuple[int, int],
        preprocess: Preprocess,
        *,
        dtype: torch.dtype = torch.float32,
        antialias: bool = True,
        device: torch.device | None = None,
        products: Products | None = None,
    ) -> None:
        """
        Args:
            size: height and width of the pixels that will be given.
            dtype: of the images.
            products: on a CPU; `choose_products`'s by default.
        """
        res, crop_fraction = preprocess.res, preprocess.crop_fraction
        self._size, self._res, self._dtype = size, res, dtype
        self._dense: DenseResample | None = None
        if device is not None and device.type != "cpu":
            self._dense = DenseResample(size, preprocess, dtype=dtype, antialias=antialias, device=device)
            return
        self._kernel = preprocess.kernel
        self._antialias, self._crop_fraction = antialias, crop_fraction
        self._memory = ReusedMemory()
        self._affine = make_affine(preprocess.mean, preprocess.std, None)
        self._products = products or choose_products(res, dtype)
        self._centre = None if size == (res, res) and crop_fraction == 1 else (self._centre_matrix(0), self._centre_matrix(1))

    def __call__(
        self,
        pixels: Tensor,
        boxes: Tensor | None = None,
        colour: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        flips: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            pixels: (M, H, W, 3) uint8, contiguous.
            boxes: (N, 4) float32: top, left, height and width of what becomes res x res, in pixels, inside the image. By
                default the shorter side is resized to ``res`` and the centre cropped, as in the DALI graph.
            colour: (N, 3, 4) float32: changes of colour on a 0..1 scale, ``y = A x + b``, made before the normalisation and
                with it, in one matrix.
            rows: (N,) int64, which of the pixels' images; all by default.
            flips: (N,) bool, which of those are flipped horizontally, before everything else.

        Returns:
            (N, 3, res, res) ``dtype``, channels_last, between what 0 and 255 are normalised to.
        """
        if pixels.shape[1:] != (*self._size, 3):
            raise ValueError(f"made for pixels of {self._size}, got {tuple(pixels.shape)}")
        chosen = Chosen(pixels, rows, flips)
        if self._dense is not None:
            return self._dense.apply(take(chosen), self._dense.prepare(boxes, colour))
        images = self._memory.empty((chosen.num_images, self._res, self._res, 3), self._dtype)
        if chosen.num_images:
            with torch.autocast(pixels.device.type, enabled=False):  # it would make the products bfloat16
                self._products(chosen, *self._changed(boxes, colour), images)
        return images.permute(0, 3, 1, 2)

    def in_pieces(self, count: int, boxes: Tensor | None, colour: Tensor | None, flips: Tensor | None) -> Pieces | None:
        """The same, made while pixels are decoded; None where that needs the whole batch."""
        products = self._products
        if not isinstance(products, CompiledProducts):
            return None
        out, rows = self._memory.empty((count, self._res, self._res, 3), self._dtype), torch.arange(count) % PIECE_IMAGES
        matrices, affine = self._changed(boxes, colour)
        return Pieces(out, lambda pixels: products.over(Chosen(pixels, rows, flips), matrices, affine, out))

    def _changed(self, boxes: Tensor | None, colour: Tensor | None) -> tuple[tuple[Any, Any] | None, Affine]:
        matrices = self._centre if boxes is None else (self._box_matrix(0, boxes), self._box_matrix(1, boxes))
        return matrices, self._affine if colour is None else self._affine.after(colour)

    def _centre_matrix(self, axis: int) -> Any:
        start, scale = centre_crop(self._size, self._res, axis, self._crop_fraction)
        return self._matrix(axis, torch.tensor([start]), torch.tensor([scale]), scale)

    def _box_matrix(self, axis: int, boxes: Tensor) -> Any:
        return self._matrix(axis, boxes[:, axis], boxes[:, axis + 2] / self._res, self._size[axis] / self._res)

    def _matrix(self, axis: int, start: Tensor, scale: Tensor, max_scale: float) -> Any:
        taps = bicubic_taps(self._res, start, scale, max_scale=max_scale, kernel=self._kernel, antialias=self._antialias)
        return self._products.prepare(taps, self._size[axis], max_scale)


def squares_of(images: Sequence[Any], boxes: Sequence[Sequence[float]], res: int, kernel: Kernel, out: Tensor) -> None:
    """One box of each image, antialiased bicubic, as a uint8 square; by the calling thread.

    Rows are resized along x where the box is, then along y: nothing in between grows with the image's aspect ratio.

    Args:
        images: arrays (H, W, 3) uint8, contiguous, each of its own size.
        boxes: (n, 4): top, left, height and width in the image's pixels; pixels outside a box count at its edges.
        out: (n, res, res, 3) uint8.
    """
    library = native.load()
    if library is not None:
        native.squares(library, images, boxes, CUBIC_A[kernel], out)
        return
    for image, box, square in zip(images, boxes, out, strict=True):
        x = image
        matrices = {}
        for axis in (0, 1):
            scale = box[axis + 2] / res
            taps = bicubic_taps(res, torch.tensor([box[axis]]), torch.tensor([scale]), max_scale=scale, kernel=kernel)
            index = taps.first[0][:, None] + torch.arange(taps.weights.shape[2])
            index = index.clamp(0, image.shape[axis] - 1)
            begin, end = int(index.min()), int(index.max()) + 1
            x = x[begin:end] if axis == 0 else x[:, begin:end]  # what the box reads, and nothing else of the image
            matrix = torch.zeros(res, end - begin)
            matrices[axis] = matrix.scatter_add_(1, index - begin, taps.weights[0])
        columns = torch.einsum("hwc,ow->hoc", torch.tensor(x, dtype=torch.float32), matrices[1])
        square.numpy()[:] = torch.einsum("hoc,ph->poc", columns, matrices[0]).clamp_(0, 255).round_().numpy()
