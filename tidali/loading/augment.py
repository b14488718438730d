"""Augmentation on the device, every draw a pure function of (seed, epoch, sample): a resumed run, and a run on another number
of ranks, changes each image as the unbroken one did. Mixing alone pairs samples within a rank's batch.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tidali.config import Augment, Flip
from tidali.loading import counter

ERASE_SCALE = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
"""Area share and aspect ratio of torchvision's RandomErasing (Zhong et al. 2017, "Random erasing data augmentation")."""

_FLIP, _SHIFT, _CROP, _ERASE, _MIX = range(1, 6)  # streams of random numbers; 0 is the order's, 6 the sizes'
_COLOUR = 7
_GREY = (0.299, 0.587, 0.114)
"""Luma of R, G and B, ITU-R BT.601."""
_ATTEMPTS = 10  # torchvision's, for a box that fits


AUGMENTS = {
    "none": Augment(),
    # For small images and few epochs. 4 of 64 pixels are the same share of the side as 2 of CIFAR's 32 in Jordan's recipe.
    "light": Augment(flip="alternating", shift_px=4),
}


# --------------------------------------------------------------------------------------------------- draws, one row a sample


def flip_flags(flip: Flip, samples: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Which samples are flipped horizontally.

    Args:
        samples: (N,) int64, positions in the split: what makes a sample's draw its own.

    Returns:
        (N,) bool.
    """
    if flip == "none":
        return torch.zeros_like(samples, dtype=torch.bool)
    if flip == "random":
        return counter.uniforms(counter.key(seed, _FLIP, epoch), samples, 1)[:, 0] < 0.5
    return (counter.hashes(counter.key(seed, _FLIP), samples) + epoch) & 1 == 1


def shift_offsets(shift_px: int, samples: Tensor, *, seed: int, epoch: int) -> Tensor:
    """(N, 2) int64, down and right, uniform in -shift_px..shift_px."""
    draws = counter.uniforms(counter.key(seed, _SHIFT, epoch), samples, 2)
    return (draws * (2 * shift_px + 1)).to(torch.int64) - shift_px


def crop_boxes(
    size: tuple[int, int] | Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    samples: Tensor,
    *,
    seed: int,
    epoch: int,
) -> Tensor:
    """Random resized crops as torchvision draws them: the first of ten boxes that fits, else the largest central one of an
    allowed aspect ratio.

    Args:
        size: height and width in pixels of all images, or (N, 2) of each.

    Returns:
        (N, 4) float32 top, left, height, width in whole pixels, inside the image.
    """
    # If all images have one size, these are 0-dimensional CPU tensors, which torch combines with tensors of any device.
    height, width = (size.T if isinstance(size, Tensor) else torch.tensor(size)).to(torch.float32)
    draws = counter.uniforms(counter.key(seed, _CROP, epoch), samples, 2 * _ATTEMPTS + 2)
    heights, widths, fits = _first_fitting(height, width, scale, ratio, draws[:, 2:])
    aspect = (width / height).clamp(*ratio)
    heights = torch.where(fits, heights, torch.minimum(height, torch.round(width / aspect)))
    widths = torch.where(fits, widths, torch.minimum(width, torch.round(height * aspect)))
    return _placed(height, width, heights, widths, torch.where(fits[:, None], draws[:, :2], 0.5))


def erase_boxes(size: tuple[int, int], probability: float, samples: Tensor, *, seed: int, epoch: int) -> Tensor:
    """The rectangles of random erasing, as torchvision draws them.

    Returns:
        (N, 4) float32 top, left, height, width in whole pixels; height and width are 0 where nothing is erased.
    """
    draws = counter.uniforms(counter.key(seed, _ERASE, epoch), samples, 2 * _ATTEMPTS + 3)
    height, width = torch.tensor(size, dtype=torch.float32)
    heights, widths, fits = _first_fitting(height, width, ERASE_SCALE, ERASE_RATIO, draws[:, 3:], whole_sides=False)
    erased = fits & (draws[:, 2] < probability)
    return _placed(height, width, heights * erased, widths * erased, draws[:, :2])


def _first_fitting(
    height: Tensor,
    width: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: Tensor,
    *,
    whole_sides: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Heights, widths (N,) and whether any attempt fitted, of boxes with uniform area and log-uniform aspect ratio.

    Args:
        whole_sides: a box may be as high or as wide as the image; torchvision erases no whole row or column.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shares = scale[0] + (scale[1] - scale[0]) * draws[:, :_ATTEMPTS]
    areas = (height * width * shares.T).T
    ratios = torch.exp(low + (high - low) * draws[:, _ATTEMPTS:])  # width to height
    heights, widths = torch.round(torch.sqrt(areas / ratios)), torch.round(torch.sqrt(areas * ratios))
    room_y, room_x = (height, width) if whole_sides else (height - 1, width - 1)
    fit = (heights > 0) & (widths > 0) & (room_y >= heights.T).T & (room_x >= widths.T).T
    first = fit.to(torch.uint8).argmax(1, keepdim=True)
    return heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0], fit.any(1)


def _placed(height: Tensor, width: Tensor, heights: Tensor, widths: Tensor, place: Tensor) -> Tensor:
    """Boxes at whole pixels, each possible place as likely; ``place`` (N, 2) in [0, 1)."""
    top = torch.floor(place[:, 0] * (height - heights + 1))
    left = torch.floor(place[:, 1] * (width - widths + 1))
    return torch.stack((top, left, heights, widths), dim=1)


def colour_matrices(augment: Augment, samples: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Changes of colour as one matrix a sample: brightness, then contrast, saturation and hue, each by a uniform factor.

    Brightness, contrast and saturation blend as torchvision's do, with black, with grey and with each pixel's luma; contrast's
    grey is the middle of the scale, where torchvision takes the image's mean luma. Hue turns colours about the grey axis in
    YIQ, which is linear, where torchvision turns them in HSV, which is not. What leaves 0..1 is clamped once, at the end.

    Returns:
        (N, 3, 4) float32: on a 0..1 scale a pixel becomes ``y = A x + b``.
    """
    draws = 2 * counter.uniforms(counter.key(seed, _COLOUR, epoch), samples, 4) - 1
    brightness, contrast, saturation = (
        (1 + strength * draws[:, number]).clamp(min=0)[:, None, None]
        for number, strength in enumerate((augment.brightness, augment.contrast, augment.saturation))
    )
    identity = torch.eye(3, device=samples.device)
    luma = torch.tensor(_GREY, device=samples.device).expand(3, 3)
    linear = saturation * identity + (1 - saturation) * luma
    if augment.hue:
        linear = _hue_rotations(2 * math.pi * augment.hue * draws[:, 3]) @ linear
    offset = linear @ (0.5 * (1 - contrast)).expand(-1, 3, 1)
    return torch.cat((linear * (brightness * contrast), offset), 2)


def _hue_rotations(angles: Tensor) -> Tensor:
    """(N, 3, 3): RGB to YIQ (FCC 1953), I and Q turned by (N,) angles in radians, and back."""
    to_yiq = torch.tensor([_GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    back = torch.linalg.inv(to_yiq.to(torch.float64)).to(torch.float32).to(angles.device)
    to_yiq = to_yiq.to(angles.device)
    # Sums of outer products instead of a product of matrices, which would cost a launch on a GPU for nine numbers.
    luma, i, q = (back[:, k : k + 1] * to_yiq[k] for k in range(3))
    i_to_q, q_to_i = back[:, 2:] * to_yiq[1], back[:, 1:2] * to_yiq[2]
    cos, sin = torch.cos(angles)[:, None, None], torch.sin(angles)[:, None, None]
    return luma + cos * (i + q) + sin * (i_to_q - q_to_i)


# ------------------------------------------------------------------------------------------------------------------- changes


def gather(pixels: Tensor, samples: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Picked rows and columns of picked images, in one launch on a GPU.

    Args:
        pixels: (N, H, W, 3) uint8.
        samples: (n,) int64.
        rows, columns: (n or 1, H) and (n or 1, W) int64, of each picked image.

    Returns:
        (n, H, W, 3) uint8, contiguous.
    """
    return pixels[samples[:, None, None], rows[:, :, None], columns[:, None, :]]


def source_pixels(shape: tuple[int, int], flips: Tensor | None, shifts: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What `gather` picks for images that are flipped, then shifted; None for neither.

    Args:
        shape: height and width.
        flips: (n,) bool.
        shifts: (n, 2) int64, as `shift_pixels` takes.
    """
    some = flips if flips is not None else shifts
    if some is None:
        return None
    rows, columns = (torch.arange(size, device=some.device)[None] for size in shape)
    if shifts is not None:
        rows, columns = _reflected(rows - shifts[:, :1], shape[0]), _reflected(columns - shifts[:, 1:], shape[1])
    if flips is not None:
        columns = torch.where(flips[:, None], shape[1] - 1 - columns, columns)
    return rows, columns


def shift_pixels(pixels: Tensor, offsets: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 moved down and right by (N, 2) int64 ``offsets``, reflected at the border."""
    n, height, width, _ = pixels.shape
    rows = _reflected(torch.arange(height, device=pixels.device) - offsets[:, :1], height)
    columns = _reflected(torch.arange(width, device=pixels.device) - offsets[:, 1:], width)
    rows += torch.arange(n, device=pixels.device)[:, None] * height
    moved = pixels.flatten(0, 1).flatten(1).index_select(0, rows.flatten()).view(n, height, width * 3)
    bytes_ = (3 * columns[..., None] + torch.arange(3, device=pixels.device)).flatten(1)
    return moved.gather(2, bytes_[:, None].expand(-1, height, -1)).view_as(pixels)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Reflect an index beyond 0..size - 1 back inside, not repeating the border: -1 -> 1."""
    period = max(2 * size - 2, 1)
    return (size - 1) - ((index % period) - (size - 1)).abs()


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Zero the (N, 4) boxes of (N, 3, H, W) images, in place: normalised, zero is the mean colour."""
    return erase_inside(images, *erase_masks(boxes, (images.shape[2], images.shape[3])))


def erase_masks(boxes: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows (N, H) and the columns (N, W), bool, that the (N, 4) boxes cover."""
    top, left, height, width = boxes.unsqueeze(-1).unbind(1)  # each (N, 1)
    y, x = (torch.arange(size, device=boxes.device) for size in shape)
    return (y >= top) & (y < top + height), (x >= left) & (x < left + width)


def erase_inside(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`erase` of what is in both, rows (N, H) and columns (N, W)."""
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


# -------------------------------------------------------------------------------------------------------------------- mixing


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How a batch is mixed with itself, moved on by one sample."""

    share: float
    """Of each image's own label, 0..1."""
    box: tuple[float, float] | None
    """CutMix: the pasted rectangle's centre as a share of height and width. None: MixUp."""


def draw_mix(mixup_alpha: float, cutmix_alpha: float, *, seed: int, epoch: int, step: int) -> Mix:
    """One batch's mix, drawn on the host: the same on every rank."""
    draws = random.Random(counter.key(seed, _MIX, epoch, step))
    cut = cutmix_alpha > 0 and (mixup_alpha == 0 or draws.random() < 0.5)
    alpha = cutmix_alpha if cut else mixup_alpha
    share = draws.betavariate(alpha, alpha)
    return Mix(share=share, box=(draws.random(), draws.random()) if cut else None)


def mix_batch(images: Tensor, labels: Tensor, mix: Mix, num_classes: int) -> tuple[Tensor, Tensor]:
    """MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019).

    Args:
        images: (N, 3, H, W) float, changed in place.
        labels: (N,) int64.

    Returns:
        The images, and (N, num_classes) float32 targets, each row's sum 1, which `torch.nn.functional.cross_entropy` takes as
        they are, label smoothing included.
    """
    share = mix.share
    if mix.box is None:
        images.lerp_(images.roll(1, 0), 1 - share)
    else:
        rows, columns = _cut(mix, images.shape[2], images.shape[3])
        images[:, :, rows, columns] = images[:, :, rows, columns].roll(1, 0)
        pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
        share = 1 - pasted / (images.shape[2] * images.shape[3])  # cut off at the border it is smaller than drawn
    own = (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(torch.float32)
    return images, own.lerp(own.roll(1, 0), 1 - share)


def _cut(mix: Mix, height: int, width: int) -> tuple[slice, slice]:
    assert mix.box is not None
    half = math.sqrt(1 - mix.share) / 2

    def side(centre: float, size: int) -> slice:
        middle = int(centre * size)
        return slice(max(middle - int(half * size), 0), min(middle + int(half * size), size))

    return side(mix.box[0], height), side(mix.box[1], width)
