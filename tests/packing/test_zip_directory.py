"""The central directory against Python's zipfile, and what zipfile does not read: other encodings, offsets that wrapped."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.scan import FileSource
from shards.zip_directory import Member, read_directory
from tidali.errors import UsageError

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
    assert list(read_directory(path)) == by_zipfile(path)


@pytest.mark.slow
def test_more_members_than_16_bits_count(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write(path, {f"{number}": b"" for number in range(66_000)})
    members = list(read_directory(path))
    assert len(members) == 66_000
    assert members == by_zipfile(path)


def test_a_comment_and_bytes_before_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write(path, {"a/b.jpg": b"12345", "c.txt": b""})
    plain = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a comment"
    commented = path.read_bytes()
    for data in (commented, b"#!/bin/sh\n" + plain, b"#!/bin/sh\n" + commented):
        path.write_bytes(data)
        assert list(read_directory(path)) == by_zipfile(path)


def test_members_with_64_bit_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a.jpg", "w", force_zip64=True) as member:
        member.write(b"12345")
    # The standard library writes the 64-bit fields to the directory only where they are needed: put them there.
    data = path.read_bytes()
    at = data.index(b"PK\1\2")
    entry, end = data[at : data.index(b"PK\5\6")], data[data.index(b"PK\5\6") :]
    extra = struct.pack("<HHQQ", 1, 16, 5, 5)
    assert entry[30:32] == b"\0\0"
    entry = entry[:20] + b"\xff" * 8 + entry[28:30] + struct.pack("<H", len(extra)) + entry[32:] + extra
    path.write_bytes(data[:at] + entry + end[:12] + struct.pack("<L", len(entry)) + end[16:])
    (member_read,) = read_directory(path)
    assert [member_read] == by_zipfile(path)
    assert (member_read.size_bytes, member_read.stored_bytes) == (5, 5)


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
        found = [member._replace(is_guessed=False) for member in read_directory(path)]
    except zipfile.BadZipFile:
        found = None
    assert expected is None or found in (expected, None)


# ------------------------------------------------------------------------------------------------------------ names, by hand


def archive_of(members: list[tuple[bytes, bytes, int, bytes]], modulus: int = 1 << 32, before: bytes = b"") -> bytes:
    """A stored zip of (raw name, data, flags, extra field), whose offsets are known modulo ``modulus`` alone."""
    body, directory = bytearray(before), bytearray()
    for name, data, flags, extra in members:
        numbers = struct.pack("<HHHHLLLH", flags, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name))
        offset = (len(body) - len(before)) % modulus
        body += b"PK\3\4\x14\0" + numbers + struct.pack("<H", len(extra)) + name + extra + data
        directory += b"PK\1\2\x14\0\x14\0" + numbers + struct.pack("<HHHHLL", len(extra), 0, 0, 0, 0, offset) + name + extra
    start = (len(body) - len(before)) % modulus
    return bytes(
        body + directory + b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, len(members), len(members), len(directory), start, 0)
    )


def unicode_path(raw: bytes, name: str, crc32: int | None = None) -> bytes:
    data = struct.pack("<BL", 1, zlib.crc32(raw) if crc32 is None else crc32) + name.encode()
    return struct.pack("<HHH", 0x5455, 2, 0) + struct.pack("<HH", 0x7075, len(data)) + data  # behind another field


CAFE_850 = "Café.jpg".encode("cp850")
NAMES: dict[str, tuple[bytes, int, bytes, str, bool]] = {
    "flag": ("Café.jpg".encode(), 0x800, b"", "Café.jpg", False),
    "UTF-8 without its flag": ("Café.jpg".encode(), 0, b"", "Café.jpg", False),
    "Unicode path field": (
        "Café.jpg".encode("cp850"),
        0,
        unicode_path("Café.jpg".encode("cp850"), "Café.jpg"),
        "Café.jpg",
        False,
    ),
    "the same beside an ASCII name": (b"Caf?.jpg", 0, unicode_path(b"Caf?.jpg", "Café.jpg"), "Café.jpg", False),
    "that field of another name": ("é.jpg".encode("cp437"), 0, unicode_path(b"", "x.jpg", 5), "é.jpg", True),
    "the flag goes before that field": ("é.jpg".encode(), 0x800, unicode_path("é.jpg".encode(), "x.jpg"), "é.jpg", False),
    "cp437": ("Café.jpg".encode("cp437"), 0, b"", "Café.jpg", True),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_in_every_encoding(tmp_path: Path, case: str) -> None:
    raw, flags, extra, name, guessed = NAMES[case]
    (tmp_path / "a.zip").write_bytes(archive_of([(raw, b"12", flags, extra)]))
    (member,) = read_directory(tmp_path / "a.zip")
    assert (member.name, member.is_guessed) == (name, guessed)


def test_a_guessed_encoding_is_said(tmp_path: Path) -> None:
    names = ["train/Café/0.jpg", "train/The/0.jpg"]
    for encoding, warnings in (("utf-8", 0), ("cp437", 1)):
        (tmp_path / "a.zip").write_bytes(archive_of([(name.encode(encoding), b"12", 0, b"") for name in names]))
        scan = FileSource(tmp_path / "a.zip").scan()
        assert [class_.id for class_ in scan.classes] == ["Café", "The"]
        assert len(scan.warnings) == warnings
        assert not warnings or "cp437" in scan.warnings[0]


@pytest.mark.parametrize("raw", [b"train/caf\xe9/0.jpg", b"train/a/\0.jpg"])
def test_names_that_cannot_be(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(archive_of([(raw, b"12", 0x800, b"")]))
    with pytest.raises(UsageError, match=r"a\.zip: neither a folder nor a readable zip"):
        FileSource(tmp_path / "a.zip").scan()


@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n"])
def test_offsets_that_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes) -> None:
    """With 4 KiB in place of 4 GiB. Some data hold what looks like another member's header."""
    monkeypatch.setattr("shards.zip_directory._WRAP", 1 << 12)
    files = {f"train/c{n % 2}/{n}.jpg": bytes([n]) * (100 + 37 * n) for n in range(60)}
    files["train/c0/59a.jpg"] = b"PK\3\4" + bytes(40)
    data = archive_of([(name.encode(), data, 0, b"") for name, data in files.items()], 1 << 12, before)
    assert len(data) > 10 << 12
    (tmp_path / "a.zip").write_bytes(data)
    scan = FileSource(tmp_path / "a.zip").scan()
    with scan.reader.open() as read:
        assert {item.name: read(item, 1 << 20) for item in scan.splits["train"]} == files


def test_more_than_four_gib(tmp_path: Path) -> None:
    """A sparse file: three members, the second more than 4 GiB behind the first, without the fields for that."""
    small = archive_of([(f"train/c{n % 2}/{n}.jpg".encode(), bytes([n]) * 9, 0, b"") for n in range(3)])
    gap = 1 << 32
    second, directory = small.index(b"PK\3\4", 1), small.index(b"PK\1\2")
    with open(tmp_path / "a.zip", "wb") as file:
        file.write(small[:second])
        file.seek(second + gap)
        file.write(small[second:])
    assert directory + gap < (tmp_path / "a.zip").stat().st_size
    scan = FileSource(tmp_path / "a.zip").scan()
    with scan.reader.open() as read:
        assert sorted(read(item, 99) for item in scan.splits["train"]) == [bytes([n]) * 9 for n in range(3)]
