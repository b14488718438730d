"""Whether a split's pixels are kept on the device or streamed, decided from described facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tidali.config import CacheChoice
from tidali.dataset.contract import Split
from tidali.errors import UsageError, counted

CACHE_SHARE = 0.5
"""Of the free memory at most: the rest is for activations, which at 224 px and batch 256 take more than Tiny-ImageNet's
pixels."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a split's pixels are, and why."""

    cached: bool
    reason: str
    pixel_bytes: int
    """What they take in the cache."""

    def describe(self) -> str:
        return f"{'cached' if self.cached else 'streamed'}: {self.reason}"


GIVEN = Route(cached=True, reason="made for its pixels", pixel_bytes=0)
"""Of batches whose source nobody chose."""


def choose_route(
    choice: CacheChoice, split: Split, *, sides: Sequence[int], crops: bool, free_bytes: int, training_bytes: int = 0
) -> Route:
    """Cache what fits and loses nothing by it.

    Args:
        sides: of the input, in pixels: images of unequal size are cached as squares of each of them.
        crops: random crops are asked for, which a cache of such squares would blur.
        free_bytes: of the device's memory, now.
        training_bytes: of it that training will need besides the cache, by an estimate.

    Raises:
        UsageError: a cache was asked for where it would blur the crops.
    """
    size = split.single_image_size
    if size is not None:
        pixel_bytes = split.samples * size[0] * size[1] * 3
        stored = f"{counted(split.samples, 'image')} of {size[0]} x {size[1]} px"
    else:
        pixel_bytes = split.samples * sum(side * side * 3 for side in set(sides))
        stored = f"{counted(split.samples, 'image')} of {counted(len(split.image_sizes), 'size')}, "
        stored += f"as squares of {', '.join(map(str, sides))} px,"
    stored += f" take {pixel_bytes / 2**20:,.0f} MiB"
    if choice == "off":
        return Route(cached=False, reason="--cache off", pixel_bytes=pixel_bytes)
    if crops and size is None:
        if choice == "device":
            raise UsageError(
                "--cache device keeps images of unequal size as squares, of which random crops (augment.crop_scale) would be "
                "blurred; use --cache auto, which streams them"
            )
        reason = f"random crops of {len(split.image_sizes)} sizes of images are cut from the whole images"
        return Route(cached=False, reason=reason, pixel_bytes=pixel_bytes)
    if choice == "auto":
        free, most = f"half of the {free_bytes / 2**30:,.1f} GiB free", CACHE_SHARE * free_bytes
        if training_bytes > most:
            most = free_bytes - training_bytes
            free = f"what is left of the {free_bytes / 2**30:,.1f} GiB free by training, which takes about "
            free += f"{training_bytes / 2**30:,.1f} GiB"
        if pixel_bytes > most:
            return Route(cached=False, reason=f"{stored}, over {free}", pixel_bytes=pixel_bytes)
        stored += f", under {free}"
    return Route(cached=True, reason=stored, pixel_bytes=pixel_bytes)
