"""The two routes to batches, the choice between them, and that they give the same batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tidali.config import Augment, CacheChoice, Kernel, Preprocess
from tidali.dataset.contract import Dataset, Split, open_dataset
from tidali.errors import UsageError
from tidali.hardware.limits import FreeMemory
from tidali.hardware.ranks import Ranks
from tidali.loading import data as data_module
from tidali.loading import stream as stream_module
from tidali.loading.batches import Training
from tidali.loading.data import Data, free_memory_bytes
from tidali.loading.route import choose_route
from tidali.loading.sizes import SizePlan

CPU = torch.device("cpu")
MIB = 2**20


def split_of(samples: int, *sizes: str) -> Split:
    return Split(
        name="train",
        labelled=True,
        samples=samples,
        class_counts=(samples,),
        image_sizes=dict.fromkeys(sizes, 1),
        extensions={"jpg": samples},
        shards=(),
    )


# ------------------------------------------------------------------------------------------------------------------- the route


@pytest.mark.parametrize(
    ("choice", "free_mib", "cached", "facts"),
    [
        ("auto", 24, True, ["1,024", "64 x 64", "12 MiB", "under half", "0.0 GiB"]),  # 1,024 x 64 x 64 x 3 bytes are 12 MiB
        ("auto", 23, False, ["1,024", "64 x 64", "12 MiB", "over half"]),
        ("device", 1, True, ["1,024", "64 x 64", "12 MiB"]),
        ("off", 1000, False, ["--cache off"]),
    ],
)
@pytest.mark.parametrize("crops", [False, True])  # of images of one size the cache keeps every pixel
def test_auto_caches_what_takes_half_of_the_free_memory(choice, free_mib: int, cached: bool, facts, crops: bool) -> None:
    route = choose_route(choice, split_of(1024, "64x64"), sides=[224], crops=crops, free_bytes=free_mib * MIB)
    assert route.cached is cached
    assert all(fact in route.reason for fact in facts), route.reason
    assert route.pixel_bytes == 12 * MIB


@pytest.mark.parametrize(
    ("free_mib", "training_mib", "cached", "facts"),
    [
        (32, 16, True, ["under half", "0.0 GiB"]),  # training fits the other half
        (32, 20, True, ["under what is left", "training"]),
        (32, 21, False, ["over what is left", "training"]),
        (32, 100, False, ["over what is left", "training"]),
    ],
)
def test_a_cache_leaves_what_training_needs(free_mib: int, training_mib: int, cached: bool, facts) -> None:
    split = split_of(1024, "64x64")  # 12 MiB
    free = {"free_bytes": free_mib * MIB, "training_bytes": training_mib * MIB}
    route = choose_route("auto", split, sides=[224], crops=False, **free)
    assert route.cached is cached
    assert all(fact in route.reason for fact in facts), route.reason


@pytest.mark.parametrize(
    ("sides", "mib", "named"),
    [([128], 48, ["128"]), ([64, 128], 60, ["64", "128"]), ([128, 128], 48, ["128"])],
)
def test_unequal_sizes_are_cached_as_squares_of_each_side_where_no_crop_is_asked_for(sides, mib: int, named) -> None:
    split = split_of(1024, "64x64", "80x64")
    route = choose_route("auto", split, sides=sides, crops=False, free_bytes=2 * mib * MIB)
    assert route.cached
    assert route.pixel_bytes == mib * MIB
    assert all(fact in route.reason for fact in ["2 sizes", "1,024", f"{mib} MiB", *named]), route.reason
    assert not choose_route("auto", split, sides=sides, crops=False, free_bytes=2 * mib * MIB - 2).cached


def test_random_crops_of_unequal_sizes_are_streamed_however_much_memory_there_is() -> None:
    split = split_of(1024, "64x64", "80x64", "500x400")
    route = choose_route("auto", split, sides=[64], crops=True, free_bytes=2**50)
    assert not route.cached
    assert "3 sizes" in route.reason
    assert "crops" in route.reason
    with pytest.raises(UsageError, match=r"--cache device.*augment\.crop_scale.*--cache auto"):
        choose_route("device", split, sides=[64], crops=True, free_bytes=2**50)


@pytest.mark.parametrize(
    ("cache", "train", "crop_scale", "cached"),
    [
        ("auto", True, (0.25, 1.0), False),
        ("auto", True, None, True),
        ("auto", False, None, True),  # evaluation, whatever training does
        ("device", False, None, True),
        ("off", False, None, False),
    ],
)
def test_batches_know_their_route(photographs: Dataset, cache, train: bool, crop_scale, cached: bool) -> None:
    training = Training(augment=Augment(crop_scale=crop_scale)) if train else None
    batches = Data(photographs, CPU, cache=cache).batches("train", Preprocess(res=32), 4, training=training)
    assert batches.route is not None
    assert batches.route.cached is cached
    assert hasattr(batches.source, "pixels") is cached
    assert next(iter(batches))[0].shape == (4, 3, 32, 32)


# ------------------------------------------------------------------------------------------------------------------ memory


def test_free_memory_is_within_the_machines() -> None:
    assert MIB < free_memory_bytes(CPU) < 2**50


def test_ranks_share_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "free_memory", lambda: FreeMemory(100 * MIB, ""))
    assert free_memory_bytes(CPU) == 100 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory_bytes(CPU) == 25 * MIB


def test_what_the_allocator_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (5 * MIB, 80 * MIB)), ("memory_reserved", 9 * MIB), ("memory_allocated", 2 * MIB)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert free_memory_bytes(torch.device("cuda", 0)) == 12 * MIB


def test_the_rank_with_the_least_memory_decides_for_all(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's own memory would have one fill a cache while the other waits for it at the first step."""
    free_bytes = [2**40, 2**10]

    def gather(ranks: Ranks, value: int) -> list[int]:
        assert value == free_bytes[ranks.rank]
        return free_bytes

    monkeypatch.setattr(Ranks, "gather", gather)  # tests/unit/test_distributed.py has that of two processes
    for rank in range(2):
        monkeypatch.setattr(data_module, "free_memory_bytes", lambda device, rank=rank: free_bytes[rank])
        data = Data(open_dataset(demo_data), CPU, ranks=Ranks(rank=rank, world_size=2))
        batches = data.batches("val", Preprocess(res=64), 8)
        assert batches.route is not None
        assert (batches.route.cached, type(batches.source)) == (False, stream_module.ShardSource)


# ------------------------------------------------------------------------------------------ both routes' batches are equal

NORMALISED: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
SINGLY = {
    "nothing": Augment(),
    "random flips": Augment(flip="random"),
    "alternating flips": Augment(flip="alternating"),
    "shift": Augment(shift_px=5),
    "crop": Augment(crop_scale=(0.25, 1.0)),
    "brightness": Augment(brightness=0.4),
    "contrast": Augment(contrast=0.4),
    "saturation": Augment(saturation=0.4),
    "hue": Augment(hue=0.1),
    "erase": Augment(erase=0.5),
}
TOGETHER = Augment(
    flip="random", shift_px=3, crop_scale=(0.3, 1.0), brightness=0.4, contrast=0.3, saturation=0.4, hue=0.2, erase=0.5
)


def steps(
    dataset: Dataset,
    cache: CacheChoice,
    *,
    split: str = "train",
    res: int = 64,
    batch_size: int = 16,
    augment: Augment | None = None,
    kernel: Kernel = "pil",
    crop_fraction: float = 1.0,
    sizes: SizePlan | None = None,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    epochs: int = 2,
) -> list[tuple[Tensor, Tensor]]:
    """All batches of some epochs: a step's of the ranks, one after another. Without augmentation, of evaluation."""
    found = []
    for rank in range(world_size):
        data = Data(dataset, CPU, cache=cache, ranks=Ranks(rank=rank, world_size=world_size))
        batches = data.batches(
            split,
            Preprocess(res=res, kernel=kernel, crop_fraction=crop_fraction, **NORMALISED),
            batch_size // world_size,
            training=Training(augment=augment, seed=5, sizes=sizes) if augment is not None else None,
            dtype=dtype,
        )
        found.append([(images.clone(), labels) for _ in range(epochs) for images, labels in batches])
    assert found[0]
    return [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*found, strict=True)]  # type: ignore[misc]


def assert_equal(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, other_images)


@pytest.mark.parametrize("augment", [*SINGLY.values(), TOGETHER], ids=[*SINGLY, "together"])
@pytest.mark.parametrize("res", [64, 80])  # as stored, and resized
def test_both_routes_have_every_augmentation(demo_data: Path, augment: Augment, res: int) -> None:
    dataset = open_dataset(demo_data)
    cached, streamed = (steps(dataset, cache, augment=augment, res=res) for cache in ("device", "off"))  # type: ignore[arg-type]
    assert_equal(cached, streamed)
    if augment != SINGLY["nothing"]:
        plain = steps(dataset, "device", augment=Augment(), res=res)
        assert any(not torch.equal(images, other) for (images, _), (other, _) in zip(cached, plain, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("augment", [SINGLY["alternating flips"], TOGETHER], ids=["flips", "together"])
def test_any_number_of_ranks_has_the_same_batches_on_both_routes(demo_data: Path, world_size: int, augment: Augment) -> None:
    dataset = open_dataset(demo_data)
    one = steps(dataset, "off", augment=augment, batch_size=12)
    for cache in ("device", "off"):
        assert_equal(one, steps(dataset, cache, augment=augment, batch_size=12, world_size=world_size))  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["pil", "opencv"])
@pytest.mark.parametrize("order", ["mixed", "progressive"])
def test_both_routes_have_both_kernels_and_several_sizes(demo_data: Path, kernel: Kernel, order: Any) -> None:
    sizes = SizePlan(sides=(32, 64, 96), order=order, seed=5, epochs=2)
    keys: dict[str, Any] = dict(augment=TOGETHER, kernel=kernel, sizes=sizes)
    dataset = open_dataset(demo_data)
    cached, streamed = steps(dataset, "device", **keys), steps(dataset, "off", **keys)
    assert [images.shape[2] for images, _ in cached] == [sizes.at(epoch, step) for epoch in range(2) for step in range(10)]
    assert len({images.shape[2] for images, _ in cached}) > 1
    assert_equal(cached, streamed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("res", "crop_fraction"), [(64, 1.0), (64, 0.875), (96, 1.0), (224, 0.875)])
def test_both_routes_evaluate_alike(demo_data: Path, dtype: torch.dtype, res: int, crop_fraction: float) -> None:
    dataset, keys = open_dataset(demo_data), dict(split="val", res=res, crop_fraction=crop_fraction, dtype=dtype)
    for world_size in (1, 3):
        cached, streamed = (steps(dataset, cache, world_size=world_size, **keys) for cache in ("device", "off"))  # type: ignore[arg-type]
        assert_equal(cached, streamed)
        assert sum(len(labels) for _, labels in cached) == 2 * 32


def test_the_two_kernels_are_two(demo_data: Path) -> None:
    dataset = open_dataset(demo_data)
    found = [steps(dataset, "off", split="val", res=96, kernel=kernel, epochs=1)[0][0] for kernel in ("pil", "opencv")]  # type: ignore[arg-type]
    assert (found[0] - found[1]).abs().max() > 0.01


NO_CROPS = replace(TOGETHER, crop_scale=None)


@pytest.mark.parametrize("augment", [Augment(), SINGLY["shift"], NO_CROPS], ids=["nothing", "shift", "all but crops"])
@pytest.mark.parametrize("kernel", ["pil", "opencv"])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
def test_photographs_without_crops_are_equal_on_both_routes(
    photographs: Dataset, augment: Augment, kernel: Kernel, crop_fraction: float
) -> None:
    keys: dict[str, Any] = dict(res=48, batch_size=6, kernel=kernel, crop_fraction=crop_fraction, augment=augment)
    for world_size in (1, 2, 3):
        cached, streamed = (steps(photographs, cache, world_size=world_size, **keys) for cache in ("device", "off"))  # type: ignore[arg-type]
        assert_equal(cached, streamed)


def test_photographs_of_several_sizes_are_equal_on_both_routes(photographs: Dataset) -> None:
    sizes = SizePlan(sides=(32, 48), order="mixed", seed=5)
    keys: dict[str, Any] = dict(res=48, batch_size=6, augment=NO_CROPS, sizes=sizes)
    assert_equal(steps(photographs, "device", **keys), steps(photographs, "off", **keys))


@pytest.mark.parametrize("world_size", [2, 3])
def test_crops_of_photographs_are_the_same_on_any_number_of_ranks(photographs: Dataset, world_size: int) -> None:
    keys: dict[str, Any] = dict(res=48, batch_size=6, augment=TOGETHER)
    assert_equal(steps(photographs, "off", **keys), steps(photographs, "auto", world_size=world_size, **keys))


@pytest.mark.parametrize("cache", ["device", "off"])
def test_an_evaluation_has_the_same_pixels_whatever_else_is_asked_for(photographs: Dataset, cache: CacheChoice) -> None:
    how = Preprocess(res=32, crop_fraction=0.875, **NORMALISED)
    alone = [images.clone() for images, _ in Data(photographs, CPU, cache=cache).batches("val", how, 8)]
    data = Data(photographs, CPU, cache=cache)
    for other in (Preprocess(res=96), Preprocess(res=32), replace(how, kernel="opencv")):
        list(data.batches("val", other, 8))
    beside = [images for images, _ in data.batches("val", how, 8)]
    assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))


@pytest.mark.parametrize("split_data", ["demo", "photographs"])
@pytest.mark.parametrize("cache", ["device", "off"])
def test_without_dali_the_batches_are_the_same(
    split_data: str, cache: CacheChoice, demo_data: Path, photographs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = photographs if split_data == "photographs" else open_dataset(demo_data)
    with_dali = steps(dataset, cache, split="val")
    monkeypatch.setattr(stream_module, "dali_is_installed", lambda: False)
    assert_equal(with_dali, steps(dataset, cache, split="val"))


def test_cached_pixels_are_shared_between_resolutions_and_decoded_once(
    demo_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(open_dataset(demo_data), CPU, cache="device")
    first = data.batches("val", Preprocess(res=64), 8)
    monkeypatch.setattr(data_module, "fill_cache", lambda *_, **__: pytest.fail("filled again"))
    again = data.batches("val", Preprocess(res=224, kernel="opencv", crop_fraction=0.875), 8)
    assert again.source is first.source


def test_without_a_compiler_the_batches_differ_by_rounding_alone(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from tidali.loading import native

    keys: dict[str, Any] = dict(res=48, batch_size=6, augment=TOGETHER, epochs=1)
    compiled = steps(photographs, "off", **keys)
    monkeypatch.setattr(native, "load", lambda: None)
    for (images, labels), (expected, expected_labels) in zip(steps(photographs, "off", **keys), compiled, strict=True):
        assert torch.equal(labels, expected_labels)
        # A sum in another order rounds a few pixels to the other neighbour; colour makes up to 1.4 * 1.3 * 1.4 of it and
        # a hue's turn up to 2 more, and 0.2 is the smallest deviation that pixels are divided by.
        assert (images - expected).abs().max() <= 5 / 255 / 0.2
        assert (images - expected).abs().mean() <= 0.01 / 255 / 0.2
