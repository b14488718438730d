"""A source's files as columns, compared with lists of `Item` that Python sorts; and how much memory they take."""

from __future__ import annotations

import pickle
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.items import Item, Items, ItemsBuilder
from shards.plan import PackSettings, make_plan
from shards.scan import FileSource

# Lengths around the eight bytes that are compared at a time, letters of one to four bytes, bytes that are not UTF-8.
NAME = st.text(st.sampled_from("ab/.-é\ue000\U0001f600\udc80\udcff"), min_size=1, max_size=20)
FILES = st.lists(st.tuples(NAME, st.integers(0, 2**62), st.integers(0, 2**62), st.none() | st.integers(0, 2**31 - 1)))


def columns(files: list[Item]) -> Items:
    builder = ItemsBuilder()
    for file in files:
        builder.add(*file)
    return builder.build()


@settings(max_examples=40)
@given(files=FILES, data=st.data())
def test_same_as_a_list(files: list[tuple[str, int, int, int | None]], data: st.DataObject) -> None:
    expected = sorted((Item(name, size, (where,), label) for name, size, where, label in files), key=lambda item: item.name)
    items = columns([Item(name, size, (where,), label) for name, size, where, label in files])
    assert list(items) == expected  # both sorts are stable
    assert list(items.names()) == [item.name for item in expected]
    assert items.sizes_bytes.tolist() == [item.size_bytes for item in expected]
    counts = Counter(item.name for item in expected)
    assert items.first_repeated() == next((item.name for item in expected if counts[item.name] > 1), None)
    some = data.draw(st.lists(st.integers(0, len(files) - 1))) if files else []
    taken = items.take(np.array(some, np.int64))
    assert list(taken) == list(pickle.loads(pickle.dumps(taken))) == [expected[index] for index in some]
    folder = data.draw(st.sampled_from(["a", "é", "b/a"]))
    assert list(items.inside(folder).names()) == [
        n.removeprefix(f"{folder}/") for n in items.names() if n.startswith(f"{folder}/")
    ]
    for name in (*counts, "b"):
        assert items.find(name) == next((item for item in expected if item.name == name), None)


def test_labels_and_joined_selections() -> None:
    items = columns([Item(name, 1) for name in "cabd"])
    assert [item.label for item in items] == [None] * 4
    first, last = items.take(slice(0, 1)).labelled(7), items.take(slice(2, None)).labelled(np.array([5, -1]))
    assert [(item.name, item.label) for item in Items.join([last, first])] == [("a", 7), ("c", 5), ("d", None)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folder", "tiny-imagenet"])
def test_scan_and_plan_take_at_most_250_bytes_a_file(tmp_path: Path, layout: str) -> None:
    """At their highest, by the difference between two sources; lists of objects took 730."""
    few, many = (peak_bytes_of_a_scan(tmp_path / f"{images}.zip", layout, images) for images in (5_000, 10_000))
    assert (many - few) / 5_000 < 250


def peak_bytes_of_a_scan(path: Path, layout: str, images: int) -> int:
    ids = [f"n{label:08d}" for label in range(100)]
    with zipfile.ZipFile(path, "w") as archive:
        lines = []
        if layout == "tiny-imagenet":
            archive.writestr("tiny/wnids.txt", "\n".join(ids))
        for number in range(images):
            id_ = ids[number % len(ids)]
            if layout == "tiny-imagenet" and number % 11 == 0:
                archive.writestr(f"tiny/val/images/val_{number}.JPEG", b"")
                lines.append(f"val_{number}.JPEG\t{id_}\n")
            else:
                archive.writestr(f"tiny/train/{id_}/{id_}_{number}.JPEG", b"")
        if lines:
            archive.writestr("tiny/val/val_annotations.txt", "".join(lines))
    tracemalloc.start()  # counts numpy's arrays too
    try:
        plan = make_plan(FileSource(path).scan(), PackSettings())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (plan.source["layout"], plan.samples) == (layout, images)
    return peak_bytes
