"""How the command behaves in a shell: examples, completion, colour, --quiet and --verbose, and its two outputs."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tidali import console
from tidali.cli.examples import EXAMPLES
from tidali.cli.main import app

PROGRAM = typer.main.get_command(app)
LINES = sorted({line for examples in EXAMPLES.values() for line, _ in examples})
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")


def run(*argv: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, under the name 'tidali'."""
    code = "import sys; sys.argv[0] = 'tidali'; from tidali.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, argv)]
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(command, capture_output=True, text=True, env={**kept, **env})


def test_every_command_has_examples() -> None:
    assert EXAMPLES.keys() - {""} == PROGRAM.commands.keys()
    assert all(any(f"tidali {name}" in line for line, _ in EXAMPLES[name]) for name in PROGRAM.commands)


@pytest.mark.parametrize("line", LINES)
def test_every_example_is_a_command_that_can_be_given(line: str) -> None:
    words = shlex.split(line.partition("|")[0])
    words = words[words.index("tidali") + 1 :]
    command = PROGRAM.commands[words[0]]
    command.make_context(words[0], words[1:])  # refuses unknown options, missing arguments, and values of the wrong kind


def test_examples_are_below_the_help_of_each(tidali) -> None:
    ended = tidali("shard", "--help")
    for line, what in EXAMPLES["shard"]:
        assert f"   # {what}\n   {line}\n" in ended.stdout
    assert EXAMPLES[""][0][0] in tidali().stdout
    assert tidali("train", "-h").stdout == tidali("train", "--help").stdout


def test_options_are_grouped_and_defaults_shown(tidali) -> None:
    for name in ("shard", "train", "bench"):
        command = PROGRAM.commands[name]
        panels = {parameter.rich_help_panel for parameter in command.params if parameter.name != "help"}
        assert len(panels) >= 3, name
        assert all(parameter.show_default for parameter in command.params)


@pytest.mark.parametrize(
    ("words", "offered"), [("tidali tr", {"train"}), ("tidali eval --re", {"--res"}), ("tidali train --amp b", {"bf16"})]
)
def test_completion_in_bash(words: str, offered: set[str]) -> None:
    number = str(len(words.split()) - 1)
    ended = run(_TIDALI_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number)
    assert set(ended.stdout.split()) == offered, ended.stderr


def test_the_completion_script() -> None:
    env = {"SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ended = run("--show-completion", "bash", **env)
    assert "complete -o default -F _tidali_completion tidali" in ended.stdout
    assert subprocess.run(["bash", "-n"], input=ended.stdout, text=True).returncode == 0


def test_no_color() -> None:
    assert COLOUR.search(run("--help", FORCE_COLOR="1").stdout)
    assert not COLOUR.search(run("--help", FORCE_COLOR="1", NO_COLOR="1").stdout)
    assert "\x1b" not in run("--help").stdout  # no terminal


def on_a_terminal(*argv: object, **env: str) -> str:
    """What a command prints to standard error if that is a terminal."""
    ours, theirs = pty.openpty()
    try:
        code = "import sys; sys.argv[0] = 'tidali'; from tidali.cli.main import main; main()"
        command = [sys.executable, "-c", code, *map(str, argv)]
        subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "TERM": "xterm", **env}, check=True
        )
        os.close(theirs)
        theirs = -1
        text = b""
        while True:
            try:
                text += os.read(ours, 1 << 16)
            except OSError:  # how Linux reports that the other side is closed
                return text.decode()
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def test_progress_is_for_terminals(tmp_path: Path) -> None:
    demo = ("demo", "--classes", 2, "--per-class", 5, "--workers", 1)
    assert "drawing" in on_a_terminal(*demo, tmp_path / "a")
    assert on_a_terminal("--quiet", *demo, tmp_path / "b") == ""
    # Build servers set FORCE_COLOR, but they are not terminals.
    assert "drawing" not in run(*demo, tmp_path / "c", FORCE_COLOR="1").stderr


def test_json_is_all_of_stdout(tidali, demo_data: Path, trained) -> None:
    for argv in (("info", demo_data, "--json"), ("eval", trained[0], "--data", demo_data, "--device", "cpu", "--json")):
        json.loads(tidali(*argv).stdout)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("argv", [("info", "--json"), ("info",), ("--version",)])
def test_output_to_a_full_disk(demo_data: Path, argv: tuple[str, ...]) -> None:
    code = "import sys; sys.argv[0] = 'tidali'; from tidali.cli.main import main; main()"
    words = [argv[0], str(demo_data), *argv[1:]] if argv[0] == "info" else argv
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ended.returncode, ended.stderr) == (1, "tidali: standard output: No space left on device\n")


@pytest.fixture
def normal():
    yield
    console.set_verbosity("normal")


def test_quiet_and_verbose(tidali, normal: None, demo_data: Path, tmp_path: Path) -> None:
    sheet = ("info", demo_data, "--sheet", tmp_path / "a.png")
    usual, quiet, verbose = tidali(*sheet), tidali("--quiet", *sheet), tidali("-v", *sheet)
    assert usual.stdout == quiet.stdout == verbose.stdout
    assert usual.stderr == f"wrote {tmp_path / 'a.png'}\n"
    assert quiet.stderr == ""
    assert re.search(r"^ +\d+\.\d\d s  wrote ", verbose.stderr, re.MULTILINE)
    assert "tidali 0." in verbose.stderr


def test_warnings_and_errors_are_printed_with_quiet_too(tidali, normal: None, tmp_path: Path, write_photos) -> None:
    source = write_photos(tmp_path / "photos", {"train/cat": 3, "val/cat": 2})
    (source / "train" / "cat" / "bad.jpg").write_text("no image")
    ended = tidali("-q", "shard", source, tmp_path / "packed", "--workers", 1)
    assert "warning: not usable as images: 1 file;" in ended.stderr
    ended = tidali("--quiet", "info", tmp_path / "none")
    assert ended.code == 2
    assert ended.stderr.startswith("tidali: ")


def test_a_traceback_is_printed_only_with_verbose(tidali, normal: None, tmp_path: Path) -> None:
    assert "Traceback" not in tidali("info", tmp_path / "none").stderr
    ended = tidali("--verbose", "info", tmp_path / "none")
    assert "Traceback" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("tidali: ")


def test_quiet_and_verbose_together(tidali) -> None:
    ended = tidali("-q", "-v", "info", "x")
    assert (ended.code, ended.stderr) == (2, "tidali: --quiet and --verbose: give one of them\n")


def test_wrong_use_names_the_commands_help(tidali) -> None:
    ended = tidali("eval", "--re", "3")
    assert ended.code == 2
    assert "--res" in ended.stderr
    assert "See 'tidali eval --help'." in ended.stderr
    assert tidali("evil").stderr.startswith("tidali: No such command 'evil'. Did you mean 'eval'?")
