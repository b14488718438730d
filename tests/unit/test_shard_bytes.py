"""Tar members, keys, labels and indexes against GNU tar, Python's tarfile and DALI's own index writer."""

from __future__ import annotations

import re
import shutil
import string
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidali.dataset.shard_bytes import (
    END_OF_ARCHIVE,
    Component,
    format_index,
    label_bytes,
    label_digits,
    member_header,
    padding,
    parse_index,
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


@given(st.integers(0, 10**8 - 1), st.text(min_size=0, max_size=200), st.sampled_from(["jpg", "png", "webp", "bmp"]))
def test_key_is_safe_in_tar_index_and_webdataset(ordinal: int, source_name: str, extension: str) -> None:
    key = safe_key(ordinal, source_name)
    assert re.fullmatch(rf"{ordinal:08d}_[A-Za-z0-9_-]*", key)
    header = member_header(f"{key}.{extension}", 1)
    assert tarfile.TarInfo.frombuf(header, "ascii", "strict").name == f"{key}.{extension}"


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


@pytest.mark.parametrize(("label", "digits", "expected"), [(0, 1, b"0"), (7, 3, b"007"), (199, 3, b"199")])
def test_label_bytes(label: int, digits: int, expected: bytes) -> None:
    assert label_bytes(label, digits) == expected


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
