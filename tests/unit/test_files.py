"""Files that appear whole or not at all, what a killed writer leaves, locks, the cache folder. The full disk is in
test_checkpoint.py."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tidali.errors import TidaliError
from tidali.files import cache_folder, lock, replacing, temporary_path, write_atomically

DIES = """
import os, signal, sys
from pathlib import Path
from tidali.files import write_atomically

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), b"new")
"""


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    """Neither the file nor its temporary can be made, and the latter cannot be removed."""
    with pytest.raises(TidaliError, match=r"cannot be written \(File name too long\)"):
        write_atomically(tmp_path / ("x" * 300), b"new")


def test_a_disk_that_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("open", "unlink"):
        monkeypatch.setattr(Path, name, read_only)
    with pytest.raises(TidaliError, match=r"x\.png: cannot be written \(Read-only file system\)"):
        write_atomically(tmp_path / "x.png", b"new")


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "state [1].safetensors"
    ended = subprocess.run([sys.executable, "-c", DIES, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1, "the writer was not killed in the middle"
    write_atomically(path, b"new")
    assert [(left.name, left.read_bytes()) for left in tmp_path.iterdir()] == [(path.name, b"new")]


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    ours = temporary_path(path)
    monkeypatch.setattr(os, "getpid", os.getppid)  # another process, which is alive
    theirs = temporary_path(path)
    assert theirs != ours
    theirs.write_bytes(b"half")
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert (path.read_bytes(), theirs.read_bytes()) == (b"new", b"half")


def test_a_failed_block_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [(left, left.read_bytes()) for left in tmp_path.iterdir()] == [(path, b"old")]


def test_a_lock_is_held_by_one_process_and_released_when_it_dies(tmp_path: Path) -> None:
    program = "import sys, time; from pathlib import Path; from tidali.files import lock\n"
    program += "with lock(Path(sys.argv[1]), wait=True): print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(TidaliError, match=f"{tmp_path}: another tidali process"), lock(tmp_path, wait=False):
            pass
        holder.kill()
        with lock(tmp_path, wait=True):
            pass
    with lock(tmp_path, wait=False):
        assert list(tmp_path.iterdir()) == []


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TIDALI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "tidali"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tidali"
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
