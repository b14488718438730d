"""Errors that a user can cause: one line that names the file, sample or flag and the way out, never a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_GPU, _MACHINE = "the GPU's memory", "the machine's memory"
_NO_MEMORY = {
    # torch's caching allocator and CUDA's runtime; cuBLAS and cuDNN; DALI's pools
    _GPU: ("out of memory", "STATUS_ALLOC_FAILED", "CUDA allocation failed", "bytes on device"),
    # torch's CPU allocator; the operating system; C++ libraries; oneDNN, of its work space; ONNX Runtime; DALI's pinned memory
    _MACHINE: (
        *("can't allocate memory", "Cannot allocate memory", "bad_alloc", "bad allocation", "could not create a primitive"),
        *("Failed to allocate memory", "bytes on host"),
    ),
}
"""Where memory ran out -> what libraries say then, whose exceptions have no class in common."""
_HOW_TO_FREE = {
    _GPU: "stop other programs that use the GPU, or choose --device cpu",
    _MACHINE: "stop other programs, or raise the limit on memory if there is one",
}


class TidaliError(Exception):
    """Work that failed: a damaged shard, a full disk, a missing device. The command exits with 1."""

    exit_code = 1


class UsageError(TidaliError):
    """Wrong use: a wrong flag, path or combination. The command exits with 2."""

    exit_code = 2


class DatasetError(TidaliError):
    """A packed data set that is missing, damaged or of an unknown format version."""


class NoDatasetError(DatasetError, UsageError):
    """There is no packed data set where one was named: wrong use, so the command exits with 2."""


class Interrupted(TidaliError):
    """The run was asked to stop, and its state is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the shell's convention


class Diverged(TidaliError):
    """A run ended, after the same step on every rank, because its loss or its weights were not finite. Each rank prints it:
    torchrun may end the main one as soon as another has exited."""


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


@contextmanager
def explain_out_of_memory(what: str, fix: str = "") -> Iterator[None]:
    """Where memory runs out, one line instead of a traceback.

    Args:
        what: needs the memory, such as ``batches of 256 images of 224 px``.
        fix: how to need less; by default, how to have more.

    Raises:
        TidaliError: the GPU's memory does not suffice, or the machine's.
    """
    try:
        yield
    except TidaliError:
        raise
    except Exception as error:
        where = _memory_that_ran_out(error)
        if where is None:
            raise
        raise TidaliError(f"{what} do not fit {where}; {fix or _HOW_TO_FREE[where]}") from None


def _memory_that_ran_out(error: Exception) -> str | None:
    for where, texts in _NO_MEMORY.items():
        if any(text in str(error) for text in texts):
            return where
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return _MACHINE
    return None
