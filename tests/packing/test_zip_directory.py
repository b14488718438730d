"""The central directory's fast reader against Python's zipfile."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import zip_directory
from shards.zip_directory import Member, read_directory

NAME = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


def by_zipfile(path: Path) -> list[Member]:
    with zipfile.ZipFile(path) as archive:
        return [
            Member(
                i.filename, i.flag_bits, i.compress_type, i.CRC, i.compress_size, i.file_size, i.external_attr, i.header_offset
            )
            for i in archive.infolist()
        ]


def write(path: Path, entries: dict[str, bytes], **kwargs: int) -> None:
    with zipfile.ZipFile(path, "w", **kwargs) as archive:  # type: ignore[arg-type]
        for name, data in entries.items():
            archive.writestr(name, data)


@settings(deadline=None, max_examples=60)
@given(entries=st.dictionaries(NAME, st.binary(max_size=60), max_size=8), deflate=st.booleans())
def test_same_as_zipfile(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, bytes], deflate: bool) -> None:
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    write(path, entries, compression=zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
    assert zip_directory._read_plain(path) == read_directory(path) == by_zipfile(path)


@pytest.mark.slow
def test_more_members_than_16_bits_count(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write(path, {f"{number}": b"" for number in range(66_000)})
    plain = zip_directory._read_plain(path)
    assert plain is not None
    assert len(plain) == 66_000
    assert plain == by_zipfile(path)


def test_what_is_out_of_the_ordinary_goes_to_zipfile(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write(path, {"a/b.jpg": b"12345", "c.txt": b""})
    plain = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a comment"
    commented = path.read_bytes()
    for data in (commented, b"#!/bin/sh\n" + plain):
        path.write_bytes(data)
        assert zip_directory._read_plain(path) is None
        assert read_directory(path) == by_zipfile(path)


@settings(deadline=None, max_examples=300)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_a_damaged_directory_is_read_as_by_zipfile_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    """Where both read it. zipfile also refuses fields that nothing here depends on, such as the version that is needed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(4):
            archive.writestr(f"train/c{number}/{number}.jpg", os.urandom(4))
    data = bytearray(buffer.getvalue())
    start = data.index(b"PK\1\2")
    data[start + position % (len(data) - start)] = value
    if cut % 5 == 0:
        del data[start + cut % (len(data) - start) :]
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    path.write_bytes(data)
    try:
        expected = by_zipfile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        expected = None
    try:
        found = read_directory(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        found = None
    assert found == expected or expected is None
