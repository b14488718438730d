"""Which sample goes where: every sample once, whatever the settings, and the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.items import Items, ItemsBuilder
from shards.plan import PackSettings, Plan, ShardTask, make_plan
from shards.scan import Scan
from shards.source import FolderReader
from tidali.dataset.contract import ClassName
from tidali.dataset.shard_bytes import padding
from tidali.errors import UsageError


def scan_of(per_class: list[int], val: int = 0, sizes_bytes: Iterable[int] = ()) -> Scan:
    sizes = chain(sizes_bytes, repeat(1000))

    def items(split: str, counts: list[int]) -> Items:
        builder = ItemsBuilder()
        for label, count in enumerate(counts):
            for n in range(count):
                builder.add(f"{split}/c{label}/{n}.jpg", next(sizes), (), label)
        return builder.build()

    splits = {"train": items("train", per_class)}
    if val:
        splits["val"] = items("val", [val] * len(per_class))
    return Scan(
        name="made up",
        layout="folder",
        classes=tuple(ClassName(id=f"c{label}", name=f"class {label}") for label in range(len(per_class))),
        splits=splits,
        left_out={},
        reader=FolderReader(b"nowhere"),
        fingerprint="0",
    )


def names(plan: Plan, split: str) -> list[str]:
    return [sample.item.name for task in plan.tasks if task.split == split for sample in task.samples]


PINNED = [
    ["train/c1/1.jpg", "train/c1/0.jpg", "train/c0/1.jpg"],
    ["train/c1/2.jpg", "train/c0/3.jpg", "train/c0/2.jpg"],
    ["train/c1/3.jpg", "train/c0/0.jpg"],
]


def test_train_order_is_pinned() -> None:
    """Written down, so that no version of Python, this code or its libraries can change a data set unnoticed."""
    plan = make_plan(scan_of([4, 4]), PackSettings(seed=7, shard_samples=3))
    assert [[s.item.name for s in task.samples] for task in plan.tasks] == PINNED
    ordinals = {s.item.name: s.ordinal for task in plan.tasks for s in task.samples}
    assert [name for name, _ in sorted(ordinals.items(), key=lambda pair: pair[1])] == sorted(ordinals)


@given(
    per_class=st.lists(st.integers(3, 40), min_size=1, max_size=5),
    val=st.integers(0, 5),
    seed=st.integers(0, 2**63),
    shard_samples=st.integers(1, 50),
    val_fraction=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_every_sample_once(per_class: list[int], val: int, seed: int, shard_samples: int, val_fraction: float) -> None:
    scan = scan_of(per_class, val)
    plan = make_plan(scan, PackSettings(seed=seed, shard_samples=shard_samples, val_fraction=val_fraction))
    planned = Counter(sample.item for task in plan.tasks for sample in task.samples)
    assert planned == Counter(item for items in scan.splits.values() for item in items)
    assert max(planned.values()) == 1
    assert all(0 < len(task) <= shard_samples for task in plan.tasks)
    held_out = "heldout" if val else "val"
    assert list(plan.labelled) == [s for s in ("train", held_out if val_fraction else None, "val" if val else None) if s]
    for split in plan.labelled:
        tasks = [task for task in plan.tasks if task.split == split]
        assert [task.number for task in tasks] == list(range(len(tasks)))
        assert sorted(s.ordinal for task in tasks for s in task.samples) == list(range(len(names(plan, split))))
    if val:
        assert names(plan, "val") == sorted(names(plan, "val"))
    if val_fraction:
        held = Counter(
            s.item.label for task in plan.tasks if task.split == held_out for s in task.samples if s.item.name[0] == "t"
        )
        assert held == {label: max(1, round(val_fraction * count)) for label, count in enumerate(per_class)}


def test_seeds_give_different_orders() -> None:
    scan = scan_of([50, 50])
    orders = [names(make_plan(scan, PackSettings(seed=seed)), "train") for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(order != sorted(order) for order in orders)


def test_adding_a_sample_moves_no_other() -> None:
    few, many = scan_of([20, 20]), scan_of([20, 21])
    order = names(make_plan(many, PackSettings()), "train")
    assert [name for name in order if name != "train/c1/20.jpg"] == names(make_plan(few, PackSettings()), "train")


@given(sizes=st.lists(st.integers(0, 20_000), min_size=1, max_size=60), limit=st.integers(4096, 40_000))
def test_shard_size_is_kept(sizes: list[int], limit: int) -> None:
    scan = scan_of([len(sizes)], sizes_bytes=sizes)
    plan = make_plan(scan, PackSettings(shard_samples=None, shard_size_bytes=limit))
    assert sum(len(task) for task in plan.tasks) == len(sizes)

    def tar_bytes(task: ShardTask) -> int:
        return 1024 + sum(1024 + s.item.size_bytes + len(padding(s.item.size_bytes)) + 512 for s in task.samples)

    assert all(tar_bytes(task) <= limit or len(task) == 1 for task in plan.tasks)


def test_class_subsets() -> None:
    scan = scan_of([3, 4, 5], val=2)
    two = make_plan(scan, PackSettings(classes=2))
    assert [c.id for c in two.classes] == ["c0", "c1"]
    assert len(names(two, "train")) == 7
    named = make_plan(scan, PackSettings(classes=("c2", "c0")))
    assert [c.id for c in named.classes] == ["c0", "c2"]  # the source's order, so that labels do not depend on the file's
    labels = {s.item.name.split("/")[1]: s.item.label for task in named.tasks for s in task.samples}
    assert labels == {"c0": 0, "c2": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": 4}, "--classes 4: the source has 3"),
        ({"classes": ("c0", "x")}, "'x' is not a class"),
        ({"classes": ()}, "names no class"),
        ({"classes": 0}, "--classes must be at least 1"),
        ({"val_fraction": 0.9}, "leaves no train sample of 3 in train/c0"),
        ({"val_fraction": 1.0}, "--val-fraction must be in"),
        ({"val_fraction": float("nan")}, "--val-fraction must be in"),
        ({"shard_samples": 0}, "--shard-samples must be at least 1"),
        ({"shard_samples": None, "shard_size_bytes": 100}, "--shard-size must be from 4 KiB"),
        ({"shard_size_bytes": 10_000}, "give one of --shard-samples and --shard-size"),
        ({"size_px": 0}, "--size must be from 1"),
        ({"kernel": "lanczos"}, "--kernel must be one of pil, opencv"),
        ({"shorter_side_px": 0}, "--shorter-side must be from 1"),
        ({"shorter_side_px": 9, "size_px": 9}, "--shorter-side keeps the aspect"),
        ({"shorter_side_px": 9, "kernel": "opencv"}, "--shorter-side keeps the aspect"),
        ({"quality": 90}, "--quality is that of the JPEGs which --shorter-side makes"),
        ({"shorter_side_px": 9, "quality": 101}, "--quality is .* from 1 to 100"),
        ({"max_pixels": 0}, "--max-pixels must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(scan_of([3, 4, 5]), PackSettings(**settings))
