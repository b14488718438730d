"""What people see: messages and progress on standard error, results on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

messages = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False, soft_wrap=True)
_UNLIMITED_COLUMNS = 1000


def say(text: str) -> None:
    """One line on standard error, as it stands."""
    messages.print(text, markup=False)


def progress_bar(*, note: bool = True, show: bool = True) -> Progress:
    """A bar on standard error, shown only where that is a terminal. Its field ``note`` holds running figures."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    if note:
        columns.append(TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=messages, transient=True, disable=not (show and messages.is_terminal))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> None:
    """A table on standard output: the first ``left`` columns to the left, figures to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Where no terminal sets the width, rich takes 80 columns and cuts cells off.
    console = results if sys.stdout.isatty() else Console(highlight=False, soft_wrap=True, width=_UNLIMITED_COLUMNS)
    console.print(table)
