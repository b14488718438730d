"""Fetching a file of a data set from behind a URL: its SHA-256 checked, and tried again while the store does not answer."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from tidali.dataset.remote import filesystem
from tidali.errors import DatasetError, TidaliError, first_line

_BLOCK_BYTES = 1 << 20
PAUSES_S = (1, 2, 4, 8, *[15] * 7)
"""Between the attempts to fetch one file: two minutes, in which a store can be restarted or a network repaired."""

T = TypeVar("T")


class Unreachable(TidaliError):
    """The store did not answer, or broke off."""


class Damaged(DatasetError):
    """What the store gave is not what the manifest names."""


def retrying(attempt: Callable[[], T], on_failure: Callable[[str], None] = lambda text: None) -> T:
    """The attempt's result, as soon as the store answers. A damaged file is fetched a second time at once.

    Args:
        on_failure: called with a message, the first time.

    Raises:
        TidaliError: the attempt failed otherwise, or `PAUSES_S` are over.
    """
    damaged, pauses = 0, list(PAUSES_S)
    while True:
        try:
            return attempt()
        except Damaged:
            damaged += 1
            if damaged == 2:
                raise
        except Unreachable as error:
            if not pauses:
                raise Unreachable(f"{error}; tried {len(PAUSES_S) + 1} times in {sum(PAUSES_S)} s") from None
            if len(pauses) == len(PAUSES_S):
                on_failure(f"{error}; trying again for {sum(PAUSES_S)} s")
            time.sleep(pauses.pop(0))


def fetch(url: str, name: str, sha256: str, local: BinaryIO) -> None:
    """Write a file's content, once.

    Raises:
        Unreachable: the store does not answer.
        DatasetError: there is no such file, or its SHA-256 is another.
        OSError: writing failed.
    """
    digest = hashlib.sha256()
    for block in _blocks(url, name):
        digest.update(block)
        local.write(block)
    if digest.hexdigest() != sha256:
        raise Damaged(f"{url}/{name}: damaged there or on the way (its SHA-256 is not the manifest's); {_fix(url)}")


def _blocks(url: str, name: str) -> Iterator[bytes]:
    """The caller's own errors do not come by here."""
    try:
        fs, root = filesystem(url)
        with fs.open(f"{root}/{name}", "rb", cache_type="readahead") as remote:
            while block := remote.read(_BLOCK_BYTES):
                yield block
    except TidaliError:
        raise
    except Exception as error:  # each fsspec implementation raises exceptions of its own
        cause: BaseException = error
        if isinstance(error, FileNotFoundError) and url.startswith("http"):
            cause = error.__cause__ or error  # fsspec says this of an HTTP server for whatever goes wrong when it opens a file
        status = getattr(cause, "status", None)
        if isinstance(cause, FileNotFoundError) or status in (404, 410):
            raise DatasetError(f"{url}/{name}: missing; {_fix(url)}") from None
        text = f"{url}/{name}: {type(cause).__name__}: {first_line(cause)}"
        if isinstance(cause, PermissionError) or status in (401, 403):
            raise TidaliError(text) from None
        raise Unreachable(text) from None


def _fix(url: str) -> str:
    return f"'tidali verify {url}' shows all damage, packing again repairs it"
