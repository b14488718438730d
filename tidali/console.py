"""Output for people: messages and progress on standard error, results on standard output.

``tidali --quiet`` prints only the warnings among the messages; ``tidali --verbose`` adds details, and the time of each line.
Under torchrun only rank 0 prints messages, but each rank prints its own errors, and warnings that only it can know of.
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
    """Set how much is printed, for the rest of this process."""
    global _verbosity
    _verbosity = verbosity


def is_verbose() -> bool:
    return _verbosity == "verbose"


@contextmanager
def silenced() -> Iterator[None]:
    """Print only what ``--quiet`` does, inside this context."""
    before = _verbosity
    set_verbosity("quiet")
    try:
        yield
    finally:
        set_verbosity(before)


def is_main_rank() -> bool:
    """Whether this process is rank 0 of torchrun, which prints messages, or there is no torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print one line on standard error, unless ``--quiet`` was given."""
    if _verbosity != "quiet":
        _print_message(text)


def warn(text: str, *, every_rank: bool = False) -> None:
    """Print a warning on standard error, even with ``--quiet``: something is wrong, but the work continues.

    Args:
        every_rank: print it on the other ranks too, for what only this rank knows.
    """
    _print_message(f"warning: {text}", every_rank=every_rank)


def detail(text: str) -> None:
    """Print one line on standard error, only with ``--verbose``."""
    if is_verbose():
        _print_message(text)


def _print_message(text: str, *, every_rank: bool = False) -> None:
    if not (every_rank or is_main_rank()):
        return
    messages.print(f"{now_s() - _start_s:7.2f} s  {text}" if is_verbose() else text, markup=False)


def progress_bar(*, note: bool = True, show: bool = True) -> Progress:
    """A progress bar on standard error, shown only on a terminal.

    Args:
        note: show the task's field ``note`` beside the bar, for figures such as the current loss.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    if note:
        columns.append(TextColumn("{task.fields[note]}"))
    # Ask the file and not rich, which takes everything for a terminal if FORCE_COLOR is set, as it is on build servers.
    show = show and is_main_rank() and _verbosity != "quiet" and sys.stderr.isatty()
    return Progress(*columns, console=messages, transient=True, disable=not show)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> None:
    """Print a table on standard output. The first ``left`` columns are aligned to the left, the others to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Without a terminal, rich assumes 80 columns and would cut cells off.
    console = results if sys.stdout.isatty() else Console(highlight=False, soft_wrap=True, width=_UNLIMITED_COLUMNS)
    console.print(table)
