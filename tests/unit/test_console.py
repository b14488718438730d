"""What reaches a terminal: words stay whole, figures keep their units, progress bars and tables fit."""

from __future__ import annotations

import io
import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tidali import console
from tidali.console import layout
from tidali.errors import counted, span


@pytest.fixture(params=[60, 80])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Lines are printed as on a terminal of so many columns."""
    monkeypatch.setattr(console, "line_width", lambda _: request.param)
    return request.param


WORDS = st.lists(st.text(alphabet="abc1,%.", min_size=1, max_size=9), min_size=1, max_size=40)


@given(words=WORDS, width=st.integers(12, 50), hang=st.integers(0, 5))
def test_wrapping_changes_white_space_alone(words: list[str], width: int, hang: int) -> None:
    lines = layout.wrap(" ".join(words), width, hang=hang)
    assert " ".join(" ".join(lines).split()) == " ".join(words)
    for line in lines:
        # Too long only if nothing in it may be separated: '12 %', or a word that is longer than the line.
        joined = re.sub(r"(?<=\d) (?=[a-z%])", "_", line.strip())
        assert cell_len(line) <= width or " " not in joined
    assert all(line.startswith(" " * hang) for line in lines[1:])


@pytest.mark.parametrize("figure", ["421 images/s", "87.5 %", "64 x 48", "1 GiB", "± 0.4", "3 px"])
def test_a_number_stays_with_its_unit(figure: str) -> None:
    for before in range(20):
        assert any(figure in line for line in layout.wrap(f"{'w' * before} {figure} and more words", 18))


def test_wide_characters_count_twice() -> None:
    assert layout.wrap("猫猫猫猫 犬犬", 11, hang=0) == ["猫猫猫猫", "犬犬"]


def test_a_file_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    text = "word " * 60 + "[bold] :cat:"
    console.show(text)
    console.say(text)
    assert capsys.readouterr() == (f"{text}\n", f"{text}\n")


def test_a_terminal_gets_lines_that_fit(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    console.say("data    " + "word " * 60, hang=8)
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("data    word")
    assert others
    assert all(line.startswith(" " * 8 + "word") for line in others)
    assert max(map(len, [first, *others])) <= width


def test_a_suggested_command_can_be_copied(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tidali", "train", "--data", "my pictures/it's here", "--out", "r" * 30, "--set", "augment.shift_px=4"]
    console.suggest("train on it", *words)
    heading, *lines = capsys.readouterr().err.splitlines()
    assert heading == "next: train on it"
    assert len(lines) > 1
    assert max(map(len, lines)) <= width
    script = "set -- " + "\n".join(lines) + """\nprintf '%s\\n' "$@" """
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.splitlines() == words


def test_an_option_stays_with_its_value() -> None:
    command = "tidali info data --sheet seen.png --set augment.shift_px=4"
    assert layout.wrap_command(command, 45) == "tidali info data --sheet seen.png \\\n  --set augment.shift_px=4"
    assert layout.wrap_command("tidali --out " + "r" * 20, 22) == "tidali \\\n  --out \\\n  " + "r" * 20


def test_nothing_is_suggested_to_whom_wants_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with console.silenced():
        console.suggest("train on it", "tidali", "train")
    assert capsys.readouterr() == ("", "")


COLUMNS = ("image", "size of the image", "share", *(f"measure {number}" for number in range(9)))
ROWS = [(f"name{row}", "640 x 480 px", "87 %", *range(100000 * row, 100000 * row + 9)) for row in range(1, 4)]


def test_a_table_keeps_every_cell_and_its_first_column(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("a title that is longer than the line is wide, if the line is not very wide", COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for row in ROWS:
        assert all(re.search(rf"(?<!\S){re.escape(str(cell))}(?!\S)", text) for cell in row)
    headings = [line for line in lines if line.startswith("image ")]
    assert len(headings) > 1
    for number in range(1, 4):
        assert sum(line.startswith(f"name{number} ") for line in lines) == len(headings)


def test_a_table_with_room_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("title", COLUMNS, ROWS)
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(ROWS)


def test_a_table_wraps_text_before_it_is_divided(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "line_width", lambda _: 40)
    console.print_table("", ("name", "what", "n"), [("a", "some words that need more than a line", "7")], left=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:1]] == ["name"]
    assert [line[:6].strip() for line in lines[2:]] == ["a", ""]
    assert max(map(len, lines)) <= 40


@pytest.mark.parametrize("columns", [20, 30, 40, 60, 80, 120])
def test_a_progress_bar_is_one_line_that_drops_the_least_important(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=columns, color_system=None)
    monkeypatch.setattr(console, "messages", screen)
    monkeypatch.setattr(console.sys, "stderr", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})())
    notes = ("loss 1.234", "top-1 35.1 %", "1,480 images/s", "waiting for data 1.2 %")
    bar = console.progress_bar()
    bar.add_task("epoch 3/20", total=2500, completed=1250, notes=notes)
    screen.print(bar.get_renderable())
    (line,) = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert cell_len(line) <= columns
    assert line.startswith("epoch 3/20")
    shown = [note for note in ("1,250/2,500", *notes) if note in line]
    assert shown == ["1,250/2,500", *notes][: len(shown)]
    assert len(shown) == {20: 0, 30: 1, 40: 2, 60: 3, 80: 4, 120: 5}[columns]
    assert "…" not in line


def test_counting_words() -> None:
    assert [counted(count, "epoch") for count in (0, 1, 2500)] == ["0 epochs", "1 epoch", "2,500 epochs"]
    assert (counted(1, "class"), counted(2, "class"), counted(2, "batch")) == ("1 class", "2 classes", "2 batches")
    assert (span("4", "4"), span("4", "5")) == ("4", "4 to 5")
