"""What people see: messages and progress on standard error, results on standard output.

``tidali --quiet`` leaves out all messages but warnings, ``tidali --verbose`` adds details and the time that each line came at.
Under torchrun one rank alone gives them; errors are each rank's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from tidali.hardware.timing import now_s

if TYPE_CHECKING:
    from rich.progress import Progress

Verbosity = Literal["quiet", "normal", "verbose"]

messages = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False, soft_wrap=True)
_UNLIMITED_COLUMNS = 1000

_verbosity: Verbosity = "normal"
_start_s = now_s()


def set_verbosity(verbosity: Verbosity) -> None:
    """For the rest of this process."""
    global _verbosity
    _verbosity = verbosity


def is_verbose() -> bool:
    return _verbosity == "verbose"


@contextmanager
def silenced() -> Iterator[None]:
    """As ``--quiet``, for as long as it is entered."""
    before = _verbosity
    set_verbosity("quiet")
    try:
        yield
    finally:
        set_verbosity(before)


def is_main_rank() -> bool:
    """Whether this process is the one of torchrun's that talks."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """One line on standard error, as it stands; not with ``--quiet``."""
    if _verbosity != "quiet":
        _print_message(text)


def warn(text: str, *, every_rank: bool = False) -> None:
    """One line on standard error that ``--quiet`` shows too: what is wrong, though the work goes on.

    Args:
        every_rank: also where this is not the main rank, which does not know it.
    """
    _print_message(f"warning: {text}", every_rank=every_rank)


def detail(text: str) -> None:
    """One line on standard error, with ``--verbose`` alone."""
    if is_verbose():
        _print_message(text)


def _print_message(text: str, *, every_rank: bool = False) -> None:
    if not (every_rank or is_main_rank()):
        return
    messages.print(f"{now_s() - _start_s:7.2f} s  {text}" if is_verbose() else text, markup=False)


def progress_bar(*, note: bool = True, show: bool = True) -> Progress:
    """A bar on standard error, shown only where that is a terminal. Its field ``note`` holds running figures."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    if note:
        columns.append(TextColumn("{task.fields[note]}"))
    # Asked of the file: rich takes anything for a terminal where FORCE_COLOR is set, as build servers do.
    show = show and is_main_rank() and _verbosity != "quiet" and sys.stderr.isatty()
    return Progress(*columns, console=messages, transient=True, disable=not show)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> None:
    """A table on standard output: the first ``left`` columns to the left, figures to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Where no terminal sets the width, rich takes 80 columns and cuts cells off.
    console = results if sys.stdout.isatty() else Console(highlight=False, soft_wrap=True, width=_UNLIMITED_COLUMNS)
    console.print(table)
