"""Which shards are needed when, where a data set is larger than its local copy may be: the window that samples are shuffled
over, the room that it takes, and what is to be fetched ahead."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import nlargest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tidali.dataset.contract import Dataset, Shard, Split
from tidali.dataset.limited_copy import BLOCK_BYTES, Needs
from tidali.errors import UsageError
from tidali.loading.order import epoch_order, shard_order, windowed_order

WINDOW_SAMPLES = 16384
WINDOW_SHARDS = 16
"""The window holds at least so many samples and shards: packing has shuffled the samples already, so it need not be large."""
_BATCHES_READ = 5
"""Batches whose shards are in use at once: three that a rank decodes or uses, and two by which another may be ahead."""
_EVAL_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a split's shards may take of TIDALI_CACHE_LIMIT."""

    limit_bytes: int
    other_bytes: int
    """Of it, what the records and the other splits take."""
    split: Split
    shards_read: int
    """Beyond the window: what batches that are not yet done still read, on any rank."""

    @staticmethod
    def of(dataset: Dataset, split: str, batch_size: int, ranks: int, *, trains: bool) -> Room | None:
        """None where all shards are in the folder anyway.

        Args:
            batch_size: of each of the ranks.
            trains: other splits are evaluated meanwhile.

        Raises:
            UsageError: there is not even room for a window of one shard.
        """
        copy, info = dataset.copy, dataset.split(split)
        if copy is None:
            return None
        splits = dataset.manifest.splits.values()
        others = [other for other in splits if trains and other.name != split and other.labelled and other.samples]
        evaluation = [_bytes(other, 2 + _read(other, _EVAL_BATCH * ranks)) for other in others]
        room = Room(
            limit_bytes=copy.limit_bytes,
            other_bytes=copy.limit_bytes - copy.room_bytes + max(evaluation, default=0),
            split=info,
            shards_read=_read(info, batch_size * ranks),
        )
        if room.most < 1:
            raise UsageError(
                f"TIDALI_CACHE_LIMIT is {copy.limit_bytes} bytes, and {split!r} of {copy.url} needs at least "
                f"{room.least_bytes(1)}; raise it, or pack with fewer --shard-samples"
            )
        return room

    @property
    def most(self) -> int:
        """The largest window, in shards."""
        windows = range(1, len(self.split.shards) + 1)
        return bisect_right(windows, self.limit_bytes, key=self.least_bytes)

    def least_bytes(self, window: int) -> int:
        """The least limit for a window: one more shard is fetched meanwhile."""
        return self.other_bytes + _bytes(self.split, window + self.shards_read + 1)


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """How the samples of an epoch are shuffled."""

    shard_samples: tuple[int, ...]
    """Of each shard that has any, in stored order."""
    window: int | None = None
    """In shards; None shuffles all samples among each other."""
    room: Room | None = None
    """None where no window is too large."""

    @staticmethod
    def of(split: Split, room: Room | None) -> Shuffle:
        """The window is a function of the data, unless there is less room."""
        counts = tuple(shard.samples for shard in split.shards if shard.samples)
        if room is None:
            return Shuffle(shard_samples=counts)
        window = max(-(-WINDOW_SAMPLES * len(counts) // split.samples), WINDOW_SHARDS)
        # A fifth of the room is for shards that are fetched ahead.
        window = min(window, len(counts), max(room.most * 4 // 5, 1))
        return Shuffle(shard_samples=counts, window=window, room=room)

    def as_saved(self, window: int | None) -> Shuffle:
        """A run keeps the window that it began with.

        Raises:
            UsageError: there is no room for it.
        """
        if self.room is not None and (window is None or window > self.room.most):
            if window is None:
                began, fix = "with the whole data set on the disk", "unset it"
            else:
                began, fix = f"with a window of {window} shards", f"set it to {self.room.least_bytes(window)} bytes or more"
            raise UsageError(f"TIDALI_CACHE_LIMIT is {self.room.limit_bytes} bytes, and this run began {began}; {fix}")
        return replace(self, window=window)

    def describe(self) -> str:
        shards, samples = len(self.shard_samples), sum(self.shard_samples)
        if self.window is None:
            return "samples shuffled"
        text = f"shards shuffled, and samples over a window of {self.window} of the {shards} shards"
        return f"{text}, about {min(samples * self.window // shards, samples):,} samples"

    def order(self, seed: int, epoch: int, device: torch.device | None = None) -> Tensor:
        """(samples,) int64: a pure function of its arguments and the window."""
        if self.window is None:
            return epoch_order(sum(self.shard_samples), seed, epoch, device)
        return windowed_order(self.shard_samples, self.window, seed, epoch, device)


class ShardNeeds:
    """In which order a split's shards are needed. In stored order, until `follow` says otherwise."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self.follow(range(len(shards)))

    def follow(
        self, order: Sequence[int], *, window: int = 1, read: int = 2, before: Sequence[int] = (), after: Sequence[int] = ()
    ) -> None:
        """
        Args:
            order: the shards' numbers, as an epoch begins with them.
            window: so many are read together.
            read: beyond the window, so many may still be read by other ranks.
            before, after: the ends of the last epoch, and the next epoch.
        """
        self._window, self._read, self._skipped = window, read, len(before)
        self._rank = np.empty(len(self._shards), np.int64)
        self._rank[list(order)] = np.arange(len(before), len(before) + len(order))
        self._order = tuple(self._shards[number] for number in (*before, *order, *after))

    def follow_epoch(self, shuffle: Shuffle, seed: int, epoch: int) -> None:
        """An epoch of training, between the one before it and the one after it."""
        assert shuffle.window is not None
        read, count = shuffle.room.shards_read if shuffle.room is not None else 0, len(self._shards)
        before, order, after = (shard_order(count, seed, number).tolist() for number in (epoch - 1, epoch, epoch + 1))
        kept = min(shuffle.window + read, count) if epoch else 0
        self.follow(order, window=shuffle.window, read=read, before=before[count - kept :], after=after)

    def at(self, shards: NDArray[np.int64]) -> Needs:
        """From a batch on that reads these shards: all that began more than a window before its newest one are done."""
        oldest = int(self._rank[shards].max()) - self._window + 1
        return Needs(self._order, first_needed=max(oldest, self._skipped), first_kept=max(oldest - self._read, 0))


def _bytes(split: Split, shards: int) -> int:
    """What so many shards take on a disk, and what is kept free of it, at most."""
    return BLOCK_BYTES + sum(size + BLOCK_BYTES for size in nlargest(shards, (shard.size_bytes for shard in split.shards)))


def _read(split: Split, batch_size: int) -> int:
    """Shards that batches in progress touch beyond a window, by the mean samples of a shard."""
    return -(-_BATCHES_READ * batch_size * len(split.shards) // split.samples) + 1
