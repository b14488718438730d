"""Random resized crops of the loaders: a check set whose pixels tell where they come from, and the check of what was cropped.

In an image of the check set red rises from left to right, as the share of the width, and green from top to bottom; blue tells
its class, and each class has images of one size. So the box of a crop can be read off the batch: over the crop red is a ramp,
whose slope is the box's width and whose middle is the box's centre; a negative slope means that the crop was flipped.

The boxes are compared with those that torchvision's `RandomResizedCrop.get_params` draws for the same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tidali.dataset.contract import Dataset

CROP_SCALE = (0.08, 1.0)
"""Share of the image's area, uniform."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Width to height in pixels, log-uniform. Both ranges are torchvision's defaults."""

SIZES = ((400, 300), (300, 400), (360, 240), (240, 360), (320, 320), (400, 250), (256, 384), (280, 350))
"""Width and height of the images of each class. Not above 400 px, to which FFCV's file has longer sides shrunk."""
PER_SIZE = 32
CHECK_CROPS = 2048
"""How many crops of a loader are compared."""
_REFERENCE_CROPS = 8192
"""How many torchvision draws: four times as many, so that their own sampling error adds only 12 % to the loader's."""

READ_ERROR = {"area share": 0.01, "log aspect ratio": 0.02, "left edge": 0.01, "top edge": 0.01}
"""By how much a box that is read off a batch may differ from the true one. Of torchvision's crops of 64 to 448 px it differs
by at most half of this, of 32 px by at most all of it; the rest is for the decoders' and kernels' differences."""
_RAMP_DISTANCE = 4 / 255
"""Root mean square difference of a crop from its ramps. JPEG and the kernels make 0.5 to 1.5 grey levels; padding, rotation or
the image of another sample many more."""
STANDARD_ERRORS = 5.0
"""Tolerance for sampling. There are 25 comparisons for each of ten loaders: of right ones, one run in 6,000 fails."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

_FIRST_BLUE, _BLUE_STEP = 16, 32  # eight classes; JPEG changes a colour by two or three levels


# -------------------------------------------------------------------------------------------------------------- the check set


def pack_check_set(folder: Path) -> Dataset:
    """Draw and pack the check set in this folder, which is created."""
    from shards.pack import pack
    from shards.scan import FileSource
    from tidali.dataset.contract import open_dataset

    images = folder / "images"
    for label in range(len(SIZES)):
        of_class = images / "train" / str(label)
        of_class.mkdir(parents=True)
        for number in range(PER_SIZE):
            draw(label).save(of_class / f"{number}.jpg", quality=100, subsampling=0)
    pack(FileSource(images), folder / "packed", workers=1)
    return open_dataset(folder / "packed")


def draw(label: int) -> Any:
    """The image of a class, as PIL's."""
    from PIL import Image

    width, height = SIZES[label]
    pixels = torch.empty(height, width, 3)
    pixels[..., 0] = 255 * (torch.arange(width) + 0.5) / width
    pixels[..., 1] = (255 * (torch.arange(height) + 0.5) / height)[:, None]
    pixels[..., 2] = _FIRST_BLUE + _BLUE_STEP * label
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


# -------------------------------------------------------------------------------------------------------------------- reading


def read_crops(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, list[float]]:
    """Where each image of a batch was cropped from the check set.

    Args:
        images: (N, 3, res, res), normalised with mean and std on a 0..1 scale.

    Returns:
        By name N values: ``left``, ``top``, ``width`` and ``height`` as shares of the image's, ``flipped`` (0 or 1), ``label``
        as the colour has it, and ``distance``, the root mean square difference of the pixels from the ramps, on a 0..1 scale.
    """
    side = images.shape[-1]
    shift, scale = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    # Without the border, where a kernel lacks the pixels beyond the crop and so bends the ramps.
    border = max(side // 8, 2)
    red, green, blue = (images.double() * scale + shift)[:, :, border:-border, border:-border].unbind(1)
    place = ((torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5)[border:-border]
    middle_x, slope_x = red.mean((1, 2)), (red.mean(1) @ place) / (place @ place)
    middle_y, slope_y = green.mean((1, 2)), (green.mean(2) @ place) / (place @ place)
    level = blue.mean((1, 2))
    distances = torch.stack(
        (
            red - middle_x[:, None, None] - slope_x[:, None, None] * place,
            green - middle_y[:, None, None] - slope_y[:, None, None] * place[:, None],
            blue - level[:, None, None],
        )
    )
    found = {
        "left": middle_x - slope_x.abs() / 2,
        "top": middle_y - slope_y / 2,
        "width": slope_x.abs(),
        "height": slope_y,
        "flipped": (slope_x < 0).double(),
        "label": ((255 * level - _FIRST_BLUE) / _BLUE_STEP).round(),
        "distance": distances.square().mean((0, 2, 3)).sqrt(),
    }
    return {name: values.tolist() for name, values in found.items()}


def torchvision_crops(count: int = _REFERENCE_CROPS) -> dict[str, list[float]]:
    """As many boxes as torchvision draws them, evenly over the sizes: as `read_crops`, without ``distance``."""
    from torchvision.transforms import RandomResizedCrop

    found: dict[str, list[float]] = {name: [] for name in ("left", "top", "width", "height", "flipped", "label")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number in range(count):
            label = number % len(SIZES)
            width, height = SIZES[label]
            of_size = torch.empty(1).expand(1, height, width)
            box = RandomResizedCrop.get_params(of_size, list(CROP_SCALE), list(CROP_RATIO))
            shares = (box[1] / width, box[0] / height, box[3] / width, box[2] / height)
            for values, value in zip(found.values(), (*shares, number // len(SIZES) % 2, label), strict=True):
                values.append(value)
    return found


# ------------------------------------------------------------------------------------------------------------------- the check


def why_wrong_crops(facts: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a loader's crops; None if they are distributed as torchvision's.

    Compared are the mean and the quantiles of the boxes' area and aspect ratio, and of their place in the image. The tolerance
    of each is the error of reading a box (`READ_ERROR`) and `STANDARD_ERRORS` standard errors of samples of these two sizes.

    Args:
        facts: `bench.case_worker.Stream.crops` of the check set.
        expected: `torchvision_crops`.
    """
    count = len(facts["label"])
    unlike = sum(distance > _RAMP_DISTANCE for distance in facts["distance"])
    if unlike:
        return f"{unlike} of {count} images are no upright crops of the check images"
    mislabelled = sum(drawn != said for drawn, said in zip(facts["label"], facts["labels"], strict=True))
    if mislabelled:
        return f"{mislabelled} of {count} labels are not those of their images"
    flips = sum(facts["flipped"]) / count
    if abs(flips - 0.5) > STANDARD_ERRORS * 0.5 / math.sqrt(count):
        return f"{100 * flips:.0f} % of its crops are flipped horizontally, not half of them"
    return next(_differences(_quantities(facts), _quantities(expected)), None)


def _quantities(crops: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is compared of each box, by the names of `READ_ERROR`."""
    left, top, width, height = (torch.tensor(crops[name], dtype=torch.float64) for name in ("left", "top", "width", "height"))
    sizes = torch.tensor(SIZES, dtype=torch.float64)[torch.tensor(crops["label"], dtype=torch.int64)]
    aspect = width * sizes[:, 0] / (height * sizes[:, 1])
    return dict(zip(READ_ERROR, (width * height, aspect.log(), left, top), strict=True))


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    for name, error in READ_ERROR.items():
        ours, theirs = found[name], expected[name]
        samples = math.sqrt(1 / len(ours) + 1 / len(theirs))
        mean, wanted = float(ours.mean()), float(theirs.mean())
        if abs(mean - wanted) > error + STANDARD_ERRORS * float(theirs.std()) * samples:
            yield f"the mean {name} of its crops is {mean:.3f}, torchvision's {wanted:.3f}"
        for share in QUANTILES:
            # The share of the crops below torchvision's quantile, whose sampling error depends on no density. It is counted
            # twice, with the quantile moved by the error of reading to either side.
            at = float(theirs.quantile(share))
            tolerance = STANDARD_ERRORS * math.sqrt(share * (1 - share)) * samples
            surely, possibly = (float((ours < at + shift).double().mean()) for shift in (-error, error))
            if surely > share + tolerance or possibly < share - tolerance:
                nearer = min(surely, possibly, key=lambda value: abs(value - share))
                yield f"{100 * nearer:.0f} % of its crops have a {name} below {at:.3f}, {100 * share:.0f} % of torchvision's"
