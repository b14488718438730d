"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tidali.errors import TidaliError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a kill or a full disk either the old content or the new is there, whole.

    Raises:
        TidaliError: it cannot be written.
    """
    temporary = temporary_path(path)
    try:
        remove_left_over(path.parent, glob.escape(path.name))
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with suppress(OSError):  # on a read-only disk, or where the name is too long, removing fails as writing did
            temporary.unlink()
        raise TidaliError(f"{path}: cannot be written ({error.strerror}); the previous file is untouched") from None


def printable(name: str) -> str:
    """Bytes of a file name that are no UTF-8 become ``\\udc..`` escapes; other names stay as they are."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def temporary_path(path: Path) -> Path:
    """A file's name while it is written. With machine and process: two that write one file do not share it."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def remove_left_over(folder: Path, pattern: str = "*") -> None:
    """Remove what processes of this machine that were killed have left of files: a run's state takes 134 MB each time."""
    for left in folder.glob(f".{pattern}.{glob.escape(platform.node())}.*.tmp"):
        process = left.name.removesuffix(".tmp").rpartition(".")[2]
        if process.isdecimal() and not _runs(int(process)):
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder that is there: one process works in it, the others wait here. The kernel lets go when a process dies.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
