"""What the doctor reports: for each part whether it works, and if not, what is wrong and how to fix it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tidali.doctor.parity import Row
from tidali.errors import TidaliError, explain_out_of_memory

REINSTALL = "install tidali again in a new virtual environment"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str = ""
    """The part that was checked; `run_check` fills it in."""
    status: Literal["ok", "warning", "failure"]
    text: str
    fix: str = ""
    """How to fix a warning or a failure."""
    rows: tuple[Row, ...] = ()
    """The table behind the line ``resampling``: how far each way of resizing is from the DALI graph."""


def ok(text: str) -> Finding:
    return Finding(status="ok", text=text)


def warning(text: str, fix: str) -> Finding:
    return Finding(status="warning", text=text, fix=fix)


def failure(text: str, fix: str) -> Finding:
    return Finding(status="failure", text=text, fix=fix)


def run_check(name: str, check: Callable[[], Finding | str], fix: str = REINSTALL) -> Finding:
    """The finding of a check; a text alone means that the part works, and an error is a failure.

    Args:
        fix: for errors that do not say how to fix them. Those of this package do, after a semicolon.
    """
    try:
        with explain_out_of_memory("the images of this check"):
            found = check()
    except TidaliError as error:
        text, _, own_fix = str(error).partition("; ")
        found = failure(text, own_fix or fix)
    except Exception as error:  # a broken installation can raise anything
        found = failure(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", fix)
    return replace(found if isinstance(found, Finding) else ok(found), name=name)
