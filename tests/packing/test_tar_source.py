"""Tars that other programs wrote, as a source of the packer."""

from __future__ import annotations

import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from shards.pack import pack
from shards.plan import PackSettings
from shards.scan import FileSource
from shards.tar_files import read_class_names
from shards.tar_samples import read_tar
from shards.tar_source import TarSource, open_source
from shards.verify import verify
from tidali.dataset.contract import iter_records, open_dataset
from tidali.errors import TidaliError, UsageError

Pairs = list[tuple[bytes, Any]]


def pairs_of(folder: Path, split: str) -> Pairs:
    """(bytes, class's name) of a split, sorted."""
    dataset = open_dataset(folder)
    names = [class_.name for class_ in dataset.manifest.classes]
    records = iter_records(dataset, split)
    return sorted((dataset.stored_bytes(shard, record), names[record.label or 0]) for shard, record in records)


@pytest.fixture(scope="module")
def written(make: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Pairs]]:
    root = tmp_path_factory.mktemp("tars") / "tars"
    return root, make.shard_writer_tars(root)


def test_tars_of_shard_writer(written: tuple[Path, dict[str, Pairs]], contents: Any, tmp_path: Path) -> None:
    root, pairs = written
    source = open_source(root, "auto", label_field=None, class_names=("zero", "one", "two"))
    report = pack(source, tmp_path / "packed", PackSettings(shard_samples=4), workers=1)
    for split in ("train", "val"):
        assert pairs_of(tmp_path / "packed", split) == sorted(
            (data, ("zero", "one", "two")[label]) for data, label in pairs[split]
        )
    assert report.manifest.source["layout"] == "webdataset"
    assert [(class_.id, class_.name) for class_ in report.manifest.classes] == [("0", "zero"), ("1", "one"), ("2", "two")]
    assert not verify(tmp_path / "packed", decode=True).faults
    pack(source, tmp_path / "again", PackSettings(shard_samples=4), workers=2)
    assert contents(tmp_path / "again") == contents(tmp_path / "packed")
    (tmp_path / "packed" / "train-000001.tar").unlink()
    assert pack(source, tmp_path / "packed", PackSettings(shard_samples=4)).repaired == ("train-000001.tar",)
    assert contents(tmp_path / "again") == contents(tmp_path / "packed")
    (_, record), *_ = iter_records(open_dataset(tmp_path / "packed"), "val")
    assert (record.key, record.source) == ("00000000_0000", "val/000000.tar/some/folder/0000.jpg")


@pytest.mark.parametrize("pattern", ["train/{000000..000002}.tar", "train/*.tar", "train", "{train,train}/00000[0-2].tar"])
def test_patterns_name_tars(written: tuple[Path, dict[str, Pairs]], tmp_path: Path, pattern: str) -> None:
    source = open_source(written[0] / pattern, "auto", label_field=None, class_names=None)
    pack(source, tmp_path / "packed", PackSettings(val_fraction=0.3))
    found = pairs_of(tmp_path / "packed", "train") + pairs_of(tmp_path / "packed", "val")
    assert sorted(found) == sorted((data, str(label)) for data, label in written[1]["train"])


def test_tars_of_img2dataset_are_shrunk(make: Any, tmp_path: Path) -> None:
    pairs = make.img2dataset_tars(tmp_path / "tars")
    source = open_source(tmp_path / "tars", "auto", label_field="animal", class_names=None)
    manifest = pack(source, tmp_path / "packed").manifest
    assert [class_.id for class_ in manifest.classes] == ["a dog", "cat", "Äffchen"]
    assert pairs_of(tmp_path / "packed", "train") == sorted(pairs)
    manifest = pack(source, tmp_path / "small", PackSettings(shorter_side_px=20, classes=("cat",))).manifest
    assert manifest.splits["train"].image_sizes == {"20x24": 4}  # of 40 x 48


def test_images_that_are_none_are_quarantined(make: Any, tmp_path: Path) -> None:
    make.tar(tmp_path / "0.tar", {"a.jpg": make.jpeg(1), "a.cls": b"0", "b b.jpg": b"", "b b.cls": b"0"})
    manifest = pack(open_source(tmp_path / "0.tar", "auto", label_field=None, class_names=None), tmp_path / "packed").manifest
    assert [(entry.source, entry.reason) for entry in manifest.quarantine] == [("0.tar/b b.jpg", "empty file")]


def test_a_tar_that_changes_while_it_is_packed(make: Any, tmp_path: Path) -> None:
    make.tar(tmp_path / "tars" / "0.tar", {"a.jpg": make.jpeg(1), "a.cls": b"0"})
    scan = TarSource(tmp_path / "tars").scan()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    with scan.reader.open() as read, pytest.raises(TidaliError, match=r"0\.tar: changed while it was being packed"):
        read(scan.splits["train"][0], 1 << 20)


def test_what_is_taken_for_tars(make: Any, tmp_path: Path) -> None:
    folder = make.folder({"cat/0.jpg": make.jpeg(0), "dog/1.jpg": make.jpeg(1), "more.tar": b""}, tmp_path / "folder")
    assert isinstance(open_source(folder, "auto", label_field=None, class_names=None), FileSource)
    assert isinstance(open_source(folder, "webdataset", label_field=None, class_names=None), TarSource)
    with pytest.raises(UsageError, match="no WebDataset tars, to which --label-field and --class-names apply"):
        open_source(folder, "auto", label_field="x", class_names=None)


def test_a_packed_data_set_keeps_its_classes(demo_data: Path, tmp_path: Path) -> None:
    pack(open_source(demo_data, "auto", label_field=None, class_names=None), tmp_path / "packed")
    assert open_dataset(tmp_path / "packed").manifest.classes == open_dataset(demo_data).manifest.classes
    for split in ("train", "val"):
        assert pairs_of(tmp_path / "packed", split) == pairs_of(demo_data, split)


NAMES = {
    "two splits in one name": (
        ["train-val-0.tar", "train-1.tar"],
        "'train-1.tar' is named after a split, and 'train-val-0.tar' is",
    ),
    "no train": (["val-0.tar"], "has val but no train tars"),
    "folder and none": (["train/0.tar", "0.tar"], "'train/0.tar' is named after a split, and '0.tar' is not"),
}


@pytest.mark.parametrize("name", NAMES)
def test_splits_that_are_unclear(make: Any, tmp_path: Path, name: str) -> None:
    names, message = NAMES[name]
    for tar in names:
        make.tar(tmp_path / "tars" / tar, {"a.jpg": make.jpeg(1), "a.cls": b"0"})
    with pytest.raises(UsageError, match=message):
        TarSource(tmp_path / "tars").scan()


def test_patterns_that_name_nothing(written: tuple[Path, dict[str, Pairs]], tmp_path: Path) -> None:
    for pattern, message in (
        ("train/{000000..000009}.tar", r"train/000003\.tar: no such tar, of those that"),
        ("train/9*.tar", r"train/9\*\.tar: no such tar"),
        ("train/{0..99999999}.tar", "more than 1,000,000 names"),
        ("{a,b}" * 40, "more than 1,000,000 names"),
        (f"{{0..{'9' * 5000}}}.tar", "not a pattern of names"),
        ("{a,b", "not a pattern of names"),
        ("train/x.tar", "no such folder or tar"),
    ):
        with pytest.raises(UsageError, match=message):
            open_source(written[0] / pattern, "auto", label_field=None, class_names=None).scan()
    with pytest.raises(UsageError, match="lie inside each other"):
        pack(TarSource(written[0]), written[0] / "packed")


def test_names_of_classes(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    for text, message in (("a\n\nb\n", "line 2 is empty"), ("", "line 1 is empty")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_class_names(path)
    with pytest.raises(UsageError, match="not a readable file of names"):
        read_class_names(tmp_path)
    path.write_text("\ufeffcrane\r\ncrane\r\n  näme \r\n\r\n", encoding="utf-8")
    assert read_class_names(path) == ("crane", "crane", "näme")
    make.tar(tmp_path / "tars" / "0.tar", {"a.jpg": make.jpeg(1), "a.cls": b"cat", "b.jpg": make.jpeg(2), "b.cls": b"Cat "})
    with pytest.raises(UsageError, match="the labels 'Cat' and 'cat' differ only in upper and lower case"):
        TarSource(tmp_path / "tars").scan()
    shutil.rmtree(tmp_path / "tars")
    make.tar(tmp_path / "tars" / "0.tar", {"a.jpg": make.jpeg(1), "a.cls": b"cat", "b.jpg": make.jpeg(2), "b.cls": b"cow"})
    for names, message in ((("cat", "cat"), "'cat' is there twice"), (("dog", "cat"), "has no 'cow', which is a label")):
        with pytest.raises(UsageError, match=message):
            TarSource(tmp_path / "tars", class_names=names).scan()
    assert [class_.id for class_ in TarSource(tmp_path / "tars", class_names=("cow", "ox", "cat")).scan().classes] == [
        "cow",
        "ox",
        "cat",
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_damaged_tar_has_all_its_samples_or_a_fault(make: Any, tmp_path: Path, form: int) -> None:
    """Cut off anywhere, or with a byte of a header changed: Python's tarfile alone would give fewer samples in silence."""
    folder = "ü" * 40 if form != tarfile.USTAR_FORMAT else "a" * 90
    members = {f"{folder}/{n}.{suffix}": data for n in range(3) for suffix, data in (("jpg", b"x" * 700), ("cls", b"1"))}
    path = make.tar(tmp_path / "0.tar", members, form)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        headers = [member.offset_data - 512 for member in archive]
    generator = random.Random(form)
    cuts = [whole[: generator.randrange(len(whole.rstrip(b"\0")) + 1024)] for _ in range(100)]
    changed = []
    for _ in range(200):
        at = generator.choice(headers) + generator.randrange(512)
        changed.append(whole[:at] + bytes([whole[at] ^ generator.randrange(1, 256)]) + whole[at + 1 :])
    for damaged in cuts + changed:
        path.write_bytes(damaged)
        contents = read_tar(path, None)
        assert contents.faults or len(contents.samples) == 3
        assert contents.faults or damaged in changed  # in the owner's name, say, where a checksum may still be right
