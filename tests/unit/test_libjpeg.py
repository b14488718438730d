"""JPEGs decoded in a loop of compiled code: the pixels of PIL and simplejpeg, and what it leaves to them."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tidali.loading import libjpeg, native
from tidali.loading.thread_decoder import ThreadDecoder

SIZE = (37, 53)

pytestmark = pytest.mark.skipif(libjpeg.load() is None, reason="needs a C compiler, and a Pillow that brings libjpeg-turbo")


def encoded(mode: str = "RGB", size: tuple[int, int] = SIZE, seed: int = 0, format: str = "JPEG", **options: object) -> bytes:
    noise = np.random.default_rng(seed).integers(256, size=(*size, 4), dtype=np.uint8)
    image = Image.fromarray(noise[:, :, :3]).resize((size[1] // 3, size[0] // 3)).resize(size[::-1]).convert(mode)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(
    files: Sequence[bytes], size: tuple[int, int] = SIZE, crc32s: Sequence[int] | None = None
) -> tuple[NDArray[np.uint8], list[bool]]:
    arrays = [np.frombuffer(file, np.uint8) for file in files]
    encoded = native.Encoded(
        np.array([one.ctypes.data for one in arrays], np.uint64),
        np.array([len(one) for one in arrays], np.uint64),
        np.array([zlib.crc32(file) for file in files], np.uint32) if crc32s is None else np.array(crc32s, np.uint32),
    )
    out = np.zeros((len(files), *size, 3), np.uint8)
    return out, native.jpegs(native.load(), libjpeg.load(), encoded, out).tolist()


@given(
    mode=st.sampled_from(["RGB", "L"]),
    size=st.tuples(st.integers(3, 70), st.integers(3, 70)),
    subsampling=st.integers(0, 2),
    options=st.fixed_dictionaries(
        {"quality": st.integers(20, 100), "progressive": st.booleans(), "optimize": st.booleans()},
        optional={"restart_marker_blocks": st.just(2), "comment": st.just(b"a comment")},
    ),
)
def test_the_pixels_are_pils(mode: str, size: tuple[int, int], subsampling: int, options: dict[str, object]) -> None:
    if mode == "RGB":
        options = {**options, "subsampling": subsampling}
    files = [encoded(mode, size, seed, **options) for seed in range(3)]
    images, done = decoded(files, size)
    assert done == [True] * 3
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


def test_what_it_does_not_decode_spoils_no_other() -> None:
    good = encoded()
    others = {
        "cmyk": encoded("CMYK"),
        "of another size": encoded(size=(SIZE[1], SIZE[0])),
        "png": encoded(format="PNG"),
        "nothing": b"\0",
        "without its end": good[:-2],
        "half": good[: len(good) // 2],
        "a header": good[:40],
    }
    files = [file for other in others.values() for file in (good, other)]
    images, done = decoded(files)
    assert done == [True, False] * len(others)
    assert all(np.array_equal(image, simplejpeg.decode_jpeg(good)) for image in images[::2])


@given(st.integers(0, 40), st.integers(1, 2**32 - 1))
def test_bytes_without_their_crc32_are_left(comment_bytes: int, change: int) -> None:
    """Of every length, as eight bytes at a time are summed."""
    files = [encoded(comment=b"c" * comment_bytes), encoded(quality=30)]
    crc32s = [zlib.crc32(file) for file in files]
    assert decoded(files, crc32s=crc32s)[1] == [True, True]
    assert decoded(files, crc32s=[crc32s[0] ^ change, crc32s[1]])[1] == [False, True]


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_of_damaged_bytes_it_gives_simplejpegs_pixels_or_none(changes: list[tuple[int, int]], progressive: bool) -> None:
    damaged = bytearray(encoded(progressive=progressive))
    for place, value in changes:
        damaged[place % len(damaged)] = value
    images, done = decoded([bytes(damaged), encoded()])
    assert done[1]
    if done[0]:
        assert np.array_equal(images[0], simplejpeg.decode_jpeg(bytes(damaged)))


def test_without_pillows_library_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_anew = libjpeg.load.__wrapped__
    assert load_anew() is not None
    monkeypatch.setattr(PIL, "__file__", str(tmp_path / "PIL" / "__init__.py"))
    assert load_anew() is None
    folder = tmp_path / "pillow.libs"
    folder.mkdir()
    (folder / "libjpeg-1.so.62").write_bytes(b"no library")
    (folder / "libjpeg-2.so.62").symlink_to(native.build()._name)  # one without libjpeg's functions
    assert load_anew() is None


@pytest.mark.parametrize(("size", "loaded"), [((64, 64), 1), (None, 0)])
def test_only_images_of_one_size_need_it(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] | None, loaded: int) -> None:
    calls: list[None] = []
    monkeypatch.setattr(libjpeg, "load", lambda: calls.append(None))
    table: Any = SimpleNamespace(
        dataset=SimpleNamespace(manifest=SimpleNamespace(counts={})), info=SimpleNamespace(single_image_size=size)
    )
    ThreadDecoder(table, "pil", 1).close()
    assert len(calls) == loaded


def test_another_binary_interface_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        return 1

    monkeypatch.setattr(native, "load", lambda: type("Library", (), {"tidali_jpegs": staticmethod(refuse)}))
    assert libjpeg.load.__wrapped__() is None
