"""The compiled resampling: when it is there, when it is not, and that it survives a fork."""

from __future__ import annotations

import mmap
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tidali.config import Preprocess
from tidali.errors import TidaliError
from tidali.loading import native
from tidali.loading.resample import CompiledProducts, Resample, TorchProducts, choose_products, take

load_anew = native.load.__wrapped__


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler() -> None:
    if native.load() is None:
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("compiler")
def test_it_is_compiled_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_anew() is not None
    (built,) = (empty_cache / "tidali").iterdir()
    assert built.suffix == ".so"
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert load_anew() is not None


@pytest.mark.parametrize(
    ("setting", "value", "cause", "fix"),
    [
        ("PATH", "", "no C compiler", "install gcc"),
        ("CC", "false", "false fails", "build-essential"),
        ("CC", "fails", "stdint.h: No such file", "build-essential"),
        ("TIDALI_CACHE", "file/cache", "file/cache: Not a directory", "TIDALI_CACHE"),
        ("TIDALI_CACHE", "/proc/none", "/proc/none", "TIDALI_CACHE"),
    ],
)
def test_each_cause_is_named_and_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: str, cause: str, fix: str
):
    (tmp_path / "file").touch()
    script = ("#!/bin/sh", "echo from x.c: >&2", "echo 'x.c: fatal error: stdint.h: No such file' >&2", "exit 1")
    (tmp_path / "fails").write_text("\n".join(script))
    (tmp_path / "fails").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(setting, str(tmp_path / value) if value in ("fails", "file/cache") else value)
    with pytest.raises(TidaliError) as found:
        native.build()
    text, _, way_out = str(found.value).partition("; ")
    assert cause in text
    assert fix in way_out
    assert "\n" not in text
    assert load_anew() is None
    assert not any((tmp_path / "cache").glob("*"))


@pytest.mark.usefixtures("compiler")
def test_a_library_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As from a disk mounted with noexec, or after a power cut."""
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_compile", lambda _, path: path.write_bytes(b"no library"))
    with pytest.raises(TidaliError, match=r"cannot be loaded .*resample-.*; remove it, or set TIDALI_CACHE"):
        native.build()
    assert load_anew() is None


@pytest.mark.parametrize("has_library", [False, True])
def test_it_is_used_on_a_cpu_for_what_it_can(has_library: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "load", lambda: object() if has_library else None)
    kinds = {dtype: type(choose_products(224, dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    compiled = {key for key, kind in kinds.items() if kind is CompiledProducts}
    assert compiled == ({torch.float32, torch.bfloat16} if has_library else set())
    assert {kind for key, kind in kinds.items() if key not in compiled} == {TorchProducts}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_does_its_part(count: int, threads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pixels = torch.randint(0, 256, (count, 12, 10, 3), dtype=torch.uint8)
    settings: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    boxes = torch.tensor([[1.0, 2, 10, 8]]).expand(count, -1)
    images = Resample((12, 10), Preprocess(res=17, **settings))(pixels, boxes)
    expected = Resample((12, 10), Preprocess(res=17, **settings), products=TorchProducts(17))(pixels, boxes)
    torch.testing.assert_close(images, expected)
    square = pixels[:, :10].contiguous()
    images = Resample((10, 10), Preprocess(res=10, **settings))(square)
    expected = Resample((10, 10), Preprocess(res=10, **settings), products=TorchProducts(10))(square)
    torch.testing.assert_close(images, expected)


def _resample_twice(results: multiprocessing.Queue[float]) -> None:
    resample = Resample((8, 8), Preprocess(res=16, mean=(0.0,) * 3, std=(1 / 255,) * 3))
    pixels = torch.full((4, 8, 8, 3), 7, dtype=torch.uint8)
    results.put(resample(pixels).mean().item())


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_its_own_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[float] = context.Queue()
    _resample_twice(results)
    child = context.Process(target=_resample_twice, args=(results,))
    child.start()
    child.join(timeout=30)
    hung = child.is_alive()
    child.kill()
    assert not hung
    assert [results.get(timeout=5), results.get(timeout=5)] == pytest.approx([7, 7])


@pytest.mark.usefixtures("compiler")
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    res=st.integers(1, 12),
    flags=st.lists(st.booleans(), max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@example(size=(5, 5), res=5, flags=[False, True], dtype=torch.float32, seed=0)  # no resize
def test_rows_and_flips_are_those_of_the_pixels_selected_and_flipped(
    size: tuple[int, int], res: int, flags: list[bool], dtype: torch.dtype, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (7, *size, 3), dtype=torch.uint8, generator=generator)
    rows = torch.randint(0, 7, (len(flags),), generator=generator)
    flips = torch.tensor(flags, dtype=torch.bool)
    expected = pixels[rows]
    expected[flips] = expected[flips].flip(2)
    assert torch.equal(take(native.Chosen(pixels, rows, flips)), expected)
    assert torch.equal(take(native.Chosen(pixels, rows, None)), pixels[rows])
    resample = Resample(size, Preprocess(res=res, mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4)), dtype=dtype)
    assert torch.equal(resample(pixels, rows=rows, flips=flips), resample(expected))
    colour = torch.rand(len(flags), 3, 4, generator=generator)
    assert torch.equal(resample(pixels, None, colour, rows=rows, flips=flips), resample(expected, None, colour))


@pytest.mark.usefixtures("compiler")
def test_telling_the_kernel_what_is_read_takes_any_pieces(tmp_path: Path):
    """Advice alone: pages of a mapping, none, and addresses that are not mapped."""
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        assert address % mmap.PAGESIZE == 0
        for addresses, lengths in (([address], [100_000]), ([], []), ([address, 0], [1, mmap.PAGESIZE])):
            native.expect(native.load(), np.array(addresses, np.uint64), np.array(lengths, np.uint64))
        assert mapped[99_999] == 0
