"""Which tests are marked slow when they are collected, and that a slow test without the mark fails the run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
CHILD = f"{sys.executable} -c 'import time\nwhile time.process_time() < 0.5: pass'"
TESTS = f"""
import os, subprocess, sys, time
import pytest

COMMAND = [sys.executable, "-c", ""]

def helper():
    subprocess.run(COMMAND, check=True)

def use_a_core():
    end_s = time.process_time() + 0.5
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

def test_busy_child():
    assert os.system({CHILD!r}) == 0  # as text, by which no test is marked

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
    """Processes that a test started count."""
    if options:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    code, said = run(folder, *options, "--slow-limit", "0.4")
    assert code == 1
    assert "7 passed" in said
    found = {line.partition(": ")[0] for line in said.splitlines() if "pytest.mark.slow" in line}
    assert found == {"test_it.py::test_busy", "test_it.py::test_busy_child"}


def test_marked_tests_and_those_below_the_limit_fail_no_run(folder: Path) -> None:
    code, said = run(folder, "-k", "another_program or marked", "--slow-limit", "0.4")
    assert code == 0, said
    assert "2 passed" in said
    assert "pytest.mark.slow" not in said
