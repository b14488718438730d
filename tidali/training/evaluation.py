"""Evaluation of a checkpoint at one or several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tidali.config import AmpChoice, CacheChoice, DeviceChoice, check_res
from tidali.dataset.contract import Dataset
from tidali.errors import UsageError
from tidali.hardware.device import explain_out_of_memory, numerics
from tidali.hardware.ranks import joined_ranks
from tidali.loading.data import Data
from tidali.model.checkpoint import EVAL_BATCH_SIZE, ModelCard, open_checkpoint
from tidali.model.served import ServedModel
from tidali.training.engine import evaluate
from tidali.training.metrics import Meter, Score

_SERVED_BATCH = 64  # float32 at 224 px: its activations take 0.6 GB


@dataclass(frozen=True, kw_only=True)
class ResolutionScore:
    """The score at one resolution."""

    res: int
    score: Score


@numerics()
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
    """Score a checkpoint on every sample of a split, preprocessed as its card describes.

    Args:
        given: a checkpoint's path, see `tidali.model.checkpoint.find_checkpoint`.
        resolutions: input sides in pixels; by default the one it was trained at.
        flip: test-time augmentation: average the logits of each image and of the image flipped horizontally.

    Raises:
        UsageError: no checkpoint, or one for other classes than the data set's.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    model, card, plan = open_checkpoint(given, dataset, device=device, amp=amp)
    resolutions = list(resolutions) or [card.res]
    for res in resolutions:
        check_res(res)
    rows = []
    with joined_ranks(plan.device.type) as ranks:
        data = Data(dataset, plan.device, cache=cache, max_bad=max_bad, ranks=ranks)
        for res in resolutions:
            batches = data.batches(split, card.preprocess(res), EVAL_BATCH_SIZE, dtype=plan.images_dtype)
            with explain_out_of_memory(f"batches of {EVAL_BATCH_SIZE} images of {res} px", "give a smaller --res"):
                score = evaluate(model, batches, plan, expected_samples=batches.samples_given, flip=flip, ranks=ranks)
            data.share_corrupt()
            rows.append(ResolutionScore(res=res, score=score))
    return card, rows


@numerics()
@torch.inference_mode()
def evaluate_served(given: str, dataset: Dataset, *, split: str = "val", device: DeviceChoice = "auto") -> Score:
    """Score a checkpoint as it is served: in float32, on stored pixels, with resizing and normalisation inside the network.

    Raises:
        UsageError: no checkpoint, one for other classes, or images of several sizes.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    model, card, plan = open_checkpoint(given, dataset, device=device, amp="off")
    size = dataset.split(split).single_image_size
    if size is None:
        raise UsageError(f"{dataset.root}: has images of several sizes, and a served network takes one size only")
    served = ServedModel(model, card, size).to(plan.device)
    meter = Meter(plan.device)
    for pixels, labels in Data(dataset, plan.device).decoded(split, card.preprocess(), _SERVED_BATCH):
        meter.update(served(pixels).log(), labels)
    return meter.read()
