"""How text fits a line: where it is wrapped, and the columns of tables. Nothing is printed here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise

from rich.cells import cell_len

_KEPT_TOGETHER = re.compile(r"(?<=\d) (?=[^\W\d_]|[%°±])|(?<=±) (?=\d)|(?<=\d x) (?=\d)")
"""The spaces of '2,500 images', '87 %', '± 0.4' and '64 x 48'."""
_NO_BREAK = "\u00a0"
HANG = 2
GAP = "  "
_NARROWEST_TEXT = 12
"""A column of text is not made narrower for the sake of others: one word a line cannot be read."""


def wrap(text: str, width: int | None, *, hang: int = HANG) -> list[str]:
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
            lines.append(f"{' ' * (indent + HANG)}{word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def fitting(texts: Sequence[str], width: int) -> list[str]:
    """The first texts that fit a line, two spaces apart. The first is always there, cut where it alone is too long."""
    shown = [texts[0] if cell_len(texts[0]) <= width else texts[0][: max(width - 1, 1)] + "…"]
    for text in texts[1:]:
        if cell_len(GAP.join([*shown, text])) > width:
            break
        shown.append(text)
    return shown


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
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _row_lines(row: Sequence[str], widths: Sequence[int], aligned_left: Sequence[bool]) -> Iterator[str]:
    wrapped = [wrap(cell, width, hang=0) for cell, width in zip(row, widths, strict=True)]
    for number in range(max(map(len, wrapped))):
        parts = []
        for lines, width, left in zip(wrapped, widths, aligned_left, strict=True):
            text = lines[number] if number < len(lines) else ""
            padding = " " * (width - cell_len(text))
            parts.append(text + padding if left else padding + text)
        yield GAP.join(parts).rstrip()
