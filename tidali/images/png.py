"""A PNG file's chunks: whether it is whole, and the picture alone (PNG specification, third edition)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from tidali.images.errors import Unusable

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Of each colour type: grey, RGB, palette, grey with alpha, RGBA."""
PALETTE = 3
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of an interlaced picture (Adam7): first column and row, and steps."""
_LARGEST_METADATA_BYTES = 1 << 20
"""Of a chunk that is kept or read: decoders refuse larger ones, each at a limit of its own."""
_PIECE_BYTES = 1 << 20
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_BEFORE_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf")
"""At most once."""
_LENGTHS = {b"gAMA": (4,), b"cHRM": (32,), b"sRGB": (1,), b"pHYs": (9,), b"tIME": (7,), b"bKGD": (1, 2, 6)}
"""In bytes, of metadata that has a fixed length."""
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")


class Chunk(NamedTuple):
    kind: bytes
    body: bytes
    sound: bool
    """It is complete and has the right checksum."""


class Png(NamedTuple):
    width: int
    height: int
    depth: int
    """Bits of a sample, or of an index into the palette."""
    colour_type: int
    canonical: bool
    """Every decoder reads all of the file without an error."""
    pixels: bytes
    """The compressed pixels."""
    palette: bytes
    interlaced: bool
    has_key_colour: bool
    """Or a palette, with transparency."""
    significant_bits: int
    """Of a sample, as the file declares it; ``depth`` where it does not."""
    metadata: dict[str, Any]
    """What says how to turn the picture, by PIL's names."""
    exif: bytes
    """As it is in its chunk."""

    def picture(self, *, depth: int | None = None, colour_type: int | None = None) -> bytes:
        """A PNG of the same pixels, without metadata or transparency. The arguments replace the header's values."""
        depth, colour_type = depth or self.depth, self.colour_type if colour_type is None else colour_type
        header = struct.pack(">IIBBBBB", self.width, self.height, depth, colour_type, 0, 0, self.interlaced)
        chunks = [(b"IHDR", header), (b"PLTE", self.palette), (b"IDAT", self.pixels), (b"IEND", b"")]
        return SIGNATURE + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
            for kind, body in chunks
            if body or kind == b"IEND"
        )


def read_png(data: bytes) -> Png:
    """
    Raises:
        Unusable: the header or the pixels are damaged, or some are missing.
    """
    chunks = list(_chunks(data))
    if not chunks or chunks[0].kind not in (b"IHDR", b"CgBI"):
        raise Unusable("damaged PNG: it does not begin with its header")
    if chunks[0].kind == b"CgBI":
        raise Unusable("a PNG in Apple's own form for iPhones; convert it with 'pngcrush -revert-iphone-optimizations'")
    if len(chunks[0].body) != 13 or not chunks[0].sound:
        raise Unusable("damaged PNG: its header's checksum is wrong")
    width, height, depth, colour_type, compression, filters, interlace = struct.unpack(">IIBBBBB", chunks[0].body)
    if depth not in _DEPTHS.get(colour_type, ()) or compression or filters or interlace > 1 or not width or not height:
        raise Unusable(f"damaged PNG: {width} x {height} pixels of {depth} bits, colour type {colour_type}")
    kinds = [chunk.kind for chunk in chunks]
    of_kind = {kind: [chunk for chunk in chunks if chunk.kind == kind] for kind in set(kinds)}
    palette = of_kind.get(b"PLTE", [])
    if colour_type == PALETTE and not (len(palette) == 1 and palette[0].sound and 0 < len(palette[0].body) <= 3 << depth):
        raise Unusable("damaged PNG: its palette is missing or damaged")
    exifs, significant = of_kind.get(b"eXIf", []), of_kind.get(b"sBIT", [])
    return Png(
        width=width,
        height=height,
        depth=depth,
        colour_type=colour_type,
        canonical=_is_canonical(chunks, len(data)),
        pixels=b"".join(chunk.body for chunk in of_kind.get(b"IDAT", [])),
        palette=palette[0].body if colour_type == PALETTE else b"",
        interlaced=bool(interlace),
        has_key_colour=b"tRNS" in of_kind,
        significant_bits=max(significant[0].body[: 1 if colour_type in (0, 4) else 3], default=depth) if significant else depth,
        metadata=_orientation_data(chunks),
        exif=exifs[0].body if exifs else b"",
    )


def _chunks(data: bytes) -> Iterator[Chunk]:
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        checksum = data[at + 8 + size : at + 12 + size]
        yield Chunk(kind, body, checksum == struct.pack(">I", zlib.crc32(body, zlib.crc32(kind))))
        at += 12 + size
        if kind == b"IEND":
            return


def _is_canonical(chunks: list[Chunk], size_bytes: int) -> bool:
    """Whether every chunk is sound, in its place and of a kind and size that every decoder takes, with nothing behind them."""
    kinds = [chunk.kind for chunk in chunks]
    first, last = (kinds.index(b"IDAT"), len(kinds) - kinds[::-1].index(b"IDAT")) if b"IDAT" in kinds else (0, 0)
    return (
        all(chunk.sound for chunk in chunks)
        and kinds[-1] == b"IEND"
        and size_bytes == len(SIGNATURE) + sum(12 + len(chunk.body) for chunk in chunks)
        and all(kind == b"IDAT" for kind in kinds[first:last])
        and all(kind in _CRITICAL or (kind.isalpha() and kind[0] & 0x20) for kind in kinds)
        and all(kinds.count(kind) < 2 for kind in _BEFORE_PIXELS)
        and not any(kind in _BEFORE_PIXELS for kind in kinds[last:])
        and not any(kind in _ANIMATION for kind in kinds)
        and all(_is_in_form(chunk) for chunk in chunks)
    )


def _is_in_form(chunk: Chunk) -> bool:
    """OpenCV, which DALI decodes PNG with, ends the process on EXIF that libpng refuses, and fails on a cut palette."""
    match chunk.kind:
        case b"IDAT":
            return True
        case b"PLTE":
            return len(chunk.body) % 3 == 0 < len(chunk.body)
        case b"eXIf":
            return chunk.body[:4] in (b"II*\0", b"MM\0*") and 8 <= len(chunk.body) <= _LARGEST_METADATA_BYTES
    return len(chunk.body) in _LENGTHS.get(chunk.kind, (len(chunk.body),)) and len(chunk.body) <= _LARGEST_METADATA_BYTES


def _orientation_data(chunks: list[Chunk]) -> dict[str, Any]:
    """What PIL's `getexif` looks at. Texts are read only as far as they are short and name XMP or EXIF."""
    found: dict[str, Any] = {}
    for kind, body, _ in chunks:
        if kind == b"eXIf":
            found["exif"] = b"Exif\0\0" + body
            continue
        key, _, text = body.partition(b"\0")
        if kind not in (b"tEXt", b"zTXt", b"iTXt") or key not in (b"XML:com.adobe.xmp", b"Raw profile type exif"):
            continue
        compressed = kind == b"zTXt"
        if kind == b"iTXt":
            compressed, text = text[:1] == b"\1", b"".join(text[2:].split(b"\0", 2)[2:])
        elif compressed:
            text = text[1:]
        try:
            if compressed:
                text = zlib.decompressobj().decompress(text, _LARGEST_METADATA_BYTES)
            found[key.decode()] = text.decode("utf-8" if kind == b"iTXt" else "latin-1")
        except (zlib.error, UnicodeDecodeError):
            continue
    return found


def check_pixels(png: Png) -> bool:
    """Whether the compressed pixels are exactly as many as the header says, with nothing behind them.

    Raises:
        Unusable: fewer, or they are damaged.
    """
    bits = png.depth * _CHANNELS[png.colour_type]
    expected = sum(rows * (1 + (columns * bits + 7) // 8) for rows, columns in _pass_sizes(png))
    stream, rest, count = zlib.decompressobj(), png.pixels, 0
    try:
        while rest and not stream.eof and count <= expected:
            count += len(stream.decompress(rest, _PIECE_BYTES))
            rest = stream.unconsumed_tail
    except zlib.error as error:
        raise Unusable(f"damaged PNG: {error}") from None
    if count < expected:
        raise Unusable(f"damaged PNG: {100 * count // expected} % of its pixels are there")
    return count == expected and stream.eof and not stream.unused_data


def _pass_sizes(png: Png) -> Iterator[tuple[int, int]]:
    """Rows and columns of each pass that has any."""
    for column, row, step_x, step_y in _PASSES if png.interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(png.height - row) // step_y), -(-(png.width - column) // step_x)
        if rows > 0 and columns > 0:
            yield rows, columns
