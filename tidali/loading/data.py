"""A data set's batches, by the route that fits: decoded once into the device's memory, or streamed."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tidali.config import CacheChoice, Kernel
from tidali.console import progress_bar
from tidali.dataset.contract import Dataset, parse_image_size
from tidali.errors import UsageError
from tidali.hardware.device import ranks_on_machine
from tidali.hardware.ranks import Ranks
from tidali.loading.augment import Augment
from tidali.loading.cache import CachedBatches, PixelCache, fill_cache
from tidali.loading.corrupt_images import drop_corrupt
from tidali.loading.order import refuse_partial_batch
from tidali.loading.route import choose_route, why_not_streamable
from tidali.loading.sizes import SizePlan


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
            dataset = drop_corrupt(dataset, split, max_bad)
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
        from tidali.loading.stream import StreamBatches

        augment = augment or Augment()
        obstacle = why_not_streamable(self.dataset.split(split), self.device, augment=augment)
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
        from tidali.loading.stream import decoded_once
    else:
        from tidali.loading.decode_pil import decoded_once
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
