"""Packing on a local Ray of two workers: the bytes of the local executor, also when a worker is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tidali.errors import TidaliError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]  # one of them kills any worker of Ray on this machine


def test_what_the_current_folder_holds_does_not_matter(
    source: Path, local: dict[str, bytes], tmp_path: Path, contents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray puts it first on its workers' import path. Before the fixture `ray`: this starts a Ray of its own."""
    pytest.importorskip("ray", reason="Ray is not installed; pip install 'tidali[ray]'")
    for name in ("tidali", "shards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ValueError('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    pack_on_ray(source, tmp_path / "data", workers=2)
    assert contents(tmp_path / "data") == local


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    module = pytest.importorskip("ray", reason="Ray is not installed; pip install 'tidali[ray]'")
    module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield module
    module.shutdown()


@pytest.fixture(scope="module")
def source(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.zip(make.tiny_tree(train=30), tmp_path_factory.mktemp("source") / "tiny.zip")


@pytest.fixture(scope="module")
def local(make: Any, source: Path, tmp_path_factory: pytest.TempPathFactory, contents: Any) -> dict[str, bytes]:
    dest = tmp_path_factory.mktemp("local") / "data"
    make.pack(source, dest, shard_samples=8)
    return contents(dest)


def pack_on_ray(source: Path, dest: Path, **options: Any) -> Any:
    from shards.pack import pack
    from shards.plan import PackSettings
    from shards.scan import FileSource

    return pack(FileSource(source), dest, PackSettings(shard_samples=8), executor="ray", **options)


def test_same_bytes_as_the_local_executor(
    ray: Any, source: Path, local: dict[str, bytes], tmp_path: Path, contents: Any
) -> None:
    report = pack_on_ray(source, tmp_path / "data")
    assert report.written == 18
    assert contents(tmp_path / "data") == local


def workers(ray: Any) -> set[int]:
    """Process ids of Ray's workers on this machine: they rename themselves."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::") and str(os.getppid()) != path.parent.name:
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_worker_killed_in_the_middle_changes_nothing(
    ray: Any, source: Path, local: dict[str, bytes], tmp_path: Path, contents: Any
) -> None:
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        busy = {pid for pid in workers(ray) if pid not in killed}
        if done < total and len(killed) < 2 and busy:
            killed.append(max(busy))
            os.kill(killed[-1], signal.SIGKILL)

    pack_on_ray(source, tmp_path / "data", progress=kill_one)
    assert len(killed) == 2
    assert contents(tmp_path / "data") == local


def test_errors_stay_one_line(ray: Any, make: Any, tmp_path: Path) -> None:
    source = make.folder(make.folder_tree(), tmp_path / "src")

    def vanish(done: int, total: int) -> None:
        for path in (source / "train").rglob("*.jpg"):
            path.unlink()

    with pytest.raises(TidaliError, match="No such file or directory") as caught:
        pack_on_ray(source, tmp_path / "data", progress=vanish)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_without_ray(tmp_path: Path, source: Path) -> None:
    """Ray hidden: the message says what to install, and DEST is not left half-made."""
    program = f"""
import sys
sys.modules["ray"] = None
from pathlib import Path
from shards.pack import pack
from shards.scan import FileSource
pack(FileSource(Path({str(source)!r})), {str(tmp_path / "data")!r}, executor="ray")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "TidaliError: --executor ray needs Ray; pip install 'tidali[ray]'" in done.stderr
