"""Batches from cached pixels: coverage, resume and pixels, with each image's number written into it."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidali.errors import TidaliError, UsageError
from tidali.loading.augment import Augment
from tidali.loading.cache import CachedBatches, PixelCache, fill_cache

SIDE_PX = 4
EVERYTHING = Augment(flip="alternating", shift_px=1, crop_scale=(0.5, 1.0), erase=0.5)


def numbered(samples: int) -> PixelCache:
    """Image ``i`` is all of grey level ``i % 256``, its label ``i``."""
    labels = torch.arange(samples)
    pixels = (labels % 256).to(torch.uint8)[:, None, None, None].expand(-1, SIDE_PX, SIDE_PX, 3).contiguous()
    return PixelCache(pixels=pixels, labels=labels, identity="numbered")


def coloured(samples: int) -> PixelCache:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (samples, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return PixelCache(pixels=pixels, labels=torch.arange(samples), identity="coloured")


def batches(cache: PixelCache, **changes: Any) -> CachedBatches:
    return CachedBatches(cache, **{"res": cache.size[0], "batch_size": 4, "std": (1 / 255,) * 3, **changes})


def labels_of(loader: CachedBatches) -> list[list[int]]:
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

    def loaders(world_size: int) -> list[CachedBatches]:
        made = [batches(cache, batch_size=6 // world_size, rank=r, world_size=world_size, **key) for r in range(world_size)]
        for loader in made:
            loader.set_epoch(epoch)
        return made

    def steps(made: list[CachedBatches]) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
    (images, labels), *rest = batches(cache, batch_size=10, mean=mean.tolist(), std=std.tolist(), dtype=dtype)
    assert not rest
    expected = ((cache.pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    # One unit in the last place: the scale and offset here are one product and one sum.
    torch.testing.assert_close(images.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64


def test_augmentation_is_of_training_alone():
    cache = coloured(12)
    plain = torch.cat([images for images, _ in batches(cache)])
    assert torch.equal(torch.cat([images for images, _ in batches(cache, augment=EVERYTHING)]), plain)
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


def test_fill_cache_keeps_the_stored_order():
    whole, seen = coloured(10), []
    parts = [(whole.pixels[i : i + 4], whole.labels[i : i + 4].to(torch.int32)) for i in range(0, 10, 4)]
    cache = fill_cache(parts, 10, (8, 8), identity="x", on_batch=seen.append)
    assert torch.equal(cache.pixels, whole.pixels)
    assert torch.equal(cache.labels, whole.labels)
    assert seen == [4, 8, 10]
    for wrong in (parts[:2], [*parts, parts[0]]):
        with pytest.raises(TidaliError, match=r"the split has 10"):
            fill_cache(wrong, 10, (8, 8), identity="x")
