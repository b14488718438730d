"""Where a split's samples are, against tarfile, zlib and json."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.record import seal
from tidali.config import Preprocess
from tidali.dataset.contract import Dataset, iter_records, open_dataset
from tidali.errors import DatasetError, UsageError
from tidali.loading import native, samples
from tidali.loading.batches import Training
from tidali.loading.data import Data
from tidali.loading.samples import SampleTable

FIELDS = ("label", "offset", "size_bytes", "crc32", "height", "width")


@pytest.fixture(params=["compiled", "json"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "json":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("no C compiler")
    return request.param


def test_places_labels_and_sizes_are_the_records_and_bytes_are_tarfiles(photographs: Dataset, upright, reader: str) -> None:
    table = SampleTable(photographs, "train")
    records = [record for _, record in iter_records(photographs, "train")]
    expected = upright(photographs, "train")
    assert len(table) == len(records) == len(expected)
    assert table.labels.tolist() == [record.label for record in records] == [label for _, label, _ in expected]
    assert table.sizes.tolist() == [[record.height, record.width] for record in records]
    assert table.sizes.tolist() == [list(pixels.shape[:2]) for pixels, _, _ in expected]  # as displayed
    places = table.places(np.arange(len(table)))
    members = []
    for path in photographs.tar_paths("train"):
        with tarfile.open(path) as tar:
            members += [(m, tar.extractfile(m).read()) for m in tar if not m.name.endswith(".cls")]  # type: ignore[union-attr]
    assert list(table.read(np.arange(len(table)))) == [data for _, data in members]
    assert places.begins.tolist() == [member.offset_data for member, _ in members]
    assert places.ends.tolist() == [member.offset_data + member.size for member, _ in members]
    for position, (member, _) in enumerate(members):
        assert member.name.startswith(table.describe(position).partition(": ")[2].partition(" ")[0] + ".")
        assert str(member.offset_data) in table.describe(position)
    assert set(places.shards.tolist()) == set(range(3))


@given(st.data())
def test_places_of_any_positions_are_those_of_all(photographs: Dataset, data: st.DataObject) -> None:
    table = SampleTable(photographs, "val")
    picked = np.array(data.draw(st.lists(st.integers(0, len(table) - 1))), np.int64)
    everything = table.places(np.arange(len(table)))
    assert all(np.array_equal(some, every[picked]) for some, every in zip(table.places(picked), everything, strict=True))
    table.expect(picked)  # nothing to see, but that it takes any


# ---------------------------------------------------------------------------------------------------------------------- records

TEXTS = st.text(max_size=20) | st.sampled_from(
    ['"', "\\", '\\"', '"],', '{"label":7}', "ä\u2028", "\\u0041", "null", "12,3", "]}"]
)
NUMBERS = st.integers(0, 2**63 - 1)
ENTRIES = st.builds(
    lambda *values: dict(zip(("key", "source", "label", "extension", *FIELDS[1:]), values, strict=True)),
    TEXTS,
    TEXTS,
    NUMBERS | st.none(),
    st.sampled_from(["jpg", "png"]),
    *[NUMBERS] * 5,
)
"""A record's samples, their fields in the order of `SampleRecord`."""


@pytest.mark.skipif(native.load() is None, reason="no C compiler")
@given(st.lists(ENTRIES, max_size=5), TEXTS, st.booleans())
def test_the_compiled_scan_is_json(entries: list[dict], other: str, ascii_only: bool) -> None:
    """As `shards.record.seal` writes them, and with escapes for what is not ASCII."""
    record = {"format": 1, "plan": other, "samples": entries, "quarantined": [{"source": other, "label": 3}], "sums": [1, 2]}
    sealed = json.dumps(record, separators=(",", ":")).encode() if ascii_only else seal(record)
    expected = [[-1 if entry[name] is None else entry[name] for name in FIELDS] for entry in entries]
    begin = sealed.index(b'"samples":[') + len(b'"samples":[')
    library = native.load()
    found = native.integers(library, sealed, begin, 6 * len(entries))
    assert found is not None
    assert found.reshape(-1, 6).tolist() == expected
    assert native.integers(library, sealed, begin, 6 * len(entries) + 1) is None
    if entries:
        assert native.integers(library, sealed, begin, 6 * len(entries) - 1) is None


@pytest.mark.parametrize("text", ["1.5]", "-3]", "1e3]", "true]", "nil]", "1", '"a', "[1", ""])
def test_the_compiled_scan_leaves_what_it_does_not_know_to_json(text: str) -> None:
    if native.load() is None:
        pytest.skip("no C compiler")
    assert native.integers(native.load(), text.encode(), 0, 1) is None


def test_names_of_every_kind_do_not_disturb_a_table(pack_files: Callable[..., Dataset], encoded, smooth, reader: str) -> None:
    image = encoded(smooth(1, 20, 30))
    names = ['quo"te', "back\\slash", 'both\\"', "ünïcode 图", '"samples":[1,2', "}],null", "new\nline", "tab\there"]
    dataset = pack_files({f"train/{name}/{name}.jpg": image for name in names}, shard_samples=3)
    table = SampleTable(dataset, "train")
    assert sorted(table.labels.tolist()) == list(range(len(names)))
    assert all(read == image for read in table.read(np.arange(len(table))))


# ----------------------------------------------------------------------------------------------------------------------- damage


def test_a_split_without_labels_is_refused(photographs: Dataset) -> None:
    splits = {**photographs.manifest.splits, "test": replace(photographs.split("val"), labelled=False)}
    with pytest.raises(UsageError, match="'test' split has no labels"):
        SampleTable(replace(photographs, manifest=replace(photographs.manifest, splits=splits)), "test")


@pytest.mark.parametrize("how", ["missing", "changed", "cut", "folder"])
def test_a_damaged_record_is_one_line_that_names_it(demo_copy: Path, how: str) -> None:
    dataset, record = open_dataset(demo_copy), demo_copy / "train-000000.json"
    text = record.read_bytes()
    record.unlink()
    if how == "changed":
        record.write_bytes(text.replace(b'"label":0', b'"label":1', 1))
    elif how == "cut":
        record.write_bytes(text[: len(text) // 2])
    elif how == "folder":
        record.mkdir()
    with pytest.raises(DatasetError, match=r"train-000000\.json.*pack the source again") as refused:
        SampleTable(dataset, "train")
    assert "\n" not in str(refused.value)
    SampleTable(dataset, "val")  # its own is whole


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_tar_that_cannot_be_mapped_is_one_line_that_names_it(demo_copy: Path, how: str) -> None:
    dataset = open_dataset(demo_copy)
    table = SampleTable(dataset, "train")
    if how == "missing":
        (demo_copy / "train-000000.tar").unlink()
    else:
        (demo_copy / "train-000000.tar").write_bytes(b"")
    for use in (lambda: list(table.read(np.array([0]))), lambda: table.expect(np.array([0]))):
        with pytest.raises(DatasetError, match=r"train-000000\.tar.*pack the source again") as refused:
            use()
        assert "\n" not in str(refused.value)


# -------------------------------------------------------------------------------------------------------------- many shards


def many_shards(pack_files: Callable[..., Dataset], image: bytes, count: int) -> Dataset:
    """A data set of copies of one shard: packing as many would take a minute."""
    dataset = pack_files({"train/a/0.jpg": image, "train/b/1.jpg": image})
    split = dataset.split("train")
    (shard,) = split.shards
    shards = []
    for number in range(count):
        copy = replace(shard, name=f"train-{number:06d}.tar")
        for name in ("name", "index_name", "record_name"):
            if number:
                os.link(dataset.root / getattr(shard, name), dataset.root / getattr(copy, name))
        shards.append(copy)
    wide = replace(
        split,
        samples=2 * count,
        class_counts=(count, count),
        image_sizes={size: count * samples for size, samples in split.image_sizes.items()},
        extensions={"jpg": 2 * count},
        shards=tuple(shards),
    )
    (dataset.root / "dataset.json").write_text(replace(dataset.manifest, splits={"train": wide}).to_json())
    return open_dataset(dataset.root)


def test_more_shards_than_files_may_be_open(pack_files: Callable[..., Dataset], encoded, smooth) -> None:
    dataset = many_shards(pack_files, encoded(smooth(3, 32, 32)), 1200)
    batches = Data(dataset, torch.device("cpu"), cache="off").batches("train", Preprocess(res=32), 100, training=Training())
    next(iter(batches))  # what the process opens once, it opens now
    table = SampleTable(dataset, "train")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
        batches.set_epoch(0)
        assert sum(len(labels) for _ in range(2) for _, labels in batches) == 4800
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        with pytest.raises(DatasetError, match=r"train-\d+\.tar: cannot be mapped \(Too many open files\); .* 1 .*ulimit -n"):
            list(table.read(np.array([0])))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


HELD = """
import sys
from pathlib import Path
import numpy as np
from tidali.dataset.contract import open_dataset
from tidali.loading.samples import SampleTable

table = SampleTable(open_dataset(Path(sys.argv[1])), "train")
assert None not in table.read(np.array([0]))
sys.held = table  # what an executor's thread or a reference cycle may do: it goes after the modules have gone
"""


def test_a_table_that_lives_to_the_end_says_nothing(demo_data: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELD, str(demo_data)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert (done.returncode, done.stderr) == (0, "")


THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from tidali.dataset.contract import open_dataset
from tidali.loading.samples import SampleTable

table = SampleTable(open_dataset(Path(sys.argv[1])), "train")
with ThreadPoolExecutor(8) as pool:
    for _ in range(500):
        table._tars.clear()
        found = pool.map(lambda position: list(table.read(np.array([position]))), range(len(table)))
        assert [None] not in found
table._tars.clear()
"""


def test_threads_that_read_a_tar_first_share_its_mapping(pack_files: Callable[..., Dataset]) -> None:
    """As where there is no C compiler, and so no `expect` that maps the tars before the threads begin."""
    import io

    from PIL import Image

    def noise(seed: int) -> bytes:  # large, so that zlib lets go of the interpreter's lock
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    dataset = pack_files({f"train/{'ab'[n % 2]}/{n}.png": noise(n) for n in range(8)})
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(dataset.root)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_identity_is_of_the_samples_and_their_order(photographs: Dataset, demo_data: Path) -> None:
    demo = open_dataset(demo_data)
    found = {SampleTable(*key).identity for key in ((photographs, "train"), (demo, "train"), (demo, "val"))}
    assert len(found) == 3
    assert SampleTable(demo, "val").identity in found
    assert all(len(identity) == len(hashlib.sha256().hexdigest()) for identity in found)


def test_the_scan_is_of_the_fields_that_a_record_has() -> None:
    assert samples._FIELDS == FIELDS
