"""``tidali runs``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tidali.cli.options import JsonOption, output_file
from tidali.errors import UsageError, counted

if TYPE_CHECKING:
    from tidali.training.run_index import Entry

SortKey = Literal["begun", "name", "data", "state", "best", "last", "images/s"]

COLUMNS = ("run", "best %", "last %", "images/s", "state", "data", "differs in")
TEXT_COLUMNS = (0, 4, 5, 6)
REFRESH_S = 2.0
_SHOWN_DIFFERENCES = 3
_LINES_AROUND = 6
"""Of a table: its title, its heading, and what says that some rows are left out."""


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder to look through, or a run folder.")] = Path("runs"),
    sort: Annotated[SortKey, typer.Option(help="Order of the rows; figures begin with the highest.")] = "begun",
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the table as a page that links the runs' reports.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the table until Ctrl-C, and how far running runs are, every 2 s.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """List training runs: their results, how they differ, and their state: finished, running, stopped, diverged.

    "differs in" names the settings that most other runs on the same data do not have. A run that was killed counts as stopped;
    'tidali train --resume RUN' continues it. A run whose loss was not finite has diverged.
    """
    if watch and (json_ or html is not None):
        raise UsageError("--watch: not together with --json or --html")
    page = output_file(html, "--html", (".html",)) if html is not None else None

    from tidali.console import print_table, results, say, show
    from tidali.training.run_index import list_runs

    if watch:
        if not results.file.isatty():
            raise UsageError("--watch needs a terminal; --json prints the state of the runs once")
        _watch(lambda: in_order(list_runs(folder), sort))
        return
    entries = in_order(list_runs(folder), sort)
    if page is not None:
        from tidali.report.runs_page import write_runs_page

        rows = [dict(zip(COLUMNS, table_row(entry, most=None), strict=True)) for entry in entries]
        write_runs_page(entries, rows, folder, page, text_columns=[COLUMNS[place] for place in TEXT_COLUMNS])
        say(f"{page}: {counted(len(entries), 'run')}")
    if json_:
        print(json.dumps([entry.to_dict() for entry in entries]))
    elif entries:
        print_table(str(folder), COLUMNS, [table_row(entry) for entry in entries], left=TEXT_COLUMNS)
    else:
        show(f"{folder}: no runs yet; 'tidali train' makes one")


def in_order(entries: Sequence[Entry], sort: SortKey) -> list[Entry]:
    figures: dict[str, Callable[[Entry], float | None]] = {
        "best": lambda entry: entry.figure("best"),
        "last": lambda entry: entry.figure("last"),
        "images/s": lambda entry: entry.images_per_s,
    }
    texts: dict[str, Callable[[Entry], str]] = {
        "name": lambda entry: entry.name,
        "data": lambda entry: entry.data,
        "state": state_text,
    }
    if sort in figures:
        return sorted(entries, key=lambda entry: -(figures[sort](entry) or 0.0))
    return sorted(entries, key=texts[sort]) if sort in texts else list(entries)


def table_row(entry: Entry, most: int | None = _SHOWN_DIFFERENCES) -> tuple[str, ...]:
    """The cells of `COLUMNS`, with so many differences at most; None for all."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    differences = [f"{name} {value}" for name, value in entry.differs.items()]
    more = ["…"] if len(differences[:most]) < len(differences) else []
    rate = entry.images_per_s
    return (
        entry.name,
        percent(entry.figure("best")),
        percent(entry.figure("last")),
        "" if rate is None else f"{rate:,.0f}",
        state_text(entry),
        entry.data,
        ", ".join(differences[:most] + more),
    )


def state_text(entry: Entry) -> str:
    """'finished', 'finished, at chance', 'stopped in epoch 3 of 20', 'diverged in epoch 3 of 20', 'running, epoch 3 of 20'."""
    if entry.state == "unreadable":
        return f"unreadable: {entry.problem}"
    problems = "".join(f", {problem}" for problem in entry.problems)
    if entry.state == "finished":
        return f"finished{problems}"
    done, total = entry.epochs_done, entry.epochs or "?"
    began = min(int(done) + 1, entry.epochs or int(done) + 1)
    where = f"epoch {began} of {total}"
    if entry.state == "diverged":  # with a step of that epoch, perhaps its last
        return f"diverged in epoch {max(math.ceil(done), 1)} of {total}"
    if entry.state == "stopped":
        return f"stopped in {where}{problems}"
    loss = entry.step.get("train_loss") if entry.step is not None else None
    text = f"running, {where}, {100 * (done - int(done)):.0f} % of it done"
    return (f"{text}, train loss {loss:.3f}" if isinstance(loss, float) else text) + problems


def _watch(read: Callable[[], list[Entry]]) -> None:
    from rich.live import Live
    from rich.text import Text

    from tidali.console import line_width, results
    from tidali.console.layout import table_lines

    with suppress(KeyboardInterrupt), Live(console=results, auto_refresh=False) as live:
        while True:
            entries, room = read(), max(results.height - _LINES_AROUND, 1)
            while True:  # the last rows that the screen has room for
                shown = entries[-room:]
                left_out = len(entries) - len(shown)
                title = f"and {counted(left_out, 'more run')} above" if left_out else ""
                lines = table_lines(
                    title, COLUMNS, [table_row(entry) for entry in shown], line_width(results), left=TEXT_COLUMNS
                )
                if len(lines) < results.height or room == 1:
                    break
                room = max(min(room, len(shown)) // 2, 1)
            live.update(Text("\n".join(line for line, _ in lines)), refresh=True)
            time.sleep(REFRESH_S)
