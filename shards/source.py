"""Sources of images: a folder, or a zip read without extracting it. Listed once, read by the workers."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from shards.zip_directory import Member, read_directory
from tidali.errors import TidaliError, UsageError
from tidali.files import printable

_TEXT_BYTES_LIMIT = 1 << 28


class Item(NamedTuple):
    """One file of a source. A named tuple, not a dataclass: a source has 100,000 of them and they are sent to the workers."""

    name: str
    """'/'-separated, relative to the data set's root inside the source."""
    size_bytes: int
    where: tuple[int, ...] = ()
    """What the reader needs in addition to the name. Of a zip member: header offset, stored bytes, method, CRC-32."""
    label: int | None = None

    def labelled(self, label: int | None) -> Item:
        return Item(self.name, self.size_bytes, self.where, label)  # three times as fast as _replace


class Unreadable(Exception):
    """An item that cannot be read: the reason, and the bytes that could be read."""

    def __init__(self, reason: str, data: bytes = b"") -> None:
        super().__init__(reason)
        self.data = data


Read = Callable[[Item, int], bytes]
"""``read(item, limit_bytes)``: the item's bytes. Raises `Unreadable` if they are damaged or more than the limit."""


class Reader(Protocol):
    """Reads items' bytes. Can be pickled: it is sent to the workers, and each opens it for itself."""

    def open(self) -> AbstractContextManager[Read]: ...


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files and folders of a source, before its layout is known."""

    location: str
    """For messages."""
    items: list[Item]
    folders: set[str]
    """Every folder, empty ones included."""
    reader: FolderReader | ZipReader

    def inside(self, folder: str) -> Listing:
        """The listing of one folder, with names relative to it."""
        prefix = f"{folder}/"
        return Listing(
            location=f"{self.location}/{folder}",
            items=[Item(name[len(prefix) :], size_bytes, where) for name, size_bytes, where, _ in self.items],
            folders={name[len(prefix) :] for name in self.folders if name.startswith(prefix)},
            reader=self.reader.inside(folder),
        )

    def read_text(self, name: str) -> str:
        """
        Raises:
            UsageError: the file cannot be read, is damaged, or is not UTF-8.
        """
        item = next(item for item in self.items if item.name == name)
        try:
            with self.reader.open() as read:
                return read(item, _TEXT_BYTES_LIMIT).decode("utf-8-sig")
        except TidaliError as error:
            raise UsageError(str(error)) from None
        except (Unreadable, UnicodeDecodeError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
            raise UsageError(f"{self.location}/{name}: {reason}") from None


def list_source(path: Path) -> Listing:
    """The files of a folder or a zip; hidden ones and macOS's shadow files are left out.

    Raises:
        UsageError: the path does not exist, is empty, is neither a folder nor a zip, or a member of the zip is hostile.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        listing = _list_folder(path)
    elif stat.S_ISREG(mode):
        listing = _list_zip(path)
    else:
        raise UsageError(f"{path}: no such folder or zip")
    if not listing.items:
        raise UsageError(f"{path}: contains no files")
    return listing


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name or name.startswith("__MACOSX/") or name == "__MACOSX"


# -------------------------------------------------------------------------------------------------------------------- folders


def _list_folder(root: Path) -> Listing:
    items: list[Item] = []
    folders: set[str] = set()
    for name, status in _walk(str(root), "", {os.path.realpath(root)}):
        if stat.S_ISDIR(status.st_mode):
            folders.add(name)
        elif stat.S_ISREG(status.st_mode):
            items.append(Item(name, status.st_size))
    return Listing(location=str(root), items=items, folders=folders, reader=FolderReader(str(root)))


def _walk(folder: str, prefix: str, above: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Names and status of everything below a folder. Links are followed (people link data sets together), but not back into a
    folder above."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(f"{printable(folder)}: {error.strerror}") from None
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        try:
            status = entry.stat()
        except OSError as error:
            raise UsageError(f"{printable(entry.path)}: {error.strerror}; a broken link? Fix or remove it") from None
        yield prefix + entry.name, status
        if stat.S_ISDIR(status.st_mode):
            real = os.path.realpath(entry.path)
            if real in above:
                raise UsageError(f"{printable(entry.path)}: a link back to a folder above it; remove it")
            yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {real})


@dataclass(frozen=True)
class FolderReader:
    """Reads the files below a folder."""

    root: str

    def inside(self, folder: str) -> FolderReader:
        return FolderReader(f"{self.root}/{folder}")

    def open(self) -> nullcontext[Read]:
        return nullcontext(self._read)

    def _read(self, item: Item, limit_bytes: int) -> bytes:
        path = os.path.join(self.root, item.name)
        if item.size_bytes > limit_bytes:
            raise Unreadable(f"file of {item.size_bytes:,} bytes, more than an image within the pixel limit can take")
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.read(limit_bytes + 1)
        except OSError as error:
            raise TidaliError(f"{printable(path)}: {error.strerror}") from None
        if len(data) != item.size_bytes:
            raise TidaliError(f"{printable(path)}: changed while the source was being packed; run the command again")
        return data


# ----------------------------------------------------------------------------------------------------------------------- zips

_LOCAL_HEADER_BYTES = 30  # APPNOTE.TXT 4.3.7: fixed part; then the name and the extra field, whose lengths it states
_EXTRA_GUESS_BYTES = 256  # name and extra field are nearly always shorter, so that one read fetches header and data
_ENCRYPTED = 0x1 | 0x40  # APPNOTE.TXT 4.4.4, bits 0 and 6
# Looked for in the names, one per line; `_refuse_hostile` decides whether a name with one of them is hostile.
_SIGNS_OF_HOSTILE_NAMES = ("..", "\\", ":", "\n/", "\n\n")


def _list_zip(path: Path) -> Listing:
    try:
        members = read_directory(path)
        status = path.stat()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UsageError(f"{path}: neither a folder nor a readable zip ({error})") from None
    names = "\n".join(member.name for member in members)
    if any(sign in names for sign in _SIGNS_OF_HOSTILE_NAMES) or names[:1] in "/\n" or names.endswith("\n"):
        suspects = members
    else:  # then one member of each kind is checked: 0.05 s for 110,000 members, 0.3 s if each is
        suspects = list({(member.flags, member.method, member.external_attributes): member for member in members}.values())
    for member in suspects:
        _refuse_hostile(path, member)
    if names.startswith("./") or "\n./" in names:  # some archivers write names in the current folder so
        plain = ((member, member.name.removeprefix("./")) for member in members)
        members = [member._replace(name=name) for member, name in plain if name]
    if "/." in names or "\n." in names or names.startswith(".") or "__MACOSX" in names:
        members = [member for member in members if not _is_hidden(member.name)]
    twice = [name for name, count in Counter(member.name for member in members).items() if count > 1]
    if twice:
        raise UsageError(f"{path}: contains {twice[0]!r} twice; create the zip again")
    items: list[Item] = []
    folders: set[str] = set()
    for name, _, method, crc32, stored_bytes, size_bytes, _, header_offset in members:
        if name.rpartition("/")[0] not in folders:
            folders.update(_parents(name, folders))
        if not name.endswith("/"):
            items.append(Item(name, size_bytes, (header_offset, stored_bytes, method, crc32)))
    reader = ZipReader(str(path), status.st_size, status.st_mtime_ns)
    return Listing(location=str(path), items=items, folders=folders, reader=reader)


def _parents(name: str, known: set[str]) -> Iterator[str]:
    parent = name.rstrip("/") if name.endswith("/") else name.rpartition("/")[0]
    while parent and parent not in known:
        yield parent
        parent = parent.rpartition("/")[0]


def _refuse_hostile(path: Path, member: Member) -> None:
    """Nothing is ever extracted, so no name can reach outside DEST; an archive that tries is still not one to trust."""
    name = member.name
    fault = None
    if name.startswith("/") or not name or ((".." in name or "\\" in name or ":" in name) and _leaves(name)):
        fault = "its path leaves the archive"
    elif stat.S_ISLNK(member.external_attributes >> 16):
        fault = "it is a symbolic link"
    elif member.flags & _ENCRYPTED:
        fault = "it is encrypted"
    elif member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        fault = f"compression method {member.method} is neither stored nor deflate"
    if fault:
        raise UsageError(f"{path}: member {name!r} is refused: {fault}; create the zip again")


def _leaves(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return parts[0] == "" or parts[0].endswith(":") or ".." in parts


@dataclass(frozen=True)
class ZipReader:
    """Reads members at their recorded offsets, so that no worker parses the central directory again (1.2 s for 120,000)."""

    path: str
    size_bytes: int
    mtime_ns: int

    def inside(self, folder: str) -> ZipReader:
        return self  # members are found by their offsets

    @contextmanager
    def open(self) -> Iterator[Read]:
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise TidaliError(f"{self.path}: {error.strerror}") from None
        try:
            status = os.fstat(file)
            if (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
                raise TidaliError(f"{self.path}: changed while it was being packed; run the command again")
            yield lambda item, limit_bytes: _read_member(file, item, limit_bytes)
        finally:
            os.close(file)


def _read_member(file: int, item: Item, limit_bytes: int) -> bytes:
    offset, stored_bytes, method, crc32 = item.where
    if max(item.size_bytes, stored_bytes) > limit_bytes:
        raise Unreadable(f"declares {item.size_bytes:,} bytes, more than an image within the pixel limit can take")
    block = os.pread(file, _LOCAL_HEADER_BYTES + _EXTRA_GUESS_BYTES + stored_bytes, offset)
    if block[:4] != b"PK\x03\x04" or len(block) < _LOCAL_HEADER_BYTES:
        raise Unreadable("damaged zip: no member where its directory says")
    start = _LOCAL_HEADER_BYTES + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
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
