"""Locations behind a URL, by way of fsspec. Nothing of it is imported until one is opened."""

from __future__ import annotations

from typing import Any

from tidali.errors import TidaliError


def is_remote(location: str) -> bool:
    """Whether it is a URL such as ``s3://bucket/data`` rather than a path."""
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
