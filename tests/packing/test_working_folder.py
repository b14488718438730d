"""What the current folder holds must not matter to any process that is started: people work where they cloned tidali, and keep
their data in folders named ``shards``."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from tidali.hardware.processes import own_import_path


@pytest.fixture
def hiding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with packages and modules of our names and of the standard library's, none of which can be imported. No
    server of an earlier test runs."""
    for name in ("tidali", "shards", "bench"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ValueError('imported from the current folder')")
    for name in ("random", "signal", "socket", "tempfile"):
        (tmp_path / f"{name}.py").write_text("raise ValueError('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    yield tmp_path
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_the_packers_workers(make: Any, tiny_zip: Path, hiding: Path, contents: Any) -> None:
    make.pack(tiny_zip, hiding / "two", workers=2, shard_samples=20)
    make.pack(tiny_zip, hiding / "one", workers=1, shard_samples=20)
    assert contents(hiding / "two") == contents(hiding / "one")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
@pytest.mark.parametrize("ours", [True, False])
def test_spawned_processes(hiding: Path, ours: bool) -> None:
    """The doctor's ranks are. Without `own_import_path` they fail here, so this can."""
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    before = dict(os.environ)
    if ours:
        with own_import_path():
            process.start()
    else:
        process.start()
    assert dict(os.environ) == before
    process.join(timeout=60)
    assert (process.exitcode == 0) == ours


@pytest.mark.parametrize("named", [True, False])
def test_python_minus_m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """Python puts the current folder first. It stays where tidali itself was found in it."""
    import tidali

    folder = Path(tidali.__file__).resolve().parents[1] if named else tmp_path
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), "elsewhere", *sys.path])
    monkeypatch.setattr(sys, "argv", ["tidali", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(tidali.__file__).with_name("__main__.py")), run_name="__main__")
    assert sys.path[0] == (str(folder) if named else "elsewhere")
