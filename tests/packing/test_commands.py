"""shard, demo, verify, info and download as people run them: what they print, and how they exit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from tidali.cli.packing import parse_size
from tidali.dataset.contract import Manifest, open_dataset
from tidali.errors import UsageError


@pytest.fixture(scope="module")
def packed(tidali: Any, tiny_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("packed") / "data"
    ended = tidali("shard", tiny_zip, dest, "--shard-samples", 10)
    assert ended.code == 0, ended.stderr
    return dest


def test_foreign_files_are_counted(tidali: Any, make: Any, tmp_path: Path) -> None:
    source = make.folder(make.folder_tree() | {"train/class_0/notes.txt": b"x", "README.md": b"x"}, tmp_path / "src")
    ended = tidali("shard", source, tmp_path / "data")
    assert ended.code == 0
    assert "left out: 1 .md file, 1 .txt file" in ended.stderr


def test_warnings_and_repeated_images_are_printed(tidali: Any, make: Any, tmp_path: Path) -> None:
    image = make.jpeg(1)
    source = make.folder({"train/cat/0.jpg": image, "val/cat/1.jpg": image}, tmp_path / "src")
    ended = tidali("shard", source, tmp_path / "data")
    assert ended.code == 0
    for part in ("only one class, 'cat'", "byte-identical images: 1 in more than one split; 'tidali verify"):
        assert part in ended.stderr
    verified = tidali("verify", tmp_path / "data")
    assert verified.code == 0
    assert "the same image: 'train/cat/0.jpg' (train, class 'cat'), 'val/cat/1.jpg' (val, class 'cat')" in verified.stdout
    assert "in several splits or under several classes, as in the source: 1 image" in verified.stderr


def test_a_list_of_classes_from_another_system(tidali: Any, make: Any, tmp_path: Path) -> None:
    """With a byte order mark, decomposed letters and carriage returns; the names on the disk are composed."""
    source = make.folder(
        {f"train/{name}/0.jpg": make.jpeg(n) for n, name in enumerate(("Café", "cat", "dog"))}, tmp_path / "src"
    )
    (tmp_path / "classes.txt").write_bytes("\ufeffdog\r\nCafe\u0301 \r\n".encode())
    assert tidali("shard", source, tmp_path / "data", "--classes", tmp_path / "classes.txt").code == 0
    manifest = open_dataset(tmp_path / "data").manifest
    assert [class_.id for class_ in manifest.classes] == ["Café", "dog"]
    assert manifest.settings["classes"] == ["dog", "Café"]
    (tmp_path / "classes.txt").write_bytes("dog\nCaf\u0435".encode())
    refused = tidali("shard", source, tmp_path / "other", "--classes", tmp_path / "classes.txt")
    assert refused.code == 2
    assert r"'Caf\u0435'" in refused.stderr, "a Cyrillic letter"


def test_the_bytes_and_the_output_of_another_locale(make: Any, tmp_path: Path, contents: Any) -> None:
    """Python decodes names and prints as ASCII there."""
    tree = {f"{split}/{name}/é{n}.jpg": make.jpeg(n) for split in ("train", "val") for n, name in enumerate(("Café", "日本"))}
    source = make.folder(tree | {"train/Café/à.jpg": b""}, tmp_path / "Données")
    make.pack(source, tmp_path / "here")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["shard", source, tmp_path / "there"], ["info", tmp_path / "there", "--json"]):
        command = [sys.executable, "-m", "tidali", *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert ended.returncode == 0, ended.stderr
    assert [class_["id"] for class_ in json.loads(ended.stdout)["classes"]] == ["Café", "日本"]
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_shard_says_what_it_did(tidali: Any, tiny_zip: Path, tmp_path: Path) -> None:
    first = tidali("shard", tiny_zip, tmp_path / "data")
    assert first.code == 0
    assert "4 classes" in first.stdout
    for split, samples in (("train", "48"), ("val", "12"), ("test", "5")):
        assert any(split in line and samples in line for line in first.stdout.splitlines())
    again = tidali("shard", tiny_zip, tmp_path / "data")
    assert again.code == 0
    assert "0 shards written, 3 kept from an earlier run" in again.stderr
    (tmp_path / "data" / "val-000000.idx").write_text("x")
    repaired = tidali("shard", tiny_zip, tmp_path / "data")
    assert ": val-000000.tar" in repaired.stderr
    refused = tidali("shard", tiny_zip, tmp_path / "data", "--seed", 3)
    assert refused.code == 2
    assert refused.stderr.count("\n") == 1
    assert "seed is 0 there and 3 here" in refused.stderr
    assert tidali("shard", tiny_zip, tmp_path / "data", "--seed", 3, "--overwrite").code == 0
    assert open_dataset(tmp_path / "data").manifest.settings["seed"] == 3


def test_shard_options_reach_the_manifest(tidali: Any, tiny_zip: Path, tmp_path: Path) -> None:
    ids = tmp_path / "classes.txt"
    ids.write_text("n00008963\nn00009000\n\n")
    options = [
        "--shard-size",
        "8KiB",
        "--val-fraction",
        "0.25",
        "--classes",
        ids,
        "--size",
        20,
        "--kernel",
        "opencv",
        "--seed",
        9,
    ]
    ended = tidali(
        "shard", tiny_zip, tmp_path / "data", *options, "--layout", "tiny-imagenet", "--max-pixels", 5000, "--workers", 1
    )
    assert ended.code == 0, ended.stderr
    manifest = open_dataset(tmp_path / "data").manifest
    assert manifest.settings == {
        "seed": 9,
        "shard_samples": None,
        "shard_size_bytes": 8192,
        "val_fraction": 0.25,
        "classes": ["n00008963", "n00009000"],
        "size_px": 20,
        "kernel": "opencv",
        "max_pixels": 5000,
    }
    assert list(manifest.splits) == ["train", "heldout", "val", "test"]
    assert manifest.splits["train"].image_sizes == {"20x20": 18}
    assert len(manifest.splits["train"].shards) > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-samples", "5", "--shard-size", "1MB"], "give one of --shard-samples and --shard-size, not both"),
        (["--shard-size", "huge"], "--shard-size huge: give a size such as 64MB"),
        (["--classes", "nowhere.txt"], "--classes nowhere.txt: neither a number nor a readable file"),
        (["--classes", "5"], "--classes 5: the source has 4"),
        (["--val-fraction", "1.5"], "--val-fraction must be in [0, 1), not 1.5"),
        (["--layout", "folder"], "test has a class 'images' that train does not have"),
    ],
)
def test_wrong_options_are_one_line(tidali: Any, tiny_zip: Path, tmp_path: Path, options: list[str], message: str) -> None:
    ended = tidali("shard", tiny_zip, tmp_path / "data", *options)
    assert ended.code == 2
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_strict_and_the_warning(tidali: Any, make: Any, tmp_path: Path) -> None:
    tree = make.folder_tree() | {f"train/class_0/bad {n}.jpg": b"" for n in range(12)}
    source = make.folder(tree, tmp_path / "src")
    ended = tidali("shard", source, tmp_path / "data")
    assert ended.code == 0
    assert "warning: not usable as images: 12 files;" in ended.stderr
    assert "'train/class_0/bad 0.jpg': empty file" in ended.stderr
    assert "and 2 more" in ended.stderr
    strict = tidali("shard", source, tmp_path / "data", "--strict")
    assert strict.code == 1
    assert "--strict allows no quarantined file, and there are 12" in strict.stderr
    assert "--strict" in strict.stderr
    assert "quarantined: 'train/class_0/bad 7.jpg': empty file" in tidali("info", tmp_path / "data").stdout


def test_verify(tidali: Any, packed: Path, make: Any, tiny_zip: Path, tmp_path: Path) -> None:
    good = tidali("verify", packed, "--decode")
    assert good.code == 0
    assert "65 samples in 8 shards" in good.stdout
    assert "every file, header, label and image is right" in good.stdout
    make.pack(tiny_zip, tmp_path / "data")
    (tmp_path / "data" / "val-000000.idx").unlink()
    (tmp_path / "data" / "train-000007.tar").write_bytes(b"x")
    bad = tidali("verify", tmp_path / "data")
    assert bad.code == 1
    assert "val-000000.idx: is missing; pack the source again" in bad.stdout
    assert "train-000007.tar: is in no split of the manifest; remove it" in bad.stdout
    assert "2 faults" in bad.stderr
    none = tidali("verify", tmp_path)
    assert none.code == 2
    assert "no dataset.json here" in none.stderr


def test_info(tidali: Any, packed: Path, tmp_path: Path) -> None:
    shown = tidali("info", packed)
    assert shown.code == 0
    for text in ("4 classes", "tiny.zip (tiny-imagenet)", "mean of train", "simplejpeg", "quarantined"):
        assert text in shown.stdout
    rows = [line.split() for line in shown.stdout.splitlines()]
    manifest = open_dataset(packed).manifest
    for label, one in enumerate(manifest.classes):  # each class with its images in each split
        counts = [str(split.class_counts[label]) for split in manifest.splits.values() if split.class_counts]
        assert any(row[0] == one.name.split()[0] and row[-len(counts) :] == counts for row in rows if row)
    document = json.loads(tidali("info", packed, "--json").stdout)
    manifest = open_dataset(packed).manifest
    assert document["splits"]["train"]["samples"] == 48
    assert document["splits"]["train"]["size_bytes"] == manifest.splits["train"].size_bytes
    assert document["mean"] == list(manifest.mean)
    assert len(document["classes"]) == 4


@pytest.mark.slow
def test_contact_sheet(tidali: Any, packed: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert tidali("info", packed, "--sheet", tmp_path / f"{name}.png").code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (8 * 134 + 6, 22 + 6 * 166 + 6)
        assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 1000
    few = tidali("info", packed, "--sheet", tmp_path / "val.png", "--split", "test")
    assert few.code == 0
    assert tidali("info", packed, "--sheet", tmp_path / "x.png", "--split", "heldout").code == 1
    unwritable = tidali("info", packed, "--sheet", tmp_path / "no" / "x.png")
    assert unwritable.code == 2
    assert f"no folder {tmp_path / 'no'}" in unwritable.stderr
    assert tidali("info", packed, "--sheet", tmp_path).code == 2


def test_a_contact_sheet_on_a_full_disk(tidali: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = tmp_path / "sheet.png"
    assert tidali("info", packed, "--sheet", sheet).code == 0
    before = sheet.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    ended = tidali("info", packed, "--sheet", sheet, "--seed", 1)
    assert (ended.code, ended.stdout) == (1, "")
    assert "sheet.png: cannot be written (No space left on device)" in ended.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {sheet: before}


@pytest.mark.slow
def test_contact_sheet_of_what_the_network_sees(tidali: Any, packed: Path, tmp_path: Path) -> None:
    def sheet(name: str, *options: object) -> Image.Image:
        path = tmp_path / f"{name}.png"
        ended = tidali("info", packed, "--sheet", path, "--recipe", "modern", *options)
        assert ended.code == 0, ended.stderr
        with Image.open(path) as image:
            return image.convert("RGB")

    plain = sheet("plain", "--set", "augment.flip=none")
    assert plain.size == (8 * 134 + 6, 22 + 6 * 166 + 6)
    assert plain == sheet("again", "--set", "augment.flip=none")
    for number, change in enumerate(["augment.flip=random", "augment.erase=1", "augment.mixup_alpha=1"]):
        assert sheet(str(number), "--set", "augment.flip=none", "--set", change) != plain
    assert sheet("small", "--set", "augment.flip=none", "--res", 32) != plain
    # The same images as without a recipe, each with what becomes of it to its right: its centre square, 40 of 48 x 40 pixels.
    assert tidali("info", packed, "--sheet", tmp_path / "stored.png").code == 0
    with Image.open(tmp_path / "stored.png") as image:
        stored = image.convert("RGB")
    for number in range(8):
        before, after = cell(plain, 2 * number), cell(plain, 2 * number + 1)
        assert before == cell(stored, number)
        square = before.crop((10, 10, 118, 118)).resize(after.size)
        # Enlarged by two filters, in another order: the noise differs by some levels. Two of these images differ by 40.
        assert max(ImageStat.Stat(ImageChops.difference(square, after)).mean) < 12


def cell(sheet: Image.Image, number: int) -> Image.Image:
    """The picture of one cell, without its caption."""
    left, top = 6 + number % 8 * 134, 28 + number // 8 * 166
    return sheet.crop((left, top, left + 128, top + 128))


def test_outliers(tidali: Any, tmp_path: Path, write_photos: Any) -> None:
    """A copy under another class, a small, a large, a black and a white image are found, by the names of their files."""
    source = write_photos(tmp_path / "source", {"a": 12, "b": 12}, size=(64, 48))
    shutil.copy(source / "a" / "003.jpg", source / "b" / "copied.jpg")
    for name, size, colour in (("small", (20, 16), "grey"), ("large", (300, 200), "grey"), ("black", (64, 48), "black")):
        Image.new("RGB", size, colour).save(source / "a" / f"{name}.png")
    Image.new("RGB", (64, 48), "white").save(source / "b" / "white.png")
    assert tidali("shard", source, tmp_path / "data", "--workers", 1).code == 0
    ended = tidali("info", tmp_path / "data", "--sheet", tmp_path / "odd.png", "--outliers")
    assert ended.code == 0, ended.stderr
    found: dict[str, list[str]] = {}
    for line in ended.stderr.splitlines():
        kind, _, rest = line.partition(": ")
        found.setdefault(kind, []).append(rest.split(" (")[0])
    assert sorted(found["byte for byte the same"]) == ["a/003.jpg", "b/copied.jpg"]
    assert found["smallest"][0] == "a/small.png"
    assert found["largest"][0] == "a/large.png"
    assert found["darkest"][0] == "a/black.png"
    assert {"a/black.png", "b/white.png"} <= set(found["most unusual colours for their class"][:4])
    with Image.open(tmp_path / "odd.png") as image:
        assert image.width == 8 * 134 + 6


def test_an_image_of_another_split_is_an_outlier(tidali: Any, tmp_path: Path, write_photos: Any) -> None:
    """What is trained on and evaluated makes a result look better than it is."""
    source = tmp_path / "source"
    for split in ("train", "val"):
        write_photos(source / split, {"a": 4, "b": 4}, size=(64, 48))
        for file in (source / split).rglob("*.jpg"):
            file.write_bytes(file.read_bytes() + split.encode())  # equal pictures, other bytes
    shutil.copy(source / "train" / "b" / "003.jpg", source / "val" / "a" / "leaked.jpg")
    assert tidali("shard", source, tmp_path / "data", "--workers", 1).code == 0
    for split in ("train", "val"):
        ended = tidali("info", tmp_path / "data", "--sheet", tmp_path / "odd.png", "--outliers", "--split", split)
        assert ended.code == 0, ended.stderr
        assert f"1 image of {split} is in another split too" in ended.stderr
        assert "smallest" not in ended.stderr  # all have the same size
        heading = f"byte for byte the same in {split} and another split: "
        assert sorted(line for line in ended.stderr.splitlines() if line.startswith(heading)) == [
            f"{heading}train/b/003.jpg (b, one of 2, train)",
            f"{heading}val/a/leaked.jpg (a, one of 2, val)",
        ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--recipe", "modern"], "--sheet"),
        (["--sheet", "x.png", "--res", "64"], "--recipe"),
        (["--sheet", "x.png", "--recipe", "modern", "--res", "4"], "--res 4"),
        (["--outliers"], "--sheet"),
        (["--sheet", "x.png", "--recipe", "modern", "--outliers"], "--recipe"),
        (["--sheet", "x.png", "--recipe", "modern", "--set", "augment.zoom=1"], "augment.zoom"),
    ],
)
def test_contact_sheet_options_are_checked(tidali: Any, packed: Path, options: list[str], says: str) -> None:
    ended = tidali("info", packed, *options)
    assert (ended.code, says in ended.stderr) == (2, True), ended.stderr


def test_demo(tidali: Any, tmp_path: Path) -> None:
    ended = tidali("demo", tmp_path / "demo", "--classes", 3, "--per-class", 10)
    assert ended.code == 0
    assert "3 classes" in ended.stdout
    assert tidali("demo", tmp_path / "demo", "--classes", 1).code == 2


def test_download_checks_the_md5(tidali: Any, tmp_path: Path) -> None:
    data = b"a zip"
    (tmp_path / "tiny.zip").write_bytes(data)
    url = "http://127.0.0.1:9/tiny.zip"  # not asked: the file is there already
    ended = tidali("download", tmp_path, "--url", url, "--md5", hashlib.md5(data).hexdigest())
    assert (ended.code, ended.stdout.strip()) == (0, str(tmp_path / "tiny.zip"))
    assert tidali("download", tmp_path, "--url", url, "--md5", "0" * 32).code == 2


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5000", "64MB", "1.5 GiB", "2kib")] == [5000, 64_000_000, 1_610_612_736, 2048]
    for text in ("", "MB", "5 parsecs", "infGB"):
        with pytest.raises(UsageError):
            parse_size(text)


def test_a_manifest_survives_its_own_text(packed: Path) -> None:
    manifest = open_dataset(packed).manifest
    assert Manifest.from_json(manifest.to_json(), "x") == manifest
