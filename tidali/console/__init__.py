"""Output for people: messages and progress on standard error, results on standard output.

``tidali --quiet`` prints only the warnings among the messages; ``tidali --verbose`` adds details, and the time of each line.
Under torchrun only rank 0 prints messages, but each rank prints its own errors, and warnings that only it can know of.

On a terminal a line is broken at a space, never inside a word or between a number and its unit, and goes on below, indented.
In a file or a pipe each message is one line, whatever its length.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.console import Console

from tidali.console.layout import GAP, HANG, fitting, table_lines, wrap, wrap_command
from tidali.hardware.timing import now_s

if TYPE_CHECKING:
    from rich.progress import Progress

Verbosity = Literal["quiet", "normal", "verbose"]

# What users name, such as classes and files, may hold brackets and colons, which are no markup and no emoji.
messages = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
results = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

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


# --------------------------------------------------------------------------------------------------------------------- lines


def say(text: str, *, hang: int = HANG) -> None:
    """Print one line on standard error, unless ``--quiet`` was given.

    Args:
        hang: by how many columns what does not fit the line is indented below it.
    """
    if _verbosity != "quiet":
        _print_message(text, hang=hang)


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


def fail(text: str) -> None:
    """Print the one line of an error on standard error, on every rank."""
    _print_lines(messages, f"tidali: {' '.join(text.split())}")


def show(text: str, *, hang: int = HANG, style: str | None = None) -> None:
    """Print one line of a result on standard output."""
    _print_lines(results, text, hang=hang, style=style)


def show_command(command: str, *, indent: int) -> None:
    """Print a shell command on standard output, ready to copy."""
    show_line(wrap_command(command, line_width(results), indent=indent))


def suggest(what: str, *words: object) -> None:
    """Print a command that a user may want next, ready to copy, unless ``--quiet`` was given.

    Args:
        what: what it does, in a few words.
        words: of the command; quoted as a shell needs it.
    """
    if _verbosity != "quiet" and is_main_rank():
        say(f"next: {what}")
        messages.print(wrap_command(shlex.join(map(str, words)), line_width(messages), indent=HANG))


def _print_message(text: str, *, hang: int = HANG, every_rank: bool = False) -> None:
    if every_rank or is_main_rank():
        _print_lines(messages, f"{now_s() - _start_s:7.2f} s  {text}" if is_verbose() else text, hang=hang)


def _print_lines(console: Console, text: str, *, hang: int = HANG, style: str | None = None) -> None:
    width = line_width(console)
    for line in text.split("\n"):
        console.print("\n".join(wrap(line, width, hang=hang)), style=style)


def line_width(console: Console) -> int | None:
    """Columns of the terminal that a console prints to; None where it prints to a file or a pipe."""
    return console.width if console.file.isatty() else None


# ------------------------------------------------------------------------------------------------------------------ progress


def progress_bar(*, show: bool = True) -> Progress:
    """A progress bar on standard error, shown only on a terminal. It is one line, which has as many of the task's figures as
    there is room for. A task's field ``notes`` may hold further ones, such as the current loss, the most important first."""
    from rich.console import ConsoleOptions, RenderResult
    from rich.progress import Progress, Task, TimeRemainingColumn
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    class Line:
        def __init__(self, task: Task) -> None:
            self.task = task

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            task, room = self.task, options.max_width - 1
            total = "?" if task.total is None else f"{task.total:,.0f}"
            remaining = [] if task.time_remaining is None else [TimeRemainingColumn().render(task).plain]
            figures = [f"{task.completed:,.0f}/{total}", *remaining, *task.fields.get("notes", ())]
            shown = fitting([task.description, *figures], room)
            bar_width = min(room - cell_len(GAP.join(shown)) - len(GAP), 40)
            line = Table.grid(padding=(0, len(GAP), 0, 0))
            if bar_width >= 8:
                bar = ProgressBar(task.total, task.completed, width=bar_width, pulse=task.total is None)
                line.add_row(Text(shown[0]), bar, *map(Text, shown[1:]))
            else:
                line.add_row(*map(Text, shown))
            yield line

    class OneLine(Progress):
        def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
            lines = Table.grid()
            for task in tasks:
                if task.visible:
                    lines.add_row(Line(task))
            return lines

    # Ask the file and not rich, which takes everything for a terminal if FORCE_COLOR is set, as it is on build servers.
    show = show and is_main_rank() and _verbosity != "quiet" and sys.stderr.isatty()
    return OneLine(console=messages, transient=True, disable=not show)


# -------------------------------------------------------------------------------------------------------------------- tables


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int | Collection[int] = 1
) -> None:
    """Print a table on standard output. The first ``left`` columns, or the columns of these numbers, are aligned to the left,
    the others to the right.

    Where a terminal is too narrow, headings and cells are wrapped. If that does not do, the columns that have no room stand in
    a table below, beside the first column again.
    """
    for line, style in table_lines(title, columns, rows, line_width(results), left=left):
        show_line(line, style=style)


def show_line(line: str, *, style: str | None = None) -> None:
    """Print a line of a table, or of another layout of its own, on standard output as it is."""
    results.print(line, style=style)
