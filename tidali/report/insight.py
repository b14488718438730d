"""A checkpoint's predictions for a split: right and wrong ones by class, confusions, and the hardest samples."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from tidali.config import AmpChoice, CacheChoice, DeviceChoice
from tidali.console import progress_bar
from tidali.dataset.contract import ClassName, Dataset, SampleRecord, Shard, iter_records
from tidali.errors import TidaliError
from tidali.hardware.device import DevicePlan, numerics
from tidali.images.stored import stored_image
from tidali.loading.batches import Batches
from tidali.loading.data import Data
from tidali.model.checkpoint import EVAL_BATCH_SIZE, open_checkpoint
from tidali.model.resnet import compute_logits

PICTURE_SIDE_PX = 256
"""Larger images are reduced to this side for a page. It shows them at 96 CSS pixels, so sharply on screens of up to 2.7 dots
each."""
_WEB_FORMATS = {"jpg": "jpeg", "png": "png", "webp": "webp"}


class Confusion(NamedTuple):
    """How many samples of one class were predicted as another."""

    true: int
    predicted: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Insight:
    """Predictions for every sample of a split, in stored order. Tensors are on the CPU."""

    dataset: Dataset
    split: str
    res: int
    """Input side, in pixels."""
    samples: tuple[tuple[Shard, SampleRecord], ...]
    """Where each sample is stored; corrupt images are dropped."""
    labels: Tensor
    """(N,) int64."""
    predicted: Tensor
    """(N,) int64: the most probable class."""
    losses: Tensor
    """(N,) float32: cross entropy in nats, which is minus the logarithm of the true class's probability."""
    confidences: Tensor
    """(N,) float32: probability of the predicted class, 0..1."""

    @property
    def classes(self) -> tuple[ClassName, ...]:
        return self.dataset.manifest.classes

    @property
    def correct(self) -> int:
        return int((self.predicted == self.labels).sum())

    @property
    def top1_percent(self) -> float:
        return 100 * self.correct / len(self.labels)

    def confusion(self) -> Tensor:
        """(C, C) int64: samples by true class (rows) and predicted class (columns)."""
        count = len(self.classes)
        return torch.bincount(self.labels * count + self.predicted, minlength=count * count).reshape(count, count)

    def class_top1_percent(self) -> list[float | None]:
        """Top-1 of each class, in class order; None where the split has no sample of it."""
        confusion = self.confusion()
        pairs = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)
        return [100 * correct / count if count else None for correct, count in pairs]

    def most_confused(self, count: int) -> list[Confusion]:
        """The most frequent pairs of true and predicted class, most frequent first, at most ``count``; ties in class order."""
        wrong = self.confusion()
        wrong.fill_diagonal_(0)
        rows = [Confusion(true, other, int(wrong[true, other])) for true, other in wrong.nonzero().tolist()]
        return sorted(rows, key=lambda row: -row.samples)[:count]

    def hardest(self, count: int) -> list[int]:
        """Indices of the samples with the highest loss, highest first."""
        return torch.sort(self.losses, descending=True, stable=True).indices[:count].tolist()

    def examples(self, pair: Confusion, count: int) -> list[int]:
        """Indices of samples of a confused pair, those with the highest loss first."""
        found = ((self.labels == pair.true) & (self.predicted == pair.predicted)).nonzero()[:, 0]
        return found[torch.sort(self.losses[found], descending=True, stable=True).indices][:count].tolist()

    def picture(self, index: int) -> str:
        """The sample's image as a ``data:`` URL: its stored bytes where it is small and browsers show its format, else a
        reduced JPEG.

        Raises:
            DatasetError: the image cannot be decoded.
        """
        shard, record = self.samples[index]
        content = self.dataset.stored_bytes(shard, record)
        kind = _WEB_FORMATS.get(record.extension)
        if kind is None or max(record.height, record.width) > PICTURE_SIDE_PX:
            content, kind = _reduced(stored_image(self.dataset, shard, record)), "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@numerics()
def inspect_checkpoint(
    given: str,
    dataset: Dataset,
    *,
    split: str = "val",
    res: int | None = None,
    device: DeviceChoice = "auto",
    amp: AmpChoice = "auto",
    cache: CacheChoice = "auto",
    max_bad: int | None = None,
) -> Insight:
    """A checkpoint's prediction for every sample of a split, preprocessed and computed as ``tidali eval`` does, in one process.

    Args:
        given: a checkpoint's path, see `tidali.model.checkpoint.find_checkpoint`.
        res: input side in pixels; by default the one it was trained at.

    Raises:
        UsageError: no checkpoint, or one for other classes than the data set's.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    model, card, plan = open_checkpoint(given, dataset, device=device, amp=amp)
    res = res or card.res
    data = Data(dataset, plan.device, cache=cache, max_bad=max_bad)
    batches = data.batches(split, card.preprocess(res), EVAL_BATCH_SIZE)
    labels, predicted, losses, confidences = _predict(model, batches, plan)
    corrupt = data.corrupt(split)
    samples = tuple(sample for position, sample in enumerate(iter_records(dataset, split)) if position not in corrupt)
    if labels.tolist() != [record.label for _, record in samples]:
        raise TidaliError(f"{dataset.root}: {split!r} was not read in its stored order; 'tidali verify' checks its labels")
    return Insight(
        dataset=dataset,
        split=split,
        res=res,
        samples=samples,
        labels=labels,
        predicted=predicted,
        losses=losses,
        confidences=confidences,
    )


@torch.inference_mode()
def _predict(model: nn.Module, batches: Batches, plan: DevicePlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, predicted classes, losses and confidences, each (N,), on the CPU."""
    parts = []
    with progress_bar() as bar:
        task = bar.add_task("predicting", total=batches.samples)
        for images, labels in batches:
            logits = compute_logits(model, images, plan)
            # The first of the top five, as `tidali.training.metrics.Meter` counts: equal bf16 logits are ordered alike.
            predicted = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0]
            losses = functional.cross_entropy(logits, labels, reduction="none")
            confidences = logits.softmax(1).amax(1)
            parts.append([part.cpu() for part in (labels, predicted, losses, confidences)])
            bar.advance(task, len(labels))
    labels, predicted, losses, confidences = (torch.cat(column) for column in zip(*parts, strict=True))
    return labels, predicted, losses, confidences


def _reduced(image: Image.Image) -> bytes:
    """As JPEG, of at most `PICTURE_SIDE_PX` a side."""
    image.thumbnail((PICTURE_SIDE_PX, PICTURE_SIDE_PX))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
