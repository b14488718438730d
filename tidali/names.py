"""Names of files, as they are stored and shown."""

from __future__ import annotations


def printable(name: str) -> str:
    """Bytes of a file name that are no UTF-8 become ``\\udc..`` escapes; other names stay as they are."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
