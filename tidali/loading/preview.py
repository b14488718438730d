"""What the network sees: training images after augmentation and resampling, back in colours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from tidali.config import Preprocess, Recipe
from tidali.dataset.contract import ClassName, Dataset
from tidali.loading.augment import draw_mix, mix_batch
from tidali.loading.batches import Training
from tidali.loading.data import Data
from tidali.loading.order import epoch_order


class Seen(NamedTuple):
    """A training image."""

    position: int
    """Of the sample in the split's stored order."""
    image: Image.Image
    """RGB, res x res."""
    caption: str
    """The class's name; where images are mixed both names and their shares in percent."""


def seen_images(dataset: Dataset, split: str, recipe: Recipe, *, res: int, count: int, seed: int = 0) -> list[Seen]:
    """The first images of the first epoch that ``tidali train`` with this recipe and seed would take, by the same code.

    Returns:
        At most ``count``.

    Raises:
        DatasetError, UsageError, TidaliError: there is no such split, it has no labels, or it cannot be read.
    """
    augment, classes = recipe.augment, dataset.manifest.classes
    count = min(count, dataset.split(split).samples)
    mean, std = dataset.manifest.mean, dataset.manifest.std  # what is erased is of the mean colour
    preprocess = Preprocess(res=res, mean=mean, std=std, kernel=recipe.kernel, crop_fraction=recipe.crop_fraction)
    data = Data(dataset, torch.device("cpu"), cache="off")
    images, labels = next(iter(data.batches(split, preprocess, count, training=Training(augment=augment, seed=seed))))
    targets = torch.nn.functional.one_hot(labels, len(classes)).float()
    if augment.mixes:
        mix = draw_mix(augment.mixup_alpha, augment.cutmix_alpha, seed=seed, epoch=0, step=0)
        images, targets = mix_batch(images, labels, mix, len(classes))
    pixels = 255 * (images.permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean))
    order = epoch_order(dataset.split(split).samples, seed, 0)[:count].tolist()
    positions = [place for place in order if place not in data.corrupt(split)]  # a corrupt sample is missing from its batch
    return [
        Seen(place, Image.fromarray(image.round().clamp(0, 255).to(torch.uint8).numpy()), _caption(target, classes))
        for place, image, target in zip(positions, pixels, targets, strict=True)
    ]


def _caption(target: Tensor, classes: tuple[ClassName, ...]) -> str:
    shares = sorted(((share, label) for label, share in enumerate(target.tolist()) if share > 0), reverse=True)
    if len(shares) == 1:
        return classes[shares[0][1]].name
    return " + ".join(f"{100 * share:.0f} {classes[label].name[:8]}" for share, label in shares)  # as much as a cell holds
