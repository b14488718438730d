"""Prediction with a trained model: images in, classes and probabilities out, preprocessed as in its evaluation."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tidali.config import AmpChoice, DeviceChoice
from tidali.hardware.device import DevicePlan, numerics
from tidali.hardware.limits import cpu_count
from tidali.loading.resample import Resample
from tidali.model.checkpoint import EVAL_BATCH_SIZE, ModelCard, open_checkpoint
from tidali.model.image_files import ImageError, read_pixels
from tidali.model.resnet import compute_logits

_SIZES_KEPT = 64  # of images whose resize matrices are kept


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """A class, and the probability that an image is of it."""

    label: int
    id: str
    """The name of the class's folder in the source."""
    name: str
    probability: float
    """Softmax, 0..1."""


class Classifier:
    """A checkpoint's network on a device, with its class names and preprocessing.

    Images are preprocessed as in evaluation: the shorter side is resized to the checkpoint's ``res`` with its bicubic kernel,
    the centre is cropped, and pixels are normalised by its mean and standard deviation. One difference: where a data set has
    images of several sizes, evaluation rounds resized pixels to whole grey levels, and this does not.
    """

    def __init__(self, model: nn.Module, card: ModelCard, plan: DevicePlan, *, flip: bool = False) -> None:
        """
        Args:
            model: with the weights, on any device; it is moved to the plan's.
            flip: flip TTA (test-time augmentation): average the logits of each image and of the image flipped horizontally.
        """
        self.model = model.to(plan.device).eval()
        self.card, self.plan, self.flip = card, plan, flip
        self._resample_from = functools.lru_cache(_SIZES_KEPT)(lambda size: Resample(size, card.preprocess()))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in label order."""
        return tuple(one.name for one in self.card.classes)

    def predict(self, images: Any, *, top: int = 5, batch_size: int = EVAL_BATCH_SIZE) -> list[list[ClassScore]]:
        """The most probable classes of each image, best first.

        Args:
            images: one image or an iterable of them, each a path, a PIL image, or uint8 pixels as an array or CPU tensor:
                (H, W, 3) RGB or (H, W) grey. Sizes may differ. An array (N, H, W, 3) is N images.
            top: how many classes; all of them where there are fewer.
            batch_size: images in a forward pass; by default as in evaluation, so that results are the same to the bit.

        Raises:
            ImageError: an image that cannot be read.
        """
        return [scores for _, scores in self.stream(images, top=top, batch_size=batch_size)]

    def stream(
        self,
        images: Any,
        *,
        top: int = 5,
        batch_size: int = EVAL_BATCH_SIZE,
        on_bad: Callable[[ImageError], None] | None = None,
    ) -> Iterator[tuple[Any, list[ClassScore]]]:
        """Like `predict`, but batch by batch, so that any number of images needs little memory.

        Args:
            on_bad: called for each image that cannot be read, which is then skipped; by default the error is raised.

        Yields:
            Each image as given, and its classes.
        """
        for sources, logits in self._batches(images, batch_size, on_bad):
            best = logits.softmax(1).topk(min(top, len(self.card.classes)))
            for source, shares, labels in zip(sources, best.values.tolist(), best.indices.tolist(), strict=True):
                yield source, [self._score(label, share) for label, share in zip(labels, shares, strict=True)]

    def logits(self, images: Any, *, batch_size: int = EVAL_BATCH_SIZE) -> Tensor:
        """Logits (N, classes), float32, on the CPU, of images as for `predict`.

        Raises:
            ImageError: an image that cannot be read.
        """
        parts = [logits for _, logits in self._batches(images, batch_size, None)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.card.classes))

    def _batches(
        self, images: Any, batch_size: int, on_bad: Callable[[ImageError], None] | None
    ) -> Iterator[tuple[list[Any], Tensor]]:
        res = self.card.res
        batch = torch.empty(batch_size, 3, res, res, memory_format=torch.channels_last)
        sources: list[Any] = []
        for source, pixels in _read_ahead(_as_iterable(images)):
            if isinstance(pixels, ImageError):
                if on_bad is None:
                    raise pixels
                on_bad(pixels)
                continue
            resample = self._resample_from((pixels.shape[0], pixels.shape[1]))
            batch[len(sources)] = resample(torch.from_numpy(pixels.copy())[None])[0]
            sources.append(source)
            if len(sources) == batch_size:
                yield sources, self._forward(batch)
                sources = []
        if sources:
            yield sources, self._forward(batch[: len(sources)])

    @numerics()
    def _forward(self, images: Tensor) -> Tensor:
        return compute_logits(self.model, images, self.plan, flip=self.flip).cpu()

    def _score(self, label: int, probability: float) -> ClassScore:
        class_ = self.card.classes[label]
        return ClassScore(label=label, id=class_.id, name=class_.name, probability=probability)


def load_model(
    path: str | Path,
    *,
    device: DeviceChoice = "auto",
    amp: AmpChoice = "auto",
    flip: bool = False,
    model: nn.Module | None = None,
) -> Classifier:
    """A trained model, ready to predict.

    Examples:
        >>> from tidali import load_model
        >>> model = load_model("runs/demo")
        >>> for scores in model.predict(["photo.jpg", "photo.jpg"]):
        ...     assert scores[0].probability == max(score.probability for score in scores)

    Args:
        path: a checkpoint, or a run folder for its best one.
        flip: flip TTA, as ``tidali eval --flip`` does.
        model: the network, where `tidali.train_model` was given one; the weights are loaded into it.

    Raises:
        UsageError: no such checkpoint, or not one of tidali.
        TidaliError: ``cuda`` was asked for and is not available.
    """
    return Classifier(*open_checkpoint(os.fspath(path), device=device, amp=amp, model=model), flip=flip)


def _as_iterable(images: Any) -> Iterable[Any]:
    """A single image as a list of one: the characters of a path and the rows of an array are not images."""
    alone = isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4)
    return [images] if alone else images


def _read_ahead(sources: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray | ImageError]]:
    """Each source's pixels or its error, in order, read by threads that are at most as many images ahead as there are cores: a
    photograph of 50 megapixels takes 143 MiB."""
    workers = cpu_count()
    with ThreadPoolExecutor(workers) as pool:  # PIL's decoders release the interpreter's lock
        pending: deque[tuple[Any, Future[np.ndarray | ImageError]]] = deque()
        for source in sources:
            pending.append((source, pool.submit(_try_to_read, source)))
            if len(pending) > workers:
                first, pixels = pending.popleft()
                yield first, pixels.result()
        for source, pixels in pending:
            yield source, pixels.result()


def _try_to_read(source: Any) -> np.ndarray | ImageError:
    try:
        return read_pixels(source)
    except ImageError as error:
        return error
