"""Chooses the input size of an exported file, and images of that size to check it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tidali.dataset.contract import Dataset, iter_records, open_dataset
from tidali.dataset.remote import is_remote
from tidali.dataset.source import open_data
from tidali.errors import DatasetError, UsageError
from tidali.images.stored import stored_image
from tidali.model.checkpoint import ModelCard

MOST_PHOTOGRAPHS = 500
_SYNTHETIC = 64
_MOST_PIXELS = 1 << 26
"""Of all images together: 192 MiB, and as many float64 with the noise of `synthetic` 1.5 GiB. 500 images of 366 px."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    size: tuple[int, int]
    """Height and width, in pixels."""
    images: np.ndarray
    """(N, *size, 3) uint8 RGB."""
    what: str
    """A readable description of the images."""


def choose_inputs(card: ModelCard, checkpoint: str, data: str | None, size: tuple[int, int] | None) -> Inputs:
    """
    Args:
        data: a packed data set; by default the one that the checkpoint was trained on, if it still exists.
        size: height and width; by default those of the data set's images or, where they differ, those of a square that the
            checkpoint's centre crop cuts down to ``res`` without resizing it.

    Raises:
        UsageError: neither a size nor a data set was given, and the checkpoint's own data set is gone.
        DatasetError, TidaliError: the given data set cannot be opened.
    """
    side = round(card.res / card.crop_fraction)
    dataset = open_data(data) if data is not None else trained_on(card)
    if dataset is not None:
        split = "val" if "val" in dataset.manifest.splits and dataset.manifest.splits["val"].samples else "train"
        size = size or dataset.split(split).single_image_size or (side, side)
        images = photographs(dataset, split, size)
        return Inputs(size=size, images=images, what=f"{len(images)} images of {split} of {dataset.root}")
    if size is None:
        raise UsageError(
            f"{checkpoint}: the data set that it was trained on ({card.settings.get('data', 'not named')}) is not here, so its "
            f"images' size is not known; give --data, or --input-size such as {side}"
        )
    images = synthetic(size)
    return Inputs(size=size, images=images, what=f"{len(images)} random images")


def trained_on(card: ModelCard) -> Dataset | None:
    """The data set that the checkpoint was trained on, if its folder still exists and is complete."""
    location = card.settings.get("data")
    if not isinstance(location, str) or is_remote(location):
        return None
    try:
        return open_dataset(Path(location))
    except DatasetError:
        return None


def photographs(dataset: Dataset, split: str, size: tuple[int, int], most: int = MOST_PHOTOGRAPHS) -> np.ndarray:
    """Images spread evenly over a split, (N, *size, 3) uint8 RGB; those of another size are cropped and resized."""
    samples = dataset.split(split).samples
    count = min(most, samples, _images_that_fit(size))
    wanted = {i * samples // count for i in range(count)}
    out = []
    for number, (shard, record) in enumerate(iter_records(dataset, split)):
        if number in wanted:
            image = stored_image(dataset, shard, record)
            if image.size != size[::-1]:
                image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
            out.append(np.asarray(image))
    return np.stack(out)


def synthetic(size: tuple[int, int]) -> np.ndarray:
    """Random smooth images with noise, (N, *size, 3) uint8: all grey levels, and edges of different sharpness."""
    random = np.random.default_rng(0)
    count = min(_SYNTHETIC, _images_that_fit(size))
    coarse = random.integers(0, 256, (count, 6, 6, 3), np.uint8)
    smooth = np.stack([np.asarray(Image.fromarray(one).resize(size[::-1], Image.Resampling.BICUBIC)) for one in coarse])
    noise = random.normal(0, random.uniform(0, 60, (count, 1, 1, 1)), smooth.shape)
    return (smooth + noise).clip(0, 255).astype(np.uint8)


def _images_that_fit(size: tuple[int, int]) -> int:
    height, width = size
    return max(_MOST_PIXELS // (height * width), 1)
