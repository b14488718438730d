"""Which samples make up a batch: a pure function of (seed, epoch, step, rank, number of ranks).

A step is a *global* batch, cut into one piece a rank. So the samples of a step do not depend on the number of ranks, and a run
can be resumed at any step on another number of ranks, as long as the global batch stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tidali.errors import UsageError
from tidali.loading import counter

ORDER_VERSION = 1
"""Part of every checkpoint's fingerprint; to be raised by any change that alters an order."""

_STREAM = 0  # `tidali.loading.augment` numbers its own streams from 1, `tidali.loading.sizes` has 6
_SHARDS_STREAM = 7


def epoch_order(samples: int, seed: int, epoch: int, device: torch.device | None = None) -> Tensor:
    """A permutation of the samples: sorted by a 64-bit hash of (seed, epoch, sample) that cannot tie.

    Returns:
        (samples,) int64, equal on every device.
    """
    indices = torch.arange(samples, device=device)
    return torch.argsort(counter.hashes(counter.key(seed, _STREAM, epoch), indices))


def shard_order(shards: int, seed: int, epoch: int, device: torch.device | None = None) -> Tensor:
    """The shards in the order in which `windowed_order` begins with them: (shards,) int64, a permutation."""
    return torch.argsort(counter.hashes(counter.key(seed, _SHARDS_STREAM, epoch), torch.arange(shards, device=device)))


def windowed_order(
    shard_samples: Sequence[int], window: int, seed: int, epoch: int, device: torch.device | None = None
) -> Tensor:
    """A permutation of the samples that needs few shards at a time. Shards are shuffled, and samples over a window of them.

    Shard number n of the shuffled ones begins at time n, and each of its samples comes at a random time of the ``window`` that
    follow. So at each time that many shards are read, and the first batch needs only the first ones: it is the order in which
    a shuffle buffer of that many shards gives its samples, as a pure function.

    Args:
        shard_samples: of each shard, in stored order.
        window: in shards.

    Returns:
        (samples,) int64, equal on every device.
    """
    begins = torch.argsort(shard_order(len(shard_samples), seed, epoch, device))
    of_samples = begins.repeat_interleave(torch.tensor(shard_samples, device=device))
    hashes = counter.hashes(counter.key(seed, _STREAM, epoch), torch.arange(len(of_samples), device=device))
    # In units of 2**-32 shards; a stable sort, since so few bits of the hash can tie.
    return torch.argsort((of_samples << 32) + window * (hashes >> 32 & 0xFFFFFFFF), stable=True)


def num_steps(samples: int, batch_size: int, world_size: int, *, train: bool) -> int:
    """Steps an epoch, the same on every rank.

    Training drops the samples that do not fill a last global batch, others every epoch; a split smaller than one global batch
    is one step of all its samples. Evaluation drops none.

    Args:
        batch_size: of one rank.

    Raises:
        UsageError: training on fewer samples than ranks, which would leave a rank without one.
    """
    if train:
        refuse_idle_rank(samples, world_size)
    global_batch = batch_size * world_size
    return max(samples // global_batch, 1) if train else -(-samples // global_batch)


def refuse_idle_rank(samples: int, world_size: int) -> None:
    """
    Raises:
        UsageError: fewer training samples than ranks.
    """
    if samples < world_size:
        raise UsageError(f"{samples} training samples for {world_size} ranks: use at most {samples} ranks")


def refuse_partial_batch(split: str, samples: int, batch_size: int, world_size: int) -> None:
    """
    Raises:
        UsageError: training samples that do not fill one batch, ``batch_size`` on each rank.
    """
    refuse_idle_rank(samples, world_size)
    share = samples // world_size
    if batch_size > share:
        raise UsageError(
            f"--batch-size {batch_size * world_size}: the {split!r} split has {share} samples a rank, not one full batch; "
            f"use at most --batch-size {share * world_size}"
        )


def rank_slice(samples: int, step: int, batch_size: int, rank: int, world_size: int) -> slice:
    """The positions in the epoch's order that a rank takes at a step.

    A full global batch gives each rank ``batch_size``. A last, smaller one is cut evenly: sizes differ by at most one, and a
    rank gets none where there are fewer samples than ranks.
    """
    start = step * batch_size * world_size
    size = min(batch_size * world_size, samples - start)
    return slice(start + rank * size // world_size, start + (rank + 1) * size // world_size)


def check_order(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a position that was saved under another order.

    Args:
        saved, own: all that decides the order, by name, as JSON has it.

    Raises:
        UsageError: names what differs.
    """
    names = {**saved, **own}
    different = [
        f"{name} {saved.get(name)!r} then, {own.get(name)!r} now" for name in names if saved.get(name) != own.get(name)
    ]
    if different:
        raise UsageError(f"the data position cannot be restored: {'; '.join(different)}")


def centre_boxes(sizes: Tensor, res: int, crop_fraction: float = 1.0) -> Tensor:
    """What becomes a square of ``res`` pixels: see `tidali.loading.bicubic.centre_crop`.

    Args:
        sizes: (n, 2) integers, height and width in pixels.

    Returns:
        (n, 4) float32 top, left, height, width, in pixels.
    """
    sizes = sizes.to(torch.float64)
    scale = sizes.amin(1, keepdim=True) * crop_fraction / res
    resized = torch.floor(sizes / scale + 0.5)
    start = (sizes - resized * scale) / 2 + torch.ceil((resized - res) / 2) * scale
    return torch.cat((start, (scale * res).expand(-1, 2)), 1).to(torch.float32)
