"""A source's files, listed once and read by the workers; and the source that is a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from shards.items import Item, Items, ItemsBuilder
from tidali.dataset.file_names import is_image_name, printable_path, shown, walk
from tidali.errors import TidaliError, UsageError

_TEXT_BYTES_LIMIT = 1 << 28


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


class FileReader(Reader, Protocol):
    """Reads the items of a listing."""

    def inside(self, folder: str) -> FileReader:
        """The same for the items of `Listing.inside`."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files and folders of a source, before its layout is known."""

    location: str
    """For messages."""
    images: Items
    """By suffix."""
    other_files: Items
    folders: set[str]
    """Every folder, empty ones included."""
    reader: FileReader
    left_out: Counter[str]
    """How many images are in hidden and system folders, by kind."""
    warnings: tuple[str, ...] = ()
    """What a person should know about the names."""

    def inside(self, folder: str) -> Listing:
        """The listing of the one folder that holds all images, with names relative to it."""
        prefix = f"{folder}/"
        return replace(
            self,
            location=f"{self.location}/{folder}",
            images=self.images.inside(folder),
            other_files=self.other_files.inside(folder),
            folders={name.removeprefix(prefix) for name in self.folders if name.startswith(prefix)},
            reader=self.reader.inside(folder),
        )

    def read_text(self, name: str) -> str:
        """
        Raises:
            UsageError: the file cannot be read, is damaged, or is not UTF-8.
        """
        item = self.other_files.find(name)
        assert item is not None
        try:
            with self.reader.open() as read:
                return read(item, _TEXT_BYTES_LIMIT).decode("utf-8-sig")
        except TidaliError as error:
            raise UsageError(str(error)) from None
        except (Unreadable, UnicodeDecodeError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
            raise UsageError(f"{self.location}/{name}: {reason}") from None


def list_folder(root: Path) -> Listing:
    """The files of a folder, without hidden ones and those of system folders.

    Raises:
        UsageError: a file or folder cannot be read, is a link in a circle, or has a name with backslashes.
    """
    images, other_files = ItemsBuilder(), ItemsBuilder()
    folders: set[str] = set()
    left_out: Counter[str] = Counter()
    for name, entry, is_folder in walk(root, left_out):
        if "\\" in name and (is_folder or is_image_name(name)):
            fix = "it was unpacked from a zip with backslashes between folders: give that zip to this command, or rename it"
            raise UsageError(f"{root}: {shown(name)}: {fix}")
        if is_folder:
            folders.add(name)
            continue
        try:
            status = entry.stat()
        except OSError as error:
            where = printable_path(entry.path)
            raise UsageError(f"{where}: {error.strerror}; a broken link? Fix or remove it") from None
        (images if is_image_name(name) else other_files).add(name, status.st_size)
    return Listing(
        location=str(root),
        images=images.build(),
        other_files=other_files.build(),
        folders=folders,
        reader=FolderReader(os.fsencode(root)),
        left_out=left_out,
    )


@dataclass(frozen=True)
class FolderReader:
    """Reads the files below a folder."""

    root: bytes

    def inside(self, folder: str) -> FolderReader:
        return FolderReader(self._path(folder))

    def open(self) -> nullcontext[Read]:
        return nullcontext(self._read)

    def _path(self, name: str) -> bytes:
        return self.root + b"/" + name.encode("utf-8", "surrogateescape")  # as it was decoded, whatever the locale

    def _read(self, item: Item, limit_bytes: int) -> bytes:
        path = self._path(item.name)
        if item.size_bytes > limit_bytes:
            raise Unreadable(f"file of {item.size_bytes:,} bytes, more than an image within the pixel limit can take")
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.read(limit_bytes + 1)
        except OSError as error:
            raise TidaliError(f"{printable_path(path)}: {error.strerror}") from None
        if len(data) != item.size_bytes:
            raise TidaliError(f"{printable_path(path)}: changed while the source was being packed; run the command again")
        return data
