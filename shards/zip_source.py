"""A zip of images, read without extracting it."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards.items import Item, ItemsBuilder
from shards.source import Listing, Read, Unreadable
from shards.zip_directory import LOCAL_HEADER, LOCAL_SIGNATURE, Member, read_directory
from tidali.dataset.file_names import is_image_name, left_out_kind, printable_path, shown
from tidali.errors import TidaliError, UsageError

_EXTRA_GUESS_BYTES = 256  # name and extra field are nearly always shorter, so that one read fetches header and data
_ENCRYPTED = 0x1 | 0x40  # APPNOTE.TXT 4.4.4, bits 0 and 6


def list_zip(path: Path) -> Listing:
    """The files of a zip, without hidden ones and those of system folders.

    Raises:
        UsageError: it is no zip, or the name or kind of a member cannot be trusted.
    """
    images, other_files = ItemsBuilder(), ItemsBuilder()
    folders: set[str] = set()
    left_out: Counter[str] = Counter()
    guessed: list[str] = []
    kind_of: dict[str, str | None] = {}
    checked: set[tuple[int, int, int]] = set()
    try:
        for member in read_directory(path):
            name, flags, method, crc32, stored_bytes, size_bytes, attributes, header_offset, is_guessed = member
            if is_guessed:
                guessed.append(name)
            if (flags, method, attributes) not in checked or _is_unusual(name):
                name = _checked_name(path, member)
                checked.add((flags, method, attributes))
            folder, _, base = name.rpartition("/")
            if folder not in kind_of:
                kind_of[folder] = next(filter(None, map(left_out_kind, folder.split("/"))), None)
                if kind_of[folder] is None:
                    folders.update(_with_parents(folder, folders))
            kind = kind_of[folder] or left_out_kind(base)
            if kind is not None:
                left_out[kind] += is_image_name(base)
            elif base:
                files = images if is_image_name(base) else other_files
                files.add(name, size_bytes, (header_offset, stored_bytes, method, crc32))
        status = path.stat()
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: neither a folder nor a readable zip ({error})") from None
    listing = Listing(
        location=str(path),
        images=images.build(),
        other_files=other_files.build(),
        folders=folders,
        reader=ZipReader(os.fsencode(path), status.st_size, status.st_mtime_ns),
        left_out=+left_out,
        warnings=_about_guessed(path, guessed),
    )
    for items in (listing.images, listing.other_files):
        if (twice := items.first_repeated()) is not None:
            raise UsageError(f"{path}: contains {shown(twice)} twice; create the zip again")
    return listing


def _is_unusual(name: str) -> bool:
    """Whether all checks are needed, which take ten times as long."""
    return ".." in name or "./" in name or "//" in name or ":" in name or "\\" in name or name[:1] in "/"


def _checked_name(path: Path, member: Member) -> str:
    """The member's name with plain slashes; empty for the folder that the zip was made of."""
    name = member.name.replace("\\", "/")  # as Windows programs separate folders, against the format
    _refuse_hostile(path, member._replace(name=name))
    return _without_dots(name)  # some archivers write names in the current folder as ./NAME


def _about_guessed(path: Path, guessed: list[str]) -> tuple[str, ...]:
    if not guessed:
        return ()
    what = "names do not say their encoding and are not UTF-8; they were read as cp437 and may be wrong"
    return (f"{path}: {len(guessed)} {what}, such as {shown(guessed[0])}; create the zip again with UTF-8 names",)


def _without_dots(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join([*parts, ""] if name.endswith("/") and parts else parts)


def _with_parents(folder: str, known: set[str]) -> Iterator[str]:
    while folder and folder not in known:
        yield folder
        folder = folder.rpartition("/")[0]


def _refuse_hostile(path: Path, member: Member) -> None:
    """Nothing is ever extracted, so no name can reach outside DEST; an archive that tries is still not one to trust."""
    name = member.name
    fault = None
    parts = name.split("/")
    if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        fault = "its path leaves the archive"
    elif stat.S_ISLNK(member.external_attributes >> 16):
        fault = "it is a symbolic link"
    elif member.flags & _ENCRYPTED:
        fault = "it is encrypted"
    elif member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        fault = f"compression method {member.method} is neither stored nor deflate"
    if fault:
        raise UsageError(f"{path}: member {name!r} is refused: {fault}; create the zip again")


@dataclass(frozen=True)
class ZipReader:
    """Reads members at their recorded offsets, so that no worker parses the central directory again (1.2 s for 120,000)."""

    path: bytes
    size_bytes: int
    mtime_ns: int

    def inside(self, folder: str) -> ZipReader:
        return self  # members are found by their offsets

    @contextmanager
    def open(self) -> Iterator[Read]:
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise TidaliError(f"{printable_path(self.path)}: {error.strerror}") from None
        try:
            status = os.fstat(file)
            if (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
                raise TidaliError(f"{printable_path(self.path)}: changed while it was being packed; run the command again")
            yield lambda item, limit_bytes: _read_member(file, item, limit_bytes)
        finally:
            os.close(file)


def _read_member(file: int, item: Item, limit_bytes: int) -> bytes:
    offset, stored_bytes, method, crc32 = item.where
    if max(item.size_bytes, stored_bytes) > limit_bytes:
        raise Unreadable(f"declares {item.size_bytes:,} bytes, more than an image within the pixel limit can take")
    block = os.pread(file, LOCAL_HEADER.size + _EXTRA_GUESS_BYTES + stored_bytes, offset)
    if block[:4] != LOCAL_SIGNATURE or len(block) < LOCAL_HEADER.size:
        raise Unreadable("damaged zip: no member where its directory says")
    _, name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(block)
    start = LOCAL_HEADER.size + name_bytes + extra_bytes
    stored = block[start : start + stored_bytes]
    if len(stored) < stored_bytes:
        stored = os.pread(file, stored_bytes, offset + start)
    data = stored if method == zipfile.ZIP_STORED else _inflate(stored, item.size_bytes)
    if len(data) != item.size_bytes:
        held = f"more than {item.size_bytes:,}" if len(data) > item.size_bytes else f"{len(data):,}"
        raise Unreadable(f"damaged zip: holds {held} bytes, declares {item.size_bytes:,}", data)
    if zlib.crc32(data) != crc32:
        raise Unreadable("damaged zip: the CRC-32 is wrong", data)
    return data


def _inflate(stored: bytes, size_bytes: int) -> bytes:
    """At most one byte more than declared: a bomb is noticed, not unpacked."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, size_bytes + 1)
    except zlib.error as error:
        raise Unreadable(f"damaged zip: {error}") from None
