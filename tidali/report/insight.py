"""A checkpoint's predictions for a split, with the images they are of and their names in the source."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from tidali.dataset.contract import ClassName, Dataset, SampleRecord, Shard, read_record
from tidali.images.stored import stored_image
from tidali.training.evaluation import EvalOptions, ResolutionScore, evaluate_checkpoints
from tidali.training.predictions import ClassAccuracy, Predictions

PICTURE_SIDE_PX = 256
"""Larger images are reduced to this side for a page. It shows them at 96 CSS pixels, so sharply on screens of up to 2.7 dots
each."""
_WEB_FORMATS = {"jpg": "jpeg", "png": "png", "webp": "webp"}


@dataclass(frozen=True, kw_only=True)
class Insight(Predictions):
    """Predictions, and where each sample is stored."""

    dataset: Dataset
    split: str
    res: int
    """Input side, in pixels."""

    @property
    def classes(self) -> tuple[ClassName, ...]:
        return self.dataset.manifest.classes

    def lowest_classes(self) -> list[tuple[str, ClassAccuracy]]:
        """The classes that have samples, with their accuracies, the lowest first."""
        found = [(one.name, accuracy) for one, accuracy in zip(self.classes, self.by_class(), strict=True) if accuracy.samples]
        return sorted(found, key=lambda row: row[1].correct / row[1].samples)

    def sample(self, index: int) -> tuple[Shard, SampleRecord]:
        """Where a sample is stored, with the name that it had in the source.

        Raises:
            DatasetError: the shard's record is missing or damaged.
        """
        place = int(self.positions[index])
        for shard in self.dataset.split(self.split).shards:
            if place < shard.samples:
                return shard, _record(self.dataset.root, shard)[place]
            place -= shard.samples
        raise AssertionError(f"the split has no sample {int(self.positions[index])}")

    def picture(self, index: int) -> str:
        """The sample's image as a ``data:`` URL: its stored bytes where it is small and browsers show its format, else a
        reduced JPEG.

        Raises:
            DatasetError: the image cannot be decoded.
        """
        shard, record = self.sample(index)
        content = self.dataset.stored_bytes(shard, record)
        kind = _WEB_FORMATS.get(record.extension)
        if kind is None or max(record.height, record.width) > PICTURE_SIDE_PX:
            content, kind = _reduced(stored_image(self.dataset, shard, record)), "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def inspect_checkpoint(given: str, dataset: Dataset, options: EvalOptions, *, res: int | None = None) -> Insight:
    """A checkpoint's prediction for every sample of a split, preprocessed and computed as ``tidali eval`` does.

    Args:
        given: a checkpoint's path, see `tidali.model.checkpoint.find_checkpoint`.
        res: input side in pixels; by default the one it was trained at.

    Raises:
        UsageError: no checkpoint, or one for other classes than the data set's.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    [(_, [row])] = evaluate_checkpoints([given], dataset, replace(options, resolutions=(res,) if res else ()))
    return insight_of(row, dataset, options.split)


def insight_of(row: ResolutionScore, dataset: Dataset, split: str) -> Insight:
    """The predictions of an evaluation, with the samples they are of."""
    return Insight(**vars(row.predictions), dataset=dataset, split=split, res=row.res)


@lru_cache(maxsize=8)
def _record(root: Path, shard: Shard) -> list[SampleRecord]:
    return read_record(root, shard)


def _reduced(image: Image.Image) -> bytes:
    """As JPEG, of at most `PICTURE_SIDE_PX` a side."""
    image.thumbnail((PICTURE_SIDE_PX, PICTURE_SIDE_PX))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
