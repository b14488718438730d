"""Memory that runs out is one line, whichever library it is that had none; other errors stay what they are."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tidali.doctor.findings import run_check
from tidali.errors import TidaliError, UsageError, explain_out_of_memory

GPU, MACHINE = "the GPU's memory; .*--device cpu", "the machine's memory; stop other programs"
TOO_MUCH = 1 << 60  # bytes: more than any processor addresses


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("allocate", "where"),
    [
        (lambda: np.empty(TOO_MUCH, np.uint8), MACHINE),
        (lambda: torch.empty(TOO_MUCH, dtype=torch.uint8), MACHINE),
        (lambda: fail(OSError(errno.ENOMEM, "Cannot allocate memory")), MACHINE),
        # As libraries said it in a process whose address space was limited: torch of a mapped file, oneDNN of a convolution.
        (lambda: fail(RuntimeError("unable to mmap 44763484 bytes from file <x>: Cannot allocate memory (12)")), MACHINE),
        (lambda: fail(RuntimeError("could not create a primitive")), MACHINE),
        # As their sources have it.
        (
            lambda: fail(Exception("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9")),
            MACHINE,
        ),
        (lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\n...")), GPU),
        (lambda: fail(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")), GPU),
        (lambda: fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")), GPU),
        (lambda: fail(RuntimeError("Critical error in pipeline:\nCan't allocate 9 bytes on device 0.")), GPU),
    ],
)
def test_memory_that_runs_out_is_one_line(allocate: Callable[[], object], where: str) -> None:
    with pytest.raises(TidaliError, match=f"^these images do not fit {where}") as raised, explain_out_of_memory("these images"):
        allocate()
    assert "\n" not in str(raised.value)
    with pytest.raises(TidaliError, match=r"; give fewer$"), explain_out_of_memory("these images", "give fewer"):
        allocate()
    finding = run_check("pixels", allocate, "install it again")  # type: ignore[arg-type]
    assert (finding.status, finding.name) == ("failure", "pixels")
    assert finding.text.startswith("the images of this check do not fit the ")
    assert finding.fix.startswith("stop other programs")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), explain_out_of_memory("these images"):
        raise RuntimeError("a bug")
    with pytest.raises(UsageError, match=r"^a batch that ran out of memory$"), explain_out_of_memory("these images"):
        raise UsageError("a batch that ran out of memory")
