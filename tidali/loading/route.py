"""Whether a data set's pixels are kept on the device or streamed, decided from described facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tidali.config import Augment, CacheChoice, Kernel
from tidali.dataset.contract import Split, parse_image_size
from tidali.errors import UsageError

CACHE_SHARE = 0.5
"""Of the free memory: the rest is for activations, which at 224 px and batch 256 take more than Tiny-ImageNet's pixels."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Whether the pixels are kept on the device, and why."""

    cached: bool
    reason: str
    pixel_bytes: int
    """What the splits' decoded pixels take."""
    square: int | None = None
    """Side that images of unequal size are stored at, in pixels; None where they are stored as they are."""


def choose_route(wish: CacheChoice, splits: Sequence[Split], *, max_res: int, free_bytes: int, has_dali: bool = True) -> Route:
    """Decide from described facts.

    Args:
        splits: those that will be read.
        max_res: the largest input side that will be asked for, in pixels.
        free_bytes: of the training device's memory, before anything is on it.

    Raises:
        UsageError: streaming was asked for where DALI is missing.
    """
    sizes = {size for split in splits for size in split.image_sizes}
    square = None if len(sizes) == 1 else max_res
    samples = sum(split.samples for split in splits)
    height, width = parse_image_size(next(iter(sizes))) if square is None else (square, square)
    pixel_bytes = samples * height * width * 3
    stored = f"{samples:,} images of {height} x {width} px take {pixel_bytes / 2**20:,.0f} MiB"
    if square is not None:
        stored += f" ({len(sizes)} sizes, stored at the largest resolution asked for)"
    if not has_dali and wish == "off":
        raise UsageError("--cache off streams through DALI, which is not installed here; leave --cache at auto")
    if wish == "off":
        return Route(cached=False, reason="--cache off", pixel_bytes=pixel_bytes)
    if not has_dali:
        stored += "; decoded by PIL, as NVIDIA DALI is not installed here"
    elif wish == "auto":
        free = f"half of the {free_bytes / 2**30:,.1f} GiB free"
        if pixel_bytes > CACHE_SHARE * free_bytes:
            return Route(cached=False, reason=f"{stored}, over {free}", pixel_bytes=pixel_bytes)
        stored += f", under {free}"
    return Route(cached=True, reason=stored, pixel_bytes=pixel_bytes, square=square)


def why_not_streamable(
    split: Split,
    device: torch.device | None,
    *,
    kernel: Kernel = "pil",
    sides: Sequence[int] = (),
    augment: Augment | None = None,
) -> str | None:
    """Why a split cannot be streamed in this way, if it cannot.

    Args:
        sides: of the images given, in pixels.
    """
    if augment is not None and (augment != Augment(flip=augment.flip) or augment.flip == "alternating"):
        return "streaming has random flips alone; other augmentation needs the cache (--cache device)"
    by_dali = split.single_image_size is None or (device is not None and device.type != "cpu")
    if by_dali and (kernel != "pil" or len(sides) > 1):
        wish = f"kernel {kernel!r}" if kernel != "pil" else f"train_sizes {list(sides)}"
        return f"{wish}: a stream that DALI resizes has the kernel 'pil' and one size; use --cache device"
    return None
