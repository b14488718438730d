"""The distributions, each built once from a copy so that the checkout gets no build folder; by the setuptools installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("tidali", "shards", "bench", "tests", "docs", "examples")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "Dockerfile")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not _has_setuptools(77):
        pytest.skip("setuptools 77 or newer is not installed")
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for package in SOURCES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                (copy / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    return copy


@pytest.fixture(scope="session")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    _run("-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})", cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an installer would that finds no wheel: what the sdist lacks, the wheel lacks."""
    out = tmp_path_factory.mktemp("wheel")
    _run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(sdist))
    (built,) = out.iterdir()
    return built


def _has_setuptools(major: int) -> bool:
    """Asked of its metadata: it cannot be imported where another test has imported the standard library's distutils."""
    try:
        return int(version("setuptools").partition(".")[0]) >= major
    except PackageNotFoundError:
        return False


def _run(*argv: str, cwd: Path | None = None) -> None:
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
