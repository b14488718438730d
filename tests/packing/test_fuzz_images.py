"""Damaged and odd files of each format: whoever reads what is packed of them sees the same pixels, and DALI never fails.

By hand, with 5,000 variants: ``TIDALI_FUZZ=5000 TIDALI_FUZZ_SEED=1 pytest -s tests/packing/test_fuzz_images.py``.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from shards.images import Unusable, inspect
from tidali.loading.decode import decode_rgb
from tidali.model.image_files import ImageError, read_pixels

COUNT, SEED = int(os.environ.get("TIDALI_FUZZ", "360")), int(os.environ.get("TIDALI_FUZZ_SEED", "0"))
MOST_PIXELS = 1 << 16
"""More would fill the memory where a header's size is rewritten."""


def sources(make: Any) -> dict[str, list[bytes]]:
    """Of each format a few whole files."""
    image, encode = make.image(5, 24, 20), make.encode
    grey, palette, alpha = image.convert("L"), image.quantize(17), image.copy()
    alpha.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "text" * 9, zip=True)
    for kind, body in ((b"gAMA", bytes(4)), (b"sBIT", b"\5\6\5"), (b"tIME", bytes(7)), (b"bKGD", bytes(6))):
        texts.add(kind, body)
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "JPEG": [
            encode(image, quality=80),
            encode(grey),
            encode(image, progressive=True),
            encode(image, subsampling=0, exif=exif),
            encode(image.convert("CMYK")),
            encode(grey, progressive=True, exif=exif),
            encode(image, restart_marker_blocks=1, comment=b"note", xmp=b'<x tiff:Orientation="3"/>'),
        ],
        "PNG": [
            encode(image, "PNG", exif=exif),
            encode(image, "PNG", icc_profile=b"profile", dpi=(72, 72), pnginfo=texts),
            encode(palette, "PNG", transparency=1),
            encode(palette, "PNG", exif=exif),
            encode(alpha, "PNG"),
            encode(alpha.convert("LA"), "PNG"),
            encode(wide, "PNG"),
            encode(grey.convert("1"), "PNG"),
        ],
        "WEBP": [
            encode(image, "WEBP"),
            encode(image, "WEBP", lossless=True),
            encode(alpha, "WEBP", exif=exif),
            encode(alpha, "WEBP", icc_profile=b"profile", xmp=b"<x/>"),
        ],
        "BMP": [encode(image, "BMP"), encode(grey, "BMP"), encode(palette, "BMP"), encode(alpha, "BMP")],
        "GIF": [
            encode(palette, "GIF"),
            encode(palette, "GIF", save_all=True, append_images=[make.image(6, 24, 20).quantize(9)]),
        ],
        "TIFF": [
            encode(image, "TIFF"),
            encode(image, "TIFF", compression="tiff_lzw"),
            encode(wide, "TIFF"),
            encode(grey, "TIFF", compression="packbits", tiffinfo={278: 5}),
        ],
        "PPM": [
            encode(image, "PPM"),
            encode(grey, "PPM"),
            b"P5 20 24 4095\n" + (np.asarray(wide) // 16).astype(">u2").tobytes(),
        ],
    }


def flipped(data: bytes, rng: np.random.Generator, begin: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(min(begin, len(data) - 1), len(data))] ^= 1 << rng.integers(8)
    return bytes(changed)


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    """The end is missing, or a piece within."""
    at = int(rng.integers(1, len(data)))
    return data[:at] + data[at + int(rng.integers(1, 9)) :] if rng.random() < 0.5 else data[:at]


def inserted(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(0, len(data) + 1))
    fill = (bytes(2), b"\xff" * 3, b"\0", rng.bytes(4), data[:64])[rng.integers(5)]
    return data[:at] + fill + data[at:]


def header_rewritten(data: bytes, rng: np.random.Generator) -> bytes:
    """One byte, or a number of two or four bytes, of the first hundred gets a value that is often a limit of something."""
    size = int(rng.choice((1, 1, 1, 2, 4)))
    at = int(rng.integers(2, min(len(data), 128) - size))
    value = int(rng.choice((0, 1, 2, 3, 8, 12, 16, 24, 32, 127, 128, 255))) * (1, 256 ** (size - 1))[rng.integers(2)]
    return data[:at] + value.to_bytes(size, ("big", "little")[rng.integers(2)]) + data[at + size :]


def ended(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, with the end that its format wants."""
    kept = data[: int(rng.integers(len(data) // 2, len(data)))]
    return kept + (b"\xff\xd9" if data[:2] == b"\xff\xd8" else data[-12:])


def resealed(data: bytes, rng: np.random.Generator) -> bytes:
    """Changed inside, with the checksums and lengths that fit: a PNG in one chunk, a WebP or BMP behind its header."""
    change = (partial(flipped, begin=0), inserted)[rng.integers(2)]
    if data[:4] == b"RIFF":
        body = change(data[12:], rng)
        return data[:4] + struct.pack("<I", len(body) + 4) + data[8:12] + body
    if data[:2] == b"BM":
        body = change(data[18:], rng)
        return data[:2] + struct.pack("<I", 18 + len(body)) + data[6:18] + body
    if data[:4] != b"\x89PNG":
        return change(data, rng)
    parts, at, chosen = [data[:8]], 8, int(rng.integers(6))
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        at += 12 + size
        if len(parts) - 1 == chosen and body:
            body = change(body, rng)
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


CHANGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "flipped": partial(flipped, begin=2),
    "flipped behind the header": lambda data, rng: flipped(data, rng, len(data) // 3),
    "cut": cut,
    "inserted": inserted,
    "header rewritten": header_rewritten,
    "ended": ended,
    "resealed": resealed,
    "nothing": lambda data, rng: data,
    "twice": lambda data, rng: data + data,
}


def variants(make: Any, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """What was changed, and the file."""
    rng = np.random.default_rng(seed)
    files, changes = sources(make), list(CHANGES)
    for number in range(count):
        kind = list(files)[number % len(files)]
        change = changes[int(rng.integers(len(changes)))]
        which = int(rng.integers(len(files[kind])))
        yield f"{number}: {kind} {which}, {change}", CHANGES[change](files[kind][which], rng)


def pil_rgb(data: bytes) -> np.ndarray:
    """As `exif_transpose` shows it, which itself fails where other entries of EXIF are of a wrong type."""
    image = Image.open(io.BytesIO(data))
    turned = image.convert("RGB")
    turned.info.clear()
    turned.getexif()[0x0112] = image.getexif().get(0x0112, 1)
    return np.asarray(ImageOps.exif_transpose(turned))


def test_every_reader_sees_what_was_packed(make: Any, dali_rgb: Callable[[bytes], np.ndarray], tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for name, data in variants(make, COUNT, SEED):
        kind = name.split()[1]
        (tmp_path / "file").write_bytes(data)
        try:
            packed = inspect(data, max_pixels=MOST_PIXELS)
        except Unusable as error:
            outcomes[f"{kind} quarantined"] += 1
            if "declares" not in str(error):  # predict has a larger limit
                with pytest.raises(ImageError):
                    read_pixels(tmp_path / "file")
            continue
        outcomes[f"{kind} {'kept' if packed.data == data else 'stored as PNG'}"] += 1
        predicted = read_pixels(tmp_path / "file")
        readers = {"DALI": dali_rgb(packed.data), "threads": decode_rgb(memoryview(packed.data), plain=False)}
        readers["PIL"] = pil_rgb(packed.data)
        for reader, pixels in readers.items():
            assert pixels.shape == predicted.shape == (*packed.size, 3), (name, reader, data.hex())
            # One grey level: decoders round four inks to RGB in ways of their own.
            assert abs(pixels.astype(int) - predicted).max() <= 1, (name, reader, data.hex())
    print(dict(sorted(outcomes.items())))
    for kind in ("JPEG", "PNG"):
        assert all(outcomes[f"{kind} {outcome}"] for outcome in ("quarantined", "kept", "stored as PNG"))
