"""A file that is read and hashed at once."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from types import TracebackType

_BLOCK_BYTES = 1 << 20


class HashedFile:
    """Gives parts of a file, and its SHA-256. Where the parts are asked for in order, each byte is read from the disk once."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError, ValueError: the file cannot be read, or is empty.
        """
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._hash = hashlib.sha256()
        self._hashed_bytes = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bytes.close()

    def __len__(self) -> int:
        return len(self._bytes)

    def read(self, start: int, end: int) -> bytes:
        self._hash_until(end)
        return self._bytes[start:end]

    def sha256(self) -> str:
        """Of the whole file."""
        self._hash_until(len(self))
        return self._hash.hexdigest()

    def _hash_until(self, end: int) -> None:
        while self._hashed_bytes < min(end, len(self)):
            block = self._bytes[self._hashed_bytes : min(end, self._hashed_bytes + _BLOCK_BYTES)]
            self._hash.update(block)
            self._hashed_bytes += len(block)
