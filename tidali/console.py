"""Output for people: messages and progress on standard error, results on standard output.

``tidali --quiet`` prints only the warnings among the messages; ``tidali --verbose`` adds details, and the time of each line.
Under torchrun only rank 0 prints messages, but each rank prints its own errors, and warnings that only it can know of.

On a terminal a line is broken at a space, never inside a word or between a number and its unit, and goes on below, indented.
In a file or a pipe each message is one line, whatever its length.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.console import Console

from tidali.hardware.timing import now_s

if TYPE_CHECKING:
    from rich.progress import Progress

Verbosity = Literal["quiet", "normal", "verbose"]

# What users name, such as classes and files, may hold brackets and colons, which are no markup and no emoji.
messages = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
results = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

_KEPT_TOGETHER = re.compile(r"(?<=\d) (?=[^\W\d_]|[%°±])|(?<=±) (?=\d)|(?<=\d x) (?=\d)")
"""The spaces of '2,500 images', '87 %', '± 0.4' and '64 x 48'."""
_NO_BREAK = "\u00a0"
_HANG = 2
_GAP = "  "
_NARROWEST_TEXT = 12
"""A column of text is not made narrower for the sake of others: one word a line cannot be read."""

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


def say(text: str, *, hang: int = _HANG) -> None:
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


def show(text: str, *, hang: int = _HANG, style: str | None = None) -> None:
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
        messages.print(wrap_command(shlex.join(map(str, words)), line_width(messages), indent=_HANG))


def _print_message(text: str, *, hang: int = _HANG, every_rank: bool = False) -> None:
    if every_rank or is_main_rank():
        _print_lines(messages, f"{now_s() - _start_s:7.2f} s  {text}" if is_verbose() else text, hang=hang)


def _print_lines(console: Console, text: str, *, hang: int = _HANG, style: str | None = None) -> None:
    width = line_width(console)
    for line in text.split("\n"):
        console.print("\n".join(wrap(line, width, hang=hang)), style=style)


def line_width(console: Console) -> int | None:
    """Columns of the terminal that a console prints to; None where it prints to a file or a pipe."""
    return console.width if console.file.isatty() else None


def wrap(text: str, width: int | None, *, hang: int = _HANG) -> list[str]:
    """The lines of a text.

    Args:
        width: columns of a line. A word that is longer has a line of its own. None: one line.
        hang: columns by which the second line and the others are indented.
    """
    if width is None or cell_len(text) <= width:
        return [text]
    indent, lines, line = " " * (hang if 2 * hang < width else 0), [], ""
    for gap, word in re.findall("( *)([^ ]+)", _KEPT_TOGETHER.sub(_NO_BREAK, text)):
        if line and cell_len(line + gap + word) > width:
            lines.append(line)
            line = indent + word
        else:
            line += gap + word
    return [one.replace(_NO_BREAK, " ") for one in (*lines, line)]


def wrap_command(command: str, width: int | None, *, indent: int = 0) -> str:
    """A shell command, indented. Where a line would be too long, it goes on in the next after a backslash, so that it can be
    copied.

    Args:
        command: quoted as a shell needs it.
        width: columns of a line, those of ``indent`` included. None: one line.
    """
    words = re.findall(r"""(?:'[^']*'|"[^"]*"|[^ ])+""", command)
    lines = [" " * indent + words[0]]
    for word, following in pairwise([*words[1:], ""]):
        # An option stays with its value where there is room for both.
        kept = f"{word} {following}" if word.startswith("-") and following and not following.startswith("-") else word
        if width is not None and cell_len(f"{lines[-1]} {kept} \\") > width:
            lines[-1] += " \\"
            lines.append(f"{' ' * (indent + _HANG)}{word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


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
            bar_width = min(room - cell_len(_GAP.join(shown)) - len(_GAP), 40)
            line = Table.grid(padding=(0, len(_GAP), 0, 0))
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


def fitting(texts: Sequence[str], width: int) -> list[str]:
    """The first texts that fit a line, two spaces apart. The first is always there, cut where it alone is too long."""
    shown = [texts[0] if cell_len(texts[0]) <= width else texts[0][: max(width - 1, 1)] + "…"]
    for text in texts[1:]:
        if cell_len(_GAP.join([*shown, text])) > width:
            break
        shown.append(text)
    return shown


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


def table_lines(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], width: int | None, *, left: int | Collection[int] = 1
) -> list[tuple[str, str | None]]:
    """The lines of `print_table`, each with its style."""
    cells = [[str(cell) for cell in row] for row in rows]
    left_columns = range(left) if isinstance(left, int) else left
    out: list[tuple[str, str | None]] = [(line, "bold") for line in wrap(title, width)] if title else []
    for number, (chosen, widths) in enumerate(_tables(columns, cells, width)):
        aligned = [place in left_columns for place in chosen]
        out += [("", None)] if number else []
        headings = [columns[place] for place in chosen]
        out += [(line, "bold") for line in _row_lines(headings, widths, aligned) if any(headings)]
        out.append(("─" * _total(widths), None))
        for row in cells:
            out += [(line, None) for line in _row_lines([row[place] for place in chosen], widths, aligned)]
    return out


def show_line(line: str, *, style: str | None = None) -> None:
    """Print a line of a table, or of another layout of its own, on standard output as it is."""
    results.print(line, style=style)


def _tables(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int | None) -> list[tuple[list[int], list[int]]]:
    """For each table that is printed: which columns it has, and how wide they are."""
    natural, least = [], []
    for place, heading in enumerate(columns):
        below = [row[place] for row in cells]
        widest = max(map(cell_len, below), default=0)
        words = [cell_len(word) for text in (heading, *below) for word in _KEPT_TOGETHER.sub(_NO_BREAK, text).split(" ")]
        natural.append(max(widest, cell_len(heading)))
        least.append(max(*words, min(widest, _NARROWEST_TEXT)))
    every = list(range(len(columns)))
    if width is None:
        return [(every, natural)]
    groups: list[list[int]] = [[0]]
    for place in every[1:]:
        if len(groups[-1]) > 1 and _total([least[one] for one in (*groups[-1], place)]) > width:
            groups.append([0])
        groups[-1].append(place)
    return [(group, _shrunk([natural[one] for one in group], [least[one] for one in group], width)) for group in groups]


def _shrunk(natural: list[int], least: list[int], width: int) -> list[int]:
    """The widths of columns that together fit, where that is possible: the widest give way first."""
    widths = list(natural)
    while _total(widths) > width:
        spare = [place for place in range(len(widths)) if widths[place] > least[place]]
        if not spare:
            break
        widths[max(spare, key=lambda place: widths[place])] -= 1
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _row_lines(row: Sequence[str], widths: Sequence[int], aligned_left: Sequence[bool]) -> Iterator[str]:
    wrapped = [wrap(cell, width, hang=0) for cell, width in zip(row, widths, strict=True)]
    for number in range(max(map(len, wrapped))):
        parts = []
        for lines, width, left in zip(wrapped, widths, aligned_left, strict=True):
            text = lines[number] if number < len(lines) else ""
            padding = " " * (width - cell_len(text))
            parts.append(text + padding if left else padding + text)
        yield _GAP.join(parts).rstrip()
