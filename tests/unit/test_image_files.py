"""Image files as arguments, and their pixels: what the packer stores and DALI decodes of the same file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tidali.config import Preprocess
from tidali.errors import UsageError
from tidali.model.image_files import ImageError, find_images, read_pixels

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (64, 64, 3), np.uint8)
Y, X = np.mgrid[0:64, 0:64]
SMOOTH = np.stack([2 * X + Y, X + 2 * Y, 255 - X - Y], axis=-1).astype(np.uint8)  # no symmetry: every turn shows
GREY16 = (SMOOTH[:, :, 0].astype(np.uint16) << 8) | NOISE[:, :, 0]


def _with_alpha(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([pixels, NOISE[:, :, 0]]))


def _exif(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


IMAGES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "jpeg": (Image.fromarray(SMOOTH), "jpg", {}),
    "jpeg grey": (Image.fromarray(SMOOTH).convert("L"), "jpg", {}),
    "jpeg cmyk": (Image.fromarray(SMOOTH).convert("CMYK"), "jpg", {}),
    "jpeg progressive": (Image.fromarray(SMOOTH), "jpg", {"progressive": True}),
    **{f"jpeg exif {o}": (Image.fromarray(SMOOTH), "jpg", _exif(o)) for o in range(1, 9)},
    "png": (Image.fromarray(NOISE), "png", {}),
    "png palette": (Image.fromarray(SMOOTH).quantize(16), "png", {}),
    "png bilevel": (Image.fromarray(NOISE).convert("1"), "png", {}),
    "png alpha": (_with_alpha(SMOOTH), "png", {}),
    "png grey alpha": (_with_alpha(SMOOTH).convert("LA"), "png", {}),
    "png grey 16 bit": (Image.fromarray(GREY16), "png", {}),
    "png exif 6": (Image.fromarray(SMOOTH), "png", _exif(6)),
    "webp exif 6": (Image.fromarray(SMOOTH), "webp", {"lossless": True, **_exif(6)}),
    "webp alpha": (_with_alpha(SMOOTH), "webp", {"lossless": True}),
    "tiff 16 bit": (Image.fromarray(GREY16), "tif", {}),
    "tiff cmyk": (Image.fromarray(SMOOTH).convert("CMYK"), "tif", {}),
    "gif": (Image.fromarray(SMOOTH), "gif", {}),
    "bmp": (Image.fromarray(NOISE), "bmp", {}),
    "ppm": (Image.fromarray(NOISE), "ppm", {}),
}


def _encode(name: str) -> bytes:
    image, suffix, options = IMAGES[name]
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[f".{suffix}"], **options)
    return buffer.getvalue()


def test_pixels_are_those_of_the_packed_data_set(tmp_path: Path) -> None:
    """Packed, and decoded by both decoders as for training."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from shards.pack import pack
    from shards.scan import FileSource
    from tidali.dataset.contract import iter_records, open_dataset
    from tidali.loading.cache import stored_order
    from tidali.loading.dali import DaliDecoder
    from tidali.loading.data import Data
    from tidali.loading.thread_decoder import ThreadDecoder

    source = tmp_path / "source"
    for split in ("train", "val"):
        (source / split / "a").mkdir(parents=True)
    (source / "val/a/x.png").write_bytes(_encode("png"))
    for name, (_, suffix, _) in IMAGES.items():
        (source / f"train/a/{name.replace(' ', '-')}.{suffix}").write_bytes(_encode(name))
    pack(FileSource(source), tmp_path / "packed", workers=1)
    dataset = open_dataset(tmp_path / "packed")
    assert dataset.split("train").samples == len(IMAGES)

    for decoder in (ThreadDecoder, DaliDecoder):
        data = Data(dataset, torch.device("cpu"))
        stream = data.streamed("train", Preprocess(res=64), len(IMAGES))
        if decoder is DaliDecoder:
            stream._decoder = DaliDecoder(stream._decoder, torch.device("cpu"), batch_size=len(IMAGES), num_threads=1)
        ((_, found),) = stream.read(stored_order(stream, 64, 1.0, len(IMAGES)))
        for (_, record), packed in zip(iter_records(dataset, "train"), found.stored.numpy(), strict=True):
            assert np.array_equal(read_pixels(source / record.source), packed), (record.source, decoder)


@pytest.mark.parametrize("name", ["png grey 16 bit", "tiff 16 bit"])
def test_sixteen_bits_become_their_high_byte(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(_encode(name))
    assert np.array_equal(read_pixels(tmp_path / "x"), np.repeat(SMOOTH[:, :, :1], 3, axis=2))


def test_sixteen_bit_pgm(tmp_path: Path) -> None:
    (tmp_path / "x.pgm").write_bytes(b"P5 64 64 65535\n" + GREY16.astype(">u2").tobytes())
    assert np.array_equal(read_pixels(tmp_path / "x.pgm"), np.repeat(SMOOTH[:, :, :1], 3, axis=2))


def test_images_in_memory() -> None:
    assert np.array_equal(read_pixels(Image.fromarray(NOISE)), NOISE)
    assert np.array_equal(read_pixels(NOISE), NOISE)
    assert np.array_equal(read_pixels(np.dstack([NOISE, NOISE[:, :, :1]])), NOISE)
    assert np.array_equal(read_pixels(NOISE[:, :, 0]), np.repeat(NOISE[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    "wrong", [NOISE / 255, NOISE.transpose(2, 0, 1), NOISE[None], np.zeros((0, 4, 3), np.uint8), None, 3, "text"]
)
def test_what_is_no_image_in_memory(wrong: Any) -> None:
    with pytest.raises(ImageError):
        read_pixels(wrong)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"text", "no image .*text"),
        (_encode("jpeg")[:-60], "damaged JPEG"),
        (_encode("png")[:4000], "damaged PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image .*PostScript"),
        (b"P5 4 4 65535\n", "damaged PPM"),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=rf"x\.jpg: .*({reason})") as refused:
        read_pixels(tmp_path / "x.jpg")
    assert "\n" not in str(refused.value)
    assert refused.value.source == tmp_path / "x.jpg"


def test_32_bit_samples_are_refused(tmp_path: Path) -> None:
    for mode in ("F", "I"):
        Image.new(mode, (4, 4)).save(tmp_path / "x.tif")
        with pytest.raises(ImageError, match="32-bit samples"):
            read_pixels(tmp_path / "x.tif")


def test_find_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/2.jpg", "a/1.PNG", "a/notes.txt", "a/.hidden.jpg", "a/.git/x.jpg", "a/deep/3.webp", "b.dat"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    (tmp_path / "empty").mkdir()

    def found(*given: str) -> list[str]:
        return [str(path) for path in find_images(given)[0]]

    assert found("a") == ["a/1.PNG", "a/2.jpg", "a/deep/3.webp"]
    assert found("b.dat", "a/2.jpg") == ["b.dat", "a/2.jpg"]  # named is wanted, whatever its suffix
    assert found("a/*.jpg") == ["a/2.jpg"]
    assert found("a/**/*.webp") == ["a/deep/3.webp"]
    Path("a/[x].jpg").touch()
    assert found("a/[x].jpg") == ["a/[x].jpg"]  # a name before it is a pattern
    for wrong, complaint in [("none.jpg", "no such file"), ("empty", "no images"), ("*.bmp", "no images")]:
        with pytest.raises(UsageError, match=complaint):
            found("a", wrong)
