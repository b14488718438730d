"""The order: random numbers against the published generator, coverage and equal steps as properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidali.errors import UsageError
from tidali.loading import counter
from tidali.loading.bicubic import centre_crop
from tidali.loading.order import (
    centre_boxes,
    check_order,
    epoch_order,
    num_steps,
    rank_slice,
    shard_order,
    windowed_order,
)

# The first outputs of splitmix64 seeded with 1234567, as other implementations of Vigna's reference code list them.
SPLITMIX64_OF_1234567 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]

splits = st.integers(1, 5000)
batch_sizes = st.integers(1, 1024)
world_sizes = st.integers(1, 16)
seeds = st.integers(-(2**63), 2**64)


def unsigned(values: torch.Tensor) -> list[int]:
    return [value % 2**64 for value in values.tolist()]


def test_hashes_are_splitmix64():
    assert unsigned(counter.hashes(1234567, torch.arange(5))) == SPLITMIX64_OF_1234567


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_tensor_and_host_mix_agree(values: list[int]):
    assert unsigned(counter.mix(torch.tensor(values))) == [counter.mix_int(value % 2**64) for value in values]


@given(seeds, st.integers(0, 1000))
def test_keys_depend_on_each_part_and_their_order(seed: int, epoch: int):
    keys = {counter.key(seed, epoch), counter.key(epoch, seed), counter.key(seed, epoch + 1), counter.key(seed + 1, epoch)}
    # Of Python's unbounded seeds only 64 bits count, hence the residues.
    assert len(keys) == (3 if (seed - epoch) % 2**64 == 0 else 4)


def test_uniforms_look_uniform_and_independent():
    count = 200_000
    draws = counter.uniforms(counter.key(0, 7), torch.arange(count), 4).double()
    assert draws.shape == (count, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    # Five standard errors: 1 / sqrt(12 n) of the mean, 1 / sqrt(180 n) of the variance, 1 / sqrt(n) of a correlation.
    assert (draws.mean(0) - 1 / 2).abs().max() < 5 / (12 * count) ** 0.5
    assert (draws.var(0) - 1 / 12).abs().max() < 5 / (180 * count) ** 0.5
    correlations = torch.corrcoef(torch.cat((draws, draws.roll(1, 0)), dim=1).T) - torch.eye(8)
    assert correlations.abs().max() < 5 / count**0.5


def test_uniforms_of_a_sample_do_not_depend_on_its_batch():
    draws = counter.uniforms(99, torch.arange(50), 3)
    picked = torch.tensor([31, 2, 2, 49])
    assert torch.equal(counter.uniforms(99, picked, 3), draws[picked])


@given(splits, seeds, st.integers(0, 2**31))
def test_an_order_is_a_permutation_and_repeatable(samples: int, seed: int, epoch: int):
    order = epoch_order(samples, seed, epoch)
    assert torch.equal(order.sort().values, torch.arange(samples))
    assert torch.equal(order, epoch_order(samples, seed, epoch))


def test_orders_are_uncorrelated_with_each_other_and_with_storage():
    samples = 5000
    orders = [torch.arange(samples)] + [epoch_order(samples, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2, 100)]
    ranks = torch.stack(orders).argsort(dim=1).double()
    rho = torch.corrcoef(ranks) - torch.eye(len(orders))
    # Spearman's rho of random permutations has standard deviation 1 / sqrt(n - 1); 36 pairs stay within 4.5 of them.
    assert rho.abs().max() < 4.5 / (samples - 1) ** 0.5
    neighbours = torch.stack([(order.diff() == 1).sum() for order in orders[1:]])
    assert neighbours.max() < 10  # one expected of a random permutation


@settings(max_examples=150, deadline=None)
@given(splits, batch_sizes, world_sizes)
def test_evaluation_takes_each_position_once(samples: int, batch_size: int, world_size: int):
    steps = num_steps(samples, batch_size, world_size, train=False)
    position = 0
    for step in range(steps):
        for rank in range(world_size):
            part = rank_slice(samples, step, batch_size, rank, world_size)
            assert part.start == position
            assert 0 <= part.stop - part.start <= batch_size
            position = part.stop
    assert position == samples


@settings(max_examples=150, deadline=None)
@given(splits, batch_sizes, world_sizes)
def test_training_takes_each_position_at_most_once_in_equal_steps(samples: int, batch_size: int, world_size: int):
    if samples < world_size:
        with pytest.raises(UsageError, match=f"{samples} training samples for {world_size} ranks"):
            num_steps(samples, batch_size, world_size, train=True)
        return
    steps = num_steps(samples, batch_size, world_size, train=True)
    global_batch = batch_size * world_size
    position = 0
    for step in range(steps):
        sizes = set()
        for rank in range(world_size):
            part = rank_slice(samples, step, batch_size, rank, world_size)
            assert part.start == position
            position = part.stop
            sizes.add(part.stop - part.start)
        assert sizes == {batch_size} if samples >= global_batch else max(sizes) - min(sizes) <= 1 <= min(sizes)
    assert position == (samples - samples % global_batch if samples >= global_batch else samples)


@given(splits, st.integers(1, 64), world_sizes, world_sizes, st.data())
def test_a_step_has_the_same_samples_on_any_number_of_ranks(
    samples: int, unit: int, world_size: int, other: int, data: st.DataObject
):
    global_batch = unit * world_size * other
    if samples < max(world_size, other):
        return

    def positions(step: int, ranks: int) -> list[int]:
        parts = [rank_slice(samples, step, global_batch // ranks, rank, ranks) for rank in range(ranks)]
        return [position for part in parts for position in range(part.start, part.stop)]

    steps = num_steps(samples, global_batch // world_size, world_size, train=True)
    assert steps == num_steps(samples, global_batch // other, other, train=True)
    step = data.draw(st.integers(0, steps - 1))
    assert positions(step, world_size) == positions(step, other)


def test_check_order_names_every_difference():
    check_order({"seed": 1, "samples": 5}, {"samples": 5, "seed": 1})
    with pytest.raises(UsageError, match=r"seed 1 then, 2 now; flip 'none' then, None now; route None then, 'cache' now"):
        check_order({"seed": 1, "flip": "none"}, {"seed": 2, "route": "cache"})


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    st.integers(1, 600),
    st.floats(0.1, 1.0),
)
def test_centre_boxes_are_those_of_images_of_one_size(sizes: list[tuple[int, int]], res: int, crop_fraction: float):
    boxes = centre_boxes(torch.tensor(sizes, dtype=torch.int32), res, crop_fraction)
    assert boxes.shape == (len(sizes), 4)
    assert boxes.dtype == torch.float32
    for size, (top, left, height, width) in zip(sizes, boxes.double().tolist(), strict=True):
        scale = min(size) * crop_fraction / res
        for axis, (start, extent) in enumerate(((top, height), (left, width))):
            expected, expected_scale = centre_crop(size, res, axis, crop_fraction)
            # float32 keeps 24 bits of numbers up to 5000.
            assert abs(extent - res * expected_scale) <= 1e-3
            assert abs(start - expected) <= 1e-3 or abs(abs(start - expected) - scale) <= 1e-3  # a tie, rounded either way
            # Around the image's centre but for the pixel of the output that resizing first and cropping then rounds away.
            assert abs(start + extent / 2 - size[axis] / 2) <= scale / 2 + 1e-3
            assert start >= -scale - 1e-3
            assert start + extent <= size[axis] + scale + 1e-3


windows = st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=25), st.integers(1, 30))


@given(windows, seeds, st.integers(0, 2**31))
def test_a_windowed_order_is_a_permutation_that_reads_few_shards_at_a_time(shape: tuple[list[int], int], seed: int, epoch: int):
    counts, window = shape
    order = windowed_order(counts, window, seed, epoch)
    assert torch.equal(order.sort().values, torch.arange(sum(counts)))
    assert torch.equal(order, windowed_order(counts, window, seed, epoch))
    begins = shard_order(len(counts), seed, epoch)
    assert begins.sort().values.tolist() == list(range(len(counts)))
    rank = torch.argsort(begins)[torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[order]].tolist()
    newest = -1
    for number, place in enumerate(rank):
        newest = max(newest, place)
        assert place > newest - window  # what began a window before is done
        assert place < min(rank[number:]) + window  # and nothing begins a window early


def test_windowed_orders_mix_their_window_evenly_and_are_independent():
    counts, window = [100] * 60, 10
    order = windowed_order(counts, window, 5, 0)
    rank = torch.argsort(shard_order(60, 5, 0))[order // 100].double()
    middle = torch.arange(len(order))[1000:5000]
    # A shard's samples come evenly over the window: how far each is behind its place is uniform over 0..10 shards, of which the
    # mean of 4,000 has a standard deviation of 10 / sqrt(12 * 4000) = 0.046.
    behind = middle / 100 + (window - 1) / 2 - rank[1000:5000]  # the ramp of the first shards takes half a window
    assert abs(behind.mean() - window / 2) < 0.25
    assert abs(behind.std() - window / 12**0.5) < 0.25
    other = [windowed_order(counts, window, *key) for key in ((5, 1), (6, 0))]
    assert all((one == order).double().mean() < 0.01 for one in other)
    within = order[rank == 30] % 100  # the samples of one shard, in the order in which they come
    assert abs(torch.corrcoef(torch.stack((within.double(), torch.arange(100.0).double())))[0, 1]) < 0.4
