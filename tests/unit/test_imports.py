"""Imports point one way. Read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import bench
import shards
import tidali

MODULES = {
    f"{package.__name__}.{path.stem}": path
    for package in (tidali, shards, bench)
    for path in sorted(Path(package.__path__[0]).glob("*.py"))
}
ROOMS = {"tidali", "shards", "bench"}
HEAVY = {
    *("torch", "torchvision", "nvidia", "numpy", "PIL", "simplejpeg", "safetensors", "fsspec", "ray", "webdataset"),
    *("matplotlib", "jinja2"),
}
LEAVES = ("contract", "config", "errors", "files", "remote", "schedule", "timing", "names", "shard_bytes")


class Import(NamedTuple):
    module: str
    inside_function: bool
    for_types: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports_of(module: str) -> list[Import]:
    return list(_imports(ast.parse(MODULES[module].read_text()), inside_function=False, for_types=False))


def _imports(node: ast.AST, *, inside_function: bool, for_types: bool) -> Iterator[Import]:
    inside_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for_types |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Import):
        yield from (Import(name.name, inside_function, for_types) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        # `from tidali import errors` names a module of the package, `from tidali.errors import X` a thing in one.
        names = [f"{node.module}.{name.name}" if node.module in ROOMS else str(node.module) for name in node.names]
        yield from (Import(name, inside_function, for_types) for name in names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, inside_function=inside_function, for_types=for_types)


def test_the_reader_sees_every_kind() -> None:
    found = imports_of("tidali.cli_data")
    assert Import("typer", False, False) in found
    assert any(one.top == "shards" and one.inside_function for one in found)
    assert any(one.top == "shards" and one.for_types for one in found)
    assert {name.partition(".")[0] for name in MODULES} == ROOMS
    assert len(MODULES) > 40


@pytest.mark.parametrize("module", [f"tidali.{leaf}" for leaf in LEAVES])
def test_standard_library_only(module: str) -> None:
    found = [one for one in imports_of(module) if not one.for_types]
    if module in ("tidali.remote", "tidali.timing"):  # what they drive is theirs to import, in the function that does
        found = [one for one in found if not (one.inside_function and one.top in ("fsspec", "torch"))]
    allowed = {"tidali.errors"} | ({"tidali.shard_bytes"} if module == "tidali.contract" else set())
    assert {one.module for one in found if one.top not in sys.stdlib_module_names} <= allowed


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("shards.")])
def test_shards_runs_without_torch_and_dali(module: str) -> None:
    found = imports_of(module)
    assert not {one.top for one in found} & {"torch", "torchvision", "nvidia", "bench"}
    of_tidali = {one.module for one in found if one.top == "tidali"}
    assert of_tidali <= {f"tidali.{leaf}" for leaf in ("contract", "shard_bytes", "errors", "names", "remote")}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("bench.")])
def test_bench_uses_tidali_and_packs_in_one_place(module: str) -> None:
    assert module == "bench.pack" or "shards" not in {one.top for one in imports_of(module)}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("tidali.")])
def test_only_commands_look_back(module: str) -> None:
    back = [one for one in imports_of(module) if one.top in ("shards", "bench")]
    if module.startswith("tidali.cli"):
        assert [one for one in back if not one.inside_function and not one.for_types] == []
    else:
        assert back == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("tidali.cli")])
def test_command_line_modules_import_nothing_heavy(module: str) -> None:
    at_import = {one.top for one in imports_of(module) if not one.inside_function and not one.for_types}
    assert not at_import & HEAVY
