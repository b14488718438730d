"""Faults put into a packed data set one at a time: `verify` finds each and names its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from shards.record import seal, unseal
from shards.verify import VerifyReport, verify
from tidali.dataset.contract import MANIFEST_NAME, Manifest, open_dataset
from tidali.errors import DatasetError


@pytest.fixture(scope="module")
def pristine(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 train (one of them damaged), 12 val and 5 test images in shards of 10."""
    tree = make.tiny_tree()
    tree["train/n00009000/images/n00009000_7.JPEG"] = b"damaged"
    root = tmp_path_factory.mktemp("verify")
    make.pack(make.zip(tree, root / "tiny.zip"), root / "data", shard_samples=10)
    return root / "data"


@pytest.fixture
def data(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def found(report: VerifyReport) -> str:
    return "\n".join(str(fault) for fault in report.faults)


@pytest.mark.parametrize("decode", [False, True])
def test_a_good_data_set_has_no_faults(pristine: Path, decode: bool) -> None:
    report = verify(pristine, decode=decode)
    assert found(report) == ""
    assert (report.shards, report.samples) == (8, 64)


def test_each_tar_is_opened_once(pristine: Path) -> None:
    with mock.patch("builtins.open", wraps=open) as opened:
        verify(pristine, workers=1)
    names = [Path(call.args[0]).name for call in opened.call_args_list]
    assert sorted(name for name in names if name.endswith(".tar")) == sorted(path.name for path in pristine.glob("*.tar"))


SHARD = "train-000002"


class Sample:
    """The fourth sample of train-000002, and where its parts are in the tar."""

    def __init__(self, root: Path) -> None:
        self.record = json.loads((root / f"{SHARD}.json").read_bytes())["samples"][3]
        self.key = self.record["key"]
        self.image_at = self.record["offset"]
        self.label_at = self.image_at + -(-self.record["size_bytes"] // 512) * 512 + 512


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(one: Path, two: Path) -> None:
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


def edit_manifest(root: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((root / MANIFEST_NAME).read_text())
    edit(document)
    (root / MANIFEST_NAME).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def edit_index(root: Path, edit: Callable[[list[str]], Any]) -> None:
    path = root / f"{SHARD}.idx"
    lines = path.read_text().splitlines()
    edit(lines)
    path.write_text("".join(f"{line}\n" for line in lines))


def relabel_everywhere(root: Path) -> None:
    """A label changed in the tar and the record alike, every hash of both made anew: only the class counts still tell."""
    sample = Sample(root)
    tar = bytearray((root / f"{SHARD}.tar").read_bytes())
    other = (sample.record["label"] + 1) % 4
    tar[sample.label_at] = ord(str(other))
    (root / f"{SHARD}.tar").write_bytes(tar)
    rehash(root, lambda record: record["samples"][3].update(label=other))


def rehash(root: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the shard's record and bring every hash in line: a wrong pack rather than a damaged one."""
    from hashlib import sha256

    record = unseal((root / f"{SHARD}.json").read_bytes())
    edit(record)
    del record["checksum"]
    record["sha256"] = sha256((root / f"{SHARD}.tar").read_bytes()).hexdigest()
    sealed = seal(record)
    (root / f"{SHARD}.json").write_bytes(sealed)

    def into_manifest(document: dict[str, Any]) -> None:
        shard = document["splits"]["train"]["shards"][2]
        shard.update(sha256=record["sha256"], record_sha256=sha256(sealed).hexdigest())

    edit_manifest(root, into_manifest)
    text = Manifest.from_json((root / MANIFEST_NAME).read_text(), "x").to_json()
    (root / MANIFEST_NAME).write_text(text)


# fault -> (how it is put in, what verify must say, whether the cheap check of every command sees it)
FAULTS: dict[str, tuple[Callable[[Path], Any], list[str], bool]] = {
    "flipped bit in an image": (
        lambda d: flip(d / f"{SHARD}.tar", Sample(d).image_at + 700),
        ["train-000002.tar: sample {key} at byte {image_at}: the image's bytes are not those that were packed (CRC-32)"],
        False,
    ),
    "flipped bit in an image's header": (
        lambda d: flip(d / f"{SHARD}.tar", Sample(d).image_at - 512 + 3),
        ["train-000002.tar: sample {key} at byte {header_at}: no header of {key}.jpg with"],
        False,
    ),
    "flipped bit in a label": (
        lambda d: flip(d / f"{SHARD}.tar", Sample(d).label_at),
        ["train-000002.tar: sample {key} at byte {label_at}: the label reads"],
        False,
    ),
    "flipped bit in padding": (
        lambda d: flip(d / f"{SHARD}.tar", Sample(d).label_at + 100),
        ["train-000002.tar: its SHA-256 is not the manifest's"],
        False,
    ),
    "flipped bit in the end of the archive": (
        lambda d: flip(d / f"{SHARD}.tar", -5),
        ["train-000002.tar at byte", "does not end as a tar does"],
        False,
    ),
    "tar truncated in a member": (
        lambda d: os.truncate(d / f"{SHARD}.tar", Sample(d).image_at + 50),
        ["train-000002.tar: sample {key} at byte {image_at}: ends before the end of {key}.jpg", "truncated:"],
        True,
    ),
    "tar with more behind": (
        lambda d: (d / f"{SHARD}.tar").open("ab").write(bytes(512)),
        ["train-000002.tar: too long:"],
        True,
    ),
    "two tars swapped": (
        lambda d: swap(d / "train-000001.tar", d / "train-000002.tar"),
        [
            "train-000001.tar: its content is that of train-000002.tar",
            "train-000002.tar: its content is that of train-000001.tar",
        ],
        True,
    ),
    "two indexes swapped": (
        lambda d: swap(d / "train-000001.idx", d / "train-000002.idx"),
        ["train-000001.idx: its content is that of train-000002.idx", "train-000002.idx: its content is that of"],
        True,
    ),
    "two records swapped": (
        lambda d: swap(d / "train-000001.json", d / "train-000002.json"),
        ["train-000001.json: its content is that of train-000002.json"],
        False,
    ),
    "stale index": (
        lambda d: edit_index(d, lambda lines: lines.insert(1, lines.pop(4))),
        ["train-000002.idx: sample", "line 2 says 'jpg "],
        True,
    ),
    "index with a wrong offset": (
        lambda d: edit_index(d, lambda lines: lines.__setitem__(4, lines[4].replace(" ", " 1", 1))),
        ["train-000002.idx: sample {key}: line 5 says 'jpg 1"],
        True,
    ),
    "index that lacks a line": (
        lambda d: edit_index(d, lambda lines: lines.pop()),
        ["train-000002.idx: train-000002.idx: states 10 samples but lists 9"],
        True,
    ),
    "index cut whole": (
        lambda d: edit_index(d, lambda lines: (lines.pop(), lines.__setitem__(0, "v1.2 9"))),
        ["train-000002.idx: line 1 says 'v1.2 9', the tar has 'v1.2 10'"],
        True,
    ),
    "missing index": (lambda d: (d / f"{SHARD}.idx").unlink(), ["train-000002.idx: is missing"], True),
    "empty index": (lambda d: (d / f"{SHARD}.idx").write_bytes(b""), ["train-000002.idx: is empty"], True),
    "index of garbage": (
        lambda d: (d / f"{SHARD}.idx").write_bytes(b"\xff\x00"),
        ["train-000002.idx: not readable as an index"],
        True,
    ),
    "missing tar": (lambda d: (d / f"{SHARD}.tar").unlink(), ["train-000002.tar: is missing"], True),
    "empty tar": (lambda d: (d / f"{SHARD}.tar").write_bytes(b""), ["train-000002.tar: is empty"], True),
    "missing record": (lambda d: (d / f"{SHARD}.json").unlink(), ["train-000002.json: is missing"], False),
    "flipped bit in a record": (
        lambda d: flip(d / f"{SHARD}.json", 900),
        ["train-000002.json: its SHA-256 is not the manifest's"],
        False,
    ),
    "missing shard": (
        lambda d: [(d / f"{SHARD}.{e}").unlink() for e in ("tar", "idx", "json")],
        ["train-000002.tar: is missing", "train-000002.idx: is missing", "train-000002.json: is missing"],
        True,
    ),
    "extra shard": (
        lambda d: [shutil.copy(d / f"{SHARD}.{e}", d / f"train-000009.{e}") for e in ("tar", "idx", "json")],
        ["train-000009.tar: is in no split of the manifest; remove it, or pack again", "train-000009.json: is in no split"],
        False,
    ),
    "unfinished run": (
        lambda d: (d / ".tidali-plan.json").write_text("{}"),
        [".tidali-plan.json: left by a packer"],
        False,
    ),
    "quarantined file changed": (
        lambda d: next((d / "quarantine").iterdir()).write_bytes(b"?"),
        ["quarantine/train-0000", "its SHA-256 is not the manifest's"],
        False,
    ),
    "quarantined file gone": (
        lambda d: next((d / "quarantine").iterdir()).unlink(),
        ["quarantine/train-0000", "is missing"],
        False,
    ),
    "a sample packed twice": (
        lambda d: rehash(
            d, lambda r: r["samples"][0].update(key=json.loads((d / "train-000001.json").read_text())["samples"][0]["key"])
        ),
        ["_... is in train-000001.tar and in train-000002.tar: a sample twice"],
        False,
    ),
    "label out of range": (
        lambda d: rehash(d, lambda r: r["samples"][3].update(label=4)),
        ["train-000002.json: sample {key}: label 4 of 4 classes", "the label reads"],
        False,
    ),
    "label changed everywhere": (relabel_everywhere, ["dataset.json: splits.train.class_counts["], False),
    "manifest: shard hash": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["train"]["shards"][2].update(sha256="0" * 64)),
        ["dataset.json: splits.train.shards[2].sha256 is"],
        False,
    ),
    "manifest: sample count": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["train"].update(samples=49)),
        ["dataset.json: splits.train.samples is 49, the shards' records say 47"],
        False,
    ),
    "manifest: class count": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["val"]["class_counts"].__setitem__(1, 2)),
        ["dataset.json: splits.val.class_counts[1] is 2, the shards' records say 3"],
        False,
    ),
    "manifest: mean": (
        lambda d: edit_manifest(d, lambda m: m.update(mean=[0.5, 0.5, 0.5])),
        ["dataset.json: mean[0] is 0.5"],
        False,
    ),
    "manifest: class name": (
        lambda d: edit_manifest(d, lambda m: m["classes"][1].update(name="something else")),
        ["dataset.json: its source, settings or classes are not those that the shards were packed with"],
        False,
    ),
    "manifest: seed": (
        lambda d: edit_manifest(d, lambda m: m["settings"].update(seed=3)),
        ["dataset.json: its source, settings or classes are not those"],
        False,
    ),
    "manifest: quarantine": (
        lambda d: edit_manifest(d, lambda m: m.update(quarantine=[])),
        ["dataset.json: quarantine is []"],
        False,
    ),
    "manifest: a shard dropped": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["train"]["shards"].pop(2)),
        ["dataset.json: splits.train.samples is 47, the shards' records say 37", "train-000002.tar: is in no split"],
        False,
    ),
    "manifest: versions": (
        lambda d: edit_manifest(d, lambda m: m["versions"].update(pillow="1.0")),
        ["dataset.json: was edited"],
        False,
    ),
    "manifest: cut": (lambda d: os.truncate(d / MANIFEST_NAME, 500), ["dataset.json:", "damaged manifest"], True),
    "manifest: of a newer version": (
        lambda d: edit_manifest(d, lambda m: m.update(version=2)),
        ["format version 2, this tidali reads 1"],
        True,
    ),
    "manifest: a path as a shard's name": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["val"]["shards"][0].update(name="../../x.tar")),
        ["'../../x.tar' is not a name"],
        True,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found_and_named(data: Path, name: str) -> None:
    put_in, messages, seen_by_cheap_check = FAULTS[name]
    sample = Sample(data)
    places = {"key": sample.key, "image_at": sample.image_at, "header_at": sample.image_at - 512, "label_at": sample.label_at}
    put_in(data)
    text = found(verify(data))
    for message in messages:
        assert message.format(**places) in text
    assert all("; " in line for line in text.splitlines()), "each fault names its fix"
    assert all("--overwrite" in line for line in text.splitlines() if line.startswith(MANIFEST_NAME)), "packing refuses else"
    assert len(text.splitlines()) <= 12, "one fault is not drowned in its consequences"
    if seen_by_cheap_check:
        with pytest.raises(DatasetError):
            open_dataset(data)
    else:
        open_dataset(data)


@pytest.mark.parametrize("name", [name for name in FAULTS if name.startswith("manifest")])
def test_the_mend_of_a_manifest_mends_it(make: Any, pristine: Path, data: Path, name: str) -> None:
    FAULTS[name][0](data)
    make.pack(pristine.parent / "tiny.zip", data, shard_samples=10, overwrite=True)
    assert found(verify(data)) == ""
    assert (data / MANIFEST_NAME).read_bytes() == (pristine / MANIFEST_NAME).read_bytes()


def test_decode_finds_what_hashes_cannot(data: Path) -> None:
    """An image that was packed though it is none: every hash is of the wrong bytes and agrees with them."""
    from zlib import crc32

    sample = Sample(data)
    tar = bytearray((data / f"{SHARD}.tar").read_bytes())
    end = sample.image_at + sample.record["size_bytes"]
    tar[end - 2 : end] = b"\0\0"  # the JPEG's end marker
    (data / f"{SHARD}.tar").write_bytes(tar)
    rehash(data, lambda record: record["samples"][3].update(crc32=crc32(tar[sample.image_at : end])))
    assert found(verify(data)) == ""
    text = found(verify(data, decode=True))
    assert text.startswith(
        f"{SHARD}.tar: sample {sample.key} at byte {sample.image_at}: the image does not decode: damaged JPEG"
    )


def test_many_faults_are_counted_not_listed(data: Path) -> None:
    (data / f"{SHARD}.tar").write_bytes(bytes((data / f"{SHARD}.tar").stat().st_size))
    text = found(verify(data))
    assert f"{SHARD}.tar: and" in text
    assert len(text.splitlines()) < 15


def test_ordinals_may_have_more_than_eight_digits(data: Path) -> None:
    rehash(data, lambda record: [record["samples"][n].update(key=f"12345678{n}_x") for n in (0, 1)])
    assert "a sample twice" not in found(verify(data))
    rehash(data, lambda record: [record["samples"][n].update(key="123456780_x") for n in (0, 1)])
    assert "key 123456780_... is in train-000002.tar" in found(verify(data))


def test_workers_find_the_same(data: Path) -> None:
    flip(data / f"{SHARD}.tar", Sample(data).image_at + 700)
    (data / "val-000000.idx").unlink()
    assert found(verify(data, workers=2)) == found(verify(data, workers=1)) != ""


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no dataset\.json here; make a data set with 'tidali shard"):
        verify(tmp_path)


def test_dalis_own_faults(make: Any, dali_rgb: Any) -> None:
    """Among them a failure, after which the next image is decoded as if nothing had been."""
    from tidali.loading.dali_check import dali_fault

    data = make.encode(make.image(1), "PNG")
    pixels = np.asarray(make.image(1))
    assert dali_fault(data, pixels) is None
    assert "DALI fails" in str(dali_fault(data[:-20], pixels))
    assert dali_fault(data, pixels) is None
    assert "40 x 48" in str(dali_fault(data, pixels[:-1]))
    assert "2 grey levels" in str(dali_fault(data, np.where(pixels > 100, pixels - 2, pixels)))


def test_a_fault_of_dali_alone_names_the_source(pristine: Path) -> None:
    """As no such file is known, DALI's answer is made up."""
    report = verify(pristine, decode=True, second_decoder=lambda data, pixels: "DALI fails on it", workers=1)
    assert [fault.text for fault in report.faults].count("DALI fails on it") == 64
    assert "train/" in report.faults[0].fix
    assert "PNG" in report.faults[0].fix
