"""A data set on a device, ready to give batches: from the device's memory where they fit, else from the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tidali.config import CacheChoice, DecoderChoice, Preprocess
from tidali.console import progress_bar, warn
from tidali.dataset.contract import Dataset
from tidali.hardware.limits import free_memory, ranks_on_machine
from tidali.hardware.ranks import Ranks
from tidali.loading.batches import Batches, Training
from tidali.loading.cache import FILL_BATCH, PixelCache, fill_cache, stored_order
from tidali.loading.corrupt import CorruptSamples
from tidali.loading.order import refuse_partial_batch
from tidali.loading.route import choose_route
from tidali.loading.samples import SampleTable
from tidali.loading.sharing import Sharing
from tidali.loading.sizes import SizePlan
from tidali.loading.stream import ShardSource, Source
from tidali.loading.window import Room, Shuffle


class Data:
    """Gives batches of any split of a data set at any resolution. Cached pixels are shared between them."""

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device,
        *,
        cache: CacheChoice = "auto",
        decoder: DecoderChoice = "auto",
        max_bad: int | None = None,
        ranks: Ranks | None = None,
        training_bytes: int = 0,
    ) -> None:
        """
        Args:
            max_bad: samples of a split that may be corrupt and are then left out; 0.1 % of it by default.
            training_bytes: of the device's memory that caches leave for training, by an estimate.
            ranks: this process among those that share each batch; where they are joined by torch.distributed, each of them has
                to ask for the same batches, and the one with the least memory decides for all.
        """
        self.dataset, self.device = dataset, device
        self.ranks = ranks if ranks is not None else Ranks()
        self._cache_choice: CacheChoice = cache
        self._decoder: DecoderChoice = decoder
        self._max_bad = max_bad
        self._training_bytes = training_bytes
        if dataset.copy is not None:
            dataset.copy.on_failure = warn
        self._tables: dict[str, tuple[SampleTable, CorruptSamples]] = {}
        self._caches: dict[tuple[Any, ...], PixelCache] = {}

    def batches(
        self,
        split: str,
        preprocess: Preprocess,
        batch_size: int,
        *,
        training: Training | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Batches:
        """
        Args:
            batch_size: of this rank.
            training: None evaluates.
            dtype: of the images.

        Raises:
            DatasetError: a split that is not there, a damaged record, or more corrupt samples than may be left out.
            UsageError: a split without labels, a training batch larger than it, or a cache or decoder that cannot be had.
            TidaliError: the shards cannot be read.
        """
        table, _ = self._table(split)
        if training is not None:
            refuse_partial_batch(split, len(table), batch_size, self.ranks.world_size)
        room = Room.of(self.dataset, split, batch_size, self.ranks.world_size, trains=training is not None)
        sizes = (training.sizes if training is not None else None) or SizePlan.of(preprocess.res)
        # On a CPU the ranks of a machine keep one cache, in what is free for all of them.
        sharers = ranks_on_machine() if self.ranks.joined and self.device.type == "cpu" else 1
        route = choose_route(
            self._cache_choice,
            table.info,
            sides=sizes.sides,
            crops=training is not None and training.augment.crop_scale is not None,
            free_bytes=sharers * self._least_free_bytes(),
            training_bytes=sharers * (self._training_bytes + self._decoding_bytes(table, batch_size)),
        )
        source: Source
        if route.cached:
            source = self._cached(split, sizes.sides, preprocess)
        else:
            source = self.streamed(split, preprocess, batch_size)
        if training is not None:
            shuffle = Shuffle.of(table.info, None if route.cached else room)
            windows = [window for window in self.ranks.gather(shuffle.window) if window is not None]  # machines may differ
            training = replace(training, shuffle=replace(shuffle, window=min(windows, default=None)))
        return Batches(source, preprocess, batch_size, training=training, ranks=self.ranks, dtype=dtype, route=route)

    def streamed(self, split: str, preprocess: Preprocess, batch_size: int, *, num_threads: int | None = None) -> ShardSource:
        """A split's pixels, decoded whenever they are asked for."""
        table, corrupt = self._table(split)
        return ShardSource(
            table,
            self.device,
            corrupt,
            batch_size=batch_size,
            decoder=self._decoder,
            kernel=preprocess.kernel,
            num_threads=num_threads,
        )

    def decoded(self, split: str, preprocess: Preprocess, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A split's images in stored order, as the cache keeps them: pixels (n, H, W, 3) uint8 and labels (n,) int64."""
        source = self.streamed(split, preprocess, batch_size)
        for _, found in source.read(stored_order(source, preprocess.res, preprocess.crop_fraction, batch_size)):
            yield found.stored, source.labels.index_select(0, found.samples.to(self.device))

    def corrupt(self, split: str) -> frozenset[int]:
        """Positions of the split's samples that are known to be corrupt by now."""
        return frozenset(self._table(split)[1].positions)

    def share_corrupt(self) -> None:
        """Exchange what each rank has found corrupt. All ranks have to call this after the same batch.

        Raises:
            DatasetError: more samples are corrupt than may be left out.
        """
        for _, (_, corrupt) in sorted(self._tables.items()):
            corrupt.merge(self.ranks.gather(sorted(corrupt.positions)))

    def _table(self, split: str) -> tuple[SampleTable, CorruptSamples]:
        if split not in self._tables:
            table = SampleTable(self.dataset, split)
            self._tables[split] = table, CorruptSamples(table, self._max_bad)
        return self._tables[split]

    def _cached(self, split: str, sides: Sequence[int], preprocess: Preprocess) -> PixelCache:
        table, _ = self._table(split)
        one_size = table.info.single_image_size is not None
        key = (split,) if one_size else (split, tuple(sides), preprocess.crop_fraction, preprocess.kernel)
        if key not in self._caches:
            source, sharing = self.streamed(split, preprocess, FILL_BATCH), Sharing.of(self.ranks)
            share = sharing.part(len(table))
            with progress_bar() as bar:
                total = (share.stop - share.start) * (1 if one_size else len(sides))
                task = bar.add_task(f"decoding {split}", total=total)

                def show(done: int) -> None:
                    bar.update(task, completed=done)

                self._caches[key] = fill_cache(source, sides, preprocess.crop_fraction, sharing=sharing, on_batch=show)
            source.close()
        return self._caches[key]

    def _decoding_bytes(self, table: SampleTable, batch_size: int) -> int:
        """What DALI has in hand of images of unequal size, by an estimate: whole ones, as many batches as its queue is long and
        one that is used. Of caches that are filled its memory is returned."""
        if self.device.type == "cpu" or table.info.single_image_size is not None:
            return 0
        mean_pixels = float(table.sizes.to(torch.float32).prod(1).mean())
        return int(4 * batch_size * 3 * mean_pixels)

    def _least_free_bytes(self) -> int:
        return min(self.ranks.gather(free_memory_bytes(self.device)))


def free_memory_bytes(device: torch.device) -> int:
    """Of the GPU, or this rank's part of the memory that the machine and the container leave to this process."""
    if device.type == "cuda":
        # torch keeps what it freed, and the driver counts that as taken.
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory().size_bytes // ranks_on_machine()
