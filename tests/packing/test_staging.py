"""The local copy of a data set behind a URL, and what becomes of it when it is torn. The URL is fsspec's memory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tidali.config import Preprocess
from tidali.dataset.contract import Dataset
from tidali.dataset.source import open_data
from tidali.errors import DatasetError
from tidali.files import temporary_path
from tidali.loading.data import Data


@pytest.fixture(scope="module")
def url(make: Any, tiny_zip: Path) -> str:
    make.pack(tiny_zip, "memory://staging/data", shard_samples=24)
    return "memory://staging/data"


@pytest.fixture
def staged(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path / "cache"))
    return open_data(url)


@pytest.mark.parametrize("name", ["train-000000.tar", "val-000000.tar", "dataset.json"])
@pytest.mark.parametrize("size_bytes", [0, 700])
def test_a_torn_copy_is_fetched_again(url: str, staged: Dataset, contents: Any, name: str, size_bytes: int) -> None:
    """As after a power cut, before the file's data was on the disk."""
    before = contents(staged.root)
    os.truncate(staged.root / name, size_bytes)
    assert open_data(url).root == staged.root
    assert contents(staged.root) == before


def test_damage_that_stays_names_the_folder_to_delete(url: str, staged: Dataset) -> None:
    (staged.root / "train-000000.idx").write_text("v1.2 0\n")
    with pytest.raises(DatasetError) as refused:
        open_data(url)
    assert f"delete {staged.root}, which is a copy of {url}: it is fetched again" in str(refused.value)
    assert "pack" not in str(refused.value).replace("packed", "")


def test_damaged_images_name_the_folder_too(url: str, staged: Dataset) -> None:
    tar = staged.root / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # in the first image, behind its header
    tar.write_bytes(data)
    data = Data(open_data(url), torch.device("cpu"), max_bad=0)
    with pytest.raises(DatasetError, match=f"1 of the 48 samples .*; delete {staged.root}, which is a copy of {url}"):
        list(data.decoded("train", Preprocess(res=staged.default_res), 48))


def test_each_file_is_on_the_disk_before_it_has_its_name(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    synced, named = set(), []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> Path:
        assert str(source) in synced
        named.append(Path(target).name)
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)  # Python 3.10's has os.replace of its own
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path / "cache"))
    staged = open_data(url)
    assert {*named, "dataset.json"} == set(contents(staged.root))


def test_a_killed_fetch_leaves_nothing_for_ever(url: str, staged: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    tar = staged.root / "train-000000.tar"
    tar.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process.pid)
        temporary_path(tar).write_bytes(b"half")
    open_data(url)
    manifest = (staged.root / "dataset.json").read_bytes()
    assert staged.root.name.endswith(hashlib.sha256(manifest).hexdigest()[:16])
    assert [path.name for path in staged.root.iterdir() if path.name.startswith(".")] == []
