"""What augmentation does to a batch: everything that is random is drawn, then prepared for the pixels, then applied.

On CUDA a launch is what costs, however small the operator. So there the draws of very many steps are made at once, then
prepared for as many steps as memory allows, and a step takes its rows of them, which launches nothing. On a CPU draws are made
for some steps at once, as the threads that decode wait for the interpreter's lock meanwhile. The draws are the same however
many are made at once: they are functions of the seed, the epoch and the sample alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidali.config import Augment, Preprocess
from tidali.loading.augment import (
    colour_matrices,
    crop_boxes,
    erase,
    erase_boxes,
    erase_inside,
    erase_masks,
    flip_flags,
    gather,
    shift_offsets,
    shift_pixels,
    source_pixels,
)
from tidali.loading.dense import Dense, DenseResample
from tidali.loading.native import Chosen
from tidali.loading.resample import Pieces, Resample, take

_DRAWN_SAMPLES = {"cpu": 1 << 12, "cuda": 1 << 17}
"""That are drawn for at once. On CUDA 15 MB of draws, 200 MB while they are made."""
_PREPARED_ROWS = 1 << 22
"""Rows and columns of pixels and images that are prepared for at once on CUDA: up to 400 MB while it is done, 150 after it."""


class Draws(NamedTuple):
    """Of some samples, one row each; None: augmentation has no such change."""

    samples: Tensor
    """(N,) int64, positions in the split."""
    labels: Tensor
    """(N,) int64."""
    flips: Tensor | None = None
    """(N,) bool."""
    shifts: Tensor | None = None
    """(N, 2) int64, down and right."""
    boxes: Tensor | None = None
    """(N, 4) float32, of the crop in stored pixels."""
    colour: Tensor | None = None
    """(N, 3, 4) float32."""
    erased: Tensor | None = None
    """(N, 4) float32, in the image's pixels."""

    def of(self, rows: slice | Tensor) -> Draws:
        parts = {name: value[rows] for name, value in self._asdict().items() if value is not None}
        return Draws(**parts)


def draw(
    augment: Augment,
    samples: Tensor,
    labels: Tensor,
    *,
    size: tuple[int, int] | None,
    side: int,
    seed: int,
    epoch: int,
) -> Draws:
    """
    Args:
        size: of the stored images; None where they come cropped already.
        side: of the network's input, in pixels.
    """
    key = {"seed": seed, "epoch": epoch}
    crop = None if size is None else augment.crop_scale
    return Draws(
        samples,
        labels,
        flips=flip_flags(augment.flip, samples, **key) if augment.flip != "none" else None,
        shifts=shift_offsets(augment.shift_px, samples, **key) if augment.shift_px else None,
        boxes=crop_boxes(size, crop, augment.crop_ratio, samples, **key) if crop is not None and size is not None else None,
        colour=colour_matrices(augment, samples, **key) if augment.changes_colour else None,
        erased=erase_boxes((side, side), augment.erase, samples, **key) if augment.erase else None,
    )


class Changes:
    """Changes images of one input size as drawn, on a CPU: each batch by itself."""

    prepare_steps = 1
    """How many steps are prepared for at once."""

    def __init__(self, resample: Resample, batch_size: int) -> None:
        self._resample = resample
        self.draw_steps = max(_DRAWN_SAMPLES["cpu"] // batch_size, 1)

    def prepare(self, draws: Draws) -> Any:
        """What `apply` takes, one row a sample."""
        return draws

    def apply(self, stored: Tensor, rows: Tensor | None, draws: Any) -> Tensor:
        """
        Args:
            stored: (M, H, W, 3) uint8.
            rows: (n,) int64, the batch's places in ``stored``; None for all of them.

        Returns:
            (n, 3, side, side), channels_last.
        """
        chosen = Chosen(stored, rows, draws.flips)
        if draws.shifts is not None:
            chosen = Chosen(shift_pixels(take(chosen), draws.shifts), None, None)
        images = self._resample(chosen.stored, draws.boxes, draws.colour, rows=chosen.rows, flips=chosen.flips)
        return images if draws.erased is None else erase(images, draws.erased)

    def in_pieces(self, draws: Any) -> Pieces | None:
        """`apply`, made while pixels are decoded; None where that needs the whole batch."""
        if draws.shifts is not None or draws.erased is not None:
            return None
        return self._resample.in_pieces(len(draws.samples), draws.boxes, draws.colour, draws.flips)


class Prepared(NamedTuple):
    """What `CudaChanges` applies to the images of some samples."""

    picked: tuple[Tensor, Tensor] | None
    """The rows (N or 1, H) and columns (N or 1, W), int64, of which flipped and shifted images are made."""
    resampled: Dense
    erased: tuple[Tensor, Tensor] | None
    """The rows (N, side) and columns (N, side), bool, of the erased boxes."""

    def of(self, samples: slice) -> Prepared:
        def part(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            if pair is None:
                return None
            rows, columns = (one if len(one) == 1 else one[samples] for one in pair)
            return rows, columns

        return Prepared(part(self.picked), self.resampled.of(samples), part(self.erased))


class CudaChanges:
    """The same on CUDA: prepared for many batches at once, and applied in as few launches as possible."""

    def __init__(self, resample: DenseResample, size: tuple[int, int], side: int, batch_size: int) -> None:
        """
        Args:
            size: of the stored pixels.
            side: of the images.
            batch_size: the most samples of a batch.
        """
        self._resample, self._size, self._side, self._batch_size = resample, size, side, batch_size
        self.draw_steps = max(_DRAWN_SAMPLES["cuda"] // batch_size, 1)
        self.prepare_steps = max(_PREPARED_ROWS // (batch_size * (sum(size) + 2 * side)), 1)
        self._everyone: Tensor | None = None

    def prepare(self, draws: Draws) -> Prepared:
        return Prepared(
            picked=source_pixels(self._size, draws.flips, draws.shifts),
            resampled=self._resample.prepare(draws.boxes, draws.colour),
            erased=None if draws.erased is None else erase_masks(draws.erased, (self._side, self._side)),
        )

    def apply(self, stored: Tensor, rows: Tensor | None, prepared: Prepared) -> Tensor:
        """As `Changes.apply`."""
        if prepared.picked is not None:
            pixels = gather(stored, self._places(stored) if rows is None else rows, *prepared.picked)
        else:
            pixels = stored if rows is None else stored.index_select(0, rows)
        images = self._resample.apply(pixels, prepared.resampled)
        return images if prepared.erased is None else erase_inside(images, *prepared.erased)

    def in_pieces(self, prepared: Prepared) -> None:
        """Decoded pixels are uploaded first."""

    def _places(self, stored: Tensor) -> Tensor:
        if self._everyone is None:
            self._everyone = torch.arange(self._batch_size, device=stored.device)
        return self._everyone[: len(stored)]


class DrawnSteps:
    """The draws of some steps of one input size, prepared several steps at a time."""

    def __init__(self, changes: Changes | CudaChanges, draws: Draws, counts: Sequence[int]) -> None:
        """
        Args:
            counts: of the samples of each step.
        """
        self._changes, self._draws = changes, draws
        self._begins = list(accumulate(counts, initial=0))
        self._first: int | None = None
        """The first step that is prepared for."""

    def of(self, step: int, kept: Tensor | None = None) -> tuple[Tensor, Any]:
        """A step's labels (n,) and what `Changes.apply` takes for it.

        Args:
            kept: (n,) int64, the rows of the step's samples that are not corrupt; None for all.
        """
        rows = slice(*self._begins[step : step + 2])
        if kept is not None:
            draws = self._draws.of(rows).of(kept)
            return draws.labels, self._changes.prepare(draws)
        at_once = self._changes.prepare_steps
        first = step - step % at_once
        begin, end = self._begins[first], self._begins[min(first + at_once, len(self._begins) - 1)]
        if first != self._first:
            self._first, self._prepared = first, self._changes.prepare(self._draws.of(slice(begin, end)))
        whole = (rows.start, rows.stop) == (begin, end)
        return self._draws.labels[rows], self._prepared if whole else self._prepared.of(
            slice(rows.start - begin, rows.stop - begin)
        )


def make_changes(
    size: tuple[int, int], preprocess: Preprocess, batch_size: int, dtype: torch.dtype, device: torch.device
) -> Changes | CudaChanges:
    """
    Args:
        size: of the stored pixels.
        batch_size: the most samples of a batch.
    """
    if device.type == "cpu":
        return Changes(Resample(size, preprocess, dtype=dtype), batch_size)
    resample = DenseResample(size, preprocess, dtype=dtype, device=device)
    return CudaChanges(resample, size, preprocess.res, batch_size)
