"""A data set's batches, by the route that fits: decoded once into the device's memory, or streamed."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tidali.augment import Augment
from tidali.bad_images import leave_out_bad
from tidali.cache import CachedBatches, PixelCache, fill_cache
from tidali.config import CacheChoice, Kernel
from tidali.console import progress_bar
from tidali.contract import Dataset, Split, parse_image_size
from tidali.device import ranks_on_machine
from tidali.distributed import Ranks
from tidali.errors import UsageError
from tidali.order import refuse_partial_batch
from tidali.sizes import SizePlan

CACHE_SHARE = 0.5
"""Of the free memory: the rest is for activations, which at 224 px and batch 256 take more than Tiny-ImageNet's pixels."""


class Batches(Protocol):
    """Batches of one split: images (N, 3, H, W) float channels_last and labels (N,) int64, both on the loader's device."""

    def __len__(self) -> int:
        """Steps an epoch, the same on every rank."""
        ...

    @property
    def samples(self) -> int:
        """Of the split, over all ranks, without damaged images that were left out."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, counted from 0."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch; after `load_state_dict`, what was left of it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: where the consumer is, and what the order depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UsageError: the state is of another order; names the difference.
        """
        ...


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


def against_streaming(
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


class Data:
    """A data set on a device, ready to give batches of any of its splits at any resolution."""

    def __init__(
        self,
        dataset: Dataset,
        splits: Sequence[str],
        device: torch.device,
        *,
        cache: CacheChoice = "auto",
        max_res: int,
        max_bad: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            splits: those that will be asked for.
            max_res: the largest resolution that will be asked for, in pixels.
            max_bad: images of a split that may be damaged and are then left out; 0.1 % of it by default.
            ranks: those that share the splits, each with a `Data` of its own: the one with the least memory decides for all,
                as the two routes cut a split differently.

        Raises:
            DatasetError: a split that is not there, or damaged beyond `max_bad`.
            UsageError: a split without labels.
        """
        for split in splits:
            dataset.labelled_split(split)
        for split in splits:
            dataset = leave_out_bad(dataset, split, max_bad)
        self.dataset, self.device = dataset, device
        free_bytes = free_memory_bytes(device)
        self.route = choose_route(
            cache,
            [dataset.split(split) for split in splits],
            max_res=max_res,
            free_bytes=min(ranks.gather(free_bytes)) if ranks is not None else free_bytes,
            has_dali=dali_is_installed(),
        )
        self._caches: dict[str, PixelCache] = {}

    def batches(
        self,
        split: str,
        *,
        res: int,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        train: bool = False,
        augment: Augment | None = None,
        kernel: Kernel = "pil",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sizes: SizePlan | None = None,
    ) -> Batches:
        """
        Args:
            res: input side in pixels.
            sizes: the side of each training step instead.

        Raises:
            UsageError: a batch larger than the split, or augmentation or a kernel that the route does not have.
            TidaliError: the shards cannot be read.
        """
        if train:
            refuse_partial_batch(split, self.dataset.split(split).samples, batch_size, world_size)
        common: dict[str, Any] = dict(
            res=res,
            batch_size=batch_size,
            mean=mean,
            std=std,
            train=train,
            seed=seed,
            rank=rank,
            world_size=world_size,
            kernel=kernel,
            sizes=sizes,
        )
        if self.route.cached:
            return CachedBatches(self._cache(split), augment=augment, dtype=dtype, **common)
        from tidali.loader import StreamBatches

        augment = augment or Augment()
        obstacle = against_streaming(self.dataset.split(split), self.device, augment=augment)
        if obstacle is not None:
            raise UsageError(obstacle)
        if dtype != torch.float32:
            raise UsageError(f"streaming gives float32 alone; {dtype} needs the cache (--cache device)")
        return StreamBatches(self.dataset, split, flip=train and augment.flip == "random", device=self.device, **common)

    def _cache(self, split: str) -> PixelCache:
        if split not in self._caches:
            self._caches[split] = fill(self.dataset, split, self.device, self.route.square)
        return self._caches[split]


def fill(dataset: Dataset, split: str, device: torch.device, square: int | None) -> PixelCache:
    """Decode a split into the device's memory, by DALI or, where that is missing, by PIL to the same pixels.

    Raises:
        TidaliError: an image cannot be decoded.
    """
    info = dataset.split(split)
    size = (square, square) if square is not None else parse_image_size(next(iter(info.image_sizes)))
    if dali_is_installed():
        from tidali.loader import decoded_once
    else:
        from tidali.decode_pil import decoded_once
    with progress_bar(note=False) as bar:
        task = bar.add_task(f"decoding {split}", total=info.samples)
        return fill_cache(
            decoded_once(dataset, split, square=square, device=device),
            info.samples,
            size,
            identity=hashlib.sha256(f"{info.content}{size}".encode()).hexdigest(),
            device=device,
            on_batch=lambda done: bar.update(task, completed=done),
        )


def dali_is_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the namespace that it shares with other packages
        return False


def free_memory_bytes(device: torch.device) -> int:
    """Of the GPU, or this rank's share of the machine's memory within the container's limit."""
    if device.type == "cuda":
        # torch keeps what it freed, and the driver counts that as taken.
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _free_ram_bytes() // ranks_on_machine()


def _free_ram_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except OSError:  # not Linux: half of what the machine has
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except OSError:
        return free
