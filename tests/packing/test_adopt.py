"""Tars that other programs wrote, made a data set in place."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from shards import adopt_tar
from shards.adopt import AdoptSettings, adopt
from shards.pack import pack
from shards.scan import FileSource
from shards.store import local_copy
from shards.tar_source import TarSource
from shards.verify import verify
from tidali.dataset.contract import MANIFEST_NAME, iter_records, open_dataset
from tidali.dataset.shard_bytes import parse_index
from tidali.dataset.source import open_data
from tidali.errors import DatasetError, TidaliError, UsageError

Pairs = list[tuple[bytes, Any]]


def pairs_of(folder: Path, split: str) -> Pairs:
    """(bytes, class's name) of a split, in its stored order."""
    dataset = open_dataset(folder)
    names = [class_.name for class_ in dataset.manifest.classes]
    return [
        (dataset.stored_bytes(shard, record), None if record.label is None else names[record.label])
        for shard, record in iter_records(dataset, split)
    ]


def tars_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.tar")}


@pytest.fixture(scope="module")
def written(make: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Pairs]]:
    root = tmp_path_factory.mktemp("tars") / "tars"
    return root, make.shard_writer_tars(root)


@pytest.fixture
def folder(written: tuple[Path, dict[str, Pairs]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[0], tmp_path / "tars"))


def test_tars_of_shard_writer(folder: Path, written: tuple[Path, dict[str, Pairs]]) -> None:
    before = tars_of(folder)
    report = adopt(folder, class_names=["zero", "one", "two"])
    assert tars_of(folder) == before
    assert (report.written, report.left_out, report.warnings) == (5, {}, ())
    for split, pairs in written[1].items():
        assert pairs_of(folder, split) == [(image, ("zero", "one", "two")[label]) for image, label in pairs]
    assert report.manifest.splits["train"].extensions == {"jpeg": 2, "jpg": 3, "png": 2, "webp": 2}
    assert not verify(folder, decode=True).faults
    assert adopt(folder, class_names=["zero", "one", "two"]).written == 0


def test_the_indexes_are_those_of_dalis_own_program(folder: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="NVIDIA DALI is not installed")
    adopt(folder)
    for tar in folder.rglob("*.tar"):
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "its.idx"), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_text() == (tmp_path / "its.idx").read_text()


def test_tars_of_img2dataset(make: Any, contents: Any, tmp_path: Path) -> None:
    pairs = make.img2dataset_tars(tmp_path / "tars", tars=3)
    shutil.copytree(tmp_path / "tars", tmp_path / "again" / "tars")
    settings = AdoptSettings(label_field="animal", val_fraction=0.3)
    manifest = adopt(tmp_path / "tars", settings, workers=1).manifest
    assert [class_.id for class_ in manifest.classes] == ["a dog", "cat", "Äffchen"]
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 12, "val": 6}
    found = pairs_of(tmp_path / "tars", "train") + pairs_of(tmp_path / "tars", "val")
    assert sorted(found) == sorted(pairs)
    adopt(tmp_path / "again" / "tars", settings, workers=2)
    assert contents(tmp_path / "again" / "tars") == contents(tmp_path / "tars")
    assert not verify(tmp_path / "tars", decode=True).faults


@pytest.mark.parametrize("form", ["pax", "gnu", "ustar"])
def test_long_names_as_gnu_tar_writes_them(make: Any, tmp_path: Path, form: str) -> None:
    """PAX headers, GNU's long names and USTAR's prefixes; folders and hidden files as GNU tar adds them from a folder."""
    keys = [f"{'a_long_folder' * 5}/{'and_a_long_name' * 4}_{n}" for n in range(2)] + ["short"]
    keys += [] if form == "ustar" else [f"{'über' * 30}_0"]
    tree = {
        name: data for n, key in enumerate(keys) for name, data in ((f"{key}.jpg", make.jpeg(n)), (f"{key}.cls", b"%d\n" % n))
    }
    make.folder(tree | {"._short.jpg": b"AppleDouble"}, tmp_path / "files")
    (tmp_path / "tars").mkdir()
    command = [
        "tar",
        f"--format={form}",
        "--sort=name",
        "-C",
        str(tmp_path / "files"),
        "-cf",
        str(tmp_path / "tars" / "0.tar"),
        ".",
    ]
    subprocess.run(command, check=True)
    report = adopt(tmp_path / "tars")
    assert report.left_out == {"hidden files in tars": 1}
    assert sorted(pairs_of(tmp_path / "tars", "train")) == sorted((make.jpeg(n), str(n)) for n in range(len(keys)))
    assert not verify(tmp_path / "tars", decode=True).faults


def test_an_unlabelled_test_and_classes_that_do_not_occur(make: Any, tmp_path: Path) -> None:
    make.tar(
        tmp_path / "tars" / "pets-train-000.tar", {"a.jpg": make.jpeg(1), "a.cls": b"1", "b.JPG": make.jpeg(2), "b.cls": b"3"}
    )
    make.tar(tmp_path / "tars" / "pets-test-000.tar", {"a.jpg": make.jpeg(3), "b.png": make.encode(make.image(1), "PNG")})
    report = adopt(tmp_path / "tars")
    (warning,) = report.warnings
    assert warning.startswith(f"{tmp_path / 'tars'}: train has no image of 2 classes: 0, 2. ")
    assert report.manifest.splits["train"].class_counts == (0, 1, 0, 1)
    assert not report.manifest.splits["test"].labelled
    assert [label for _, label in pairs_of(tmp_path / "tars", "test")] == [None, None]
    assert not verify(tmp_path / "tars").faults


def test_labels_that_count_from_1(make: Any, tmp_path: Path) -> None:
    members = {f"{n}.{kind}": data for n in (1, 2) for kind, data in (("jpg", make.jpeg(n)), ("cls", b"%d" % n))}
    make.tar(tmp_path / "tars" / "0.tar", members)
    for source in (adopt(tmp_path / "tars"), pack(TarSource(tmp_path / "tars"), tmp_path / "packed", workers=1)):
        assert source.manifest.splits["train"].class_counts == (0, 1, 1)
        (warning,) = source.warnings
        assert "train has no image of 1 class: 0. The labels seem to count from 1" in warning
    with pytest.raises(UsageError, match=r"only 2 lines.* begin the file with a line for class 0"):
        adopt(tmp_path / "tars", class_names=["a", "b"])
    report = adopt(tmp_path / "tars", class_names=["unused", "a", "b"])
    assert [one.name for one in report.manifest.classes] == ["unused", "a", "b"]
    assert report.warnings == (f"{tmp_path / 'tars'}: train has no image of 1 class: 0",)


def test_a_class_without_images_in_val_is_named(make: Any, tmp_path: Path) -> None:
    tree = {f"{split}/{class_}/{n}.jpg": make.jpeg(n) for split in ("train", "val") for class_ in "abc" for n in range(2)}
    kept = {name: b"damaged" if "val/c" in name else data for name, data in tree.items() if "val/b" not in name}
    report = pack(FileSource(make.folder(kept, tmp_path / "source")), tmp_path / "packed", workers=1)
    of_c, of_b, *_ = report.warnings
    assert "no usable image in class 'c' of val" in of_c
    assert of_b == f"{tmp_path / 'packed'}: val has no image of 1 class: b"


def test_images_that_not_every_decoder_reads_are_left_out(make: Any, contents: Any, tmp_path: Path) -> None:
    wide = make.png16(np.full((4, 4, 3), 99, np.uint16))
    members = {"a.jpg": make.jpeg(1), "a.cls": b"0", "b.jpg": b"<html>", "b.cls": b"0", "c.png": wide, "c.cls": b"0"}
    make.tar(tmp_path / "tars" / "0.tar", members)
    manifest = adopt(tmp_path / "tars").manifest
    assert manifest.splits["train"].samples == 1
    assert [(entry.source, entry.reason.partition(";")[0]) for entry in manifest.quarantine] == [
        ("0.tar/b.jpg", "no image but an HTML page, such as a server's error message"),
        ("0.tar/c.png", "decoders do not read its bytes alike"),
    ]
    assert [(tmp_path / "tars" / entry.file).read_bytes() for entry in manifest.quarantine] == [b"<html>", wide]
    assert not verify(tmp_path / "tars", decode=True).faults
    before = contents(tmp_path / "tars")
    (tmp_path / "tars" / manifest.quarantine[0].file).unlink()
    assert any("is missing" in str(fault) for fault in verify(tmp_path / "tars").faults)
    adopt(tmp_path / "tars")
    assert contents(tmp_path / "tars") == before


# -------------------------------------------------------------------------------------------------------------- what is refused


def sound(make: Any) -> list[tuple[str, bytes]]:
    return [(f"{n}.{ext}", data) for n in range(3) for ext, data in (("jpg", make.jpeg(n)), ("cls", b"%d" % n))]


def changed(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def tar_of(extra: list[tuple[str, bytes]]) -> Callable[[Any, Path], object]:
    return lambda make, path: make.tar(path, sound(make) + extra)


def linked(make: Any, path: Path) -> None:
    make.tar(path, sound(make))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("9.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "0.jpg"
        archive.addfile(info)


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Any, Path], None]:
    def make_it(make: Any, path: Path) -> None:
        make.tar(path, sound(make))
        changed(path, change)

    return make_it


def compressed(make: Any, path: Path) -> None:
    make.tar(path, sound(make))
    changed(path, gzip.compress)


FAULTS: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "no label": (tar_of([("9.jpg", b"x")]), r"tars/0\.tar: sample '9': no label: it has no \.cls and no \.json"),
    "no such field": (
        tar_of([("9.jpg", b"x"), ("9.json", b'{"id": 3}')]),
        r"sample '9': .* no field 'label'.*--label-field \(id\)",
    ),
    "json that is none": (tar_of([("9.jpg", b"x"), ("9.json", b"{")]), r"sample '9': no label: '9.json' is not JSON"),
    "deep json": (tar_of([("9.jpg", b"x"), ("9.json", b"[" * 200_000)]), r"sample '9': no label: '9.json' is not JSON"),
    "a list as label": (
        tar_of([("9.jpg", b"x"), ("9.json", b'{"label": [1]}')]),
        r"sample '9': the field 'label' .* no number",
    ),
    "a negative label": (tar_of([("9.jpg", b"x"), ("9.cls", b"-1")]), r"sample '9': the label in '9.cls' is '-1'"),
    "an empty label": (tar_of([("9.jpg", b"x"), ("9.cls", b"")]), r"sample '9': the label in '9.cls' is ''"),
    "a pickled label": (tar_of([("9.jpg", b"x"), ("9.cls", b"\x80\x04K\x01.")]), r"sample '9': '9.cls' is not UTF-8 text"),
    "labels of both kinds": (tar_of([("9.jpg", b"x"), ("9.cls", b"cat")]), "some labels are numbers and some are names"),
    "far labels": (tar_of([("9.jpg", b"x"), ("9.cls", b"900000")]), "labels are up to 900000, but only 4 different ones"),
    "two images": (
        tar_of([("9.jpg", b"x"), ("9.seg.png", b"x"), ("9.cls", b"1")]),
        r"tars/0\.tar: sample '9': 2 images \('9.jpg', '9.seg.png'\)",
    ),
    "the same key twice": (tar_of([("0.jpg", b"x"), ("0.cls", b"1")]), r"tars/0\.tar: sample '0': the same key twice"),
    "the same member twice": (tar_of([("9.jpg", b"x"), ("9.jpg", b"x")]), r"sample '9': the same key twice"),
    "a link": (linked, r"tars/0\.tar: '9.jpg' is a link or a device"),
    "a name with a space": (tar_of([("9 a.jpg", b"x"), ("9 a.cls", b"1")]), r"'9 a.jpg': DALI's index cannot hold"),
    "cut within a member": (damaged(lambda data: data[:3000]), r"tars/0\.tar: cut off or damaged after '0\.\w+'"),
    "cut between members": (
        damaged(lambda data: data.rstrip(b"\0") + bytes(511)),
        r"tars/0\.tar: cut off after '2.cls'.*truncate",
    ),
    "a header overwritten": (
        damaged(lambda data: data.replace(b"1.cls\0", b"?" * 6)),
        r"tars/0\.tar: damaged at byte \d+, after '1.jpg': no header",
    ),
    "two tars in one": (damaged(lambda data: data + data), r"tars/0\.tar: it goes on after its end after '2.cls'"),
    "empty": (damaged(lambda data: b""), r"tars/0\.tar: no tar \(empty file\)"),
    "a page": (damaged(lambda data: b"<html><body>404"), r"tars/0\.tar: no tar but an HTML page"),
    "compressed": (compressed, r"tars/0\.tar: no tar but data compressed by gzip; decompress it, for example with 'gunzip'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(make: Any, contents: Any, tmp_path: Path, name: str) -> None:
    """By both commands, and nothing is written."""
    write, message = FAULTS[name]
    write(make, tmp_path / "tars" / "0.tar")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=message) as refused:
        adopt(tmp_path / "tars")
    assert "\n" not in str(refused.value)
    assert contents(tmp_path) == before
    if name != "a name with a space":
        with pytest.raises(UsageError) as refused_too:
            pack(TarSource(tmp_path / "tars"), tmp_path / "packed")
        assert str(refused_too.value) == str(refused.value)
    assert contents(tmp_path) == before


def test_several_faults_are_counted(make: Any, tmp_path: Path) -> None:
    for number in range(3):
        make.tar(tmp_path / "tars" / f"{number}.tar", {"a.jpg": b"x", "b.jpg": b"x"})
    with pytest.raises(UsageError, match=r"0\.tar: sample 'a': no label.*; and 5 more in 3 tars"):
        adopt(tmp_path / "tars")


def test_places_that_are_refused(make: Any, demo_copy: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a data set that 'tidali shard' packed already"):
        adopt(demo_copy)
    with pytest.raises(UsageError, match="no such folder"):
        adopt(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no tars there"):
        adopt(make.folder({"a/b.jpg": b""}, tmp_path / "images"))
    (folder / "train" / "000001.idx").write_text("mine")
    with pytest.raises(UsageError, match=r"000001\.idx: not written by tidali"):
        adopt(folder)
    (folder / "train" / "000001.idx").unlink()
    (folder / "val" / "000000.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"val/000000\.json: not written by tidali"):
        adopt(folder)
    (folder / "val" / "000000.json").unlink()
    (folder / "val" / "000000.tar").rename(folder / "val" / "with space.tar")
    with pytest.raises(UsageError, match=r"'val/with space\.tar' cannot be that of a shard"):
        adopt(folder)
    (folder / "val" / "with space.tar").rename(folder / "dataset.tar")
    with pytest.raises(UsageError, match=r"is named after a split, and 'dataset\.tar' is not"):
        adopt(folder)
    (folder / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"x\.tar\.gz: a compressed tar"):
        adopt(folder)
    (folder / "x.tar.gz").unlink()
    (folder / "dataset.tar").unlink()
    with pytest.raises(UsageError, match="--val-fraction: the tars are divided"):
        adopt(folder, AdoptSettings(val_fraction=0.5))


def test_names_that_do_not_fit_the_labels(folder: Path) -> None:
    with pytest.raises(UsageError, match="a label is 2, and --class-names has only 2 lines"):
        adopt(folder, class_names=["a", "b"])


# ------------------------------------------------------------------------------------------------------------ again, and damage


def test_a_stopped_call_is_resumed(folder: Path, contents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path(shutil.copytree(folder, tmp_path / "whole" / "tars"))
    adopt(whole)
    publish, left = adopt_tar.publish_bytes, [5]

    def stop(path: Path, data: bytes) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        publish(path, data)

    monkeypatch.setattr(adopt_tar, "publish_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        adopt(folder, workers=1)
    monkeypatch.undo()
    assert not (folder / MANIFEST_NAME).exists()
    report = adopt(folder, workers=1)
    assert len(report.kept) == 2
    assert contents(folder) == contents(whole)


def test_a_changed_folder_is_brought_up_to_date(make: Any, folder: Path, contents: Any, tmp_path: Path) -> None:
    first = adopt(folder)
    make.tar(folder / "train" / "000009.tar", {"n.jpg": make.jpeg(77), "n.cls": b"1"})
    (folder / "train" / "000000.tar").unlink()
    manifest = adopt(folder).manifest
    assert manifest.splits["train"].samples == first.manifest.splits["train"].samples - 4 + 1
    assert not verify(folder).faults
    fresh = tmp_path / "fresh" / "tars"
    for path in tars_of(folder):
        (fresh / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, fresh / path.relative_to(folder))
    adopt(fresh)
    assert contents(fresh) == contents(folder)


@pytest.fixture(scope="module")
def adopted(written: tuple[Path, dict[str, Pairs]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(written[0], tmp_path_factory.mktemp("adopted") / "tars"))
    adopt(root)
    return root


@pytest.fixture
def to_damage(adopted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adopted, tmp_path / "tars"))


def place(folder: Path, name: str, extension: str) -> int:
    """Where the first such member's data begins in a tar."""
    samples = parse_index((folder / name).with_suffix(".idx").read_text(), "")
    return next(part.offset for part in samples[0] if part.extension == extension)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "an image": (
        lambda d: flip(d / "val/000000.tar", place(d, "val/000000.tar", "jpg") + 9),
        "val/000000.tar: sample some/folder/0000: the image's bytes are not",
    ),
    "a label": (
        lambda d: flip(d / "val/000000.tar", place(d, "val/000000.tar", "cls")),
        "val/000000.tar: sample some/folder/0000: its label is 1 in the tar, and 0 in its record",
    ),
    "a header": (lambda d: flip(d / "val/000000.tar", 3), "val/000000.tar: no tar"),
    "cut off": (lambda d: os.truncate(d / "val/000000.tar", 9000), "val/000000.tar: truncated: 9000 bytes"),
    "an index": (lambda d: (d / "train/000001.idx").write_text("v1.2 0\n"), "train/000001.idx: truncated|its SHA-256"),
    "a record": (lambda d: flip(d / "train/000001.json", 900), "train/000001.json: "),
    "a tar gone": (lambda d: (d / "train/000001.tar").unlink(), "train/000001.tar: is missing"),
    "a tar more": (
        lambda d: shutil.copy(d / "train/000001.tar", d / "train/1.tar"),
        "train/1.tar: is in no split of the manifest",
    ),
    "the manifest": (
        lambda d: (d / MANIFEST_NAME).write_text(
            (d / MANIFEST_NAME).read_text().replace('"label_field": null', '"label_field": "x"')
        ),
        "its source, settings or classes are not those",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_names_damage(to_damage: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(to_damage)
    faults = [str(fault) for fault in verify(to_damage).faults]
    assert any(re.search(message, fault) for fault in faults), faults
    assert all("tidali adopt" in fault for fault in faults)


def test_opening_checks_tars_of_other_programs(to_damage: Path) -> None:
    tar = to_damage / "val" / "000001.tar"
    last = parse_index(tar.with_suffix(".idx").read_text(), "")[-1][-1]
    flip(tar, last.offset - 512)
    with pytest.raises(DatasetError, match=r"val/000001\.tar: no header of 'some/folder/0004\.txt' where 000001\.idx has it"):
        open_dataset(to_damage)
    os.truncate(to_damage / "val" / "000000.tar", 9000)
    with pytest.raises(DatasetError, match=r"val/000000\.tar: 9000 bytes, the manifest says"):
        open_dataset(to_damage)


def test_a_split_without_a_usable_image(make: Any, tmp_path: Path) -> None:
    make.tar(tmp_path / "tars" / "0.tar", {"a.jpg": b"text", "a.cls": b"0"})
    with pytest.raises(TidaliError, match=r"no usable image in the tars of train: '0.tar/a.jpg' for this: no image but text"):
        adopt(tmp_path / "tars")


def test_the_record_of_an_adopted_tar(adopted: Path) -> None:
    record = json.loads((adopted / "val" / "000000.json").read_text())
    found = {name: record["samples"][0][name] for name in ("key", "source", "label", "extension", "height", "width")}
    named = {"key": "some/folder/0000", "source": "val/000000.tar/some/folder/0000.jpg", "label": 0, "extension": "jpg"}
    assert found == {**named, "height": 40, "width": 48}


def test_a_copy_of_a_url(adopted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").put(str(adopted), "/adopted/data", recursive=True)
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path))
    dataset = open_data("memory://adopted/data")
    assert tars_of(dataset.root).keys() == {dataset.root / path.relative_to(adopted) for path in tars_of(adopted)}
    with local_copy("memory://adopted/data") as copy:
        assert not verify(copy).faults
    monkeypatch.setenv("TIDALI_CACHE_LIMIT", "5000")
    with pytest.raises(TidaliError, match="its tars are in folders, and it is larger than TIDALI_CACHE_LIMIT"):
        open_data("memory://adopted/data")


@pytest.mark.parametrize("tars", [1, 3])
def test_the_command_that_is_suggested_holds_images_out(make: Any, tidali: Any, tmp_path: Path, tars: int) -> None:
    for tar in range(tars):
        members = {f"{n}.{kind}": data for n in range(10) for kind, data in (("jpg", make.jpeg(n)), ("cls", b"0"))}
        make.tar(tmp_path / "tars" / f"{tar}.tar", members)
    (tmp_path / "names").write_text("cat\n")
    said = tidali("adopt", tmp_path / "tars", "--class-names", tmp_path / "names").stderr
    command = said[said.index("  tidali ") :].split()
    assert command[1] == ("shard" if tars == 1 else "adopt")
    followed = tidali(*command[1:])
    assert followed.code == 0, followed.stderr
    assert "next: train on it\n  tidali train --data " in followed.stderr
    dataset = open_dataset(Path(followed.stderr.split()[-1]))
    assert dataset.split("val").samples
    assert [one.name for one in dataset.manifest.classes] == ["cat"]
