"""The stream of batches against PIL's decodes of the tars' own members."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tidali.config import Augment, Flip, Preprocess
from tidali.dataset.contract import Dataset, open_dataset
from tidali.errors import DatasetError, TidaliError, UsageError
from tidali.hardware.ranks import Ranks
from tidali.loading.batches import Batches, Training
from tidali.loading.data import Data
from tidali.loading.stream import choose_decoder

CPU = torch.device("cpu")
BICUBIC = Image.Resampling.BICUBIC
MEAN, STD = (0.48, 0.45, 0.41), (0.23, 0.22, 0.24)


def stream(
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    train: bool = False,
    flip: Flip = "none",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int | None = None,
    **preprocess: Any,
) -> Batches:
    data = Data(dataset, CPU, cache="off", ranks=Ranks(rank=rank, world_size=world_size))
    training = Training(augment=Augment(flip=flip), seed=seed) if train else None
    how = Preprocess(**{"res": 64, **preprocess})
    if num_threads is None:
        return data.batches(split, how, batch_size, training=training)
    source = data.streamed(split, how, batch_size, num_threads=num_threads)
    return Batches(source, how, batch_size, training=training, ranks=data.ranks)


def grey_levels(images: torch.Tensor) -> np.ndarray:
    """(N, 3, H, W) in 0..1 -> (N, H, W, 3) uint8."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def steps_of(batches: Batches) -> list[list[tuple[bytes, int]]]:
    """One epoch's batches in the order given, each sample as its pixels and its label."""
    return [
        [(pixels.tobytes(), int(label)) for pixels, label in zip(grey_levels(images), labels, strict=True)]
        for images, labels in batches
    ]


def seen(batches: Batches) -> list[tuple[bytes, int]]:
    return list(itertools.chain(*steps_of(batches)))


@pytest.fixture(scope="module")
def dataset(demo_data: Path) -> Dataset:
    return open_dataset(demo_data)


@pytest.fixture(scope="module")
def truth(dataset: Dataset, upright: Callable[..., Any]) -> dict[str, list[tuple[bytes, int]]]:
    """What `seen` has to give, in stored order. No two samples are equal, so that a multiset tells them apart."""
    found = {split: [(pixels.tobytes(), label) for pixels, label, _ in upright(dataset, split)] for split in ("train", "val")}
    assert {split: len(set(samples)) for split, samples in found.items()} == {"train": 160, "val": 32}
    return found


# ---------------------------------------------------------------------------------------------------------- coverage and order


# 32 samples over 3 ranks in batches of 5 are steps of 15, 15 and 2: the first rank's last batch is empty.
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 5), (1, 32), (1, 100), (2, 7), (3, 5), (3, 11)])
def test_evaluation_gives_every_sample_exactly_once(dataset, truth, world_size: int, batch_size: int) -> None:
    ranks = [
        stream(dataset, "val", batch_size=batch_size, rank=rank, world_size=world_size, num_threads=1)
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    for _ in range(2):  # the second epoch has to start clean
        steps = zip(*(steps_of(rank) for rank in ranks), strict=True)
        # The ranks' parts of a step one after the other are the stored order.
        assert [sample for parts in steps for part in parts for sample in part] == truth["val"]


def test_an_evaluation_batch_is_channels_last_float32(dataset) -> None:
    batches = stream(dataset, "val", batch_size=20, num_threads=1)
    shapes = []
    for images, labels in batches:
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images.dtype, labels.dtype, images.device.type) == (torch.float32, torch.int64, "cpu")
        assert len(labels) == len(images)
        shapes.append(tuple(images.shape))
    assert shapes == [(20, 3, 64, 64), (12, 3, 64, 64)]
    assert len(batches) == 2


def test_training_epochs_are_new_permutations_without_their_tails(dataset, truth) -> None:
    batches = stream(dataset, "train", batch_size=48, train=True, num_threads=2)
    epochs = [seen(batches) for _ in range(3)]
    assert len(batches) == 3
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 3 * 48  # the last 16 of 160 fill no batch
        assert set(epoch) < set(truth["train"])
        assert epoch != truth["train"][: len(epoch)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert set(epochs[0]) != set(epochs[1])  # another tail is left out


def test_a_seed_decides_the_order_and_the_flips(dataset) -> None:
    def epochs(seed: int, num_threads: int) -> list[list[tuple[bytes, int]]]:
        batches = stream(dataset, "train", batch_size=32, train=True, flip="random", seed=seed, num_threads=num_threads)
        return [seen(batches) for _ in range(2)]

    assert epochs(seed=5, num_threads=1) == epochs(seed=5, num_threads=2)
    assert epochs(seed=5, num_threads=1) != epochs(seed=6, num_threads=1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_ranks_share_an_epoch_without_overlap(dataset, truth, world_size: int) -> None:
    ranks = [
        stream(dataset, "train", batch_size=10, train=True, rank=rank, world_size=world_size, num_threads=1)
        for rank in range(world_size)
    ]
    for _ in range(2):
        samples = list(itertools.chain.from_iterable(seen(rank) for rank in ranks))
        assert len(samples) == len(set(samples)) == world_size * 10 * (160 // world_size // 10)
        assert set(samples) <= set(truth["train"])


def test_flips_are_mirror_images_of_about_half(dataset, truth) -> None:
    mirrored = {
        (np.frombuffer(pixels, np.uint8).reshape(64, 64, 3)[:, ::-1].tobytes(), label) for pixels, label in truth["train"]
    }
    epoch = seen(stream(dataset, "train", batch_size=160, train=True, flip="random", num_threads=2))
    flipped = sum(sample in mirrored for sample in epoch)
    assert len(epoch) == 160 == flipped + sum(sample in set(truth["train"]) for sample in epoch)
    # 160 fair coins: outside 40..120 is six standard deviations, and the seed is fixed.
    assert 40 < flipped < 120


@pytest.mark.parametrize("taken", [1, 3])
def test_an_epoch_left_early_does_not_leak_into_the_next(dataset, truth, taken: int) -> None:
    train = stream(dataset, "train", batch_size=48, train=True, num_threads=2)
    assert len(list(itertools.islice(train, taken))) == taken
    again = seen(train)
    assert len(again) == len(set(again)) == 144

    val = stream(dataset, "val", batch_size=10, num_threads=1)
    assert len(list(itertools.islice(val, taken))) == taken
    assert seen(val) == truth["val"]


def test_the_next_epoch_begins_while_the_last_one_is_used(dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first batches are being decoded when an epoch ends, and are not decoded again; another epoch is read anew."""
    batches = stream(dataset, "train", batch_size=32, train=True)
    started: list[int] = []
    start = batches.source._decoder.start
    monkeypatch.setattr(batches.source._decoder, "start", lambda job: started.append(len(job.positions)) or start(job))
    steps = len(batches)
    first = seen(batches)
    ahead = len(started) - steps
    assert ahead == 2
    second = seen(batches)
    assert len(started) == 2 * steps + ahead
    fresh = stream(dataset, "train", batch_size=32, train=True)
    fresh.set_epoch(1)
    assert seen(fresh) == second != first
    batches.set_epoch(0)
    assert seen(batches) == first
    assert seen(stream(dataset, "val", batch_size=32)) == seen(stream(dataset, "val", batch_size=32))


@pytest.mark.parametrize("data", ["dataset", "photographs"])
def test_an_iterator_that_is_still_held_does_not_disturb_the_next_one(data: str, request: pytest.FixtureRequest) -> None:
    """As after ``first = iter(batches)``, or where a traceback keeps a loop's frame."""
    batches = stream(request.getfixturevalue(data), "train", batch_size=4, train=True, seed=1)
    expected = [(images.clone(), labels) for images, labels in batches]
    batches.set_epoch(0)
    held = iter(batches)
    next(held)
    batches.set_epoch(0)
    got = [(images.clone(), labels) for images, labels in batches]
    held.close()  # type: ignore[attr-defined]
    assert [torch.equal(labels, of) for (_, labels), (_, of) in zip(got, expected, strict=True)] == [True] * len(expected)
    assert [torch.equal(images, of) for (images, _), (of, _) in zip(got, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("data", ["dataset", "photographs"])
def test_batches_of_one_source_can_be_read_in_turn(data: str, request: pytest.FixtureRequest) -> None:
    """More are started than DALI has in hand at once, and taken out of their order."""
    one = stream(request.getfixturevalue(data), "train", batch_size=4, train=True, seed=1)
    others = [Batches(one.source, Preprocess(res=64), 4, training=Training(seed=seed)) for seed in (1, 2, 3)]
    expected = [[(images.clone(), labels) for images, labels in batches] for batches in others]
    for batches in others:
        batches.set_epoch(0)
    got = [[(images.clone(), labels) for images, labels in step] for step in zip(*others, strict=True)]
    for found, alone in zip(zip(*got, strict=True), expected, strict=True):
        for (images, labels), (expected_images, expected_labels) in zip(found, alone, strict=True):
            assert torch.equal(labels, expected_labels)
            assert torch.equal(images, expected_images)


@pytest.mark.parametrize("data", ["dataset", "photographs"])
def test_a_batch_that_is_held_keeps_its_pixels(data: str, request: pytest.FixtureRequest) -> None:
    held = [(images, images.clone()) for images, _ in stream(request.getfixturevalue(data), "train", batch_size=4, train=True)]
    assert len(held) > 5  # more than are in hand at once
    assert all(torch.equal(images, copy) for images, copy in held)


# ----------------------------------------------------------------------------------------------------------------------- resume


# 160 samples are five batches of 32, or of 30 and a tail that training drops: after the fifth nothing is left of the epoch.
@pytest.mark.parametrize(("batch_size", "taken"), [(30, 1), (30, 3), (30, 5), (32, 5)])
def test_a_restored_position_goes_on_to_the_bit(dataset, batch_size: int, taken: int) -> None:
    def batches() -> Batches:
        return stream(dataset, "train", batch_size=batch_size, train=True, flip="random", seed=3, num_threads=1)

    uncut = batches()
    epochs = [list(uncut) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [5, 5, 5]

    cut = batches()
    cut.set_epoch(1)
    assert len(list(itertools.islice(cut, taken))) == taken
    restored = batches()
    restored.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    for epoch, expected in ((1, epochs[1][taken:]), (2, epochs[2])):
        restored.set_epoch(epoch)
        got = list(restored)
        assert len(got) == len(expected)
        for pair, expected_pair in zip(got, expected, strict=True):
            assert all(torch.equal(tensor, other) for tensor, other in zip(pair, expected_pair, strict=True))


def test_a_position_of_another_order_is_refused(dataset) -> None:
    state = stream(dataset, "train", batch_size=30, train=True, seed=3, num_threads=1).state_dict()
    other = stream(dataset, "train", batch_size=32, train=True, seed=4, num_threads=1)
    with pytest.raises(UsageError, match="seed 3 then, 4 now; global_batch_size 30 then, 32 now"):
        other.load_state_dict(state)


# ----------------------------------------------------------------------------------------------------------------------- pixels


def test_pixels_are_pils_and_normalised(dataset, upright) -> None:
    batches = stream(dataset, "val", batch_size=32, mean=MEAN, std=STD, num_threads=1)
    images, labels = next(iter(batches))
    samples = upright(dataset, "val")
    expected = np.stack([(pixels.astype(np.float64) / 255 - MEAN) / STD for pixels, _, _ in samples])
    # pixel * scale + offset in float32: roundings of the two factors, the product and the sum, of values up to 1 / 0.22.
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=2e-6)
    assert labels.tolist() == [label for _, label, _ in samples]


@pytest.fixture(scope="module")
def pack_photos(tmp_path_factory, write_photos):
    """Smooth images of one size, packed: see `write_photos` for why smooth."""
    from shards.pack import pack
    from shards.scan import FileSource

    def make(width: int, height: int) -> Dataset:
        folder = tmp_path_factory.mktemp("photos")
        write_photos(folder / "source", {"train/a": 1, "train/b": 1, "val/a": 3, "val/b": 3}, size=(width, height))
        pack(FileSource(folder / "source"), folder / "packed", workers=1)
        return open_dataset(folder / "packed")

    return make


@pytest.mark.parametrize(
    ("width", "height", "res", "resized"),
    [
        (64, 64, 96, (96, 96)),
        (64, 64, 32, (32, 32)),
        (96, 64, 32, (48, 32)),  # the centre of a wide one
        (48, 72, 64, (64, 96)),  # and of a tall one
    ],
)
def test_resize_is_pils_bicubic_of_the_shorter_side_and_the_centre(pack_photos, upright, width, height, res, resized) -> None:
    dataset = pack_photos(width, height)
    images, _ = next(iter(stream(dataset, "val", res=res, batch_size=6, num_threads=1)))
    left, top = (resized[0] - res) // 2, (resized[1] - res) // 2
    expected = np.stack(
        [
            np.asarray(Image.fromarray(pixels).resize(resized, BICUBIC).crop((left, top, left + res, top + res)), np.int16)
            for pixels, _, _ in upright(dataset, "val")
        ]
    )
    difference = np.abs(grey_levels(images).astype(np.int16) - expected)
    assert expected.shape == (6, res, res, 3)
    # PIL rounds to whole grey levels after each of its two passes, tidali once at the end; they treat the border differently.
    assert difference.max() <= 1, f"largest {difference.max()}, mean {difference.mean():.4f}"


# --------------------------------------------------------------------------------------------------------------------- refusals


def test_a_batch_that_the_split_cannot_fill(dataset) -> None:
    with pytest.raises(UsageError, match=r"--batch-size 161: the 'train' split has 160 samples.*use at most --batch-size 160"):
        stream(dataset, "train", batch_size=161, train=True)
    with pytest.raises(UsageError, match="use at most --batch-size 159"):
        stream(dataset, "train", batch_size=54, train=True, world_size=3)


def test_a_split_without_labels(dataset) -> None:
    splits = {**dataset.manifest.splits, "test": replace(dataset.manifest.splits["val"], labelled=False)}
    unlabelled = replace(dataset, manifest=replace(dataset.manifest, splits=splits))
    with pytest.raises(UsageError, match="the 'test' split has no labels"):
        stream(unlabelled, "test", batch_size=4)


def test_a_split_that_is_not_there(dataset) -> None:
    with pytest.raises(DatasetError, match="no 'test' split"):
        stream(dataset, "test", batch_size=4)


@pytest.mark.parametrize("name", ["val-000000.tar", "val-000000.json"])
def test_a_file_that_is_gone_is_one_line_that_names_it(demo_copy: Path, name: str) -> None:
    dataset = open_dataset(demo_copy)
    (demo_copy / name).unlink()
    with pytest.raises(DatasetError, match=f"{name}.*pack the source again") as refused:
        list(stream(dataset, "val", batch_size=4))
    assert "\n" not in str(refused.value)


def test_an_image_that_cannot_be_decoded_is_one_line(demo_copy: Path) -> None:
    dataset = open_dataset(demo_copy)
    tar = demo_copy / "val-000000.tar"
    content = bytearray(tar.read_bytes())
    content[512 + 20 : 512 + 220] = bytes(200)  # inside the first image's quantisation tables
    tar.write_bytes(content)
    with pytest.raises(TidaliError, match=r"1 of the 32 samples of 'val'.*--max-bad is 0.*'tidali verify --decode'") as refused:
        list(stream(dataset, "val", batch_size=4, num_threads=1))
    assert "\n" not in str(refused.value)


def test_labels_of_three_digits(tmp_path: Path) -> None:
    from shards.demo import pack_demo

    pack_demo(tmp_path / "wide", classes=101, per_class=1, workers=1)
    dataset = open_dataset(tmp_path / "wide")
    batches = stream(dataset, "train", batch_size=101, train=True, num_threads=2)
    assert Counter(label for _, label in seen(batches)) == Counter(range(101))


# --------------------------------------------------------------------------------------------------------------- who decodes


@pytest.mark.parametrize(
    ("choice", "device", "size", "has_dali", "expected"),
    [
        ("auto", "cpu", (64, 64), True, "threads"),
        ("auto", "cpu", None, True, "dali"),  # a part of each image
        ("cpu", "cpu", None, True, "dali"),
        ("cpu", "cpu", (224, 224), True, "threads"),
        ("auto", "cpu", None, False, "threads"),
        ("auto", "cuda", (64, 64), True, "threads"),
        ("auto", "cuda", (128, 128), True, "threads"),
        ("auto", "cuda", (129, 128), True, "dali"),
        ("auto", "cuda", None, True, "dali"),
        ("auto", "cuda", None, False, "threads"),
        ("cpu", "cuda", (224, 224), True, "threads"),
        ("cpu", "cuda", None, True, "dali"),
        ("mixed", "cuda", (64, 64), True, "dali"),
    ],
)
def test_who_decodes(choice, device: str, size, has_dali: bool, expected: str) -> None:
    assert choose_decoder(choice, torch.device(device), size, has_dali=has_dali) == expected


@pytest.mark.parametrize(("device", "has_dali"), [("cpu", True), ("cuda", False)])
def test_a_decoder_that_the_machine_lacks_is_refused_with_a_way_out(device: str, has_dali: bool) -> None:
    with pytest.raises(UsageError, match=r"--decoder mixed.*--decoder (at auto|cpu)"):
        choose_decoder("mixed", torch.device(device), (64, 64), has_dali=has_dali)


def test_a_decoder_is_refused_where_batches_are_asked_for(dataset) -> None:
    with pytest.raises(UsageError, match="--decoder mixed"):
        Data(dataset, CPU, cache="off", decoder="mixed").batches("val", Preprocess(res=64), 4)
