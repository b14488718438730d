"""Locations behind a URL, through fsspec, which is imported only when one is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tidali.errors import TidaliError


def is_remote(location: str) -> bool:
    """Whether a location is a URL such as ``s3://bucket/data`` rather than a path."""
    return "://" in location


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the URL's path in it, without a trailing slash.

    Raises:
        TidaliError: the package for this kind of URL is not installed, or it does not accept the URL.
    """
    protocol = url.partition("://")[0]
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(url.rstrip("/"))
    except ImportError as error:
        hint = "pip install 'tidali[s3]'" if protocol == "s3" else f"install the fsspec package for it ({error})"
        raise TidaliError(f"{url}: {protocol}:// needs a package that is not installed; {hint}") from None
    except ValueError as error:
        raise TidaliError(f"{url}: {error}") from None
    return fs, path.rstrip("/")


@contextmanager
def reached(url: str) -> Iterator[tuple[Any, str]]:
    """`filesystem`'s result, for a block that reads or writes there.

    Raises:
        TidaliError: the block failed; the message names the URL and the cause.
    """
    try:
        yield filesystem(url)
    except (TidaliError, KeyboardInterrupt):
        raise
    except Exception as error:  # each fsspec implementation raises exceptions of its own
        raise TidaliError(f"{url}: {type(error).__name__}: {error}") from None
