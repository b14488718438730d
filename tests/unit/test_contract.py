"""The contract against GNU tar, Python's tarfile and DALI's own index writer, and against every cheap kind of damage."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import string
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidali.contract import (
    END_OF_ARCHIVE,
    IMAGE_EXTENSIONS,
    MANIFEST_NAME,
    Component,
    Manifest,
    Quarantined,
    Shard,
    Split,
    format_index,
    iter_records,
    label_digits,
    member_header,
    open_dataset,
    padding,
    parse_index,
    read_member_header,
    read_record,
    safe_key,
)
from tidali.errors import DatasetError

names = st.text(string.ascii_letters + string.digits + "_-.", min_size=1, max_size=100)
sizes = st.integers(0, 8**11 - 1)


# ---------------------------------------------------------------------------------------------------------------- tar members


@given(names, sizes)
def test_header_is_what_tarfile_reads(name: str, size_bytes: int) -> None:
    info = tarfile.TarInfo.frombuf(member_header(name, size_bytes), "ascii", "strict")
    stated = (info.name, info.size, info.mode, info.uid, info.gid, info.mtime, info.uname, info.gname, info.type)
    assert stated == (name, size_bytes, 0o644, 0, 0, 0, "", "", tarfile.REGTYPE)


@given(names, sizes)
def test_header_round_trip(name: str, size_bytes: int) -> None:
    assert read_member_header(member_header(name, size_bytes)) == (name, size_bytes)


# The checksum's own bytes are left out: a leading zero may become a space without changing its value.
@given(st.integers(0, 511).filter(lambda at: not 148 <= at < 156), st.integers(1, 255))
def test_header_with_any_byte_changed_is_refused(at: int, change: int) -> None:
    header = bytearray(member_header("00000001_a.jpg", 1234))
    header[at] ^= change
    assert read_member_header(bytes(header)) is None


@pytest.mark.parametrize("header", [bytes(512), b"", member_header("a", 1)[:511], member_header("a", 1) + b"\0"])
def test_what_is_no_header(header: bytes) -> None:
    assert read_member_header(header) is None


@pytest.mark.parametrize(("name", "size_bytes"), [("a" * 101, 0), ("é", 0), ("a", 8**11)])
def test_header_that_ustar_cannot_hold(name: str, size_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"USTAR|ascii"):
        member_header(name, size_bytes)


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar on PATH")
def test_archive_is_gnu_tars_to_the_byte(tmp_path: Path) -> None:
    contents = {"00000000_a.jpg": b"x" * 513, "00000000_a.cls": b"7", "00000001_b.jpg": b"", "00000001_b.cls": b"0" * 512}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    gnu = subprocess.run(
        [
            "tar",
            "--format=ustar",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--mtime=@0",
            "--mode=0644",
            "-cf",
            "-",
            *contents,
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    ).stdout
    ours = b"".join(member_header(name, len(data)) + data + padding(len(data)) for name, data in contents.items())
    # GNU tar fills its last 10 KiB record with zeros; ours ends after the two zero blocks that POSIX asks for.
    assert gnu.rstrip(b"\0") == ours.rstrip(b"\0")
    assert gnu.startswith(ours + END_OF_ARCHIVE)


# ------------------------------------------------------------------------------------------------------------- keys and labels


@given(st.integers(0, 10**8 - 1), st.text(min_size=0, max_size=200), st.sampled_from(IMAGE_EXTENSIONS))
def test_key_is_safe_in_tar_index_and_webdataset(ordinal: int, source_name: str, extension: str) -> None:
    key = safe_key(ordinal, source_name)
    assert re.fullmatch(rf"{ordinal:08d}_[A-Za-z0-9_-]*", key)
    assert read_member_header(member_header(f"{key}.{extension}", 1)) == (f"{key}.{extension}", 1)


@given(st.lists(st.integers(0, 10**8 - 1), min_size=2, max_size=20, unique=True), st.text(max_size=30))
def test_keys_are_unique_whatever_the_names(ordinals: list[int], source_name: str) -> None:
    assert len({safe_key(ordinal, source_name) for ordinal in ordinals}) == len(ordinals)


@pytest.mark.parametrize(
    ("source_name", "stem"),
    [
        ("train/n01443537/images/n01443537_12.JPEG", "n01443537_12"),
        ("val/a photo (2).jpg", "a_photo_2_"),
        ("x.y.jpg", "x_y"),
        ("été.jpg", "_t_"),
        ("a" * 99 + ".jpg", "a" * 64),
    ],
)
def test_key_keeps_the_readable_part_of_the_name(source_name: str, stem: str) -> None:
    assert safe_key(7, source_name) == f"00000007_{stem}"


@pytest.mark.parametrize(("classes", "digits"), [(0, 1), (1, 1), (10, 1), (11, 2), (100, 2), (101, 3), (200, 3), (1000, 3)])
def test_label_digits(classes: int, digits: int) -> None:
    assert label_digits(classes) == digits


# --------------------------------------------------------------------------------------------------------------------- index

words = st.text(string.ascii_letters + string.digits + "_-.", min_size=1, max_size=12)
components = st.builds(Component, words, st.integers(0, 2**40), st.integers(0, 2**40), words)


@given(st.lists(st.lists(components, min_size=1, max_size=3), max_size=8))
def test_index_round_trip(samples: list[list[Component]]) -> None:
    assert parse_index(format_index(samples), "x.idx") == samples


def test_index_is_dalis_own_to_the_byte(demo_data: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="DALI's index writer is not installed")
    tars = sorted(demo_data.glob("*.tar"))
    assert tars
    for tar in tars:
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "by_dali.idx"), verbose=False) as creator:
            creator.create_index()
        ours = tar.with_suffix(".idx").read_text()
        assert ours == (tmp_path / "by_dali.idx").read_text()
        assert format_index(parse_index(ours, tar.name)) == ours


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a DALI index"),
        ("v1.1 0\n", "not a DALI index"),
        ("v1.2\n", "not a DALI index"),
        ("v1.2 -1\n", "not a DALI index"),
        ("v1.2 2\njpg 512 3 a.jpg\n", "states 2 samples but lists 1"),
        ("v1.2 0\njpg 512 3 a.jpg\n", "states 0 samples but lists 1"),  # DALI reads a part of this one, without a word
        ("v1.2 1\njpg 512 3\n", "line 2"),
        ("v1.2 2\njpg 512 3 a.jpg\njpg x 3 b.jpg\n", "line 3"),
        ("v1.2 1\njpg 512 -3 a.jpg\n", "line 2"),
        ("v1.2 1\njpg 512 3 a b.jpg\n", "line 2"),
    ],
)
def test_index_that_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(DatasetError, match=rf"^x\.idx: .*{complaint}"):
        parse_index(text, "x.idx")


# ------------------------------------------------------------------------------------------------------------------- manifest

documents = st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=8), max_size=3)
counts = st.dictionaries(st.text(max_size=8), st.integers(0), max_size=3)
triples = st.tuples(*[st.floats(0, 1)] * 3)
shard_names = st.builds("{}-{:06d}.tar".format, st.sampled_from(["train", "val", "heldout", "test"]), st.integers(0, 999999))
splits = st.builds(
    Split, image_sizes=counts, extensions=counts, shards=st.lists(st.builds(Shard, name=shard_names), max_size=2).map(tuple)
)
quarantined_names = st.builds("quarantine/{}-{:08d}_{}.bin".format, st.just("train"), st.integers(0, 10**9), st.just("a_b-c"))
manifests = st.builds(
    Manifest,
    quarantine=st.lists(st.builds(Quarantined, file=quarantined_names), max_size=2).map(tuple),
    splits=st.dictionaries(st.text(max_size=8), splits, max_size=2),
    mean=triples,
    std=triples,
    counts=counts,
    source=documents,
    settings=documents,
    versions=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2),
)


@given(manifests)
def test_manifest_round_trip(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json(), "dataset.json")
    assert again == manifest
    assert again.to_json() == manifest.to_json()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda document: "{", "damaged manifest"),
        (lambda document: "[]", "damaged manifest"),
        (lambda document: "{}", "not a tidali data set"),
        (lambda document: {**document, "format": "other"}, "not a tidali data set"),
        (lambda document: {**document, "version": 2}, "format version 2, this tidali reads 1"),
        (lambda document: {**document, "surprise": 1}, "damaged manifest .*surprise"),
        (lambda document: {key: document[key] for key in document if key != "classes"}, "damaged manifest .*classes"),
        (lambda document: {**document, "splits": {"train": {"name": "train"}}}, "damaged manifest"),
        (
            lambda document: json.dumps(document).replace("val-000000.tar", "../000000.tar"),
            "damaged manifest .*no name of a shard",
        ),
        (
            lambda document: {
                **document,
                "quarantine": [{"split": "train", "source": "a", "label": 0, "reason": "", "file": "quarantine/../../a.bin"}],
            },
            "damaged manifest .*no name of a quarantined file",
        ),
    ],
)
def test_manifest_that_is_refused(demo_data: Path, change: Callable[..., object], complaint: str) -> None:
    changed = change(json.loads((demo_data / MANIFEST_NAME).read_text()))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    with pytest.raises(DatasetError, match=f"^where: .*{complaint}"):
        Manifest.from_json(text, "where")


# -------------------------------------------------------------------------------------------------------------------- reading


def test_demo_opens_and_its_records_agree_with_its_tars(demo_data: Path) -> None:
    dataset = open_dataset(demo_data)
    for split, samples in {"train": 160, "val": 32}.items():
        records = list(iter_records(dataset, split))
        assert len(records) == dataset.split(split).samples == samples
        for shard, record in records:
            with (demo_data / shard.name).open("rb") as tar:
                tar.seek(record.offset - 512)
                header = tar.read(512)
            assert read_member_header(header) == (f"{record.key}.{record.extension}", record.size_bytes)


def test_missing_split_names_those_there_are(demo_data: Path) -> None:
    with pytest.raises(DatasetError, match=r"no 'test' split with samples \(splits: train, val\)"):
        open_dataset(demo_data).split("test")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


def _restate_index(root: Path, text: str) -> None:
    """Replace train's first index by one that the manifest names too, so that only the tar itself can contradict it."""
    index = root / "train-000000.idx"
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    index.write_text(text)
    manifest = root / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace(digest, hashlib.sha256(text.encode()).hexdigest()))


def _shift_index(root: Path) -> None:
    samples = parse_index((root / "train-000000.idx").read_text(), "")
    moved = [[part._replace(offset=part.offset - 512) for part in sample] for sample in samples]
    _restate_index(root, format_index(moved))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda root: (root / MANIFEST_NAME).unlink(), r"no dataset.json here; make a data set"),
        (lambda root: (root / MANIFEST_NAME).write_bytes(b"\xff\xfe"), r"dataset\.json: cannot be read"),
        (lambda root: (root / "train-000000.tar").unlink(), r"train-000000\.tar: No such file"),
        (lambda root: (root / "val-000000.idx").unlink(), r"val-000000\.idx: No such file"),
        (lambda root: _truncate(root / "train-000000.tar"), r"train-000000\.tar: \d+ bytes, the manifest says \d+"),
        (lambda root: (root / "train-000000.idx").write_text("v1.2 0\n"), r"train-000000\.idx: not the index"),
        (lambda root: shutil.copy(root / "val-000000.idx", root / "train-000000.idx"), r"train-000000\.idx: not the index"),
        (lambda root: _restate_index(root, "v1.2 0\n"), r"train-000000\.idx: does not end in a sample, the manifest says \d+"),
        (lambda root: _restate_index(root, ""), r"train-000000\.idx: does not end in a sample"),
        (lambda root: _restate_index(root, "v1.2 1\njpg 5 5 a.jpg\n"), r"train-000000\.idx: does not end in a sample"),
        (_shift_index, r"train-000000\.tar: no header of '\S+\.cls' where train-000000\.idx has it"),
    ],
    ids=[
        "no manifest",
        "manifest not text",
        "no tar",
        "no index",
        "truncated tar",
        "stale index",
        "swapped index",
        "index of no samples",
        "empty index",
        "index of an offset before the tar",
        "wrong offsets",
    ],
)
def test_damage_is_named(demo_copy: Path, damage: Callable[[Path], object], complaint: str) -> None:
    damage(demo_copy)
    with pytest.raises(DatasetError, match=complaint) as refused:
        open_dataset(demo_copy)
    assert "\n" not in str(refused.value)


def test_a_tar_that_cannot_be_opened(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its owner's will; staged, as the tests may run as root."""
    opened = Path.open

    def refuse_tars(path: Path, *args: Any, **options: Any) -> Any:
        if path.suffix == ".tar":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse_tars)
    with pytest.raises(DatasetError, match=r"train-000000\.tar: Permission denied; run 'tidali verify'"):
        open_dataset(demo_data)


@pytest.mark.parametrize("text", ["", "{}", '{"samples": [{}]}', '{"samples": 3}'])
def test_damaged_record(demo_copy: Path, text: str) -> None:
    shard = open_dataset(demo_copy).split("val").shards[0]
    (demo_copy / shard.record_name).write_text(text)
    with pytest.raises(DatasetError, match=r"val-000000\.json: damaged shard record"):
        read_record(demo_copy, shard)
