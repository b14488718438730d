"""Whole pictures in odd bytes, damaged ones in plausible bytes, and files that are no images.

Each is made of a few bytes, and read by PIL, by DALI, by the packer and as `tidali predict` reads it.
"""

from __future__ import annotations

import gzip
import io
import struct
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from shards.images import Inspected, Unusable, inspect
from tidali.loading.decode import decode_rgb
from tidali.model.image_files import ImageError, read_pixels

MAX_PIXELS = 1 << 20
XMP = b'<x tiff:Orientation="6"/>'
_SOS, _SOF, _DQT, _ADOBE, _EOI = 0xDA, 0xC0, 0xDB, 0xEE, b"\xff\xd9"


def look(data: bytes) -> Inspected:
    return inspect(data, max_pixels=MAX_PIXELS)


def pil_rgb(data: bytes) -> np.ndarray:
    """As PIL shows it, with its limits off: what people see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 30)
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


# ----------------------------------------------------------------------------------------------------------------- byte surgery


def place(data: bytes, marker: int) -> int:
    return data.index(bytes((0xFF, marker)))


def put(data: bytes, at: int, what: bytes) -> bytes:
    """Insert."""
    return data[:at] + what + data[at:]


def over(data: bytes, at: int, what: bytes) -> bytes:
    """Overwrite."""
    return data[:at] + what + data[at + len(what) :]


def before(marker: int, what: bytes, m: Any) -> bytes:
    return put(m.jpeg(1), place(m.jpeg(1), marker), what)


def ended(data: bytes) -> bytes:
    """The last third is lost, and the end marker put behind what is left."""
    return data[: 2 * len(data) // 3] + _EOI


def jfif_0(m: Any) -> bytes:
    return over(m.jpeg(1), m.jpeg(1).index(b"JFIF") + 5, b"\0\0")


def scan_0(m: Any) -> bytes:
    """The start of scan has zeros where a sequential JPEG has 0, 63, 0."""
    return over(m.jpeg(1), place(m.jpeg(1), _SOS) + 11, bytes(3))


def adobe_unknown(m: Any) -> bytes:
    """A colour transform that does not exist, and no JFIF segment that would decide."""
    data = m.jpeg(1)
    return data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x07" + data[place(data, _DQT) :]


def cmyk(m: Any) -> bytes:
    return m.encode(m.image(1).convert("CMYK"))


def cmyk_without_adobe(m: Any) -> bytes:
    data = cmyk(m)
    return data[: place(data, _ADOBE)] + data[place(data, _ADOBE) + 16 :]


def scans_kept(m: Any, lost: int) -> bytes:
    """A progressive JPEG without its last scans."""
    data = m.encode(m.image(1), progressive=True)
    return b"\xff\xda".join(data.split(b"\xff\xda")[:-lost]) + _EOI


def zeros_between_scans(m: Any) -> bytes:
    data = m.encode(m.image(1), progressive=True)
    return put(data, data.rindex(b"\xff\xc4"), bytes(9))


def png_parts(m: Any) -> tuple[bytes, bytes, bytes]:
    """Before the pixels' chunk, the chunk, and behind it."""
    data = m.encode(m.image(1), "PNG")
    begin, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    return data[:begin], data[begin:end], data[end:]


def png_of_rows(m: Any, share: float) -> bytes:
    rows = m.rows(np.asarray(m.image(1)))
    return m.png(2, 8, (40, 48), (rows + rows)[: int(share * len(rows))])


def png_wrong_crc(m: Any) -> bytes:
    begin, pixels, end = png_parts(m)
    return begin + pixels[:-1] + bytes((pixels[-1] ^ 1,)) + end


def png_flipped(m: Any) -> bytes:
    """A changed bit among the pixels, under a checksum that fits."""
    begin, pixels, end = png_parts(m)
    body = bytearray(pixels[8:-4])
    body[len(body) // 2] ^= 4
    return begin + m.chunk(b"IDAT", bytes(body)) + end


def png_with(m: Any, *extra: bytes, behind: bytes = b"") -> bytes:
    begin, pixels, end = png_parts(m)
    return begin + b"".join(extra) + pixels + behind + end


def exif_cut(m: Any) -> bytes:
    """An orientation, which PIL ignores for its type, then a resolution that points outside: OpenCV turns the image."""
    one = m.exif("<", 3, 3)
    return one[:8] + b"\2\0" + over(one[10:22], 2, b"\0\0") + struct.pack("<HHII", 0x011A, 5, 1, 0xFFFF) + bytes(4)


def interlaced(m: Any) -> bytes:
    """Adam7, in order of its passes."""
    pixels = np.asarray(m.image(1))
    steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [np.ascontiguousarray(pixels[y::step_y, x::step_x]) for y, x, step_y, step_x in steps]
    return m.png(2, 8, (40, 48), b"".join(map(m.rows, passes)), lace=True)


def text_png(m: Any, size: int, *, packed: bool) -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "x" * size, zip=packed)
    return m.encode(m.image(1), "PNG", pnginfo=texts)


def xmp_png(m: Any) -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
    return m.encode(m.image(1), "PNG", pnginfo=texts)


def bmp(bits: int, m: Any, *, upside_down: bool = False) -> bytes:
    pixels = np.random.default_rng(bits).integers(0, 256, (40, 48, bits // 8), np.uint8).tobytes()
    numbers = (54 + len(pixels), 0, 54, 40, 48, -40 if upside_down else 40, 1 | bits << 16, 0, len(pixels), 0, 0, 0, 0)
    return b"BM" + b"".join(number.to_bytes(4, "little", signed=number < 0) for number in numbers) + pixels


def webp_announcing(flags: int, m: Any) -> bytes:
    """A still WebP whose extended header announces what is not there."""
    body = m.encode(m.image(1), "WEBP")[12:]
    header = b"VP8X\x0a\0\0\0" + bytes((flags, 0, 0, 0)) + (47).to_bytes(3, "little") + (39).to_bytes(3, "little")
    return b"RIFF" + (4 + len(header) + len(body)).to_bytes(4, "little") + b"WEBP" + header + body


def rare_sampling(m: Any) -> bytes:
    """Chroma of a quarter of the width and half of the height, which libjpeg-turbo's own interface has no name for."""
    data = m.jpeg(1)
    return over(data, place(data, _SOF) + 11, b"\x42")


# ---------------------------------------------------------------------------- whole pictures: as what they are stored

NOISE = np.random.default_rng(0).bytes(2 << 20)
KEPT, NEW = "kept", "png"

WHOLE: dict[str, tuple[Callable[[Any], bytes], str]] = {
    "zeros before the quantization table": (partial(before, _DQT, bytes(2)), NEW),
    "zeros before the frame": (partial(before, _SOF, bytes(2)), NEW),
    "zeros before the scan": (partial(before, _SOS, bytes(7)), NEW),
    "fill bytes before the frame": (partial(before, _SOF, b"\xff\xff"), NEW),
    "restart marker before the frame": (partial(before, _SOF, b"\xff\xd0"), NEW),
    "zeros between two scans": (zeros_between_scans, NEW),
    "JFIF 0.00": (jfif_0, NEW),
    "scan parameters of zero": (scan_0, NEW),
    "unknown colour transform": (adobe_unknown, NEW),
    "two jpegs": (lambda m: m.jpeg(1) + m.jpeg(2), KEPT),
    "mpo": (lambda m: m.encode(m.image(1), "MPO", save_all=True, append_images=[m.image(2)]), KEPT),
    "restarts": (lambda m: m.encode(m.image(1), restart_marker_blocks=2), KEPT),
    "rare sampling": (rare_sampling, NEW),
    "thumbnail in exif": (lambda m: m.encode(m.image(1), exif=b"Exif\0\0" + m.exif("<", 3, 6) + m.jpeg(2)), KEPT),
    "jpeg with a large profile": (lambda m: m.encode(m.image(1), icc_profile=NOISE), KEPT),
    "jpeg with a broken profile": (lambda m: put(m.jpeg(1), 2, b"\xff\xe2\0\x0fICC_PROFILE\0\1"), NEW),
    "jpeg with a short JFIF segment": (lambda m: m.jpeg(1)[:2] + b"\xff\xe0\0\7JFIF\0" + m.jpeg(1)[20:], NEW),
    "jpeg without tables of codes": (lambda m: m.jpeg(1)[: place(m.jpeg(1), 0xC4)] + m.jpeg(1)[place(m.jpeg(1), _SOS) :], NEW),
    "cmyk": (cmyk, KEPT),
    "cmyk without adobe": (cmyk_without_adobe, NEW),
    "cmyk with another's segment": (lambda m: cmyk(m).replace(b"Adobe", b"Abode"), NEW),
    "cmyk of an unknown transform": (lambda m: over(cmyk(m), place(cmyk(m), _ADOBE) + 15, b"\1"), NEW),
    "cmyk, turned": (lambda m: m.encode(m.image(1).convert("CMYK"), exif=b"Exif\0\0" + m.exif("<", 3, 6)), NEW),
    "png without its last byte": (lambda m: m.encode(m.image(1), "PNG")[:-1], NEW),
    "png without its last chunk": (lambda m: m.encode(m.image(1), "PNG")[:-12], NEW),
    "png without its last checksums": (lambda m: m.encode(m.image(1), "PNG")[:-17], NEW),
    "png with more behind it": (lambda m: m.encode(m.image(1), "PNG") * 2, NEW),
    "png with a wrong checksum": (png_wrong_crc, NEW),
    "png with too many rows": (lambda m: png_of_rows(m, 1.5), NEW),
    "png interlaced": (interlaced, KEPT),
    "png with a large text": (lambda m: text_png(m, 3 << 20, packed=False), NEW),
    "png with a text that unpacks to a large one": (lambda m: text_png(m, 3 << 20, packed=True), NEW),
    "png with a small text": (lambda m: text_png(m, 3 << 10, packed=True), KEPT),
    "png with a large profile": (lambda m: m.encode(m.image(1), "PNG", icc_profile=NOISE), NEW),
    "png with a broken profile": (lambda m: png_with(m, m.chunk(b"iCCP", b"x")), NEW),
    "png with exif that libpng refuses": (lambda m: png_with(m, m.chunk(b"eXIf", b"M\r" + m.exif(">", 3, 6)[2:])), NEW),
    "png with exif that is damaged behind the orientation": (lambda m: png_with(m, m.chunk(b"eXIf", exif_cut(m))), NEW),
    "png with an empty palette": (lambda m: png_with(m, m.chunk(b"PLTE", b"")), NEW),
    "png with exif behind the pixels": (lambda m: png_with(m, behind=m.chunk(b"eXIf", m.exif(">", 3, 6))), NEW),
    "png with a chunk of no name": (lambda m: png_with(m, m.chunk(b"a1bc", b"x")), NEW),
    "png with an unknown critical chunk": (lambda m: png_with(m, m.chunk(b"ABCD", b"x")), NEW),
    "png with an uneven palette": (
        lambda m: m.png(3, 8, (2, 2), b"\0\0\1\0\1\0", m.chunk(b"PLTE", bytes(range(6)) + b"x")),
        NEW,
    ),
    "jpeg turned by xmp": (lambda m: m.encode(m.image(1), xmp=XMP), NEW),
    "png turned by xmp": (xmp_png, NEW),
    "webp turned by xmp": (lambda m: m.encode(m.image(1), "WEBP", lossless=True, xmp=XMP), NEW),
    **{
        f"{kind} turned by {order}{number}": (
            lambda m, kind=kind, order=order, number=number: m.encode(
                m.image(1), kind, lossless=True, exif=(b"Exif\0\0" if kind == "JPEG" else b"") + m.exif(order, number, 6)
            ),
            # Big-endian, the four bytes of a long number begin with zeros, which a plain reader takes for the value.
            NEW if kind == "WEBP" or (order, number) == (">", 4) else KEPT,
        )
        for kind in ("JPEG", "PNG", "WEBP")
        for order in "<>"
        for number in (3, 4, 8)
    },
    "bmp of 16 bits": (partial(bmp, 16), NEW),
    "bmp of 32 bits": (partial(bmp, 32), NEW),
    "bmp upside down": (partial(bmp, 24, upside_down=True), NEW),
    "bmp of 24 bits": (partial(bmp, 24), KEPT),
    "webp that announces exif": (partial(webp_announcing, 8), NEW),
    "webp that announces a profile": (partial(webp_announcing, 0x20), NEW),
    "webp that announces alpha": (partial(webp_announcing, 0x10), NEW),
    "webp that announces nothing": (partial(webp_announcing, 0), KEPT),
    "webp with more behind it": (lambda m: m.encode(m.image(1), "WEBP") + b"xx", NEW),
    "tiff of two pages": (lambda m: m.encode(m.image(1), "TIFF", save_all=True, append_images=[m.image(2)]), NEW),
    "tiff with a large profile": (lambda m: m.encode(m.image(1), "TIFF", icc_profile=NOISE), NEW),
    "avif": (lambda m: m.encode(m.image(1), "AVIF"), NEW),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_picture_is_packed(make: Any, dali_rgb: Callable[[bytes], np.ndarray], tmp_path: Path, name: str) -> None:
    data, stored = WHOLE[name][0](make), WHOLE[name][1]
    got = look(data)
    assert (got.data == data) == (stored == KEPT)
    assert got.data == data or got.extension == "png"
    try:
        expected = pil_rgb(data)
    except (SyntaxError, OSError):  # PIL stops at metadata
        expected = np.asarray(make.image(1)) if name.startswith("png") else pil_rgb(make.jpeg(1))
    (tmp_path / "x").write_bytes(data)
    trained = decode_rgb(memoryview(got.data), plain=False)
    for pixels in (dali_rgb(got.data), trained, pil_rgb(got.data), read_pixels(tmp_path / "x")):
        assert np.array_equal(pixels, expected)
    assert got.size == expected.shape[:2]


def test_a_plain_palette_picture_is_kept(make: Any) -> None:
    """Beside the uneven palette: an index that no colour belongs to, which decoders make different colours of."""
    palette = make.chunk(b"PLTE", bytes(range(6)))
    kept, beyond = (make.png(3, 8, (2, 2), rows, palette) for rows in (b"\0\0\1\0\1\0", b"\0\0\1\0\2\0"))
    assert look(kept).data == kept
    assert look(beyond).data != beyond


# ------------------------------------------------------------------------------------------------------------- damaged pictures

DAMAGED: dict[str, Callable[[Any], bytes]] = {
    "jpeg cut, with an end": lambda m: ended(m.jpeg(1)),
    "jpeg of JFIF 0.00, cut": lambda m: ended(jfif_0(m)),
    "jpeg with scan parameters of zero, cut": lambda m: ended(scan_0(m)),
    "jpeg of an unknown transform, cut": lambda m: ended(adobe_unknown(m)),
    "jpeg with zeros before the frame, cut": lambda m: ended(before(_SOF, bytes(2), m)),
    "cmyk without adobe, cut": lambda m: ended(cmyk_without_adobe(m)),
    "jpeg of rare sampling, cut": lambda m: ended(rare_sampling(m)),
    "jpeg with restarts, cut": lambda m: ended(m.encode(m.image(1), restart_marker_blocks=2)),
    "progressive jpeg without its last scan": partial(scans_kept, lost=1),
    "progressive jpeg of one scan": partial(scans_kept, lost=9),
    "jpeg of a start marker": lambda m: b"\xff\xd8",
    "jpeg of both ends": lambda m: b"\xff\xd8\xff\xd9",
    "png of half its rows": lambda m: png_of_rows(m, 0.5),
    "png without the last row": lambda m: png_of_rows(m, 39 / 40),
    "png with a changed bit": png_flipped,
    "png cut": lambda m: png_parts(m)[0] + png_parts(m)[1][:900],
    "png with an unknown filter": lambda m: m.png(2, 8, (1, 1), b"\7abc"),
    "png without its palette": lambda m: m.png(3, 8, (1, 1), b"\0\0"),
    "bmp cut": lambda m: bmp(24, m)[:-99],
    "webp cut, with lengths that fit": lambda m: webp_announcing(0, m)[:4] + b"\xe8\1\0\0" + webp_announcing(0, m)[8:496],
    "tiff without its second strip": lambda m: m.tiff(np.zeros((40, 48), np.uint8), t278=(20,)),
    "pgm without its last bytes": lambda m: b"P5 4 4 4095\n" + bytes(30),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_picture_is_refused(make: Any, tmp_path: Path, name: str) -> None:
    data = DAMAGED[name](make)
    with pytest.raises(Unusable, match="damaged") as packing:
        look(data)
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ImageError, match="damaged") as predicting:
        read_pixels(tmp_path / "x.jpg")
    assert predicting.value.reason == str(packing.value)
    assert "\n" not in str(packing.value)
    assert "JFIF" not in str(packing.value)  # the reason is the damage


# -------------------------------------------------------------------------------------------------------------------- no images

KINDS: dict[str, tuple[bytes, str, str]] = {  # content, the kind, the way out
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC", "heif-convert|sips"),
    "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40), "HEIC", "heif-convert|sips"),
    "mp4": (b"\0\0\0\x18ftypisom" + bytes(40), "MP4", "frames"),
    "quicktime": (b"\0\0\0\x14ftypqt  " + bytes(40), "QuickTime", "frames"),
    "webm": (b"\x1a\x45\xdf\xa3" + bytes(40), "WebM", "frames"),
    "avi": (b"RIFF\0\0\0\0AVI LIST", "AVI", "frames"),
    "gzip": (gzip.compress(b"\xff\xd8\xff"), "gzip", "unpack"),
    "zip": (b"PK\3\4" + bytes(40), "ZIP", "unpack"),
    "tar": (b"a.jpg".ljust(257, b"\0") + b"ustar\0", "tar", "unpack"),
    "html": (b"<!DOCTYPE html>\n<html>", "HTML", "download"),
    "html in capitals, behind lines": (b"\xef\xbb\xbf\n\n <HTML><BODY>403 Forbidden", "HTML", "download"),
    "xml": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied', "XML", "download"),
    "json": (b'{"message": "Not Found"}', "JSON", "download"),
    "svg": (b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns=', "SVG", "PNG"),
    "pdf": (b"%PDF-1.7\n", "PDF", "PNG"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 9\n", "Git LFS", "git lfs pull"),
    "git annex": (b"/annex/objects/SHA256E-s9--1f.jpg\n", "git-annex", "git annex get"),
    "base64": (b"/9j/4AAQSkZJRgABAQ", "base64", "decode"),
    "apple double": (b"\0\5\x16\7\0\2\0\0Mac OS X", "AppleDouble", "remove"),
    "jpeg xl": (b"\xff\x0a\xfa\x7f", "JPEG XL", "convert"),
    "dicom": (bytes(128) + b"DICM", "DICOM", "convert"),
    "numpy": (b"\x93NUMPY\1\0", "NumPy", "PNG"),
    "zeros": (bytes(5000), "zero bytes", "copy"),
    "text": ("Ein kurzer Text über Katzen.\n".encode(), "text", "remove"),
    "noise": (b"\x80\x01\x02\x03\x04", "80 01 02", "convert|remove"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_image_is_named(tmp_path: Path, name: str) -> None:
    content, kind, way_out = KINDS[name]
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(Unusable, match=f"no image .*{kind}.*({way_out})"):
        look(content)
    with pytest.raises(ImageError, match=rf"x\.jpg: no image .*{kind}"):
        read_pixels(tmp_path / "x.jpg")


# -------------------------------------------------------------------------------------------------------------------- bit depth

SCENE = np.random.default_rng(3).integers(0, 4096, (9, 12), np.uint16)
SCENE[0, 0], SCENE[0, 1] = 4095, 1
COLOURS = np.dstack([SCENE, SCENE[::-1], 4095 - SCENE])
TWELVE = b"\x0c"


def filled(samples: np.ndarray) -> np.ndarray:
    """Twelve bits as the PNG specification wants them in 16: the lower bits repeat the upper ones."""
    return samples << 4 | samples >> 8


def twelve_packed(samples: np.ndarray) -> bytes:
    """Two samples in three bytes."""
    pairs = samples.astype(int).reshape(-1, 2)
    return b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs.tolist())


def compressed_tiff(m: Any) -> bytes:
    data = m.encode(Image.fromarray(SCENE), "TIFF", compression="tiff_lzw", tiffinfo={281: 1})
    return over(data, data.index(struct.pack("<HHI", 281, 3, 1)) + 8, struct.pack("<H", 4095))


DEPTHS: dict[str, tuple[Callable[[Any], bytes], np.ndarray]] = {
    "png, sBIT": (lambda m: m.png16(SCENE[..., None], m.chunk(b"sBIT", TWELVE)), SCENE >> 4),
    "png, sBIT, filled": (lambda m: m.png16(filled(SCENE)[..., None], m.chunk(b"sBIT", TWELVE)), SCENE >> 4),
    "png, sBIT, filled and dark": (lambda m: m.png16((SCENE >> 8 << 4)[..., None], m.chunk(b"sBIT", TWELVE)), SCENE >> 12),
    "png in colour, sBIT": (lambda m: m.png16(COLOURS, m.chunk(b"sBIT", TWELVE * 3)), COLOURS >> 4),
    "png in colour, sBIT, filled": (lambda m: m.png16(filled(COLOURS), m.chunk(b"sBIT", TWELVE * 3)), COLOURS >> 4),
    "png with alpha, sBIT": (
        lambda m: m.png16(np.dstack([COLOURS, SCENE]), m.chunk(b"sBIT", TWELVE * 4)),
        COLOURS >> 4,
    ),
    "png, grey with alpha, sBIT": (lambda m: m.png16(np.dstack([SCENE, SCENE]), m.chunk(b"sBIT", TWELVE * 2)), SCENE >> 4),
    "png of 16 bits": (lambda m: m.png16((SCENE * 16)[..., None]), SCENE >> 4),
    "tiff of 12 bits": (lambda m: m.tiff(SCENE, t258=(12,), data=twelve_packed(SCENE)), SCENE >> 4),
    "tiff, MaxSampleValue": (lambda m: m.tiff(SCENE, t281=(4095,)), SCENE >> 4),
    "tiff, big-endian, MaxSampleValue": (lambda m: m.tiff(SCENE, ">", t281=(4095,)), SCENE >> 4),
    "tiff in colour, MaxSampleValue": (lambda m: m.tiff(COLOURS, t281=(4095,) * 3), COLOURS >> 4),
    "tiff in colour, big-endian, MaxSampleValue": (lambda m: m.tiff(COLOURS, ">", t281=(4095,) * 3), COLOURS >> 4),
    "tiff of 16 bits": (lambda m: m.tiff(SCENE * 16), SCENE >> 4),
    "tiff of 16 bits, white is zero": (lambda m: m.tiff(SCENE * 16, t262=(0,)), 255 - (SCENE >> 4)),
    "tiff, white is zero, MaxSampleValue": (lambda m: m.tiff(SCENE, t262=(0,), t281=(4095,)), 255 - (SCENE >> 4)),
    "tiff of 8 bits, white is zero": (lambda m: m.tiff((SCENE >> 4).astype(np.uint8), t262=(0,)), 255 - (SCENE >> 4)),
    "tiff compressed, MaxSampleValue": (compressed_tiff, SCENE >> 4),
    "pgm of 16 bits": (lambda m: b"P5 12 9 65535\n" + (SCENE * 16).astype(">u2").tobytes(), SCENE >> 4),
    "pgm of 12 bits": (lambda m: b"P5 12 9 4095\n" + SCENE.astype(">u2").tobytes(), SCENE >> 4),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_bit_depth_is_read_from_the_file(make: Any, dali_rgb: Callable, tmp_path: Path, name: str) -> None:
    data, expected = DEPTHS[name][0](make), DEPTHS[name][1].astype(int)
    expected = expected if expected.ndim == 3 else np.repeat(expected[:, :, None], 3, axis=2)
    got = look(data)
    (tmp_path / "x").write_bytes(data)
    for pixels in (dali_rgb(got.data), read_pixels(tmp_path / "x")):
        # One level: a sample's high byte, against its place in the declared range, which PIL computes of a PGM.
        assert abs(pixels.astype(int) - expected).max() <= 1
    assert "sixteen_bit_dark" not in got.flags


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda m: m.png16(SCENE[..., None]), id="png"),
        pytest.param(lambda m: m.png16(COLOURS), id="png in colour"),
        pytest.param(lambda m: m.tiff(SCENE), id="tiff"),
        pytest.param(lambda m: m.tiff(COLOURS, ">"), id="tiff in colour"),
        pytest.param(lambda m: b"P5 12 9 65535\n" + SCENE.astype(">u2").tobytes(), id="pgm"),
    ],
)
def test_samples_that_only_look_like_12_bits_are_counted(make: Any, data: Callable[[Any], bytes]) -> None:
    got = look(data(make))
    assert {"sixteen_bit", "sixteen_bit_dark"} <= set(got.flags)
    assert int(got.rgb.max()) == 15


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda m: m.tiff(SCENE.astype(np.int16), t339=(2,)), "signed"),
        (lambda m: m.tiff(SCENE.astype(np.int8), t339=(2,)), "signed"),
        (lambda m: m.tiff(SCENE.astype(np.uint32)), "32-bit"),
        (lambda m: m.tiff(COLOURS, t284=(2,)), "planes"),
        (lambda m: m.tiff(SCENE, ">", t262=(0,)), "variant"),
        (lambda m: over(m.jpeg(1), place(m.jpeg(1), _SOF) + 4, TWELVE), "precision 12"),
    ],
)
def test_samples_without_a_scale_are_refused(make: Any, data: Callable[[Any], bytes], reason: str) -> None:
    with pytest.raises(Unusable, match=reason) as refused:
        look(data(make))
    assert "convert" in str(refused.value)
    assert "damaged" not in str(refused.value)


def test_a_tiff_palette_of_8_bits(make: Any) -> None:
    """TIFF has 16 bits a colour; where every one is below 256 the writer meant 8, and PIL would show black."""
    index, colours = np.arange(108, dtype=np.uint8).reshape(9, 12), np.arange(768) % 256
    data = make.tiff(index, t262=(3,), t320=tuple(colours.tolist()))
    assert np.array_equal(look(data).rgb, np.moveaxis(colours.reshape(3, 256)[:, index], 0, 2))


# ------------------------------------------------------------------------------------------- PIL's globals, and what is counted


def test_pils_own_limits_and_switches_do_not_show(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as many a training script sets it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
            data = make.encode(make.image(1), kind)
            (tmp_path / "x").write_bytes(data)
            assert look(data).size == read_pixels(tmp_path / "x").shape[:2] == (40, 48)
            if kind != "WEBP":
                with pytest.raises(Unusable, match="damaged"):
                    look(data[: len(data) // 2])
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == (9, True)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_only_transparent_pixels_count_as_alpha(make: Any, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = make.image(1).convert("RGBA")
    assert "alpha" not in look(make.encode(image, kind, **options)).flags
    image.putpixel((3, 2), (1, 2, 3, 254))
    assert "alpha" in look(make.encode(image, kind, **options)).flags


def test_shard_says_what_becomes_of_alpha_and_of_dark_samples(make: Any, tidali: Any, tmp_path: Path) -> None:
    image = make.image(1)
    image.putalpha(image.convert("L"))
    tree = {f"cat/{n}.png": make.encode(image, "PNG") for n in range(3)}
    tree |= {"dog/a.jpg": make.jpeg(1), "dog/b.png": make.png16(SCENE[..., None])}
    make.folder(tree, tmp_path / "source")
    done = tidali("shard", tmp_path / "source", tmp_path / "packed", "--workers", 1)
    assert done.code == 0
    said = " ".join(done.stderr.split())
    assert "3 images with transparent pixels" in said
    assert "1 image with 16-bit samples" in said
    again = f"tidali shard {tmp_path}/source {tmp_path}/packed --workers 1 --overwrite --val-fraction 0.1"
    assert f"next: hold out a tenth of the images, as training needs a split to evaluate on\n  {again}\n" in done.stderr


def test_a_large_picture_on_a_sheet_and_in_an_export(make: Any, tidali: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Larger than PIL's limit is for everything else: the packer's own limit is the one that counts."""
    from tidali.dataset.contract import open_dataset
    from tidali.model.export_inputs import photographs

    images = {f"train/{c}/{n}.png": make.encode(make.image(n, 100, 120), "PNG") for c in "ab" for n in range(2)}
    make.folder(images, tmp_path / "source")
    make.pack(tmp_path / "source", tmp_path / "packed")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # the letters of a heading or caption have less
    assert photographs(open_dataset(tmp_path / "packed"), "train", (8, 8)).shape == (4, 8, 8, 3)
    done = tidali("info", tmp_path / "packed", "--sheet", tmp_path / "sheet.png")
    assert done.code == 0, done.stderr
    assert (tmp_path / "sheet.png").stat().st_size > 0
