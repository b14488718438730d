"""What the distributions hold and install: three packages and their metadata; and that an installed one does the job."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from tidali import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("tidali", "shards", "bench")


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_top_level_names(names: list[str]) -> None:
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, f"tidali-{__version__}.dist-info"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_inside(names: list[str], package: str) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    assert f"{package}/__init__.py" in modules
    assert modules <= set(names)


def test_types_data_entry_point_and_licence(wheel: Path, names: list[str]) -> None:
    assert "tidali/py.typed" in names
    data = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert {
        "tidali/report/page.html",
        "tidali/loading/resample.c",
        "tidali/loading/jpeg.c",
        "bench/schema.json",
        "bench/bench.html",
    } <= data
    assert data <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "tidali = tidali.cli.main:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_dali_is_asked_for_on_linux_alone(wheel: Path, names: list[str]) -> None:
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    wanted = message_from_bytes(zipfile.ZipFile(wheel).read(metadata)).get_all("Requires-Dist")
    (dali,) = (line for line in wanted if line.startswith("nvidia-dali"))
    assert 'sys_platform == "linux"' in dali.replace("'", '"')


def test_the_sdist_can_be_tested_and_its_site_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "pyproject.toml",
        "mkdocs.yml",
        "Dockerfile",
        "tidali/loading/resample.c",
    } <= held
    for folder, pattern in (("tests", "*"), ("docs", "*.md"), ("bench/results", "*.json"), ("examples", "*")):
        paths = [path for path in (ROOT / folder).rglob(pattern) if path.is_file() and path.suffix != ".pyc"]
        ours = {str(path.relative_to(ROOT)) for path in paths}
        assert ours
        assert ours <= held
    assert not [name for name in held if "__pycache__" in name or name.startswith(("data/", "runs/"))]


def test_an_installed_wheel_does_the_job(wheel: Path, tmp_path: Path) -> None:
    """A new environment with nothing in it but the wheel; its dependencies are lent by this one, which they would fill with
    gigabytes, and come after it on the path."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path(packages).iterdir()} - {"pip", "setuptools"} >= set(PACKAGES)
    (Path(packages) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str) -> str:
        # -I: neither this checkout's folder nor PYTHONPATH; its editable install, if any, is a hook of the lent .pth files,
        # which site does not read in a folder that itself came from one.
        done = subprocess.run([str(python), "-I", *command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for package in PACKAGES:
        assert run("-c", f"import {package}; print({package}.__file__)").startswith(packages)
    tidali = str(environment / "bin" / "tidali")
    assert run(tidali, "--version") == f"tidali {__version__}\n"
    run(tidali, "demo", "demo", "--classes", "2", "--per-class", "10", "--workers", "1")
    source = tmp_path / "photos"
    _unpack(tmp_path / "demo", source)
    run(tidali, "shard", "photos", "packed", "--workers", "1")
    run(tidali, "verify", "packed")
    train = (
        "train",
        "--data",
        "packed",
        "--res",
        "32",
        "--epochs",
        "1",
        "--batch-size",
        "10",
        "--device",
        "cpu",
        "--out",
        "run",
    )
    assert "best" in run(tidali, *train)
    assert (tmp_path / "run" / "best.safetensors").stat().st_size > 40e6


def _unpack(packed: Path, source: Path) -> None:
    """A folder of images from a packed data set's tars, as GNU tar would."""
    for split in ("train", "val"):
        for tar in sorted(packed.glob(f"{split}-*.tar")):
            with tarfile.open(tar) as archive:
                members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
            for name, data in members.items():
                if name.endswith(".jpg"):
                    folder = source / split / f"class{members[name.replace('.jpg', '.cls')].decode()}"
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(data)
