"""Layouts as people have them: which folders are splits, classes, wrappings, or the system's; and when names are the same."""

from __future__ import annotations

import inspect
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from shards.plan import PackSettings, make_plan
from shards.scan import FileSource, Scan
from tidali.dataset.file_names import describe_left_out, name_key, split_of, visible_name
from tidali.errors import UsageError
from tidali.model.image_files import find_images

Tree = dict[str, bytes]
NFC, NFD = "Café", unicodedata.normalize("NFD", "Café")


def tree_of(*folders: str, images: int = 2) -> Tree:
    """Two files named as images in each folder. Nothing here looks into them."""
    return {f"{folder}/{n}.jpg".removeprefix("/"): folder.encode() + bytes([n]) for folder in folders for n in range(images)}


@pytest.fixture(params=["folder", "zip"])
def scan(request: Any, make: Any, tmp_path: Path) -> Any:
    """Scans a tree, as a folder and as a zip."""

    def scanned(tree: Tree, layout: str = "auto") -> Scan:
        is_zip = request.param == "zip"
        path = make.zip(tree, tmp_path / "source.zip") if is_zip else make.folder(tree, tmp_path / "source")
        found = FileSource(path, layout).scan()
        with found.reader.open() as read:  # every item is where it was listed
            for items in found.splits.values():
                assert all(len(read(item, 99)) == item.size_bytes for item in items)
        return found

    return scanned


def split_counts(found: Scan) -> dict[str, int]:
    return {split: len(items) for split, items in found.splits.items()}


def ids(found: Scan) -> list[str]:
    return [class_.id for class_ in found.classes]


# ------------------------------------------------------------------------------------------------------------ system folders

SYSTEM = [
    *("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information", "__MACOSX", "lost+found"),
    *("@Recently-Snapshot", "@Recycle", "@GMT-2024.01.31-12.00.00", ".thumbnails", ".ipynb_checkpoints", ".git", ".Trash-1000"),
]


@pytest.mark.parametrize("place", ["{}", "train/{}", "train/cat/{}", "train/cat/{}/0.jpg", "val/cat/{}/deep"])
def test_system_folders_hold_no_images_of_the_data_set(scan: Any, tmp_path: Path, place: str) -> None:
    """@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg is a thumbnail of 0.jpg."""
    tree = tree_of("train/cat", "train/dog", "val/cat", "val/dog")
    found = scan(tree | tree_of(*(place.format(name) for name in SYSTEM)))
    assert (split_counts(found), ids(found)) == ({"train": 4, "val": 4}, ["cat", "dog"])
    visible = [name for name in SYSTEM if not name.startswith(".")]
    assert found.left_out == {"hidden images": 2 * (len(SYSTEM) - len(visible)), **{f"images in {n}": 2 for n in visible}}
    if (tmp_path / "source").exists():
        files, left_out = find_images([str(tmp_path / "source")])
        assert sorted(str(file.relative_to(tmp_path / "source")) for file in files) == sorted(tree)
        assert left_out == found.left_out


def test_hidden_and_foreign_files_are_counted(scan: Any, tmp_path: Path) -> None:
    extra = {
        **{"train/a/.DS_Store": b"x", "train/a/._0.jpg": b"x", "train/a/Thumbs.db": b"x", "desktop.ini": b"x"},
        **{"README.md": b"x", "train/a/notes.TXT": b"x", "train/b/notes.txt": b"x", "train/b/raw.CR2": b"x", "LICENSE": b"x"},
    }
    found = scan(tree_of("train/a", "train/b") | extra)
    assert split_counts(found) == {"train": 4}
    expected = {"hidden images": 1, ".txt files": 2, ".md files": 1, ".cr2 files": 1, "files without a suffix": 1}
    assert found.left_out == expected
    assert describe_left_out(found.left_out) == (
        "2 .txt files, 1 .cr2 file, 1 .md file, 1 file without a suffix, 1 hidden image"
    )
    if (tmp_path / "source").exists():
        assert find_images([str(tmp_path / "source")])[1] == expected


def test_one_list_of_suffixes(scan: Any, tmp_path: Path) -> None:
    """What a phone's photographs are called, whatever they are."""
    suffixes = "jpg JPG jpeg JPE jfif HEIC heif MPO png webp bmp gif tif TIFF ppm pgm jp2 avif"
    tree = {f"{c}/0.{suffix}": b"x" for c in "ab" for suffix in suffixes.split()}
    found = scan(tree)
    assert split_counts(found) == {"train": len(tree)}
    assert not found.left_out
    if (tmp_path / "source").exists():
        assert len(find_images([str(tmp_path / "source")])[0]) == len(tree)


def test_a_pattern_leaves_out_system_folders_too(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make.folder(tree_of("cat", "cat/@eaDir", images=1), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find_images(["**/*.jpg"]) == ([Path("cat/0.jpg")], {"images in @eaDir": 1})
    assert find_images(["cat/@eaDir/*.jpg"]) == ([Path("cat/@eaDir/0.jpg")], {})


def test_a_system_folder_that_may_not_be_read(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make.folder(tree_of("cat", "dog", "lost+found"), tmp_path)
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if os.fsencode(path).endswith(b"lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert split_counts(FileSource(tmp_path).scan()) == {"train": 4}
    (tmp_path / "lost+found").rename(tmp_path / "xlost+found")
    with pytest.raises(UsageError, match=r"xlost\+found: Permission denied"):
        FileSource(tmp_path).scan()


def test_folders_nested_deeper_than_python_may_recurse(make: Any, tmp_path: Path) -> None:
    """With a limit of 80 calls in place of 1,000: deeper folders take seconds to make."""
    deep = "/d" * 120
    source = make.folder(tree_of("cat", "dog", f"dog{deep}", f"dog/.hidden{deep}"), tmp_path / "source")
    zipped = make.zip(tree_of("cat", f"dog{deep}"), tmp_path / "deep.zip")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 80)
    try:
        found = FileSource(source).scan()
        assert (split_counts(found), found.left_out) == ({"train": 6}, {"hidden images": 2})
        assert split_counts(FileSource(zipped).scan()) == {"train": 4}
    finally:
        sys.setrecursionlimit(before)


def test_a_pipe_is_no_image(make: Any, tmp_path: Path) -> None:
    """Opening one would wait for ever."""
    make.folder(tree_of("cat", "dog"), tmp_path)
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    found = FileSource(tmp_path).scan()
    assert (split_counts(found), found.left_out) == ({"train": 4}, {"special files": 1})
    files, left_out = find_images([str(tmp_path)])
    assert (len(files), left_out) == (4, {"special files": 1})


# -------------------------------------------------------------------------------------------------------------------- splits

SPELLINGS = {
    "train": [
        "train",
        "Train",
        "TRAIN",
        "training",
        "train_set",
        "training-set",
        "trainset",
        "train_images",
        "train2017",
        "Train Set",
    ],
    "val": ["val", "Val", "valid", "VALID", "validation", "Validation", "val_set", "validation-set", "dev"],
    "test": ["test", "Test", "TESTING", "testing", "test_set", "test1", "test-images"],
}
OF_NO_SPLIT = [
    "训练train",
    "été train",
    "cat",
    "images",
    "data",
    "dataset",
    "train_station",
    "trainer",
    "testtube",
    "train_test",
    "2017",
    "",
    "val d'or",
]


@pytest.mark.parametrize("split", SPELLINGS)
def test_spellings_of_splits(split: str) -> None:
    assert [split_of(name) for name in SPELLINGS[split]] == [split] * len(SPELLINGS[split])


def test_names_of_no_split() -> None:
    for name in OF_NO_SPLIT:
        assert split_of(name) is None, name


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("Training", "Testing"), ("train", "test")),
        (("TRAIN", "VAL"), ("train", "val")),
        (("training_set", "test_set"), ("train", "test")),
        (("train", "valid"), ("train", "val")),
    ],
)
@pytest.mark.parametrize("around", ["", "images/", "Dataset/", "data/tiny/"])
def test_splits_in_any_spelling_and_wrapping(scan: Any, names: tuple[str, str], splits: tuple[str, str], around: str) -> None:
    tree = tree_of(*(f"{around}{name}/{class_}" for name in names for class_ in ("cat", "dog")))
    found = scan(tree | {"README": b"", "LICENSE.txt": b"", "docs/manual.pdf": b"", f"{around}notes.md": b""})
    assert (split_counts(found), ids(found)) == (dict.fromkeys(splits, 4), ["cat", "dog"])
    assert found.warnings == ()


@pytest.mark.parametrize("around", ["images", "Images", "data/images", "train/train", "train/images"])
def test_classes_in_a_wrapping(scan: Any, around: str) -> None:
    found = scan(tree_of(f"{around}/cat", f"{around}/dog") | {"README.md": b"", "Annotation/cat/0": b""})
    assert (split_counts(found), ids(found)) == ({"train": 4}, ["cat", "dog"])


def test_every_split_may_have_its_wrapping(scan: Any) -> None:
    found = scan(tree_of("train/train/cat", "train/train/dog", "test/test/cat", "test/test/dog"))
    assert (split_counts(found), ids(found)) == ({"train": 4, "test": 4}, ["cat", "dog"])
    found = scan(tree_of("train/cat", "train/dog", "val/cat/deep", "val/cat/deeper"))  # val has one class, not a wrapping


def test_a_class_named_as_a_split(scan: Any) -> None:
    tree = tree_of("bus", "car", "train")
    with pytest.raises(UsageError, match=r"'train'.*--layout folder"):
        scan(tree)
    assert ids(scan(tree, "folder")) == ["bus", "car", "train"]


@pytest.mark.parametrize(
    "folders",
    [
        ("seg_train/cat", "seg_train/dog", "seg_test/cat", "seg_test/dog"),
        ("fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog", "fold3/cat", "fold3/dog"),
        ("amazon/images/cat", "amazon/images/dog", "webcam/images/cat", "webcam/images/dog"),
        ("cat/train", "cat/val", "dog/train", "dog/val"),
        ("cat/images", "cat/masks", "dog/images", "dog/masks"),
        ("train/amazon/cat", "train/amazon/dog", "train/webcam/Cat", "train/webcam/dog"),
    ],
)
def test_a_missed_level_of_folders(scan: Any, folders: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"both hold .*--layout folder"):
        scan(tree_of(*folders))
    assert scan(tree_of(*folders), "folder").images == 2 * len(folders)


@pytest.mark.parametrize(
    "folders", [("cat/images", "dog/images"), ("cat", "cat/more", "dog", "dog/more"), ("cat/images/a", "dog/images/b")]
)
def test_folders_inside_classes(scan: Any, folders: tuple[str, ...]) -> None:
    found = scan(tree_of(*folders))
    assert (found.images, ids(found), found.warnings) == (2 * len(folders), ["cat", "dog"], ())


@pytest.mark.parametrize(
    "folders", [("pets/cat", "pets/dog", "cars/bus", "cars/van"), ("labelled/cat", "labelled/dog", "rest")]
)
def test_classes_that_are_several_folders_are_said(scan: Any, folders: tuple[str, ...]) -> None:
    found = scan(tree_of(*folders))
    (warning,) = found.warnings
    assert "'cat', 'dog'" in warning or "'bus', 'van'" in warning
    assert len(found.classes) == 2
    assert scan(tree_of(*folders), "folder").warnings == ()


@pytest.mark.parametrize("folders", [("cat",), ("images",), ("train/cat", "val/cat"), ("Data/Images",)])
def test_one_class_is_said(scan: Any, folders: tuple[str, ...]) -> None:
    (warning,) = scan(tree_of(*folders)).warnings
    assert "only one class" in warning


IN_NO_CLASS = {
    "val without folders": (tree_of("train/cat", "train/dog", "val"), r"val holds 2 images, .*sort them into val/CLASS"),
    "train without folders": (tree_of("train", "test"), r"(train|test) holds 2 images, .*sort them into"),
    "nothing but images": (tree_of(""), r"the source holds 2 images, .*sort them"),
    "images and their masks": (tree_of("images", "annotations/trimaps"), r"'annotations' .*--layout folder"),
    "an image beside the classes": (tree_of("cat", "dog") | {"logo.png": b"x"}, r"'logo.png' is not in a class folder"),
    "an image beside the splits": (tree_of("train/cat", "train/dog") | {"x.png": b"x"}, r"'x.png' is not in a class folder"),
    "an empty split": (tree_of("train/cat", "train/dog") | {"val/cat/x.txt": b""}, "val holds no images"),
    "no train": (tree_of("Validation/cat", "Test/dog"), "no train folder"),
    "two of one split": (tree_of("train/a", "train/b", "val/a", "Valid/b"), "two folders for val"),
    "other files": ({"train/cat/0.cr2": b"x"}, r"found no images .*1 \.cr2 file\)"),
    "an invisible name": (tree_of("train/\u200b", "train/a"), r"invisible"),
}


@pytest.mark.parametrize("case", IN_NO_CLASS)
def test_what_is_in_no_class_is_refused(scan: Any, case: str) -> None:
    tree, message = IN_NO_CLASS[case]
    with pytest.raises(UsageError, match=message):
        scan(tree)


def test_imagenets_val_without_folders(scan: Any) -> None:
    tree = tree_of("ILSVRC/Data/CLS-LOC/train/n01", "ILSVRC/Data/CLS-LOC/train/n02") | {"ILSVRC/Annotations/x.xml": b""}
    tree |= {f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_0000000{n}.JPEG": b"x" for n in range(3)}
    with pytest.raises(UsageError, match=r"val holds 3 images, .*val/CLASS.*LOC_val_solution\.csv"):
        scan(tree)


# --------------------------------------------------------------------------------------------------------------------- names

SAME = {
    "composed and decomposed": (NFC, NFD),
    "a space behind": ("cat", "cat "),
    "a space before": ("cat", " cat"),
    "two spaces": ("polar bear", "polar  bear"),
    "a space that does not break": ("polar bear", "polar\u00a0bear"),
    "zero width": ("cat", "c\u200bat"),
    "a mark of direction": ("cat", "\u200fcat"),
    "a byte order mark": ("cat", "\ufeffcat"),
    "a soft hyphen": ("catfish", "cat\u00adfish"),
    "a dot behind": ("cat", "cat."),
    "a tab and an invisible letter": ("polar bear", "polar\t\u200b bear"),
    "a variation selector": ("\u2764", "\u2764\ufe0f"),
    "case": ("Cat", "cat"),
    "case beyond ASCII": ("Élan", "élan"),
}


@pytest.mark.parametrize("case", SAME)
def test_names_that_look_the_same_are_one_class(make: Any, tmp_path: Path, case: str) -> None:
    """In two splits they are one class; in one split they are refused, with what differs; --classes finds them."""
    one, other = SAME[case]
    found = FileSource(make.folder(tree_of(f"train/{one}", "train/dog", f"val/{other}", "val/dog"), tmp_path / "a")).scan()
    assert ids(found) == sorted([one, "dog"])
    assert [item.label for item in found.splits["val"]] == [
        ids(found).index(one if other in item.name else "dog") for item in found.splits["val"]
    ]
    assert make_plan(found, PackSettings(classes=(other,))).classes[0].id == one
    both = make.folder(tree_of(f"train/{one}", f"train/{other}", "train/dog"), tmp_path / "b")
    with pytest.raises(UsageError) as refused:
        FileSource(both).scan()
    assert all(ascii(f"train/{name}") in str(refused.value) for name in (one, other))


def test_what_is_shown_of_a_name(scan: Any) -> None:
    found = scan(tree_of(f"train/{NFD}", "train/cat ", "train/\u200fdog\u200b"))
    assert ids(found) == [NFC, "cat", "dog"]


def test_names_that_differ_stay_apart() -> None:
    for one, other in (("cat", "cats"), ("cat", "c.at"), ("Café", "Cafe"), ("a b", "ab"), ("١", "1"), ("cat-1", "cat_1")):
        assert name_key(one) != name_key(other)
    assert visible_name("می\u200cخواهم") == "می\u200cخواهم", "Persian is written with it"


def test_a_class_that_train_lacks_shows_its_letters(scan: Any) -> None:
    with pytest.raises(UsageError, match=r"'\\u0441at'"):
        scan(tree_of("train/cat", "train/dog", "val/\u0441at"))  # a Cyrillic letter


def test_names_do_not_depend_on_the_locale(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where LC_ALL=C and PYTHONUTF8=0: then the interpreter itself decodes names as ASCII."""
    source = make.folder(tree_of(f"train/{NFC}", "train/dog"), tmp_path / "Données")
    expected = FileSource(source).scan()
    assert (expected.name, ids(expected)) == ("Données", [NFC, "dog"])
    ascii_only = os.fsencode(source).decode("ascii", "surrogateescape")
    monkeypatch.setattr(os, "fsencode", lambda path: os.fspath(path).encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda path: os.fspath(path).decode("ascii", "surrogateescape"))
    from tidali.dataset import file_names

    found = list(file_names.walk(ascii_only, file_names.Counter()))
    assert {name for name, _, _ in found} >= {f"train/{NFC}", f"train/{NFC}/0.jpg"}
    assert file_names.printable_path(ascii_only).endswith("Données")


# ----------------------------------------------------------------------------------------------------------------------- zips


def test_backslashes_in_a_zip_are_separators(make: Any, tmp_path: Path) -> None:
    tree = {"train\\cat/0.jpg": b"1", "train\\dog/0.jpg": b"2", "val\\cat/0.jpg": b"3", "val\\dog\\0.jpg": b"4"}
    found = FileSource(make.zip(tree, tmp_path / "a.zip")).scan()
    assert (split_counts(found), ids(found)) == ({"train": 2, "val": 2}, ["cat", "dog"])
    with pytest.raises(UsageError, match=r"'train/cat/0\.jpg' twice"):
        FileSource(make.zip(tree | {"train/cat/0.jpg": b"5"}, tmp_path / "b.zip")).scan()
    for name in ("train\\..\\..\\x.jpg", "\\etc\\x.jpg", "C:\\x.jpg", "\\\\server\\share\\x.jpg"):
        with pytest.raises(UsageError, match="its path leaves the archive"):
            FileSource(make.zip(tree | {name: b"5"}, tmp_path / "c.zip")).scan()


def test_such_a_zip_unpacked_by_a_program_that_keeps_them(make: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'train\\\\cat.*give that zip"):
        FileSource(make.folder({"train\\cat/0.jpg": b"1", "val\\cat/0.jpg": b"1"}, tmp_path)).scan()


def test_dots_and_slashes_in_a_zip(make: Any, tmp_path: Path) -> None:
    tree = {"./": b"", "./train//cat/./0.jpg": b"1", ".//train/dog/0.jpg": b"2", "train/dog/": b"", "train/dog./": b""}
    found = FileSource(make.zip({n: d for n, d in tree.items() if n != "train/dog./"}, tmp_path / "a.zip")).scan()
    assert [item.name for item in found.splits["train"]] == ["train/cat/0.jpg", "train/dog/0.jpg"]


# -------------------------------------------------------------------------------------------------------------- Tiny-ImageNet


def sorted_val(make: Any) -> tuple[Tree, list[str]]:
    """val in class folders, with the annotations left behind, as the usual scripts do it."""
    tree: Tree = make.tiny_tree(classes=2, train=1, val=2, test=0)
    wnids = tree["wnids.txt"].decode().split()
    for n in range(4):
        tree[f"val/{wnids[n % 2]}/images/val_{n}.JPEG"] = tree.pop(f"val/images/val_{n}.JPEG")
    return tree, wnids


def test_val_sorted_with_its_annotations_left_behind(make: Any, tmp_path: Path) -> None:
    tree, wnids = sorted_val(make)
    tree[f"val/{wnids[0]}/images/more.JPEG"] = b"x"  # not annotated: its folder says what it is
    found = FileSource(make.zip(tree, tmp_path / "a.zip")).scan()
    assert len(found.splits["val"]) == 5
    assert all(wnids[item.label] == item.name.split("/")[1] for item in found.splits["val"] if item.label is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("val/{0}/images/val_1.JPEG", "val/{1}/images/val_1.JPEG"), r"line 2: says .*val_1\.JPEG.*remove val/val_annotations"),
        (("val/{0}/images/val_1.JPEG", None), r"line 2: .*remove val/val_annotations"),
        (("val/x/val_9.JPEG", None), r"does not name 'val/x/val_9.JPEG'"),
    ],
)
def test_val_sorted_otherwise_than_annotated(make: Any, tmp_path: Path, change: tuple[str, str | None], message: str) -> None:
    tree, wnids = sorted_val(make)
    new, old = (None if name is None else name.format(*wnids) for name in change)
    tree[str(new)] = b"x" if old is None else tree.pop(old)
    with pytest.raises(UsageError, match=message):
        FileSource(make.zip(tree, tmp_path / "a.zip")).scan()
