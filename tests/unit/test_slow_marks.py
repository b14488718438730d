"""Which tests are marked slow when they are collected, and that a slow test without the mark fails the run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TESTS = """
import subprocess, sys, time
import pytest

COMMAND = [sys.executable, "-c", ""]

def helper():
    subprocess.run(COMMAND, check=True)

def use_a_core():
    end_s = time.process_time() + 0.2
    while time.process_time() < end_s:
        pass

def test_by_a_helper():
    helper()

def test_by_a_list():
    assert COMMAND

def test_by_itself():
    def inner():
        return sys.executable
    assert inner()

def test_another_program():
    subprocess.run(["true"], check=True)

def test_busy():
    use_a_core()

@pytest.mark.slow
def test_busy_and_marked():
    use_a_core()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with the conftest.py of this one."""
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\naddopts = -p no:cacheprovider\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def run(folder: Path, *argv: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "pytest", *argv], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_those_that_start_python_are_marked(folder: Path) -> None:
    code, said = run(folder, "-q", "--collect-only", "-m", "slow")
    assert code == 0, said
    marked = {line.partition("::")[2] for line in said.splitlines() if "::" in line}
    assert marked == {"test_by_a_helper", "test_by_a_list", "test_by_itself", "test_busy_and_marked"}


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_a_missing_mark_fails_the_run(folder: Path, options: tuple[str, ...]) -> None:
    if options:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    code, said = run(folder, *options, "--slow-limit", "1e-9")
    assert code == 1
    assert "6 passed" in said
    found = {line.partition(": ")[0] for line in said.splitlines() if "pytest.mark.slow" in line}
    assert "test_it.py::test_busy" in found
    assert found <= {"test_it.py::test_busy", "test_it.py::test_another_program"}


def test_a_test_below_the_limit_fails_no_run(folder: Path) -> None:
    code, said = run(folder, "--slow-limit", "1e9")
    assert code == 0, said
    assert "pytest.mark.slow" not in said


def test_processes_that_a_test_started_count(folder: Path) -> None:
    (folder / "child.py").write_text("import time\nwhile time.process_time() < 0.5:\n    pass\n")
    command = f"{sys.executable} child.py"  # as text, by which no test is marked
    (folder / "test_it.py").write_text(f"import os\n\ndef test_child():\n    assert os.system({command!r}) == 0\n")
    code, said = run(folder, "--slow-limit", "0.4")
    assert code == 1, said
    assert "test_it.py::test_child: " in said
