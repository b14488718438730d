"""Every command and option has help, and the README names every command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import typer

from tidali.cli.main import app
from tidali.cli.options import RecipeName
from tidali.recipes import RECIPES

README = Path(__file__).parents[2] / "README.md"
COMMANDS = typer.main.get_command(app).commands


def test_there_are_the_main_jobs_commands() -> None:
    assert {"shard", "demo", "train", "eval", "bench"} <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert command.params
    without = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
    assert without == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_its_options(tidali, name: str) -> None:
    ended = tidali(name, "--help")
    assert (ended.code, ended.stderr) == (0, "")
    for parameter in COMMANDS[name].params:
        for option in parameter.opts:
            if option.startswith("--"):
                assert option in ended.stdout


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_every_command(tidali, argv: list[str]) -> None:
    ended = tidali(*argv)
    assert ended.code == 0
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", ended.stdout)] == []


def test_readme_names_every_command() -> None:
    text = README.read_text()
    assert [name for name in COMMANDS if f"`tidali {name}" not in text and f"\ntidali {name}" not in text] == []


def test_readme_names_no_command_or_option_that_is_not_there() -> None:
    text = README.read_text()
    named = set(re.findall(r"^tidali (\w+)", text, re.MULTILINE)) | set(re.findall(r"`tidali (\w+)", text))
    assert named
    assert named - {"COMMAND"} <= COMMANDS.keys()
    options = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    lines = [line for line in text.splitlines() if re.search(r"(^|`|bin/)tidali \w+", line)]
    used = {option for line in lines for option in re.findall(r"--[a-z][a-z-]*", line)}
    assert used
    assert used <= options | {"--help", "--version"}


def test_every_recipe_can_be_chosen() -> None:
    assert get_args(RecipeName) == tuple(RECIPES)


def test_version(tidali) -> None:
    from tidali import __version__

    assert tidali("--version") == (0, f"tidali {__version__}\n", "")


def test_help_is_printed_as_it_is_written(tidali) -> None:
    text = " ".join(re.sub(r"[│\s]+", " ", tidali("shard", "--help").stdout).split())
    assert "SPLIT/CLASS/*.jpg or CLASS/*.jpg: a folder, or a zip of one." in text
    assert "When run again, it keeps every intact shard and rewrites the rest." in text
