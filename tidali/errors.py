"""Errors that a user can cause: one line that names the file, sample or flag and the way out, never a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class TidaliError(Exception):
    """Work that failed: a damaged shard, a full disk, a missing device. The command exits with 1."""

    exit_code = 1


class UsageError(TidaliError):
    """Wrong use: a wrong flag, path or combination. The command exits with 2."""

    exit_code = 2


class DatasetError(TidaliError):
    """A packed data set that is missing, damaged or of an unknown format version."""


class Interrupted(TidaliError):
    """The run was asked to stop, and its state is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the shell's convention


class DataLost(Interrupted):
    """The run stopped after the same step on every rank, because one could not get its data, and its state is saved."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 0)
        self.exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of another library's error message; its type's name where the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def some_of(texts: Sequence[str], most: int) -> str:
    """The first texts of a list that may be long, for a message."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def counted(count: int, noun: str) -> str:
    """'1 epoch', '2,500 images', '2 classes'."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{count:,} {noun}{ending}"


def span(lowest: str, highest: str) -> str:
    """'3 to 8'; '4' where both are equal."""
    return lowest if lowest == highest else f"{lowest} to {highest}"
