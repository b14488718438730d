"""Evaluation of one or several checkpoints, each at one or several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tidali.config import AmpChoice, CacheChoice, DeviceChoice, check_res
from tidali.console import progress_bar
from tidali.dataset.contract import Dataset
from tidali.errors import UsageError, explain_out_of_memory
from tidali.hardware.device import DevicePlan, numerics
from tidali.hardware.ranks import joined_ranks
from tidali.loading.data import Data
from tidali.model.checkpoint import EVAL_BATCH_SIZE, ModelCard, open_checkpoint
from tidali.model.served import ServedModel
from tidali.training.engine import evaluate
from tidali.training.metrics import Meter, Score
from tidali.training.predictions import PredictionLog, Predictions

_SERVED_BATCH = 64  # float32 at 224 px: its activations take 0.6 GB


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How checkpoints are evaluated."""

    split: str = "val"
    resolutions: tuple[int, ...] = ()
    """Input sides in pixels; none for the one that a checkpoint was trained at."""
    device: DeviceChoice = "auto"
    amp: AmpChoice = "auto"
    cache: CacheChoice = "auto"
    max_bad: int | None = None
    """Corrupt images of the split that may be left out; None for 0.1 % of it."""
    flip: bool = False
    """Flip TTA (test-time augmentation): average the logits of each image and of the image flipped horizontally."""


@dataclass(frozen=True, kw_only=True)
class ResolutionScore:
    """The score at one resolution."""

    res: int
    score: Score
    predictions: Predictions
    """What was predicted for each sample."""


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
        flip: flip TTA (test-time augmentation): average the logits of each image and of the image flipped horizontally.

    Raises:
        UsageError: no checkpoint, or one for other classes than the data set's.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    options = EvalOptions(
        split=split, resolutions=tuple(resolutions), device=device, amp=amp, cache=cache, max_bad=max_bad, flip=flip
    )
    [evaluated] = evaluate_checkpoints([given], dataset, options)
    return evaluated


@numerics()
def evaluate_checkpoints(
    given: Sequence[str], dataset: Dataset, options: EvalOptions
) -> list[tuple[ModelCard, list[ResolutionScore]]]:
    """Score several checkpoints, each as `evaluate_checkpoint` does, on the same data.

    Raises:
        UsageError: no checkpoint, or one for other classes than the data set's.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    opened = [open_checkpoint(one, dataset, device=options.device, amp=options.amp) for one in given]
    for res in options.resolutions:
        check_res(res)
    plan = opened[0][2]
    found = []
    with joined_ranks(plan.device.type) as ranks:
        data = Data(dataset, plan.device, cache=options.cache, max_bad=options.max_bad, ranks=ranks)
        for model, card, _ in opened:
            found.append((card, [_score(model, card, data, res, plan, options) for res in options.resolutions or [card.res]]))
    return found


def _score(model: nn.Module, card: ModelCard, data: Data, res: int, plan: DevicePlan, options: EvalOptions) -> ResolutionScore:
    batches = data.batches(options.split, card.preprocess(res), EVAL_BATCH_SIZE, dtype=plan.images_dtype)
    ranks = data.ranks
    with (
        explain_out_of_memory(f"batches of {EVAL_BATCH_SIZE} images of {res} px", "give a smaller --res"),
        progress_bar() as bar,
    ):
        task = bar.add_task(f"evaluating at {res} px", total=batches.samples)
        log = PredictionLog(on_batch=lambda samples: bar.advance(task, samples * ranks.world_size))
        score = evaluate(
            model,
            batches,
            plan,
            expected_samples=batches.samples_given,
            flip=options.flip,
            ranks=ranks,
            on_logits=log.add,
        )
    predictions = log.read(batches, ranks, len(card.classes))
    data.share_corrupt()
    return ResolutionScore(res=res, score=score, predictions=predictions)


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
