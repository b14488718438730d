"""Files that appear whole or not at all, and what a killed writer leaves. The full disk is in test_checkpoint.py."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tidali.errors import TidaliError
from tidali.files import temporary_path, write_atomically

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
