"""Packing as a round trip, judged by other readers of the same files."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.executor import default_workers
from shards.pack import pack, samples_done
from shards.scan import FileSource
from shards.store import LocalStore
from tidali.dataset.contract import MANIFEST_NAME, Manifest, iter_records, open_dataset
from tidali.errors import TidaliError, UsageError

Pairs = list[tuple[bytes, int | None]]


@pytest.fixture(scope="module")
def packed(make: Any, tiny_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 train, 12 val and 5 test images in shards of 10."""
    dest = tmp_path_factory.mktemp("packed") / "data"
    make.pack(tiny_zip, dest, shard_samples=10)
    return dest


def expected(tree: dict[str, bytes], split: str) -> Pairs:
    """(image bytes, label) of a split of the tree, from its own files, sorted by name."""
    ids = tree["wnids.txt"].decode().split()
    annotated = dict(line.split("\t")[:2] for line in tree["val/val_annotations.txt"].decode().splitlines())
    labels = {
        "train": lambda name: ids.index(name.split("/")[1]),
        "val": lambda name: ids.index(annotated[name.rpartition("/")[2]]),
        "test": lambda name: None,
    }
    names = sorted(name for name in tree if name.startswith(f"{split}/") and name.endswith(".JPEG"))
    return [(tree[name], labels[split](name)) for name in names]


SPLITS = {"train": 48, "val": 12, "test": 5}


def by_content(pairs: Pairs) -> Pairs:
    return sorted(pairs, key=lambda pair: pair[0])


@pytest.mark.parametrize("split", SPLITS)
def test_python_tarfile_reads_the_source_back(make: Any, packed: Path, split: str) -> None:
    pairs: Pairs = []
    for tar in sorted(packed.glob(f"{split}-*.tar")):
        with tarfile.open(tar) as archive:
            members = archive.getmembers()
            assert all((m.mtime, m.uid, m.gid, m.mode, m.type) == (0, 0, 0, 0o644, tarfile.REGTYPE) for m in members)
            assert not archive.pax_headers
            files = {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
        for name in files:
            key, _, extension = name.partition(".")
            if extension == "jpg":
                label = files.get(f"{key}.cls")
                pairs.append((files[name], None if label is None else int(label)))
    assert len(pairs) == SPLITS[split]
    wanted = expected(make.tiny_tree(), split)
    assert by_content(pairs) == by_content(wanted)
    if split == "train":
        assert pairs != wanted, "train is shuffled"
    else:
        assert pairs == wanted, "val and test keep their order"


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not installed")
def test_gnu_tar_lists_and_extracts(make: Any, packed: Path, tmp_path: Path) -> None:
    listed = []
    for tar in sorted(packed.glob("*.tar")):
        run = subprocess.run(["tar", "--list", "--verbose", "--file", tar], capture_output=True, text=True, check=True)
        assert run.stderr == ""
        listed += run.stdout.splitlines()
        subprocess.run(["tar", "--extract", "--file", tar, "--directory", tmp_path], check=True)
    assert len(listed) == 2 * 48 + 2 * 12 + 5
    images = by_content([(path.read_bytes(), None) for path in tmp_path.glob("*.jpg")])
    wanted = by_content([(data, None) for split in SPLITS for data, _ in expected(make.tiny_tree(), split)])
    assert len(images) == 65
    assert images == wanted


@pytest.mark.parametrize("split", ["train", "val"])
def test_webdataset_reads_the_source_back(make: Any, packed: Path, split: str) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the webdataset library is not installed")
    urls = [str(tar) for tar in sorted(packed.glob(f"{split}-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).to_tuple("jpg", "cls"))
    pairs = [(image, int(label)) for image, label in samples]
    assert len(pairs) == SPLITS[split]
    assert by_content(pairs) == by_content(expected(make.tiny_tree(), split))


def test_webdataset_reads_a_shard_of_several_suffixes(make: Any, tmp_path: Path) -> None:
    """As docs/format.md shows it."""
    webdataset = pytest.importorskip("webdataset", reason="the webdataset library is not installed")
    tree = {"a/0.jpg": make.jpeg(0), "b/1.png": make.encode(make.image(1), "PNG"), "b/2.bmp": make.encode(make.image(2), "BMP")}
    make.pack(make.folder(tree, tmp_path / "src"), tmp_path / "data")
    shard = webdataset.WebDataset([str(tmp_path / "data" / "train-000000.tar")], shardshuffle=False)
    found = {(image, int(label)) for image, label in shard.to_tuple("jpg;png;webp;bmp", "cls")}
    assert found == {(tree["a/0.jpg"], 0), (tree["b/1.png"], 1), (tree["b/2.bmp"], 1)}


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("split", ["train", "val"])
def test_dali_reads_the_source_back(make: Any, packed: Path, split: str, with_index: bool) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    from nvidia.dali import fn, pipeline_def

    tars = sorted(packed.glob(f"{split}-*.tar"))
    index = {"index_paths": [str(tar.with_suffix(".idx")) for tar in tars]} if with_index else {}

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> Any:
        jpg, cls = fn.readers.webdataset(
            paths=[str(tar) for tar in tars], ext=["jpg", "cls"], missing_component_behavior="error", name="r", **index
        )
        return jpg, cls

    pipe = read()
    pipe.build()
    assert pipe.reader_meta("r")["epoch_size"] == SPLITS[split]
    pairs: Pairs = []
    for _ in range(SPLITS[split]):
        jpg, cls = pipe.run()
        pairs.append((np.array(jpg.at(0)).tobytes(), int(np.array(cls.at(0)).tobytes())))
    assert by_content(pairs) == by_content(expected(make.tiny_tree(), split))


def test_dalis_own_tool_makes_the_same_index(packed: Path, tmp_path: Path) -> None:
    tool = pytest.importorskip("wds2idx", reason="NVIDIA DALI's wds2idx is not installed")
    tars = sorted(packed.glob("*.tar"))
    assert len(tars) == 8
    for tar in tars:
        theirs = tmp_path / f"{tar.stem}.idx"
        with tool.IndexCreator(str(tar), str(theirs), verbose=False) as creator:
            creator.create_index()
        assert theirs.read_text() == tar.with_suffix(".idx").read_text()


def test_bytes_do_not_depend_on_workers_or_wrapping(make: Any, tmp_path: Path, contents: Any) -> None:
    tree = make.tiny_tree()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    source = make.zip(tree, tmp_path / "one" / "tiny.zip")
    again = make.zip(tree, tmp_path / "two" / "tiny.zip")
    make.pack(source, tmp_path / "a", shard_samples=10, workers=1)
    make.pack(again, tmp_path / "b", shard_samples=10, workers=2)
    assert len(contents(tmp_path / "a")) == 8 * 3 + 1
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    make.pack(make.folder(tree, tmp_path / "folder"), tmp_path / "c", shard_samples=10)
    make.pack(
        make.zip(tree, tmp_path / "deflated.zip", method=zipfile.ZIP_DEFLATED, inside="x/"), tmp_path / "d", shard_samples=10
    )
    for other in ("c", "d"):  # the same samples from another kind of source: only what names the source differs
        assert {n: d for n, d in contents(tmp_path / other).items() if n.endswith((".tar", ".idx"))} == {
            n: d for n, d in contents(tmp_path / "a").items() if n.endswith((".tar", ".idx"))
        }


def test_manifest_says_what_is_there(make: Any, packed: Path) -> None:
    dataset = open_dataset(packed)
    manifest = dataset.manifest
    tree = make.tiny_tree()
    assert [c.id for c in manifest.classes] == tree["wnids.txt"].decode().split()
    assert manifest.classes[2].name == "thing 2, no. 2"
    assert {name: split.samples for name, split in manifest.splits.items()} == SPLITS
    assert manifest.splits["train"].class_counts == (12,) * 4
    assert manifest.splits["val"].class_counts == (3,) * 4
    assert manifest.splits["test"].class_counts == ()
    assert not manifest.splits["test"].labelled
    assert manifest.splits["train"].image_sizes == {"40x48": 48}
    assert manifest.splits["train"].extensions == {"jpg": 48}
    assert manifest.quarantine == ()
    decoded = [rgb(data) for data, _ in expected(tree, "train")]
    flat = np.concatenate([image.reshape(-1, 3) for image in decoded]).astype(np.float64) / 255
    # float64 sums of 92,160 values in another order: 1e-12 is far above their rounding, far below a pixel's effect.
    np.testing.assert_allclose(manifest.mean, flat.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, flat.std(axis=0), rtol=1e-9)
    text = (packed / MANIFEST_NAME).read_text()
    assert str(packed.parent) not in text
    records = [record for _, record in iter_records(dataset, "train")]
    assert len(records) == 48
    for shard, record in iter_records(dataset, "train"):
        with open(packed / shard.name, "rb") as file:
            file.seek(record.offset)
            assert file.read(record.size_bytes) == tree[record.source]


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


ODD_NAMES = [
    "two words.jpg",
    "new\nline.jpg",
    "Zürich 東京.jpg",
    "a.b.c.jpg",
    "x" * 251 + ".jpg",
    "'quotes\" & $(x).jpg",
    "-dash.JPG",
    "tab\t.jpeg",
]


def test_odd_names_become_safe_keys_and_are_kept(make: Any, tmp_path: Path) -> None:
    tree = {f"train/a class/{name}": make.jpeg(n) for n, name in enumerate(ODD_NAMES)}
    source = make.folder(tree, tmp_path / "src")
    bad = b"train/a class/no utf-8 \xff.jpg"
    (source / "train" / "a class").joinpath(bad.rpartition(b"/")[2].decode("utf-8", "surrogateescape")).write_bytes(
        make.jpeg(99)
    )
    make.pack(source, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    records = [record for _, record in iter_records(dataset, "train")]
    assert {record.source for record in records} == {*tree, "train/a class/no utf-8 \\udcff.jpg"}
    for record in records:
        assert set(record.key) <= set("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-")
        assert len(record.key) <= 73
    assert len({record.key for record in records}) == len(ODD_NAMES) + 1
    listed = subprocess.run(["tar", "-tf", tmp_path / "out" / "train-000000.tar"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 2 * len(records)


def test_quarantine(make: Any, tmp_path: Path, contents: Any) -> None:
    tree = make.folder_tree(classes=2, train=4, val=1)
    bad = {
        "train/class_0/cut.jpg": make.jpeg(5)[:-2],
        "train/class_1/empty.jpg": b"",
        "val/class_0/text in\nlines.png": b"hello\n",
    }
    report = make.pack(make.folder(tree | bad, tmp_path / "src"), tmp_path / "out", shard_samples=3)
    entries = {entry.source: entry for entry in report.manifest.quarantine}
    assert set(entries) == set(bad)
    for name, data in bad.items():
        assert (tmp_path / "out" / entries[name].file).read_bytes() == data
    assert entries["train/class_0/cut.jpg"].reason == "damaged JPEG: Premature end of JPEG file"
    assert entries["train/class_1/empty.jpg"].label == 1
    assert report.manifest.splits["train"].samples == 8
    assert report.manifest.splits["train"].class_counts == (4, 4)
    ordinals = sorted(int(record.key[:8]) for _, record in iter_records(open_dataset(tmp_path / "out"), "train"))
    assert len(ordinals) == 8
    assert ordinals != list(range(8)), "a quarantined file keeps its place in the numbering"
    first = contents(tmp_path / "out")
    make.pack(tmp_path / "src", tmp_path / "out", shard_samples=3)
    assert contents(tmp_path / "out") == first


def test_damaged_zip_members_are_quarantined(make: Any, tmp_path: Path) -> None:
    """Wrong CRC-32, a size declared far above the content, a bomb, and a member that is not where the directory says."""
    tree = make.folder_tree(classes=1, train=6, val=0)
    names = sorted(tree)
    source = make.zip(tree, tmp_path / "src.zip", method=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(source) as archive:
        members = {info.filename: info for info in archive.infolist()}
        directory = archive.start_dir
    data = bytearray(source.read_bytes())

    def entry(name: str) -> int:
        """Where the member's central directory entry starts (APPNOTE.TXT 4.3.12: the name is at 46)."""
        return data.index(name.encode(), directory) - 46

    data[entry(names[0]) + 16] ^= 1  # CRC-32
    data[entry(names[1]) + 24 : entry(names[1]) + 28] = (2**31).to_bytes(4, "little")  # declared size
    data[entry(names[2]) + 24 : entry(names[2]) + 28] = (100).to_bytes(4, "little")  # declared below the content
    data[members[names[3]].header_offset] = 0  # signature of the local header
    source.write_bytes(data)
    manifest = make.pack(source, tmp_path / "out").manifest
    reasons = {entry.source: entry.reason for entry in manifest.quarantine}
    assert manifest.splits["train"].samples == 2
    assert set(reasons) == set(names[:4])
    assert reasons[names[0]] == "damaged zip: the CRC-32 is wrong"
    assert reasons[names[1]].startswith("declares 2,147,483,648 bytes, more than an image within the pixel limit")
    assert reasons[names[2]] == "damaged zip: holds more than 100 bytes, declares 100"
    assert reasons[names[3]] == "damaged zip: no member where its directory says"


def test_a_shard_may_come_out_empty(make: Any, tmp_path: Path) -> None:
    tree = {f"train/a/{n}.jpg": make.jpeg(n) if n < 3 else b"" for n in range(9)}
    manifest = make.pack(make.folder(tree, tmp_path / "src"), tmp_path / "out", shard_samples=1).manifest
    dataset = open_dataset(tmp_path / "out")
    assert len(manifest.splits["train"].shards) == 9
    assert len(dataset.tar_paths("train")) == 3


def test_nothing_usable_in_train_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(TidaliError, match="no usable image in train"):
        make.pack(make.folder({"train/a/x.jpg": b"", "val/a/x.jpg": make.jpeg(1)}, tmp_path / "src"), tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_dest_inside_source_is_refused(make: Any, tmp_path: Path) -> None:
    source = make.folder(make.folder_tree(), tmp_path / "src")
    for dest in (source, source / "out", tmp_path):
        with pytest.raises(UsageError, match="lie inside each other"):
            make.pack(source, dest)
    assert not (source / "out").exists()


def test_unwritable_or_foreign_dest_is_refused(make: Any, tmp_path: Path, tiny_zip: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for dest, message in (
        (file, "File exists|Not a directory"),
        (file / "below", "Not a directory"),
        (Path("/proc/nowhere"), "No such file or directory"),
    ):
        with pytest.raises(UsageError, match=message):
            make.pack(tiny_zip, dest)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty and no data set"):
            make.pack(tiny_zip, foreign, overwrite=overwrite)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_held_out_and_subset_and_resize(make: Any, tiny_zip: Path, tmp_path: Path) -> None:
    manifest = make.pack(tiny_zip, tmp_path / "out", val_fraction=0.25, classes=3, size_px=32, kernel="opencv").manifest
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 27, "heldout": 9, "val": 9, "test": 5}
    assert manifest.splits["heldout"].class_counts == (3, 3, 3)
    assert manifest.splits["train"].image_sizes == {"32x32": 27}
    assert manifest.settings["kernel"] == "opencv"
    assert manifest.counts == {"resized": 50}
    assert Manifest.from_json((tmp_path / "out" / MANIFEST_NAME).read_text(), "x") == manifest


def test_progress_is_told(tiny_zip: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pack(FileSource(tiny_zip), tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (65, 65)
    assert told == sorted(told)


def test_source_that_changes_meanwhile_fails(make: Any, tmp_path: Path) -> None:
    source = make.folder(make.folder_tree(), tmp_path / "src")
    victim = source / "train" / "class_0" / "img 0.jpg"

    class Changing(FileSource):
        def scan(self) -> Any:
            scan = super().scan()
            victim.write_bytes(b"shorter")
            return scan

    with pytest.raises(TidaliError, match=r"img 0.jpg: changed while the source was being packed"):
        pack(Changing(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / ".tidali-plan.json").read_text())["source"]["name"] == "src"
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_the_garbage_collector_is_left_as_it_was(make: Any, tiny_zip: Path, tmp_path: Path) -> None:
    """Where there is no source, and where DEST is taken: what is frozen then would stay in memory for good."""
    before = gc.get_freeze_count(), gc.isenabled()
    with pytest.raises(UsageError):
        make.pack(tmp_path / "nowhere", tmp_path / "data")
    assert (gc.get_freeze_count(), gc.isenabled()) == before
    with LocalStore(tmp_path / "data").locked(), pytest.raises(TidaliError, match="another tidali"):
        make.pack(tiny_zip, tmp_path / "data")
    assert (gc.get_freeze_count(), gc.isenabled()) == before


def test_workers_where_a_process_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert default_workers() == 7


def test_progress_is_of_the_total_from_the_start() -> None:
    seen: list[tuple[int, int]] = []
    done = samples_done([3, 2], lambda *counts: seen.append(counts))
    done(1)
    done(0)
    assert seen == [(0, 5), (2, 5), (5, 5)]
