"""Augmentation: torchvision's distributions as the oracle of the draws, plain indexing as that of the changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torchvision.transforms import RandomErasing, RandomResizedCrop

from tidali.errors import UsageError
from tidali.loading.augment import (
    AUGMENTS,
    ERASE_RATIO,
    ERASE_SCALE,
    Augment,
    Mix,
    crop_boxes,
    draw_mix,
    erase,
    erase_boxes,
    flip_flags,
    mix_batch,
    shift_offsets,
    shift_pixels,
)
from tidali.loading.resample import flip_where

KEY: dict[str, Any] = {"seed": 3, "epoch": 5}
SAMPLES = torch.arange(4000)


def random_pixels(n: int = 8, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def ks_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's: the largest distance of two empirical distributions."""
    a, b = a.sort().values, b.sort().values
    points = torch.cat((a, b))
    return (
        (torch.searchsorted(a, points, right=True) / len(a) - torch.searchsorted(b, points, right=True) / len(b))
        .abs()
        .max()
        .item()
    )


def assert_same_distribution(boxes: torch.Tensor, expected: torch.Tensor) -> None:
    # Larger distances have a probability below 1e-4 for continuous draws (Kolmogorov), and less for whole pixels.
    limit = 2.2 * math.sqrt(1 / len(boxes) + 1 / len(expected))
    for name, of in (
        ("area", lambda b: b[:, 2] * b[:, 3]),
        ("ratio", lambda b: b[:, 3] / b[:, 2]),
        ("top", lambda b: b[:, 0]),
        ("left", lambda b: b[:, 1]),
    ):
        distance = ks_distance(of(boxes), of(expected))
        assert distance < limit, f"{name}: {distance:.3f}, limit {limit:.3f}"


def assert_whole_and_inside(boxes: torch.Tensor, height: int, width: int) -> None:
    assert torch.equal(boxes, boxes.round())
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    # The last place is drawn too, by boxes that had a choice.
    assert ((boxes[:, 0] + boxes[:, 2] == height) & (boxes[:, 2] < height)).any()
    assert ((boxes[:, 1] + boxes[:, 3] == width) & (boxes[:, 3] < width)).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": "sideways"},
        {"shift_px": -1},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 1.5)},
        {"crop_scale": (0.9, 0.8)},
        {"crop_ratio": (2.0, 1.0)},
        {"erase": 1.5},
        {"mixup_alpha": -0.1},
        {"cutmix_alpha": math.inf},
    ],
)
def test_impossible_settings_are_named(wrong: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Augment(**wrong)


def test_presets():
    assert AUGMENTS["none"] == Augment()
    assert not AUGMENTS["light"].mixes
    assert Augment(mixup_alpha=0.2).mixes
    assert Augment(cutmix_alpha=1.0).mixes


def test_draws_belong_to_the_sample_and_the_epoch():
    draws = {
        "flip": lambda s, **key: flip_flags("random", s, **key),
        "shift": lambda s, **key: shift_offsets(4, s, **key),
        "crop": lambda s, **key: crop_boxes((64, 64), (0.08, 1), (3 / 4, 4 / 3), s, **key),
        "erase": lambda s, **key: erase_boxes((64, 64), 0.5, s, **key),
    }
    picked = torch.tensor([17, 3999, 0, 17])
    for name, draw in draws.items():
        all_ = draw(SAMPLES, **KEY)
        assert torch.equal(draw(picked, **KEY), all_[picked]), name
        assert not torch.equal(draw(SAMPLES, seed=3, epoch=6), all_), name
        assert not torch.equal(draw(SAMPLES, seed=4, epoch=5), all_), name


def test_flips():
    assert not flip_flags("none", SAMPLES, **KEY).any()
    five_sigma = 5 * 0.5 / math.sqrt(len(SAMPLES))
    assert abs(flip_flags("random", SAMPLES, **KEY).float().mean() - 0.5) < five_sigma
    even, odd, again = (flip_flags("alternating", SAMPLES, seed=3, epoch=epoch) for epoch in (0, 1, 2))
    assert abs(even.float().mean() - 0.5) < five_sigma
    assert torch.equal(odd, ~even)
    assert torch.equal(again, even)


def test_shifts_are_uniform():
    offsets = shift_offsets(2, SAMPLES, **KEY)
    counts = torch.stack([torch.bincount(offsets[:, axis] + 2, minlength=5) for axis in (0, 1)]).double()
    assert offsets.min() == -2
    assert offsets.max() == 2
    expected = len(SAMPLES) / 5
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()


@pytest.mark.parametrize("size", [(64, 64), (40, 90)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]):
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = crop_boxes(size, scale, ratio, SAMPLES, **KEY)
    assert_whole_and_inside(boxes, *size)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    expected = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in SAMPLES]
    assert_same_distribution(boxes, torch.tensor(expected, dtype=torch.float32))


def test_boxes_of_equal_sizes_are_those_of_one_size():
    for size in ((64, 64), (375, 500), (1, 3000)):
        each = torch.tensor(size, dtype=torch.int32).expand(len(SAMPLES), 2)
        one = crop_boxes(size, (0.08, 1.0), (3 / 4, 4 / 3), SAMPLES, **KEY)
        assert torch.equal(crop_boxes(each, (0.08, 1.0), (3 / 4, 4 / 3), SAMPLES, **KEY), one)


def test_each_images_box_is_its_own_sizes():
    """Whatever sizes the others of the batch have."""
    sizes = torch.randint(1, 600, (len(SAMPLES), 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    boxes = crop_boxes(sizes, (0.08, 1.0), (3 / 4, 4 / 3), SAMPLES, **KEY)
    for sample in range(0, len(SAMPLES), 97):
        size = tuple(sizes[sample].tolist())
        alone = crop_boxes(size, (0.08, 1.0), (3 / 4, 4 / 3), SAMPLES[sample : sample + 1], **KEY)
        assert torch.equal(alone[0], boxes[sample])
    ends = boxes[:, :2] + boxes[:, 2:]
    assert torch.equal(boxes, boxes.round())
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (ends <= sizes).all()


def test_crops_of_unequal_sizes_have_uniform_area_and_log_uniform_aspect():
    """Of images that any box of the range fits into: squares of 300 to 900 px and a share of at most 0.75."""
    sides = torch.randint(300, 901, (len(SAMPLES), 1), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    boxes = crop_boxes(sides.expand(-1, 2), (0.08, 0.75), (3 / 4, 4 / 3), SAMPLES, **KEY)
    area, aspect = boxes[:, 2] * boxes[:, 3] / sides[:, 0] ** 2, boxes[:, 3] / boxes[:, 2]
    # Kolmogorov's 1e-4 limit of one sample against a distribution. Rounding to whole pixels moves either by less than 1 %,
    # which shifts the distribution by less than a fiftieth of that.
    limit = 2.2 / math.sqrt(len(SAMPLES)) + 0.005
    uniform = (torch.arange(len(SAMPLES)) + 0.5) / len(SAMPLES)
    for name, found in (
        ("area", (area - 0.08) / (0.75 - 0.08)),
        ("aspect", (aspect.log() - math.log(3 / 4)) / (math.log(4 / 3) - math.log(3 / 4))),
    ):
        distance = (found.sort().values - uniform).abs().max().item()
        assert distance < limit, f"{name}: {distance:.3f}, limit {limit:.3f}"
    assert abs(torch.corrcoef(torch.stack((area, aspect.log())))[0, 1]) < 5 / math.sqrt(len(SAMPLES))  # independent


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (33, 33)])
def test_crops_among_images_of_other_sizes_are_distributed_as_torchvisions(size: tuple[int, int]):
    """Every second image is of this size, the others of any."""
    sizes = torch.randint(1, 600, (2 * len(SAMPLES), 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    sizes[::2] = torch.tensor(size, dtype=torch.int32)
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = crop_boxes(sizes, scale, ratio, torch.arange(2 * len(SAMPLES)), **KEY)[::2]
    assert_whole_and_inside(boxes, *size)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    expected = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in SAMPLES]
    assert_same_distribution(boxes, torch.tensor(expected, dtype=torch.float32))


def test_every_place_is_reached():
    """Of a 12 x 15 image and boxes of 9 x 9 pixels: 4 x 7 places, each as likely."""
    sizes = torch.tensor([12, 15], dtype=torch.int32).expand(len(SAMPLES), 2)
    boxes = crop_boxes(sizes, (0.45, 0.45), (1.0, 1.0), SAMPLES, **KEY)
    assert boxes[:, 2:].unique(dim=0).tolist() == [[9, 9]]
    counts = torch.zeros(4, 7).index_put_(tuple(boxes[:, :2].long().T), torch.ones(len(boxes)), accumulate=True)
    expected = len(SAMPLES) / 28
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()


@given(
    st.lists(st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)), min_size=1, max_size=8),
    st.floats(0.01, 1.0),
    st.floats(0.1, 1.0),
    st.integers(0, 100),
)
def test_boxes_are_inside_whatever_the_sizes(sizes: list[tuple[int, int]], least: float, narrowest: float, epoch: int):
    each = torch.tensor(sizes, dtype=torch.int32)
    boxes = crop_boxes(each, (least, 1.0), (narrowest, 1 / narrowest), torch.arange(len(sizes)), seed=0, epoch=epoch)
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, boxes.round())
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= each).all()


def test_a_crop_that_never_fits_is_the_largest_central_one():
    boxes = crop_boxes((10, 100), (0.9, 1.0), (1.0, 2.0), SAMPLES[:20], **KEY)
    assert boxes.tolist() == [[0, 40, 10, 20]] * 20


def test_erasing_is_distributed_as_torchvisions():
    size = (64, 48)
    boxes = erase_boxes(size, 1.0, SAMPLES, **KEY)
    assert_whole_and_inside(boxes, *size)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    expected = torch.tensor(
        [RandomErasing.get_params(image, ERASE_SCALE, ERASE_RATIO, [0.0])[:4] for _ in SAMPLES], dtype=torch.float32
    )
    assert_same_distribution(boxes[boxes[:, 2] > 0], expected[expected[:, 2] < size[0]])  # torchvision's full box: none fitted


def test_erasing_probability():
    erased = erase_boxes((64, 64), 0.25, SAMPLES, **KEY)[:, 2] > 0
    assert abs(erased.float().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(SAMPLES))
    assert not erase_boxes((64, 64), 0.0, SAMPLES, **KEY)[:, 2:].any()


def test_flip_where():
    pixels, flags = random_pixels(), torch.tensor([True, False] * 4)
    flipped = flip_where(pixels, flags)
    assert torch.equal(flipped[0::2], pixels[0::2].flip(2))
    assert torch.equal(flipped[1::2], pixels[1::2])
    assert flipped.is_contiguous()


@given(
    st.integers(1, 6), st.integers(1, 6), st.lists(st.tuples(st.integers(-8, 8), st.integers(-8, 8)), min_size=1, max_size=4)
)
def test_shifts_mirror_at_the_border(height: int, width: int, offsets: list[tuple[int, int]]):
    pixels = random_pixels(len(offsets), height, width)
    shifted = shift_pixels(pixels, torch.tensor(offsets))
    for image, out, (down, right) in zip(pixels.numpy(), shifted.numpy(), offsets, strict=True):
        padded = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="reflect")
        np.testing.assert_array_equal(out, padded[8 - down : 8 - down + height, 8 - right : 8 - right + width])


def test_erase_zeroes_the_boxes_and_nothing_else():
    images = torch.ones(3, 3, 6, 8).to(memory_format=torch.channels_last)
    boxes = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0], [0, 0, 6, 8]])
    expected = torch.ones(3, 3, 6, 8)
    expected[0, :, 1:4, 2:6] = 0
    expected[2] = 0
    assert erase(images, boxes) is images
    assert torch.equal(images, expected)


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), [(0.2, 0.0), (0.0, 1.0), (0.8, 0.8)])
def test_mixes_are_drawn_from_beta(mixup_alpha: float, cutmix_alpha: float):
    mixes = [draw_mix(mixup_alpha, cutmix_alpha, seed=0, epoch=0, step=step) for step in range(4000)]
    assert mixes[:3] == [draw_mix(mixup_alpha, cutmix_alpha, seed=0, epoch=0, step=step) for step in range(3)]
    share_cut = np.mean([mix.box is not None for mix in mixes])
    expected_cut = {True: 0.5, False: float(cutmix_alpha > 0)}[mixup_alpha > 0 and cutmix_alpha > 0]
    assert abs(share_cut - expected_cut) < 5 * 0.5 / math.sqrt(len(mixes))
    alpha = max(mixup_alpha, cutmix_alpha)
    shares = np.array([mix.share for mix in mixes])
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha); its mean is 1/2
    assert abs(shares.mean() - 0.5) < 5 * math.sqrt(variance / len(mixes))
    assert abs(shares.var() / variance - 1) < 0.1


@pytest.mark.parametrize("mix", [Mix(share=0.7, box=None), Mix(share=0.4, box=(0.5, 0.4)), Mix(share=0.1, box=(0.99, 0.0))])
def test_targets_are_the_shares_of_the_pixels(mix: Mix):
    classes, labels = 5, torch.tensor([0, 1, 2, 4])
    images = functional.one_hot(labels, classes).float()[:, :3, None, None].expand(-1, -1, 20, 30)
    images = images.contiguous(memory_format=torch.channels_last)
    mixed, targets = mix_batch(images, labels, mix, classes)
    # Channel c of these images says how much of class c a pixel holds, for the first three classes.
    torch.testing.assert_close(mixed.mean(dim=(2, 3)), targets[:, :3])
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    own = targets.gather(1, labels[:, None])[0].item()
    assert own == pytest.approx(mix.share) if mix.box is None else mix.share - 0.1 < own < 1


def test_soft_targets_give_the_weighted_cross_entropy():
    labels, logits = torch.tensor([2, 0, 1]), torch.tensor([[1.0, 2, 3], [0, 0, 5], [-1, 0, 1]])
    _, targets = mix_batch(torch.zeros(3, 3, 4, 4), labels, Mix(share=0.3, box=None), 3)
    expected = 0.3 * functional.cross_entropy(logits, labels) + 0.7 * functional.cross_entropy(logits, labels.roll(1))
    torch.testing.assert_close(functional.cross_entropy(logits, targets), expected)
