"""Imports point one way, between rooms and between modules. Read from the source, so an import inside a function counts too."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import bench
import shards
import tidali

PACKAGES = {"tidali": tidali, "shards": shards, "bench": bench}


def _module_name(package: str, path: Path) -> str:
    parts = path.relative_to(Path(PACKAGES[package].__path__[0]).parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    _module_name(name, path): path
    for name, package in PACKAGES.items()
    for path in sorted(Path(package.__path__[0]).rglob("*.py"))
}
ROOMS = [
    *("errors", "files", "config", "recipes", "hardware", "console", "dataset", "images", "loading", "model", "training"),
    *("report", "study", "doctor", "api", "", "cli", "__main__"),
]
"""Of `tidali`, lowest first; "" is the package itself. A room imports from rooms before it. docs/architecture.md draws them."""
HEAVY = {
    *("torch", "torchvision", "nvidia", "numpy", "PIL", "simplejpeg", "safetensors", "fsspec", "ray", "webdataset"),
    *("matplotlib", "jinja2"),
}
STANDARD_LIBRARY_ONLY = {
    *(
        "tidali.errors",
        "tidali.files",
        "tidali.config",
        "tidali.recipes",
        "tidali.training.schedule",
        "tidali.training.judgement",
    ),
    *("tidali.training.history", "tidali.training.run_index"),
    *("tidali.hardware.timing", "tidali.hardware.limits", "tidali.hardware.processes"),
    *(name for name in MODULES if name.startswith("tidali.dataset")),
}
OPEN_TO_SHARDS = {
    *("tidali", "tidali.errors", "tidali.files", "tidali.dataset", "tidali.images"),  # of tidali itself its version
    *("tidali.hardware.limits", "tidali.hardware.processes"),
}


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
        # `from tidali.report import figures` names a module, `from tidali.report.figures import X` a thing in one.
        names = [f"{node.module}.{name.name}" for name in node.names]
        known = [name if name in MODULES else str(node.module) for name in names]
        yield from (Import(name, inside_function, for_types) for name in known)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, inside_function=inside_function, for_types=for_types)


def test_the_reader_sees_every_kind() -> None:
    found = imports_of("tidali.cli.data")
    assert Import("typer", False, False) in found
    assert any(one.top == "shards" and one.inside_function for one in found)
    assert any(one.top == "shards" and one.for_types for one in found)
    assert any(name.count(".") == 2 for name in MODULES)
    assert len(MODULES) > 100


def room_of(module: str) -> str | None:
    """The room of a module of tidali; None elsewhere."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "tidali" else None


def test_every_room_has_its_place() -> None:
    assert {room_of(module) for module in MODULES} - {None} == set(ROOMS)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("tidali")])
def test_a_room_imports_from_those_before_it(module: str) -> None:
    own = room_of(module)
    assert own is not None
    others = {room_of(one.module) for one in imports_of(module)} - {None, own}
    if own != "":  # it names what other modules hold; all of them take its version
        others.discard("")
    assert {room for room in others if ROOMS.index(str(room)) >= ROOMS.index(own)} == set()


def test_no_modules_import_each_other() -> None:
    graph = {name: {one.module for one in imports_of(name)} & MODULES.keys() - {name, "tidali"} for name in MODULES}
    TopologicalSorter(graph).prepare()  # a circle is an error that names it


def test_the_drawing_of_the_rooms_is_true() -> None:
    """docs/architecture.md lists for each room those that it imports from."""
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = dict(re.findall(r"^([a-z]+) +<- (.+)$", text, flags=re.MULTILINE))
    found: dict[str, set[str]] = {}
    for module in MODULES:
        own = room_of(module)
        if own:
            others = {str(room_of(one.module)) for one in imports_of(module)} - {"None", "", own}
            found.setdefault(own, set()).update(others)
    expected = {room: " ".join(sorted(found[room], key=ROOMS.index)) for room in ROOMS if found.get(room)}
    expected.pop("__main__")
    assert drawn == expected


@pytest.mark.parametrize("module", sorted(STANDARD_LIBRARY_ONLY))
def test_standard_library_only(module: str) -> None:
    found = [one for one in imports_of(module) if not one.for_types]
    if module in ("tidali.dataset.remote", "tidali.hardware.timing"):  # the function that drives it may import it
        found = [one for one in found if not (one.inside_function and one.top in ("fsspec", "torch"))]
    assert {one.module for one in found if one.top not in sys.stdlib_module_names} <= STANDARD_LIBRARY_ONLY


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("shards.")])
def test_shards_runs_without_torch_and_dali(module: str) -> None:
    found = imports_of(module)
    assert not {one.top for one in found} & {"torch", "torchvision", "nvidia", "bench"}
    of_tidali = {one.module for one in found if one.top == "tidali"}
    assert {name for name in of_tidali if not OPEN_TO_SHARDS & {name, ".".join(name.split(".")[:2])}} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("bench.")])
def test_bench_packs_to_measure_packing_and_for_its_check_of_crops(module: str) -> None:
    assert module in ("bench.pack", "bench.crops") or "shards" not in {one.top for one in imports_of(module)}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("tidali.")])
def test_only_commands_look_back(module: str) -> None:
    back = [one for one in imports_of(module) if one.top in ("shards", "bench")]
    if module.startswith("tidali.cli."):
        assert [one for one in back if not one.inside_function and not one.for_types] == []
    else:
        assert back == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("tidali.cli.")])
def test_command_line_modules_import_nothing_heavy(module: str) -> None:
    at_import = {one.top for one in imports_of(module) if not one.inside_function and not one.for_types}
    assert not at_import & HEAVY
