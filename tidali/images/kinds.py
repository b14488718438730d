"""The kind of a file by its first bytes: an image format that is read here, or what the file is instead."""

from __future__ import annotations

import re

IMAGE_MAGIC: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (name, re.compile(pattern, re.DOTALL))
    for name, pattern in (
        ("JPEG", rb"\xff\xd8"),
        ("PNG", rb"\x89PNG\r\n\x1a\n"),
        ("WEBP", rb"RIFF....WEBP"),
        ("GIF", rb"GIF8[79]a"),
        ("BMP", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00"),
        ("TIFF", rb"(?!.{8}CR\x02)(II[*+]\x00|MM\x00[*+])"),
        ("PPM", rb"P[1-6f][\s#]"),
        ("JPEG2000", rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
        ("AVIF", rb"....ftyp(avi[fs]|(mif1|msf1).{0,40}avi[fs])"),
        ("PSD", rb"8BPS\x00\x01"),
        ("QOI", rb"qoif"),
        ("DDS", rb"DDS \x7c"),
        ("SGI", rb"\x01\xda[\x00\x01][\x01\x02]"),
    )
)
"""PIL's name of each format that is read, and how its files begin. A closed list: PIL would run Ghostscript for an EPS, and
takes noise for a format that has no fixed beginning."""

_CONVERT = "convert it to JPEG or PNG"
_AGAIN = "download it again"
_UNPACK = "unpack it first"
_HEIC_FIX = "convert it to JPEG, for example with 'heif-convert' or, on a Mac, 'sips -s format jpeg'"
_BEFORE_MARKUP = rb"(\xef\xbb\xbf)?\s*(<!--.{0,1000}?-->\s*)?"
_FRAMES = "extract its frames first, for example with ffmpeg"

_OTHER_KINDS: tuple[tuple[str, str, re.Pattern[bytes]], ...] = tuple(
    (kind, fix, re.compile(pattern, re.DOTALL | re.IGNORECASE))
    for kind, fix, pattern in (
        ("a HEIC photograph", _HEIC_FIX, rb"....ftyp(hei[cfmsx]|hev[cmx]|mif1|msf1)"),
        ("a Canon raw photograph", _CONVERT, rb"....ftypcrx |II\*\x00....CR\x02"),
        ("an MP4 or QuickTime film", _FRAMES, rb"....(ftyp|moov|mdat|free|wide|skip|pnot)"),
        ("a WebM or Matroska film", _FRAMES, rb"\x1a\x45\xdf\xa3"),
        ("an AVI film", _FRAMES, rb"RIFF....AVI "),
        ("an MPEG film", _FRAMES, rb"\x00\x00\x01[\xb3\xba]"),
        ("a sound file", "remove it", rb"RIFF....WAVE|OggS|ID3|fLaC"),
        ("a JPEG XL image", _CONVERT, rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n"),
        ("a Fuji raw photograph", _CONVERT, rb"FUJIFILMCCD-RAW"),
        ("an icon", _CONVERT, rb"\x00\x00[\x01\x02]\x00[^\x00]\x00|icns"),
        ("a PAM image", _CONVERT, rb"P7\n"),
        ("an OpenEXR image", _CONVERT, rb"\x76\x2f\x31\x01"),
        ("a DICOM image", _CONVERT, rb".{128}DICM"),
        ("a FITS image", _CONVERT, rb"SIMPLE  ="),
        ("a Git LFS pointer", "run 'git lfs pull' where it was cloned", rb"version https://git-lfs\.github\.com/"),
        ("a git-annex pointer", "run 'git annex get' where it was cloned", rb"/annex/objects/"),
        ("data compressed by gzip", _UNPACK, rb"\x1f\x8b"),
        ("data compressed by bzip2", _UNPACK, rb"BZh[1-9]"),
        ("data compressed by xz", _UNPACK, rb"\xfd7zXZ\x00"),
        ("data compressed by Zstandard", _UNPACK, rb"\x28\xb5\x2f\xfd"),
        ("a ZIP archive or an Office document", _UNPACK, rb"PK(\x03\x04|\x05\x06|\x07\x08)"),
        ("a 7-Zip archive", _UNPACK, rb"7z\xbc\xaf\x27\x1c"),
        ("a RAR archive", _UNPACK, rb"Rar!\x1a\x07"),
        ("a tar archive", _UNPACK, rb".{257}ustar"),
        (
            "an AppleDouble file, macOS's attributes of another file",
            "remove files that are named '._*'",
            rb"\x00\x05\x16[\x00\x07]",
        ),
        ("a PDF", "save its pictures as JPEG or PNG", rb"(\xef\xbb\xbf)?\s*%PDF-"),
        ("PostScript", _CONVERT, rb"%!PS|\xc5\xd0\xd3\xc6"),
        ("an SVG drawing", "render it as PNG", _BEFORE_MARKUP + rb"(<\?xml.{0,1000}?)?(<!--.{0,1000}?-->\s*)?<svg"),
        ("an HTML page, such as a server's error message", _AGAIN, _BEFORE_MARKUP + rb"<(!doctype html|html|head|body)"),
        ("XML, such as a server's error message", _AGAIN, _BEFORE_MARKUP + rb"<(\?xml|error)"),
        ("JSON, such as a server's error message", _AGAIN, rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\d}\]]"),
        ("base64 text", "decode it first", rb"data:image/|/9j/[\w+/]{8}|iVBORw0KGgo"),
        ("an HDF5 file", "save its pictures as PNG", rb"\x89HDF\r\n"),
        ("a NumPy array", "save it as PNG", rb"\x93NUMPY"),
        ("a program", "remove it", rb"\x7fELF|MZ.\x00"),
    )
)
_LOOKED_AT = 4096
_TEXT = bytes([*range(0x20, 0x7F), *b"\t\n\r\f", *range(0x80, 0x100)])
"""Bytes of text in ASCII, UTF-8 or a Windows code page: all but control characters."""


def image_format(data: bytes) -> str | None:
    """PIL's name of the image format that the file begins as; None if it is none that is read here."""
    return next((name for name, magic in IMAGE_MAGIC if magic.match(data)), None)


def other_kind(data: bytes) -> tuple[str, str] | None:
    """What a file that is no image is, and what to do about it; None if it is of no kind that is known here."""
    begin = data[:_LOOKED_AT]
    return next(((kind, fix) for kind, fix, magic in _OTHER_KINDS if magic.match(begin)), None)


def what_else(data: bytes) -> str:
    """What a file that is no image is, and what to do about it, for a message."""
    begin = data[:_LOOKED_AT]
    if kind := other_kind(begin):
        return f"no image but {kind[0]}; {kind[1]}"
    if not data.strip(b"\x00"):
        return "no image but zero bytes alone: it was never written completely; copy it again"
    if not begin.translate(None, _TEXT):
        return f"no image but text, which begins {begin[:24].decode('ascii', 'replace').split(chr(10))[0]!r}; remove it"
    return f"no image of a kind that is read here, it begins with the bytes {data[:8].hex(' ')}; {_CONVERT}, or remove it"
