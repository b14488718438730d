"""A JPEG file's segments: what its header says, and the same picture in a form that all decoders read alike.

libjpeg-turbo, inside PIL, DALI and simplejpeg, skips what it does not expect between two segments, and only warns. nvImageCodec
reads the segments before libjpeg-turbo does, and fails there (ITU T.81, annex B).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_DHT, _SOI, _EOI, _SOS, _APP0, _APP1, _APP14 = 0xC4, 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
_PLAIN, _FRAME, _METADATA, _SCAN = range(1, 5)
_KINDS = bytearray(256)
"""What to do with each marker before the first scan; 0: it is not one that a canonical file has there."""
for _kind, _markers in (
    (_PLAIN, (_DHT, 0xDB, 0xDD, 0xFE)),
    (_FRAME, (0xC0, 0xC1, 0xC2)),  # baseline, extended and progressive, all with Huffman coding
    (_METADATA, range(_APP0, 0xF0)),
    (_SCAN, (_SOS,)),
):
    for _marker in _markers:
        _KINDS[_marker] = _kind

_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}
_AFTER_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_ANY_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_ALONE = {0x01, *range(0xD0, 0xD8)}
"""Markers that have no length: TEM and the restart markers."""
_BEGIN, _FRAME_FIELDS = struct.Struct(">BBH").unpack_from, struct.Struct(">HBHHB").unpack_from
_SIZE = struct.Struct(">HH").unpack


def _segment(marker: int, *sizes: int) -> bytes:
    """A pattern of a segment of one of these sizes, the marker's two bytes not counted."""
    begin = b"\xff" + bytes((marker,))
    return b"|".join(re.escape(begin + size.to_bytes(2, "big")) + b".{%d}" % (size - 2) for size in sizes)


_HUFFMAN = _segment(_DHT, 31, 181, 418)
_TABLES = b"(?:" + b"|".join((_segment(_APP0, 16), _segment(0xDB, 67, 132), _HUFFMAN, _segment(0xDD, 4))) + b")*"
_USUAL = re.compile(
    b"\xff\xd8%b\xff\xc0\x00\x11\x08(.{4})\x03.{9}(?:%b)%b\xff\xda\x00\x0c\x03" % (_TABLES, _HUFFMAN, _TABLES), re.DOTALL
)
"""The header of a baseline JPEG in colour as most encoders write it; the group is the size. Matched in 1.1 us, where
the loop over its segments takes 4.3 and libjpeg-turbo decodes 64 x 64 pixels in 49."""


class Header(NamedTuple):
    """What stands before the first scan."""

    height: int
    width: int
    components: int
    canonical: bool
    """All decoders that read JPEG find the same frame, colours and metadata."""
    needs_scans: bool
    """The first scan alone is not the whole picture."""
    has_metadata: bool = False
    """Other than JFIF's usual segment."""
    exif: bytes | None = None
    """From the TIFF header on."""
    xmp: bytes | None = None


def read_header(data: bytes) -> Header | None:
    """What the file says before its first scan. None if there is no frame."""
    usual = _USUAL.match(data)
    if usual is not None:
        height, width = _SIZE(usual[1])
        return Header(height, width, 3, True, False)
    return _canonical_header(data) or _loose_header(data)


def _canonical_header(data: bytes) -> Header | None:
    """Of a file whose segments follow one another, of a kind that all decoders read; else None."""
    frame = adobe = exifs = 0
    exif = xmp = None
    sound, has_metadata, has_codes, at = True, False, False, 2
    try:
        while True:
            begin, marker, size = _BEGIN(data, at)
            if begin != 0xFF or size < 2:
                return None
            kind = _KINDS[marker]
            if kind == _PLAIN:
                has_codes = has_codes or marker == _DHT
            elif kind == _METADATA:
                has_metadata = has_metadata or marker != _APP0 or size != 16
                if marker == _APP14:
                    adobe = at
                elif marker == _APP1:
                    body = data[at + 4 : at + 2 + size]
                    sound = sound and size >= 8
                    if body.startswith(_EXIF):
                        exifs += 1
                        exif = body[len(_EXIF) :] if exif is None else exif + body[len(_EXIF) :]  # as PIL joins them
                    elif body.startswith(_XMP):
                        xmp = body[len(_XMP) :]
            elif kind == _FRAME and not frame:
                frame = at
            elif kind == _SCAN:
                break
            else:
                return None
            at += 2 + size
        frame_bytes, bits, height, width, components = _FRAME_FIELDS(data, frame + 2)
        scanned = data[at + 4]
    except (struct.error, IndexError):
        return None
    if not frame or bits != 8 or components not in (1, 3, 4) or frame_bytes != 8 + 3 * components or size != 6 + 2 * scanned:
        return None
    if components == 4:  # without Adobe's segment some decoders take the inks for inverted, and some do not
        segment = data[adobe + 2 : adobe + 16]
        sound = sound and segment.startswith(b"\0\x0eAdobe") and segment[-1] in (0, 2)
    canonical = sound and has_codes and exifs < 2
    needs_scans = scanned < components or data[frame + 1] == 0xC2
    return Header(height, width, components, canonical, needs_scans, has_metadata, exif, xmp)


class Segment(NamedTuple):
    marker: int
    body: bytes
    """After the length."""
    scan: bytes = b""
    """The entropy-coded bytes behind a start of scan."""


def segments(data: bytes) -> Iterator[Segment]:
    """Every segment as libjpeg finds it: bytes that belong to none are skipped. Ends at the end marker or at the end."""
    at = 2
    while (found := _ANY_MARKER.search(data, at)) is not None:
        marker, at = found[1][0], found.end()
        if marker in _ALONE:
            continue
        if marker in (_EOI, _SOI):
            yield Segment(marker, b"")
            return
        size = int.from_bytes(data[at : at + 2], "big")
        body, at = data[at + 2 : at + size], at + max(size, 2)
        scan = b""
        if marker == _SOS:
            end = _AFTER_SCAN.search(data, at)
            scan, at = data[at : end.start() if end else None], end.start() if end else len(data)
        yield Segment(marker, body, scan)


def _loose_header(data: bytes) -> Header | None:
    """As libjpeg finds it, wherever its segments are. None if there is no frame."""
    found = list(segments(data))
    frame = _frame(found)
    if frame is None:
        return None
    bodies = [segment.body for segment in found if segment.marker == _APP1]
    exif = [body[len(_EXIF) :] for body in bodies if body.startswith(_EXIF)]
    xmp = [body[len(_XMP) :] for body in bodies if body.startswith(_XMP)]
    height, width, components = struct.unpack_from(">HHB", frame.body, 1)
    return Header(height, width, components, False, True, True, b"".join(exif) if exif else None, xmp[-1] if xmp else None)


def _frame(found: Iterable[Segment]) -> Segment | None:
    return next((segment for segment in found if segment.marker in _FRAMES and len(segment.body) > 5), None)


def rewritten(data: bytes, *, fill: bytes | None = None) -> bytes:
    """The same scans behind a header without metadata and without values that decoders warn of.

    A decoder's warning about this form is about the scans, so the picture is damaged; no field of the original header can hide
    that.

    Args:
        fill: what stands at the end of each scan in place of zero bytes; by default they stay.
    """
    found = list(segments(data))
    frame = _frame(found)
    known_transforms = (0, 2) if frame is not None and frame.body[5] == 4 else (0, 1)
    parts = [b"\xff\xd8"]
    for marker, body, scan in found:
        if marker in (_EOI, _SOI):
            parts.append(bytes((0xFF, marker)))
            break
        if marker == _APP0 and len(body) >= 14 and body.startswith(b"JFIF\0"):
            body = b"JFIF\0\1\1\0\0\1\0\1\0\0"
        elif marker == _APP14 and len(body) >= 12 and body.startswith(b"Adobe"):
            transform = body[11] if body[11] in known_transforms else known_transforms[1]  # as libjpeg takes unknown ones
            body = body[:11] + bytes((transform,))
        elif _APP0 <= marker <= 0xEF or marker == 0xFE:
            continue
        elif marker == _SOS and frame is not None and frame.marker in _SEQUENTIAL:
            body = body[:-3] + b"\0\x3f\0"
        if fill is not None and scan:
            scan = scan.rstrip(b"\0")
            scan += (b"\0" if scan.endswith(b"\xff") else b"") + fill  # a byte 0xFF has a zero byte behind it
        parts.append(bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body + scan)
    return b"".join(parts)


def read_scans(data: bytes) -> tuple[bool, int]:
    """Of a picture that may be spread over several scans: whether all are there, and how many there are.

    libjpeg shows a picture whose last scans are missing without a warning, with less detail.
    """
    progressive, planes, count = False, {}, 0
    for marker, body, _ in segments(data):
        if marker in _FRAMES:
            progressive = marker == 0xC2
            planes = {body[at]: [-1] * (64 if progressive else 1) for at in range(6, len(body) - 2, 3)}
        elif marker == _SOS and len(body) > 3:
            count += 1
            first, last, bits = body[-3:] if progressive else (0, 0, 0)
            for component in body[1 : 1 + 2 * body[0] : 2]:
                if component in planes:
                    planes[component][first : last + 1] = [bits & 15] * (last + 1 - first)
    return not any(left for plane in planes.values() for left in plane), count
