"""Write the pages, tables and pictures that are made from the program and from recorded measurements: ``python
docs/generate.py``. With ``--check`` name those that are stale and exit with 1."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import measured  # beside this file
from typer.models import OptionInfo

import tidali
from tidali import config
from tidali.cli.examples import EXAMPLES
from tidali.cli.main import app, root
from tidali.recipes import RECIPES

DOCS = Path(__file__).parent


# ------------------------------------------------------------------------------------------------------- command-line reference


def command_line() -> str:
    lines = [
        "# Command line",
        "",
        "Made from the program by `python docs/generate.py`. `tidali COMMAND --help` shows the same. These come before a",
        "command, as in `tidali --quiet train`:",
        "",
        *_tables(root),
    ]
    for command in app.registered_commands:
        function = command.callback
        assert function is not None
        name = command.name or function.__name__
        usage = [_argument_name(parameter) for parameter in _parameters(function) if not parameter.is_option]
        lines += [f"## tidali {name}", "", "```", " ".join(["tidali", name, *usage, "[OPTIONS]"]), "```", ""]
        lines += [_text(inspect.getdoc(function)), "", *_tables(function), "```"]
        for line, what in EXAMPLES.get(name, ()):
            lines += [f"# {what}", line]
        lines += ["```", ""]
    return "\n".join(lines)


class Parameter(NamedTuple):
    """One parameter of a command's function."""

    name: str
    type: Any
    info: Any
    """typer's OptionInfo or ArgumentInfo."""
    default: Any

    @property
    def is_option(self) -> bool:
        return isinstance(self.info, OptionInfo)

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    found = []
    # Not by get_type_hints: Python 3.10's makes Optional[Annotated[...]] of what is None by default.
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if get_origin(hint := parameter.annotation) is Annotated:
            found.append(Parameter(name, hint.__origin__, hint.__metadata__[0], parameter.default))
    return found


def _tables(function: Callable[..., Any]) -> list[str]:
    """The arguments, and a table for each group of options, with the group's name as its head."""
    groups: dict[str, list[Parameter]] = {}
    for parameter in _parameters(function):
        group = parameter.info.rich_help_panel or ("Options" if parameter.is_option else "Arguments")
        groups.setdefault(group, []).append(parameter)
    lines = []
    for title, members in groups.items():
        lines += [f"| {title} | what it does | default |", "|---|---|---|"]
        for parameter in members:
            shown = _option_cell(parameter) if parameter.is_option else _kinds(_argument_name(parameter))
            lines.append(f"| {shown} | {_cell(parameter.info.help)} | {_default(parameter)} |")
        lines.append("")
    return lines


def _argument_name(parameter: Parameter) -> str:
    name = (parameter.info.metavar or parameter.name).upper().removesuffix("...")
    name += "..." if get_origin(parameter.type) is list else ""
    return name if parameter.required else f"[{name}]"


def _option_cell(parameter: Parameter) -> str:
    declared = [parameter.info.default, *(parameter.info.param_decls or ())]  # in Annotated, typer keeps the first as default
    names = [name for name in declared if isinstance(name, str) and name.startswith("-")]
    names = names or [f"--{parameter.name.replace('_', '-')}"]
    return f"{', '.join(f'`{name}`' for name in names)} {_value(parameter)}".strip()


def _value(parameter: Parameter) -> str:
    """What an option takes: its choices, or the kind of value."""
    kind = parameter.type
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if kind is bool:
        return ""
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    kind = get_args(kind)[0] if get_origin(kind) is list else kind
    names = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}
    return _kinds(parameter.info.metavar or names[kind])


def _kinds(text: str) -> str:
    """Of N|FILE: `N` or `FILE`. A bar would end the table's cell, and behind a backslash it would be shown with that."""
    return " or ".join(f"`{kind.strip()}`" for kind in text.split("|"))


def _default(parameter: Parameter) -> str:
    if isinstance(parameter.info.show_default, str):
        return _cell(parameter.info.show_default)
    if parameter.required:
        return "required"
    return "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"


def _cell(text: str | None) -> str:
    """One line, in which options are code, so that a browser does not break them at their dashes."""
    line = _text(text).replace("|", "\\|").replace("\n", " ")
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*", r"`\g<0>`", line)


def _text(text: str | None) -> str:
    """As the program prints it: what Markdown would take for emphasis is not."""
    return re.sub(r"([*_<])", r"\\\1", text or "")


# --------------------------------------------------------------------------------------------------------------------- recipes


def recipe_table() -> str:
    recipes = {name: asdict(recipe) for name, recipe in RECIPES.items()}
    lines = [f"| `--set` | what it does | {' | '.join(recipes)} |", f"|---|---|{'---|' * len(recipes)}"]
    for prefix, settings in (("", config.Recipe), ("augment.", config.Augment)):
        what = _docstrings(settings)
        for field in fields(settings):
            if field.name in ("name", "augment"):
                continue
            values = [recipe["augment"][field.name] if prefix else recipe[field.name] for recipe in recipes.values()]
            of_default = [_shown(value) for value in values]
            lines.append(f"| `{prefix}{field.name}` | {_describe(what.get(field.name, ''))} | {' | '.join(of_default)} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"`{[round(one, 4) for one in value]}`"
    return "`null`" if value is None else f"`{str(value).lower()}`"


def _describe(docstring: str) -> str:
    text = re.sub(r"``([^`]+)``", r"`\1`", " ".join(docstring.split()))
    return text.replace("|", "\\|")


def _docstrings(settings: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(settings)).body
    assert isinstance(definition, ast.ClassDef)
    return dict(_pairs(definition.body))


def _pairs(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            yield field.target.id, ast.literal_eval(below.value)


# ---------------------------------------------------------------------------------------------------------------------- Python


def python_names() -> str:
    """The page on the package's names: its docstring, with the examples as code, and each name's own reference."""
    parts = []
    for paragraph in (inspect.getdoc(tidali) or "").split("\n\n")[1:]:
        text = re.sub(r"``([^`]+)``", r"`\1`", paragraph)
        parts.append(f"```pycon\n{paragraph}\n```" if paragraph.startswith(">>>") else text)
    names = [f"{tidali._HOMES[name]}.{name}" for name in tidali.__all__]  # without importing torch for it
    lines = ["# Python", "", *("\n\n".join(parts)).splitlines(), ""]
    for title, members in (("The ten names", names), ("Their arguments and results", BESIDES)):
        lines += [f"## {title}", ""]
        for member in members:
            lines += [f"::: {member}", ""]
    return "\n".join(lines)


BESIDES = (
    "tidali.model.predict.Classifier",
    "tidali.model.predict.ClassScore",
    "tidali.loading.data.Batches",
    "tidali.config.Recipe",
    "tidali.config.Augment",
    "tidali.dataset.contract.Dataset",
    "tidali.dataset.contract.Manifest",
    "tidali.model.checkpoint.ModelCard",
    "tidali.training.evaluation.ResolutionScore",
    "tidali.training.metrics.Score",
    "tidali.training.run_folder.RunResult",
)


# ----------------------------------------------------------------------------------------------------------------------- pages


def pages() -> dict[Path, str]:
    """Every page and picture that is generated, or has a generated part, as it should be."""
    results = DOCS / "results.md"
    generated_parts = {
        DOCS.parent / "README.md": {
            "results in short": measured.results_in_short(),
            "study in short": measured.study_in_short(),
        },
        **{page: measured.benchmark_tables(page.read_text(encoding="utf-8")) for page in (results, DOCS / "gpu.md")},
        DOCS / "study.md": {file: measured.study_table(file) for file in measured.STUDIES},
        DOCS / "recipes.md": {"recipe fields": recipe_table()},
    }
    written = {DOCS / "cli.md": command_line(), DOCS / "api.md": python_names()}
    for path, texts in generated_parts.items():
        page = path.read_text(encoding="utf-8")
        for name, text in texts.items():
            page = replace_part(page, name, text)
        written[path] = page
    for theme in ("light", "dark"):
        written[DOCS / f"loaders-{theme}.svg"] = measured.loaders_chart(dark=theme == "dark")
    return written


def replace_part(page: str, name: str, text: str) -> str:
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, begins, rest = page.partition(begin)
    _, ends, after = rest.partition(end)
    if not begins or not ends:
        raise SystemExit(f"no part {name!r} between comments")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    check = sys.argv[1:] == ["--check"]
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not check:
            path.write_text(pages()[path], encoding="utf-8")
        print(f"{path}: {'stale; run python docs/generate.py' if check else 'written'}")
    if stale and check:
        sys.exit(1)


if __name__ == "__main__":
    main()
