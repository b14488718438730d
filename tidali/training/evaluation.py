"""A checkpoint measured at one or several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tidali.config import AmpChoice, CacheChoice, DeviceChoice, check_res
from tidali.dataset.contract import Dataset
from tidali.errors import UsageError
from tidali.hardware.device import plan_device, set_numerics
from tidali.hardware.ranks import joined_ranks
from tidali.loading.data import Data
from tidali.model.checkpoint import EVAL_BATCH_SIZE, ModelCard, find_checkpoint, load_model
from tidali.model.served import ServedModel
from tidali.training.engine import evaluate
from tidali.training.metrics import Meter, Score

_SERVED_BATCH = 64  # float32 at 224 px: its activations take 0.6 GB


@dataclass(frozen=True, kw_only=True)
class ResolutionScore:
    """One row of the table."""

    res: int
    score: Score


def evaluate_checkpoint(
    given: str,
    dataset: Dataset,
    *,
    split: str = "val",
    resolutions: Sequence[int] = (),
    device: DeviceChoice = "auto",
    amp: AmpChoice = "auto",
    cache: CacheChoice = "auto",
    max_bad: int | None = None,
    flip: bool = False,
) -> tuple[ModelCard, list[ResolutionScore]]:
    """Score a checkpoint on a split, preprocessed as its card says.

    Args:
        given: a checkpoint's path, see `tidali.model.checkpoint.find_checkpoint`.
        resolutions: input sides in pixels; by default the one it was trained at.
        flip: score the mean of the logits of each image and of its mirror image.

    Raises:
        UsageError: no checkpoint, or one for other classes than the data set's.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    model, card = load_model(find_checkpoint(given))
    check_classes(card, dataset, given)
    resolutions = list(resolutions) or [card.res]
    for res in resolutions:
        check_res(res)
    plan = plan_device(device, amp, "off")
    set_numerics()
    model.to(plan.device)
    rows = []
    with joined_ranks(plan.device.type) as ranks:
        data = Data(dataset, plan.device, cache=cache, max_bad=max_bad, ranks=ranks)
        for res in resolutions:
            batches = data.batches(split, card.preprocess(res), EVAL_BATCH_SIZE)
            score = evaluate(model, batches, plan, expected_samples=batches.samples_given, flip=flip, ranks=ranks)
            data.share_corrupt()
            rows.append(ResolutionScore(res=res, score=score))
    return card, rows


@torch.inference_mode()
def evaluate_served(given: str, dataset: Dataset, *, split: str = "val", device: DeviceChoice = "auto") -> Score:
    """Score a checkpoint as it would be served: stored pixels in, resize and normalisation inside the network, in float32.

    Raises:
        UsageError: no checkpoint, one for other classes, or images of several sizes.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    model, card = load_model(find_checkpoint(given))
    check_classes(card, dataset, given)
    plan = plan_device(device, "off", "off")
    set_numerics()
    size = dataset.split(split).single_image_size
    if size is None:
        raise UsageError(f"{dataset.root}: images of several sizes, and a served network takes one")
    served = ServedModel(model, card, size).to(plan.device)
    meter = Meter(plan.device)
    for pixels, labels in Data(dataset, plan.device).decoded(split, card.preprocess(), _SERVED_BATCH):
        meter.update(served(pixels).log(), labels)
    return meter.read()


def check_classes(card: ModelCard, dataset: Dataset, given: str) -> None:
    """
    Raises:
        UsageError: the checkpoint's labels do not mean the data set's classes.
    """
    ours, theirs = [c.id for c in dataset.manifest.classes], [c.id for c in card.classes]
    if len(ours) != len(theirs):
        raise UsageError(
            f"{given}: a head of {len(theirs)} classes, {dataset.root} has {len(ours)}; evaluate it on its own data"
        )
    for label, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if own != other:
            raise UsageError(
                f"{given}: class {label} is {other!r}, in {dataset.root} it is {own!r}; evaluate it on its own data"
            )
