"""Whether a BMP or WebP file is in the plain form that every decoder reads alike."""

from __future__ import annotations

import struct

_BMP_HEADERS = (40, 108, 124)


def is_plain_bmp(data: bytes) -> bool:
    """Uncompressed, of 8 or 24 bits, the bottom row first, with all of its palette and pixels.

    DALI 2.4.0 fails on 16 bits, and reads 32 bits as RGBA or not at all, depending on the header.
    """
    try:
        begin = struct.unpack_from("<2sIHHIIiiHHIIiiII", data)
    except struct.error:
        return False
    _, size, _, _, offset, header, width, height, planes, bits, compression, _, _, _, colours, _ = begin
    if header not in _BMP_HEADERS or planes != 1 or bits not in (8, 24) or compression or width <= 0 or height <= 0:
        return False
    colours = 0 if bits == 24 else colours or 256
    row_bytes = (width * bits + 31) // 32 * 4
    first = 14 + header + 4 * colours
    return colours <= 256 and offset >= first and size == len(data) >= offset + row_bytes * height and offset - first < 4


def is_plain_webp(data: bytes) -> bool:
    """A still picture whose chunks are complete and those that its header announces, without EXIF.

    With an EXIF chunk, or a header that announces one, DALI's parser reports an unexpected end of stream.
    """
    chunks: list[tuple[bytes, bytes]] = []
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 8 + length + (length & 1)
    if at != len(data) or struct.unpack_from("<I", data, 4)[0] != len(data) - 8:
        return False
    kinds = [kind for kind, _ in chunks]
    if kinds in ([b"VP8 "], [b"VP8L"]):
        return True
    if kinds[0] != b"VP8X" or len(chunks[0][1]) != 10:
        return False
    header, (kind, frame) = chunks[0][1], next((chunk for chunk in chunks if chunk[0] in (b"VP8 ", b"VP8L")), (b"", b""))
    flags, canvas = header[0], tuple(int.from_bytes(header[at : at + 3], "little") + 1 for at in (4, 7))
    separate_alpha = [b"ALPH"] if flags & 0x10 and kind == b"VP8 " else []
    announced = [b"ICCP"] if flags & 0x20 else [], separate_alpha, [kind], [b"XMP "] if flags & 0x04 else []
    return (
        not flags & ~0x34 and kinds[1:] == [name for part in announced for name in part] and canvas == _frame_size(kind, frame)
    )


def _frame_size(kind: bytes, frame: bytes) -> tuple[int, int]:
    """Width and height by a picture's own header (RFC 9649, and RFC 6386 for VP8)."""
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", frame.ljust(10, b"\0"), 6)
        return width & 0x3FFF, height & 0x3FFF
    bits = int.from_bytes(frame[1:5], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
