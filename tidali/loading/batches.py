"""Batches of one split: which samples, how each is changed, where a run is in them. One code for cached and streamed pixels."""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidali.config import Augment, Preprocess
from tidali.errors import TidaliError, UsageError
from tidali.hardware.ranks import Ranks
from tidali.loading.augment import crop_boxes
from tidali.loading.changes import DrawnSteps, draw, make_changes
from tidali.loading.order import ORDER_VERSION, centre_boxes, check_order, epoch_order, num_steps, rank_slice
from tidali.loading.route import GIVEN, Route
from tidali.loading.sizes import SizePlan
from tidali.loading.stream import Pixels, Request, ShardSource, Source
from tidali.loading.window import Shuffle


@dataclass(frozen=True, kw_only=True)
class Training:
    """What training asks of batches, beyond evaluation: a new order each epoch, augmentation, input sizes."""

    augment: Augment = field(default_factory=Augment)
    seed: int = 0
    """Of the order and the augmentation."""
    sizes: SizePlan | None = None
    """The input side of each step, instead of the one resolution."""
    shuffle: Shuffle | None = None
    """None shuffles all samples among each other."""


class _Reading(NamedTuple):
    """What is asked of a source, from a position on."""

    answers: Iterator[tuple[Request, Pixels]]
    drawn: deque[tuple[DrawnSteps, int]]
    """Of the requests that are not yet answered."""
    position: tuple[int, int]
    """Epoch and step of the next answer."""


class Batches:
    """Batches of one split: images (N, 3, res, res) float channels_last and labels (N,) int64, on the source's device.

    Training takes every sample at most once an epoch, in a new order each epoch, and gives every rank as many steps;
    evaluation takes every sample exactly once, in stored order. A sample that is found corrupt is missing from its batch.

    The order and each image's augmentation are pure functions of the seed, the epoch and the sample (`tidali.loading.order`,
    `tidali.loading.augment`), so nothing but the position needs saving.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        batch_size: int,
        *,
        training: Training | None = None,
        ranks: Ranks | None = None,
        dtype: torch.dtype = torch.float32,
        route: Route = GIVEN,
    ) -> None:
        """
        Args:
            batch_size: of this rank.
            training: None evaluates.
            dtype: of the images.
            route: how the source was chosen, for whoever asks.

        Raises:
            UsageError: training on fewer samples than ranks.
        """
        self.source, self.route = source, route
        self._preprocess, self._batch_size = preprocess, batch_size
        self._training = training if training is not None else Training()
        self._train = training is not None
        self.shuffle = self._training.shuffle
        ranks = ranks if ranks is not None else Ranks()
        self._ranks, self._rank, self._world_size = ranks, ranks.rank, ranks.world_size
        self._steps = num_steps(len(source.labels), batch_size, self._world_size, train=self._train)
        self._sizes = self._training.sizes or SizePlan.of(preprocess.res)
        # Images of unequal size come as squares, which are cropped already.
        crop_fraction = preprocess.crop_fraction if source.size is not None else 1.0
        self._changes = {
            side: make_changes(
                source.size or (side, side),
                replace(preprocess, res=side, crop_fraction=crop_fraction),
                batch_size,
                dtype,
                source.device,
            )
            for side in self._sizes.sides
        }
        self._epoch, self._step = 0, 0  # of the next batch that the consumer gets
        self._underway = False
        self._left_out = 0  # corrupt samples of the epoch, on this rank
        self._reading: _Reading | None = None

    def without_augmentation(self, source: Source, preprocess: Preprocess, most: int, dtype: torch.dtype) -> Batches:
        """Training's samples in training's order, as an evaluation sees them, on this rank alone.

        Args:
            most: samples of a batch, which has no more of them than a batch of this rank.
        """
        training = Training(seed=self._training.seed, shuffle=self.shuffle)
        return Batches(source, preprocess, min(self._batch_size, most), training=training, dtype=dtype)

    def __len__(self) -> int:
        """Steps an epoch, the same on every rank."""
        return self._steps

    @property
    def samples(self) -> int:
        """Of the split, over all ranks, corrupt ones included."""
        return len(self.source.labels)

    def samples_given(self) -> int:
        """Of the split, without those that the last epoch left out on any rank. Each rank has to ask, where they are joined."""
        return self.samples - sum(self._ranks.gather(self._left_out))

    def evaluated_positions(self) -> Tensor:
        """(n,) int64 on the CPU: where the samples that this rank gave in an evaluation are in the split's stored order."""
        slices = [rank_slice(self.samples, step, self._batch_size, self._rank, self._world_size) for step in range(self._steps)]
        asked = torch.cat([torch.arange(part.start, part.stop) for part in slices])
        corrupt = torch.tensor(sorted(self.source.corrupt.positions), dtype=torch.int64)
        return asked[torch.isin(asked, corrupt, invert=True)]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, counted from 0. A restored position in that epoch stays."""
        if epoch != self._epoch or self._underway:
            self._epoch, self._step, self._underway = epoch, 0, False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch; after `load_state_dict`, what was left of it."""
        if self._underway:  # the last epoch was left early
            self._next_epoch()
        self._underway = True
        for batch in prefetch(self._rest_of_epoch(self._epoch, self._step), self.source.device):
            self._step += 1
            yield batch
            del batch  # or this frame would hold it while the next one is made
        self._next_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch and all that the order depends on, as JSON values."""
        return {"epoch": self._epoch, "step": self._step, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a saved position. The number of ranks may differ if the batch over all ranks is the same. Samples are
        shuffled over the window that was saved.

        Raises:
            UsageError: the state is of another order; names the difference.
        """
        saved = dict(state["order"])
        if self.shuffle is not None:
            self.shuffle, self._reading = self.shuffle.as_saved(saved.get("window")), None
        own = self._order()
        if "dali" in state:
            raise UsageError("the data position is of an earlier tidali's stream, whose order was DALI's own; train anew")
        for order in (saved, own):
            order.pop("route", None)  # both routes have one order
        check_order({**_as_json(asdict(Augment())), **saved}, own)  # fields that the saved state does not know were not used
        self._epoch, self._step, self._underway = state["epoch"], state["step"], False

    def _order(self) -> dict[str, Any]:
        settings = {
            "route": "stream" if isinstance(self.source, ShardSource) else "cache",
            "version": ORDER_VERSION,
            "data": self.source.identity,
            "samples": len(self.source.labels),
            "train": self._train,
            "seed": self._training.seed,
            "global_batch_size": self._batch_size * self._world_size,
            **asdict(self._training.augment),
        }
        if self.shuffle is not None and self.shuffle.window is not None:
            settings["window"] = self.shuffle.window
        return _as_json(settings)

    def _next_epoch(self) -> None:
        self._epoch, self._step, self._underway = self._epoch + 1, 0, False

    def _rest_of_epoch(self, epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._left_out = 0
        reading, self._reading = self._reading, None
        if reading is None or reading.position != (epoch, first_step):
            drawn: deque[tuple[DrawnSteps, int]] = deque()
            reading = _Reading(self.source.read(self._requests(epoch, first_step, drawn)), drawn, (epoch, first_step))
        for _ in range(first_step, self._steps):
            request, pixels = next(reading.answers)
            asked, given = len(request.samples), len(pixels.samples)
            self._left_out += asked - given
            if self._train and given < min(2, asked):
                raise TidaliError(
                    f"{given} of a batch's {asked} samples are sound, and batch norm needs two; "
                    f"give a larger --batch-size, or repair the data set"
                )
            kept = None
            if given < asked:  # on a GPU the host waits here, which is as rare as corrupt samples are
                kept = torch.isin(request.samples, pixels.samples).nonzero()[:, 0].to(self.source.device)
            steps, step = reading.drawn.popleft()
            yield self._batch(pixels, request.side, steps, step, kept)
        if self._train:
            self._reading = reading._replace(position=(epoch + 1, 0))

    def _requests(self, epoch: int, first_step: int, drawn: deque[tuple[DrawnSteps, int]]) -> Iterator[Request]:
        """Of the rest of the epoch, and in training of all epochs after it, so that a stream decodes the next epoch's first
        batches while the model is evaluated. Appends what is drawn for a step before it yields the step's request."""
        yield from self._requests_of_epoch(epoch, first_step, drawn)
        while self._train:
            epoch += 1
            yield from self._requests_of_epoch(epoch, 0, drawn)

    def _requests_of_epoch(self, epoch: int, first_step: int, drawn: deque[tuple[DrawnSteps, int]]) -> Iterator[Request]:
        count, order = self.samples, self._epoch_order(epoch)
        at_once = self._changes[self._sizes.sides[0]].draw_steps
        for first in range(first_step, self._steps, at_once):
            steps_of: dict[int, list[Tensor]] = {side: [] for side in self._sizes.sides}
            requests = []
            for step in range(first, min(first + at_once, self._steps)):
                samples = order[rank_slice(count, step, self._batch_size, self._rank, self._world_size)]
                side = self._sizes.at(epoch, step)
                requests.append((samples, side, len(steps_of[side])))
                steps_of[side].append(samples)
            draws = {side: self._draw(steps, epoch, side) for side, steps in steps_of.items() if steps}
            for samples, side, number in requests:
                drawn.append((draws[side], number))
                boxes = self._boxes(samples, epoch, side) if self.source.takes_boxes else None
                pieces = None
                if self.source.takes_pieces:
                    with self._no_autocast():
                        pieces = self._changes[side].in_pieces(draws[side].of(number)[1])
                yield Request(samples, side, boxes, pieces)

    def _epoch_order(self, epoch: int) -> Tensor:
        """(samples,) int64 on the order's device. The source is told which shards that needs when."""
        device, seed, shuffle = self.source.order_device, self._training.seed, self.shuffle
        if not self._train:
            return torch.arange(self.samples, device=device)
        if shuffle is None:
            return epoch_order(self.samples, seed, epoch, device)
        if shuffle.window is not None and isinstance(self.source, ShardSource):
            self.source.table.needs.follow_epoch(shuffle, seed, epoch)
        return shuffle.order(seed, epoch, device)

    def _draw(self, steps: Sequence[Tensor], epoch: int, side: int) -> DrawnSteps:
        """What is random in steps of one input size, the boxes of `_boxes` aside."""
        source, training = self.source, self._training
        samples = (torch.cat(list(steps)) if len(steps) > 1 else steps[0]).to(source.device)
        labels = source.labels.index_select(0, samples)
        with self._no_autocast():
            draws = draw(training.augment, samples, labels, size=source.size, side=side, seed=training.seed, epoch=epoch)
        return DrawnSteps(self._changes[side], draws, [len(step) for step in steps])

    def _boxes(self, samples: Tensor, epoch: int, side: int) -> Tensor:
        """What becomes a square of each image, where images are of unequal size."""
        augment, sizes = self._training.augment, self.source.sizes_of(samples)
        if augment.crop_scale is None:
            return centre_boxes(sizes, side, self._preprocess.crop_fraction)
        return crop_boxes(sizes, augment.crop_scale, augment.crop_ratio, samples, seed=self._training.seed, epoch=epoch)

    def _batch(self, pixels: Pixels, side: int, steps: DrawnSteps, step: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """From stored pixels to what the network sees, and labels. Nothing in it makes the host wait for the device."""
        with self._no_autocast():
            labels, changes = steps.of(step, kept)
            if pixels.images is not None:
                return pixels.images.permute(0, 3, 1, 2), labels
            return self._changes[side].apply(pixels.stored, pixels.rows, changes), labels

    def _no_autocast(self) -> AbstractContextManager[None]:
        """The consumer's autocast would make products here bfloat16."""
        return torch.autocast(self.source.device.type, enabled=False)


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: lists for tuples."""
    return dict(json.loads(json.dumps(settings)))


def prefetch(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """On CUDA, queue the next batch on a stream of its own before the current one is used, so that making it overlaps with the
    step (not measured). On a CPU, batches as they are: making one from cached pixels took 0.15 % of a ResNet-18 step's time at
    64 and at 224 px, and a thread could not save more; a stream's decoding is ahead of it by itself.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # the cache may still be on its way

    def queue_next() -> tuple[Tensor, Tensor] | None:
        with torch.cuda.stream(side):
            return next(batches, None)

    batch = queue_next()
    while batch is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for tensor in batch:
            tensor.record_stream(current)  # the allocator must not give it to the side stream while the step still reads it
        following = queue_next()
        yield batch
        batch = following


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: the allocator keeps the freed memory of each stream for that stream alone."""
    return torch.cuda.Stream(device)
