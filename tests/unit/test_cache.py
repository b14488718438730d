"""Batches from cached pixels: coverage, resume and pixels, with each image's number written into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidali.config import Augment, Preprocess
from tidali.dataset.contract import Dataset, open_dataset
from tidali.errors import UsageError
from tidali.hardware.ranks import Ranks
from tidali.loading import cache as cache_module
from tidali.loading.batches import Batches, Training
from tidali.loading.cache import ANY_SIDE, PixelCache, fill_cache
from tidali.loading.corrupt import CorruptSamples
from tidali.loading.samples import SampleTable
from tidali.loading.stream import ShardSource
from tidali.loading.thread_decoder import ThreadDecoder

SIDE_PX = 4
COLOUR: dict[str, float] = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
EVERYTHING = Augment(flip="alternating", shift_px=1, crop_scale=(0.5, 1.0), erase=0.5, **COLOUR)


class NoneCorrupt(CorruptSamples):
    """Of a split that has no shards."""

    def __init__(self) -> None:
        self.positions = set()


def cache_of(pixels: torch.Tensor, identity: str) -> PixelCache:
    return PixelCache(
        pixels={ANY_SIDE: pixels},
        labels=torch.arange(len(pixels)),
        identity=identity,
        size=(pixels.shape[1], pixels.shape[2]),
        corrupt=NoneCorrupt(),
    )


def numbered(samples: int) -> PixelCache:
    """Image ``i`` is all of grey level ``i % 256``, its label ``i``."""
    labels = torch.arange(samples)
    pixels = (labels % 256).to(torch.uint8)[:, None, None, None].expand(-1, SIDE_PX, SIDE_PX, 3).contiguous()
    return cache_of(pixels, "numbered")


def coloured(samples: int) -> PixelCache:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (samples, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return cache_of(pixels, "coloured")


def batches(
    cache: PixelCache,
    *,
    batch_size: int = 4,
    train: bool = False,
    augment: Augment | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    **preprocess: Any,
) -> Batches:
    assert cache.size is not None
    return Batches(
        cache,
        Preprocess(**{"res": cache.size[0], "std": (1 / 255,) * 3, **preprocess}),
        batch_size,
        training=Training(augment=augment or Augment(), seed=seed) if train else None,
        ranks=Ranks(rank=rank, world_size=world_size),
        dtype=dtype,
    )


def labels_of(loader: Batches) -> list[list[int]]:
    """Each batch's labels, its images checked against them."""
    seen = []
    for images, labels in loader:
        assert torch.equal(images[:, 0, 0, 0].to(torch.int64), labels % 256)
        seen.append(labels.tolist())
    return seen


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 5))
def test_evaluation_sees_each_sample_once_in_stored_order(samples: int, batch_size: int, world_size: int):
    cache = numbered(samples)
    ranks = [labels_of(batches(cache, batch_size=batch_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(seen) for seen in ranks} == {-(-samples // (batch_size * world_size))}
    assert [label for step in zip(*ranks, strict=True) for part in step for label in part] == list(range(samples))


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 5), st.integers(0, 3))
def test_training_sees_no_sample_twice_in_equal_steps(samples: int, batch_size: int, world_size: int, epoch: int):
    cache = numbered(samples)
    if samples < world_size:
        with pytest.raises(UsageError, match="ranks"):
            batches(cache, train=True, world_size=world_size)
        return
    seen = []
    for rank in range(world_size):
        loader = batches(cache, batch_size=batch_size, train=True, rank=rank, world_size=world_size)
        loader.set_epoch(epoch)
        parts = labels_of(loader)
        assert len(parts) == len(loader) == max(samples // (batch_size * world_size), 1)
        seen += [label for part in parts for label in part]
    assert len(seen) == len(set(seen)) == min(samples, len(loader) * batch_size * world_size)


@settings(max_examples=12)
@given(st.integers(30, 60), st.integers(0, 4), st.integers(0, 3), st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 3, 6]))
def test_a_resumed_epoch_has_the_same_images(samples: int, stop: int, epoch: int, before: int, after: int):
    cache, key = coloured(samples), dict(train=True, seed=11, augment=EVERYTHING, res=8)

    def loaders(world_size: int) -> list[Batches]:
        made = [batches(cache, batch_size=6 // world_size, rank=r, world_size=world_size, **key) for r in range(world_size)]
        for loader in made:
            loader.set_epoch(epoch)
        return made

    def steps(made: list[Batches]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Global batches: the ranks' parts one after another."""
        return [
            (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
            for parts in zip(*made, strict=True)
        ]

    unbroken = steps(loaders(before))
    assert len(unbroken) == samples // 6
    stopped = loaders(before)[0]
    assert len(list(islice(stopped, stop))) == stop
    state = json.loads(json.dumps(stopped.state_dict()))
    assert (state["epoch"], state["step"]) == (epoch, stop)

    resumed = loaders(after)
    for loader in resumed:
        loader.load_state_dict(state)
        loader.set_epoch(epoch)
    rest = steps(resumed)
    assert len(rest) == len(unbroken) - stop
    for (images, labels), (expected_images, expected_labels) in zip(rest, unbroken[stop:], strict=True):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(images, expected_images)


def test_epochs_differ_and_follow_each_other():
    loader = batches(numbered(40), train=True)
    first, second = labels_of(loader), labels_of(loader)
    assert first != second
    loader.set_epoch(0)
    assert labels_of(loader) == first
    assert labels_of(loader) == second
    loader.set_epoch(1)
    assert labels_of(loader) == second


def test_an_epoch_that_was_left_early_is_not_gone_on_with():
    loader, evaluation = batches(numbered(40), train=True), batches(numbered(40))
    second = [labels_of(loader) for _ in range(2)][1]
    loader.set_epoch(0)
    next(iter(loader))
    assert labels_of(loader) == second
    loader.set_epoch(1)
    next(iter(loader))
    loader.set_epoch(1)
    assert labels_of(loader) == second
    next(iter(evaluation))
    assert [label for part in labels_of(evaluation) for label in part] == list(range(40))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 5}, "seed 0 then, 5 now"),
        ({"batch_size": 5}, "global_batch_size 4 then, 5 now"),
        ({"world_size": 2}, "global_batch_size 4 then, 8 now"),
        ({"augment": Augment(crop_scale=(0.5, 1.0))}, r"crop_scale None then, \[0.5, 1.0\] now"),
    ],
)
def test_a_state_of_another_order_is_refused(changes: dict[str, Any], named: str):
    state = batches(numbered(40), train=True).state_dict()
    with pytest.raises(UsageError, match=named):
        batches(numbered(40), train=True, **changes).load_state_dict(state)
    with pytest.raises(UsageError, match="samples 40 then, 41 now"):
        batches(numbered(41), train=True).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_of_the_right_size_are_normalised_and_nothing_else(dtype: torch.dtype):
    cache, mean, std = coloured(10), torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    (images, labels), *rest = batches(cache, batch_size=10, mean=tuple(mean.tolist()), std=tuple(std.tolist()), dtype=dtype)
    assert not rest
    expected = ((cache.pixels[ANY_SIDE] / 255 - mean) / std).permute(0, 3, 1, 2)
    # One unit in the last place: the scale and offset here are one product and one sum.
    torch.testing.assert_close(images.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64


def test_augmentation_is_of_training_alone():
    cache = coloured(12)
    plain = torch.cat([images for images, _ in batches(cache)])
    assert torch.equal(torch.cat([images for images, _ in batches(cache)]), plain)
    trained = {
        int(label): image
        for images, labels in batches(cache, train=True, augment=EVERYTHING)
        for image, label in zip(images, labels, strict=True)
    }
    assert len(trained) == 12
    assert sum(torch.equal(trained[label], plain[label]) for label in range(12)) == 0


def test_flips_are_those_of_the_sample():
    cache = coloured(12)
    plain = torch.cat([images for images, _ in batches(cache)])
    loader = batches(cache, train=True, augment=Augment(flip="alternating"))
    for epoch in range(2):
        flipped = {}
        for images, labels in loader:
            for image, label in zip(images, labels.tolist(), strict=True):
                flipped[label] = torch.equal(image, plain[label].flip(2))
                assert flipped[label] or torch.equal(image, plain[label])
        if epoch == 0:
            first = flipped
    assert len(first) == len(flipped) == 12
    assert all(first[label] != flipped[label] for label in first)


def test_both_routes_have_one_position(demo_data: Path) -> None:
    """The state names the route that it is of, and is none the worse for the other."""
    table = SampleTable(open_dataset(demo_data), "train")
    source = ShardSource(table, torch.device("cpu"), CorruptSamples(table), batch_size=32)
    streamed = Batches(source, Preprocess(res=64), 32, training=Training())
    next(iter(streamed))
    state = json.loads(json.dumps(streamed.state_dict()))
    cached = Batches(fill_cache(source, [64], 1.0), Preprocess(res=64), 32, training=Training())
    cached.load_state_dict(state)
    assert (state["order"]["route"], cached.state_dict()["order"]["route"]) == ("stream", "cache")
    assert len(list(cached)) == len(streamed) - 1


def test_a_position_of_dalis_own_order_is_refused() -> None:
    loader = batches(numbered(40), train=True)
    with pytest.raises(UsageError, match="stream"):
        loader.load_state_dict({**loader.state_dict(), "dali": "checkpoint"})


def test_a_position_from_before_a_field_was_added_is_taken() -> None:
    """What the saved state does not know was not used: brightness, say, in one of an earlier tidali's."""
    loader = batches(numbered(40), train=True)
    state = loader.state_dict()
    for name in ("brightness", "hue", "crop_ratio"):
        del state["order"][name]
    loader.load_state_dict(state)
    with pytest.raises(UsageError, match="hue"):
        batches(numbered(40), train=True, augment=Augment(hue=0.1)).load_state_dict(state)


@pytest.mark.parametrize("fill_batch", [7, 32, 256])
def test_a_filled_cache_is_pils_decodes_in_stored_order(
    demo_data: Path, upright: Callable[..., Any], fill_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "FILL_BATCH", fill_batch)
    dataset, seen = open_dataset(demo_data), []
    table = SampleTable(dataset, "val")
    source = ShardSource(table, torch.device("cpu"), CorruptSamples(table), batch_size=256)
    monkeypatch.delattr(ThreadDecoder, "empty")  # they are decoded to where they stay
    cache = fill_cache(source, [32, 64], 1.0, on_batch=seen.append)
    expected = upright(dataset, "val")
    assert list(cache.pixels) == [ANY_SIDE]
    assert cache.pixels[ANY_SIDE].tolist() == [pixels.tolist() for pixels, _, _ in expected]
    assert cache.labels.tolist() == [label for _, label, _ in expected]
    assert seen == [min(first + fill_batch, 32) for first in range(0, 32, fill_batch)]


def test_unequal_images_are_kept_as_squares_of_each_side(photographs: Dataset) -> None:
    table, seen = SampleTable(photographs, "train"), []
    source = ShardSource(table, torch.device("cpu"), CorruptSamples(table), batch_size=256)
    cache = fill_cache(source, [32, 48], 0.875, on_batch=seen.append)
    assert {side: tuple(pixels.shape) for side, pixels in cache.pixels.items()} == {
        side: (len(table), side, side, 3) for side in (32, 48)
    }
    assert all(pixels.flatten(1).amax(1).min() > 0 for pixels in cache.pixels.values())  # each was written
    assert seen == [len(table), 2 * len(table)]
    alone = fill_cache(source, [48], 0.875)
    assert torch.equal(alone.pixels[48], cache.pixels[48])  # whatever is asked for beside it


def test_an_autocast_around_batches_changes_nothing() -> None:
    """Of what is drawn for an image, too: bfloat16 has 8 bits."""
    cache, key = coloured(12), dict(train=True, augment=EVERYTHING, batch_size=12)
    ((expected, _),) = batches(cache, **key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ((images, _),) = batches(cache, **key)
    assert torch.equal(images, expected)
