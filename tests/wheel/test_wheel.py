"""What the wheel installs: three packages and their metadata, nothing of the tests or the data."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that the checkout gets no build folder; by the setuptools that is installed."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or newer is not installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for package in ("tidali", "shards", "bench", "tests"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        str(source),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return zipfile.ZipFile(built)


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    from tidali import __version__

    assert {name.partition("/")[0] for name in wheel.namelist()} == {
        "tidali",
        "shards",
        "bench",
        f"tidali-{__version__}.dist-info",
    }


@pytest.mark.parametrize("package", ["tidali", "shards", "bench"])
def test_every_module_is_inside(wheel: zipfile.ZipFile, package: str) -> None:
    modules = {f"{package}/{path.name}" for path in (ROOT / package).glob("*.py")}
    assert f"{package}/__init__.py" in modules
    assert modules <= set(wheel.namelist())


def test_every_page_template_is_inside(wheel: zipfile.ZipFile) -> None:
    templates = {f"tidali/{path.name}" for path in (ROOT / "tidali").glob("*.html")}
    assert "tidali/page.html" in templates
    assert templates <= set(wheel.namelist())


def test_types_entry_point_and_licence(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "tidali/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "tidali = tidali.cli:main" in wheel.read(entry_points).decode()


def test_dali_is_asked_for_on_linux_alone(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    wanted = message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist")
    (dali,) = (line for line in wanted if line.startswith("nvidia-dali"))
    assert 'sys_platform == "linux"' in dali.replace("'", '"')
