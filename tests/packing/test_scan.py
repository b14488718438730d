"""What is taken for a data set, how it is understood, and what is refused before DEST is touched."""

from __future__ import annotations

import errno
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.scan import FileSource
from tidali.dataset.contract import ClassName
from tidali.errors import UsageError

Tree = dict[str, bytes]


def test_tiny_imagenet_layout(make: Any, tmp_path: Path) -> None:
    tree = make.tiny_tree(classes=3, train=4, val=2, test=2)
    scan = FileSource(make.folder(tree, tmp_path / "src")).scan()
    assert scan.layout == "tiny-imagenet"
    ids = tree["wnids.txt"].decode().split()
    assert scan.classes == tuple(ClassName(id=id_, name=f"thing {n}, no. {n}") for n, id_ in enumerate(ids))
    assert {split: len(items) for split, items in scan.splits.items()} == {"train": 12, "val": 6, "test": 2}
    for item in scan.splits["train"]:
        assert item.label is not None
        assert item.name.split("/")[1] == ids[item.label]
    annotated = dict(line.split("\t")[:2] for line in tree["val/val_annotations.txt"].decode().splitlines())
    assert {i.name.rpartition("/")[2]: ids[i.label] for i in scan.splits["val"] if i.label is not None} == annotated
    assert [item.label for item in scan.splits["test"]] == [None, None]
    assert not scan.left_out, "the layout's own text files are no surprise"
    assert all(list(items) == sorted(items) for items in scan.splits.values())


def test_val_sorted_into_class_folders(make: Any, tmp_path: Path) -> None:
    """Many people move Tiny-ImageNet's val images into folders; the annotations are gone then."""
    tree = make.tiny_tree(classes=2, train=2, val=2, test=0)
    ids = tree["wnids.txt"].decode().split()
    del tree["val/val_annotations.txt"]
    for n in range(4):
        tree[f"val/{ids[n % 2]}/images/val_{n}.JPEG"] = tree.pop(f"val/images/val_{n}.JPEG")
    scan = FileSource(make.folder(tree, tmp_path / "src")).scan()
    assert [(item.name[-10:], item.label) for item in scan.splits["val"]] == [
        (item.name[-10:], ids.index(item.name.split("/")[1])) for item in scan.splits["val"]
    ]
    assert len(scan.splits["val"]) == 4


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("inside", ["", "tiny-imagenet-200/", "a/b/"])
def test_zip_reads_as_its_folder(make: Any, tmp_path: Path, method: int, inside: str) -> None:
    tree = make.tiny_tree(classes=2, train=3, val=1, test=1)
    in_folder = FileSource(make.folder(tree, tmp_path / "src")).scan()
    in_zip = FileSource(make.zip(tree, tmp_path / "src.zip", inside=inside, method=method)).scan()
    assert in_zip.classes == in_folder.classes
    for split, items in in_folder.splits.items():
        assert [(i.name, i.size_bytes, i.label) for i in in_zip.splits[split]] == [
            (i.name, i.size_bytes, i.label) for i in items
        ]
        with in_zip.reader.open() as read:
            assert [read(item, 1 << 20) for item in in_zip.splits[split]] == [tree[item.name] for item in items]


def test_folder_layouts(make: Any, tmp_path: Path) -> None:
    tree = make.folder_tree()
    splits = FileSource(make.folder(tree, tmp_path / "splits")).scan()
    assert splits.layout == "folder"
    assert {split: len(items) for split, items in splits.splits.items()} == {"train": 24, "val": 6}
    flat = {name.removeprefix("train/"): data for name, data in tree.items() if name.startswith("train/")}
    train_only = FileSource(make.folder(flat, tmp_path / "flat")).scan()
    assert {split: len(items) for split, items in train_only.splits.items()} == {"train": 24}
    assert [c.id for c in train_only.classes] == [c.id for c in splits.classes] == ["class_0", "class_1", "class_2"]


def test_links_are_followed_but_not_in_a_circle(make: Any, tmp_path: Path) -> None:
    real = make.folder(make.folder_tree(classes=2, train=2, val=1), tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "train").symlink_to(real / "train")
    assert FileSource(linked).scan().images == 4
    (real / "train" / "class_0" / "again").symlink_to(real / "train")
    with pytest.raises(UsageError, match="a link back to a folder above it"):
        FileSource(linked).scan()


# What is refused: how the good Tiny-ImageNet tree is broken, and what the one line must say.
BROKEN_TREES: dict[str, tuple[Callable[[Tree], None], str]] = {
    "no files": (lambda tree: tree.clear(), "no files"),
    "no images": (lambda tree: [tree.pop(n) for n in list(tree) if n.endswith("JPEG")], "has no images in train/"),
    "class of wnids without images": (
        lambda tree: tree.update({"wnids.txt": tree["wnids.txt"] + b"n1\n"}),
        "class n1 .* no images",
    ),
    "class twice in wnids": (lambda tree: tree.update({"wnids.txt": tree["wnids.txt"] * 2}), "names a class twice"),
    "folder that wnids does not know": (
        lambda tree: tree.update({"train/n1/images/x.JPEG": b"x"}),
        "'train/n1' is not a class",
    ),
    "annotation of a missing file": (
        lambda tree: tree.update({"val/val_annotations.txt": b"val_99.JPEG\tn00009000\t0\t0\t1\t1\n"}),
        r"val_annotations.txt line 1: .*'val_99.JPEG'",
    ),
    "annotation twice": (
        lambda tree: tree.update({"val/val_annotations.txt": tree["val/val_annotations.txt"] * 2}),
        "line 7: val_0.JPEG is annotated twice",
    ),
    "annotation of an unknown class": (
        lambda tree: tree.update({"val/val_annotations.txt": b"val_0.JPEG\tn5\t0\t0\t1\t1\n"}),
        "'n5' is not a class of wnids.txt",
    ),
    "image without annotation": (
        lambda tree: tree.update({"val/images/val_77.JPEG": b"x"}),
        "does not name 'val/images/val_77.JPEG'",
    ),
    "annotations that are no text": (lambda tree: tree.update({"val/val_annotations.txt": b"\xff\xfe\x00"}), "not UTF-8 text"),
}


@pytest.mark.parametrize("name", BROKEN_TREES)
def test_broken_tiny_imagenet_is_refused(make: Any, tmp_path: Path, name: str) -> None:
    break_it, message = BROKEN_TREES[name]
    tree = make.tiny_tree(classes=2, train=2, val=3, test=0)
    break_it(tree)
    (tmp_path / "src").mkdir()
    with pytest.raises(UsageError, match=message):
        make.pack(make.folder(tree, tmp_path / "src"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROKEN_FOLDERS: dict[str, tuple[Tree, str]] = {
    "no train": ({"val/a/x.jpg": b"x"}, "has val but no train folder"),
    "images without classes": ({"x.jpg": b"x", "y.jpg": b"x"}, "no data set"),
    "train images without classes": ({"train/x.jpg": b"x", "train/a/y.jpg": b"x"}, "'train/x.jpg' is not in a class folder"),
    "images beside the splits": (
        {"train/a/x.jpg": b"x", "more/a/y.jpg": b"x"},
        "'more/a/y.jpg' is not in a class folder of a split",
    ),
    "empty class": ({"train/a/x.jpg": b"x", "train/b/notes.txt": b"x"}, "class folder 'train/b' of train .* no images"),
    "class that train lacks": ({"train/a/x.jpg": b"x", "val/b/y.jpg": b"x"}, "val has a class 'b' that train does not have"),
    "two folders for val": ({"train/a/x.jpg": b"x", "val/a/y.jpg": b"x", "valid/a/y.jpg": b"x"}, "two folders for val"),
    "same class in another case": (
        {"train/Cat/x.jpg": b"x", "train/cat/y.jpg": b"x"},
        "'train/Cat' and 'train/cat' differ only in upper and lower case",
    ),
    "only text": ({"train/a/x.txt": b"x"}, "no data set"),
}


@pytest.mark.parametrize("packed_as", ["folder", "zip"])
@pytest.mark.parametrize("name", BROKEN_FOLDERS)
def test_broken_folder_is_refused(make: Any, tmp_path: Path, name: str, packed_as: str) -> None:
    tree, message = BROKEN_FOLDERS[name]
    source = make.folder(tree, tmp_path / "src") if packed_as == "folder" else make.zip(tree, tmp_path / "src.zip")
    with pytest.raises(UsageError, match=message):
        make.pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _member(name: str, data: bytes = b"x", **fields: Any) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


LINK = (stat.S_IFLNK | 0o777) << 16
HOSTILE_MEMBERS: dict[str, tuple[list[tuple[zipfile.ZipInfo, bytes]], str]] = {
    "path upwards": ([_member("../../etc/x.jpg")], "its path leaves the archive"),
    "path upwards within": ([_member("train/a/../../../x.jpg")], "its path leaves the archive"),
    "path upwards, backslashes": ([_member("train\\..\\..\\x.jpg")], "its path leaves the archive"),
    "absolute path": ([_member("/etc/x.jpg")], "its path leaves the archive"),
    "drive": ([_member("C:/x.jpg")], "its path leaves the archive"),
    "symbolic link": ([_member("train/a/x.jpg", b"/etc/passwd", external_attr=LINK)], "it is a symbolic link"),
    "unknown compression": ([_member("train/a/x.jpg", compress_type=zipfile.ZIP_BZIP2)], "compression method 12"),
}


@pytest.mark.parametrize("name", HOSTILE_MEMBERS)
def test_hostile_zip_is_refused(make: Any, tmp_path: Path, name: str) -> None:
    members, message = HOSTILE_MEMBERS[name]
    source = make.zip(make.folder_tree(classes=2, train=2, val=1), tmp_path / "src.zip")
    with zipfile.ZipFile(source, "a") as archive:
        for info, data in members:
            archive.writestr(info, data)
    with pytest.raises(UsageError, match=message):
        make.pack(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["src.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_member_is_refused(make: Any, tmp_path: Path) -> None:
    source = make.zip(make.folder_tree(classes=2, train=2, val=1), tmp_path / "src.zip")
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("train/class_0/img 0.jpg", b"another")
    with pytest.raises(UsageError, match=r"'train/class_0/img 0.jpg' twice"):
        FileSource(source).scan()


def test_encrypted_member_is_refused(make: Any, tmp_path: Path) -> None:
    """The standard library does not encrypt: bit 0 of the flags is set in both headers."""
    source = make.zip(make.folder_tree(classes=2, train=2, val=1), tmp_path / "src.zip")
    data = bytearray(source.read_bytes())
    for signature, flags_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(signature) + flags_at
        data[at : at + 2] = struct.pack("<H", 1)
    source.write_bytes(data)
    with pytest.raises(UsageError, match="it is encrypted"):
        FileSource(source).scan()


@pytest.mark.parametrize("prefix", ["./", "./tiny/"])
def test_a_zip_whose_names_begin_with_a_dot_and_a_slash(make: Any, tmp_path: Path, prefix: str) -> None:
    """As they stand where someone zipped '.'; nothing of it is hidden."""
    tree = make.tiny_tree() | {".hidden/train/x.jpg": b"x"}
    path = make.zip({"": b"", **tree}, tmp_path / "tiny.zip", inside=prefix)
    plain = make.zip(make.tiny_tree(), tmp_path / "plain.zip")
    theirs, ours = FileSource(plain).scan(), FileSource(path).scan()
    assert (ours.classes, ours.fingerprint) == (theirs.classes, theirs.fingerprint)
    (item, *_), (other, *_) = ours.splits["train"], theirs.splits["train"]
    with ours.reader.open() as read:
        assert read(item, 1 << 20) == make.tiny_tree()[other.name]


def test_what_cannot_be_looked_at_is_refused_in_one_line(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for path in (loop, tmp_path / ("x" * 300), loop / "inside"):
        with pytest.raises(UsageError, match=r"(Too many levels of symbolic links|File name too long)$"):
            FileSource(path).scan()
        with pytest.raises(UsageError, match=r"(Too many levels of symbolic links|File name too long)$"):
            make.pack(path, tmp_path / "data")
    source = make.folder(make.tiny_tree(), tmp_path / "tiny")
    (source / "train" / "link").symlink_to("link")
    with pytest.raises(UsageError, match=r"train/link: Too many levels of symbolic links; a broken link\? Fix or remove it"):
        FileSource(source).scan()
    (source / "train" / "link").unlink()

    def refuse(path: str, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UsageError, match=r"tiny/wnids\.txt: Permission denied$"):
        FileSource(source).scan()
    monkeypatch.undo()


def test_other_sources_are_refused(make: Any, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    for path, message in ((tmp_path / "nowhere", "no such folder or zip"), (text, "neither a folder nor a readable zip")):
        with pytest.raises(UsageError, match=message):
            FileSource(path).scan()
    cut = make.zip(make.folder_tree(), tmp_path / "cut.zip")
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(UsageError, match="neither a folder nor a readable zip"):
        FileSource(cut).scan()
    broken = make.folder(make.folder_tree(), tmp_path / "broken")
    (broken / "train" / "class_0" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"gone.jpg: No such file or directory; a broken link"):
        FileSource(broken).scan()
