"""No line of any command's output is longer than the terminal, or broken inside a word."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.rich_utils
from rich.cells import cell_len

from bench import report
from tidali import console
from tidali.console import layout

WIDTHS = [60, 80]


def words(text: str) -> set[str]:
    return set(re.sub(r"[│╭╮╰╯─]|\\$", " ", text, flags=re.MULTILINE).split())


def check(narrow: str, wide: str, width: int) -> None:
    """The same words, on lines that fit, but for those that are one long word."""
    assert words(narrow) == words(wide)
    too_long = [line for line in narrow.splitlines() if cell_len(line) > width]
    assert [line for line in too_long if len(line.split()) > 1] == []


@pytest.fixture(params=WIDTHS)
def on_a_terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """``width = on_a_terminal()``: from then on lines are printed as on one."""

    def narrow() -> int:
        monkeypatch.setattr(console, "line_width", lambda _: request.param)
        return int(request.param)

    return narrow


@pytest.mark.parametrize(
    ("argv", "widths"),
    [
        (("info", "demo"), WIDTHS),
        (("verify", "demo"), WIDTHS),
        (("runs", "."), WIDTHS),
        (("eval", "run", "--data", "demo", "--device", "cpu"), WIDTHS[:1]),
        (("predict", "run", "photos", "--top", "2", "--device", "cpu"), WIDTHS[:1]),
    ],
    ids=lambda argv: argv[0],
)
def test_results_and_messages(
    tidali, trained, demo_data: Path, write_photos, tmp_path: Path, monkeypatch, argv, widths
) -> None:
    monkeypatch.chdir(tmp_path)  # a path of many letters is one word
    Path("demo").symlink_to(demo_data)
    shutil.copytree(trained[0], "run")
    write_photos(Path("photos"), {"a": 2})
    wide = tidali(*argv)
    assert wide.code == 0
    for width in widths:
        monkeypatch.setattr(console, "line_width", lambda _, width=width: width)
        narrow = tidali(*argv)
        assert narrow.code == 0
        check(narrow.stdout, wide.stdout, width)
        check(narrow.stderr, wide.stderr, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_training_prints(trained, width: int) -> None:
    _, ended = trained
    for line in (ended.stdout + ended.stderr).splitlines():
        check("\n".join(layout.wrap(line, width)), line, width)


def test_the_line_of_an_error(tidali, on_a_terminal) -> None:
    wide = tidali("train", "--set", "nonsense=1").stderr
    width = on_a_terminal()
    check(tidali("train", "--set", "nonsense=1").stderr, wide, width)


@pytest.mark.parametrize("argv", [[], ["train"], ["shard"], ["bench"], ["study"]], ids="-".join)
def test_help_on_80_columns(tidali, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 1000)
    wide = tidali(*argv, "--help").stdout
    monkeypatch.setattr(console, "line_width", lambda _: 80)
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 80)
    narrow = tidali(*argv, "--help").stdout
    assert max(cell_len(line.rstrip()) for line in narrow.splitlines()) <= 80
    assert words(narrow) <= words(wide)
    assert not re.search(r"<(bool|str|int|float|list)", narrow)


def test_a_benchmark(capsys: pytest.CaptureFixture[str], on_a_terminal) -> None:
    rate = {"median": 12345.6, "min": 11111.1, "max": 23456.7}
    rows = [
        {"case": case, "res": 224, "images_per_s": rate, "times_original": 1.5, "gmacs": 1.814, "others_share": 0.4}
        for case in ("decode only", "step, synthetic")
    ]
    rows[1]["ceiling"] = {"name": "float32 matrix-product", "images_per_s": 3e4, "share": 0.41}
    rows.append(
        {"case": "FFCV raw", "res": 224, "not_run": "it has no wheel for this Python, and does not compile here either"}
    )
    document = {
        "benchmark": "train",
        "repeats": 5,
        "device": {"name": "A Processor of 2,000 MHz"},
        "cores": 2,
        "dtype": "float32",
        "cached": True,
        "batch_size": 32,
        "compile": False,
        "rows": rows,
        "versions": {"tidali": "0.1", "torch": "2.9"},
        "commit": "0123456789ab-dirty",
        "date": "2026-01-01",
    }
    report.show(document)
    wide = capsys.readouterr().out
    assert "other processes used up to 40 % of the cores" in wide
    width = on_a_terminal()
    report.show(document)
    check(capsys.readouterr().out, wide, width)
