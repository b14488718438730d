"""Files that appear whole or not at all, locks between processes, and the cache folder."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import platform
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tidali.errors import TidaliError, UsageError

TEMPORARY_SUFFIX = ".part"
_UNITS = ("", "k", "m", "g", "t")


def cache_folder() -> Path:
    """Where everything is kept that can be downloaded or built again: ``$TIDALI_CACHE``, else ``$XDG_CACHE_HOME/tidali``, else
    ``~/.cache/tidali``."""
    if own := os.environ.get("TIDALI_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tidali"


def cache_limit_bytes() -> int | None:
    """``$TIDALI_CACHE_LIMIT``: what the local copy of one data set behind a URL may take. None where it is not set.

    Raises:
        UsageError: it is not a number of bytes, such as 20GB or 18.6GiB.
    """
    text = os.environ.get("TIDALI_CACHE_LIMIT", "").strip()
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.lower())
    if not found or (found[3] and not found[2]):
        raise UsageError(f"TIDALI_CACHE_LIMIT={text}: not a number of bytes; give it as 20000000000, 20GB or 18.6GiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS.index(found[2]))


def printable(name: str) -> str:
    """A file name with ``\\udc..`` escapes for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file's content, by an algorithm that hashlib knows."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------------- writing


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a kill, a power cut or a full disk either the old content or the new is there, whole.

    Raises:
        TidaliError: the file cannot be written.
    """
    try:
        remove_left_over(path.parent, glob.escape(path.name))
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        sync(path.parent)
    except OSError as error:
        kept = "; the previous file is untouched" if os.path.exists(path) else ""  # pathlib raises where the name is too long
        raise TidaliError(f"{path}: cannot be written ({error.strerror}){kept}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. After the block the file is flushed to the disk and renamed to ``path``; if the block
    fails it is removed, and what was at ``path`` stays.

    The rename survives a power cut only once the folder is flushed too, see `sync`: one call does it for several files.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        sync(temporary)  # before the rename: after a power cut a file with this name must be whole
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # on a read-only disk, or if the name is too long, removing fails as writing did
            temporary.unlink()
        raise


def sync(path: Path) -> None:
    """Flush a file's content to the disk, or a folder's list of names, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """A file's name while it is written. It contains the machine, the thread and the process, so that two writers of the same
    file never share a temporary file."""
    writer = f"{platform.node()}.{threading.get_native_id()}.{os.getpid()}"
    return path.with_name(f".{path.name}.{writer}{TEMPORARY_SUFFIX}")


def remove_left_over(folder: Path, pattern: str = "*") -> None:
    """Remove the temporary files of killed processes of this machine: each saved state of a training run takes 134 MB."""
    for left in folder.glob(f".{pattern}.{glob.escape(platform.node())}.*{TEMPORARY_SUFFIX}"):
        process = left.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[2]
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
def resumable(place: str | Path) -> Iterator[None]:
    """For work that the same command resumes.

    Args:
        place: named in the message where the error names no file.

    Raises:
        TidaliError: the block raised an OSError, such as a full disk.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename or place}: {error.strerror or error}"
        fix = "allow more with 'ulimit -n'" if error.errno == errno.EMFILE else "fix that"
        raise TidaliError(f"{where}; {fix} and run the same command again to resume") from None


# -------------------------------------------------------------------------------------------------------------------- locking


def is_locked(path: Path) -> bool:
    """Whether a process holds a file or folder, see `lock`. False where the file system has no locks.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold an existing file or folder: one process at a time does. The kernel releases it when the process dies.

    Args:
        path: the file or folder. Its content is not touched.
        wait: whether to wait for a process that holds it.

    Raises:
        OSError: it cannot be opened.
        TidaliError: another process holds it, and ``wait`` is false.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise TidaliError(f"{path}: another tidali process is writing it; wait for it to end") from None
        yield
    finally:
        os.close(descriptor)
