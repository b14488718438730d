"""The lines of a report on what works and what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tidali.doctor.parity import Row
from tidali.errors import TidaliError

Status = Literal["ok", "warning", "failure"]

REINSTALL = "install tidali anew in a new virtual environment"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    text: str
    fix: str = ""
    """What to do about a warning or a failure."""
    rows: tuple[Row, ...] = ()
    """The table behind the line ``resampling``: how far each route to a network's input is from the DALI graph."""


def ok(text: str) -> Finding:
    return Finding(name="", status="ok", text=text)


def guard(name: str, look: Callable[[], Finding], fix: str = REINSTALL) -> Finding:
    """What was found, or what stopped the look."""
    try:
        return replace(look(), name=name)
    except Exception as error:  # anything a broken installation can do
        return of_error(name, error, fix)


def of_error(name: str, error: Exception, fix: str) -> Finding:
    """The errors of this package name the way out after a semicolon; for the others it is ``fix``."""
    if not isinstance(error, TidaliError):
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Finding(name=name, status="failure", text=text, fix=fix)
    text, _, own_fix = str(error).partition("; ")
    return Finding(name=name, status="failure", text=text, fix=own_fix or fix)
