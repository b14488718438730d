"""Asking for help, or for a list of runs, must not cost an import of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "torchvision",
    "nvidia",
    "numpy",
    "PIL",
    "safetensors",
    "simplejpeg",
    "fsspec",
    "ray",
    "matplotlib",
    "jinja2",
    "webdataset",
    "rich.progress",
)


@pytest.mark.parametrize(
    "argv", [["--help"], ["runs", str(Path(__file__).parent)], ["train", "--help"], ["train", "--res", "31"]]
)
def test_nothing_heavy_is_imported(argv: list[str]) -> None:
    program = f"""
import atexit, sys
from tidali.cli import main as cli
sys.argv = ["tidali", *{argv!r}]
atexit.register(lambda: print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules))))
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout + done.stderr
    assert done.returncode == (2 if "31" in argv else 0)
    assert "Traceback" not in done.stderr
