"""What is checked once the images have been read: classes and splits that lost all of theirs, and images that are repeated."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from shards.duplicates import Repeated, find_repeated, read_contents
from shards.hashed_file import HashedFile
from shards.verify import verify
from tidali.dataset.contract import MANIFEST_NAME
from tidali.errors import TidaliError, UsageError

Tree = dict[str, bytes]


@pytest.fixture
def tree(make: Any) -> Tree:
    """Classes cat and dog, three images of each in train, one in val."""
    return {
        f"{split}/{class_}/{n}.jpg": make.jpeg(100 * s + 10 * c + n)
        for s, (split, count) in enumerate((("train", 3), ("val", 1)))
        for c, class_ in enumerate(("cat", "dog"))
        for n in range(count)
    }


def packed(make: Any, tree: Tree, tmp_path: Path, **settings: Any) -> Any:
    return make.pack(make.folder(tree, tmp_path / "source"), tmp_path / "data", **settings)


# -------------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("train/dog", r"class 'dog' of train: all 3 .*'train/dog/.\.jpg'.*: empty file; .*--classes"),
        ("val/", r"no usable image in val: all 2 "),
        ("train/", r"no usable image in train: all 6 "),
    ],
)
def test_a_class_of_train_or_a_split_without_a_usable_image_fails(
    make: Any, tree: Tree, tmp_path: Path, lost: str, message: str
) -> None:
    with pytest.raises(TidaliError, match=message) as refused:
        packed(make, {name: b"" if name.startswith(lost) else data for name, data in tree.items()}, tmp_path)
    assert refused.value.exit_code == 1
    assert not (tmp_path / "data" / MANIFEST_NAME).exists()


def test_a_class_of_val_without_a_usable_image_is_said(make: Any, tree: Tree, tmp_path: Path) -> None:
    report = packed(make, tree | {"val/dog/0.jpg": b"text"}, tmp_path)
    (warning,) = report.warnings
    assert "class 'dog' of val" in warning
    assert "val/dog/0.jpg" in warning
    assert report.manifest.splits["val"].class_counts == (1, 0)


def test_one_usable_image_is_enough(make: Any, tree: Tree, tmp_path: Path) -> None:
    report = packed(make, tree | {"train/dog/0.jpg": b"", "train/dog/1.jpg": b""}, tmp_path)
    assert report.warnings == ()
    assert report.manifest.splits["train"].class_counts == (3, 1)


def test_a_split_without_the_chosen_classes_is_refused(make: Any, tree: Tree, tmp_path: Path) -> None:
    del tree["val/dog/0.jpg"]
    with pytest.raises(UsageError, match=r"val has no images of the chosen classes"):
        packed(make, tree, tmp_path, classes=("dog",))


# ---------------------------------------------------------------------------------------------------------------- duplicates


def lines(root: Path) -> list[str]:
    report = verify(root)
    assert not report.faults, "an image that is there twice is no damage"
    return list(report.repeated)


def test_images_in_two_splits_or_classes_are_counted_and_listed(make: Any, tree: Tree, tmp_path: Path) -> None:
    tree["val/cat/1.jpg"] = tree["train/cat/1.jpg"]
    tree["train/cat/9.jpg"] = tree["train/cat/1.jpg"]
    tree["val/dog/1.jpg"] = tree["train/cat/2.jpg"]
    tree["train/dog/7.jpg"] = tree["train/cat/0.jpg"]
    tree["train/dog/8.jpg"] = tree["train/dog/1.jpg"]  # in one class of one split: nothing to say
    (warning,) = packed(make, tree, tmp_path, shard_samples=2).warnings
    assert "byte-identical images: 2 in more than one split, 2 under more than one class" in warning
    assert "tidali verify" in warning
    assert lines(tmp_path / "data") == [
        "the same image: 'train/cat/0.jpg' (train, class 'cat'), 'train/dog/7.jpg' (train, class 'dog')",
        "the same image: 'train/cat/1.jpg', 'train/cat/9.jpg' (train, class 'cat'), 'val/cat/1.jpg' (val, class 'cat')",
        "the same image: 'train/cat/2.jpg' (train, class 'cat'), 'val/dog/1.jpg' (val, class 'dog')",
    ]
    again = packed(make, tree, tmp_path, shard_samples=2)
    assert len(again.kept) > 3
    assert again.warnings == (warning,), "of shards that were kept, too"


def test_an_unlabelled_image_contradicts_no_class(make: Any, tmp_path: Path) -> None:
    tree = make.tiny_tree(classes=2, train=2, val=1, test=2)
    train = next(name for name in tree if name.startswith("train/") and name.endswith("JPEG"))
    tree["test/images/test_0.JPEG"] = tree[train]
    (warning,) = packed(make, tree, tmp_path).warnings
    assert "1 in more than one split;" in warning
    (line,) = lines(tmp_path / "data")
    assert "'test/images/test_0.JPEG' (test)" in line


def test_equal_crc_and_size_are_not_enough(tmp_path: Path) -> None:
    """Four bytes appended to each of two texts of equal length, so that their CRC-32 are equal."""
    one, other = (text + forged_suffix(text, 0x12345678) for text in (b"cat" * 50, b"dog" * 50))
    assert (zlib.crc32(one), len(one)) == (zlib.crc32(other), len(other))
    (tmp_path / "a.tar").write_bytes(one + other)
    samples = [{"offset": start, "size_bytes": len(one), "label": n} for n, start in enumerate((0, len(one)))]
    with HashedFile(tmp_path / "a.tar") as tar:
        assert find_repeated([("train", read_contents(tar, samples))]) == Repeated()
    (tmp_path / "a.tar").write_bytes(one + one)
    with HashedFile(tmp_path / "a.tar") as tar:
        found = find_repeated([("train", read_contents(tar, samples))])
    assert (len(found.in_splits), len(found.in_classes)) == (0, 1)


def forged_suffix(text: bytes, crc32: int) -> bytes:
    """The four bytes after which the text's CRC-32 is this one: the register is run backwards through CRC-32's table."""
    table = [_table_entry(n) for n in range(256)]
    register = crc32 ^ 0xFFFFFFFF
    for _ in range(4):
        index = next(n for n in range(256) if table[n] >> 24 == register >> 24)
        register = ((register ^ table[index]) << 8 | index) & 0xFFFFFFFF
    return (register ^ zlib.crc32(text) ^ 0xFFFFFFFF).to_bytes(4, "little")


def _table_entry(n: int) -> int:
    for _ in range(8):
        n = n >> 1 ^ (0xEDB88320 if n & 1 else 0)
    return n


def test_no_images_at_all() -> None:
    assert find_repeated([]) == Repeated()
    assert str(Repeated()) == ""
