"""One image file: whether it is usable, its pixels as displayed, and whether every decoder reads its bytes alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import Image

from tidali.images import jpeg
from tidali.images.bit_depth import eight_bit_rgb, fix_palette, is_wide, narrow, refuse_without_scale
from tidali.images.canonical import is_plain_bmp, is_plain_webp
from tidali.images.errors import TooLarge, Unusable
from tidali.images.kinds import image_format, what_else
from tidali.images.orientation import displayed, displayed_by, plain, upright
from tidali.images.pil import has_transparent_pixels, load, one_reason, open_file, open_unguarded
from tidali.images.png import PALETTE, Png, check_pixels, read_png

_MOST_SCANS = 100  # nvImageCodec refuses more than 256
_GREY_MODES = ("1", "L", "LA", "La")
_FILLS = (b"\x2b\x8a\xd1" * 64, b"\x94\x55\x0e" * 64)
"""Bytes that a decoder takes for coefficients, in two versions that have none in common."""


@dataclass(slots=True)
class Picture:
    """A usable image."""

    rgb: np.ndarray
    """(H, W, 3) uint8 pixels as the file stores them, before its orientation. Alpha is dropped."""
    orientation: int = 1
    """EXIF's, 1..8."""
    flags: list[str] = field(default_factory=list)
    """'grey', 'cmyk', 'alpha', 'sixteen_bit', 'sixteen_bit_dark', 'exif_rotated'."""
    kept: str | None = None
    """The extension under which its bytes are kept: PIL, libjpeg-turbo and DALI 2.4.0 read the same pixels and the same
    orientation from them. None if they do not, or may not."""

    @property
    def upright(self) -> np.ndarray:
        """(H, W, 3) uint8 pixels as displayed."""
        return upright(self.rgb, self.orientation)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as displayed."""
        height, width = self.rgb.shape[:2]
        return (width, height) if self.orientation >= 5 else (height, width)  # 5..8 turn by 90 degrees


def read_picture(data: bytes, *, max_pixels: int) -> Picture:
    """Decode an image file of any kind that is read here.

    Of an animation or a file of several pages it is the first one; of samples of more than 8 bits the upper 8 of those that the
    file declares. Metadata, however large or damaged, decides nothing but the orientation.

    Raises:
        Unusable: empty, no image, damaged, cut off, or more than ``max_pixels`` by its header.
    """
    if data.startswith(b"\xff\xd8"):  # without a search for the kind: 1.5 us, of 55 for 64 x 64 pixels
        picture = _read_jpeg(data, max_pixels)
    elif (kind := image_format(data)) == "PNG":
        picture = _read_png(data, max_pixels)
    elif kind is not None:
        picture = _read_other(data, kind, max_pixels)
    else:
        raise Unusable(what_else(data) if data else "empty file")
    if picture.orientation != 1:
        picture.flags.append("exif_rotated")
    return picture


def decode_kept(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 pixels as displayed, of bytes that a `Picture` was ``kept`` as, without the checks of `read_picture`.

    Raises:
        Exception: any, of bytes that were never checked.
    """
    if data.startswith(b"\xff\xd8"):
        header = jpeg.read_header(data)
        orientation = 1 if header is None or header.exif is None else plain(header.exif)
        four_inks = header is not None and header.components == 4
        return upright(_pixels_by_pil(data) if four_inks else simplejpeg.decode_jpeg(data), orientation)
    kind = image_format(data) or "unknown"
    image = open_unguarded(data, kind)  # without the guard, which lets one thread in at a time
    image.load()
    image.info.pop("transparency", None)
    exif = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    return upright(eight_bit_rgb(image, wide=False)[0], plain(exif))


# ----------------------------------------------------------------------------------------------------------------------- JPEG


def _read_jpeg(data: bytes, max_pixels: int) -> Picture:
    header = jpeg.read_header(data)
    if header is None:
        raise Unusable("damaged JPEG: it ends before it says its size")
    _check_size(header.width, header.height, max_pixels)
    canonical = header.canonical
    try:
        rgb = simplejpeg.decode_jpeg(data, strict=True)
    except Exception:
        canonical = False
        rgb = _decode_odd_jpeg(data)
    if header.needs_scans:
        complete, scans = jpeg.read_scans(data)
        if not complete:
            raise Unusable("damaged JPEG: the last of its scans are missing")
        canonical = canonical and scans <= _MOST_SCANS
    picture = Picture(rgb)
    if header.components == 1:
        picture.flags.append("grey")
    elif header.components == 4:
        picture.flags.append("cmyk")  # libjpeg-turbo's own conversion is one grey level off PIL's and DALI's
        picture.rgb = _pixels_by_pil(data if canonical else jpeg.rewritten(data))
    if header.has_metadata:
        try:
            picture.orientation = displayed(open_file(data, "JPEG"))
        except Unusable:  # for its metadata
            canonical = False
            info = {"exif": header.exif and b"Exif\0\0" + header.exif, "xmp": header.xmp}
            picture.orientation = displayed_by({key: value for key, value in info.items() if value is not None})
        plain_answer = 1 if header.exif is None else plain(header.exif)
        # DALI turns an image by OpenCV, whose conversion of four inks is a grey level off.
        canonical = canonical and picture.orientation == plain_answer and (header.components != 4 or plain_answer == 1)
    picture.kept = "jpg" if canonical else None
    return picture


def _decode_odd_jpeg(data: bytes) -> np.ndarray:
    """The pixels of a JPEG that libjpeg-turbo warned of, or that its strict interface does not take.

    Raises:
        Unusable: the warning is about the scans, so the picture is damaged.
    """
    for form in (jpeg.rewritten(data, fill=b""), jpeg.rewritten(data)):
        try:
            return simplejpeg.decode_jpeg(form, strict=True)
        except Exception as again:
            error = again
    text = " ".join(str(error).split())
    if "precision" in text:
        raise Unusable(f"JPEG of a variant that is not read here ({text}); convert it to 8 bits")
    if "subsampling" not in text:
        raise Unusable(f"damaged JPEG: {text}")
    # A sampling that the strict interface has no name for. Where a scan is cut off, other bytes at its end change the picture.
    picture, *others = (_pixels_by_pil(jpeg.rewritten(data, fill=fill)) for fill in (b"", *_FILLS))
    if any(not np.array_equal(picture, other) for other in others):
        raise Unusable("damaged JPEG: its scan is cut off")
    return picture


def _pixels_by_pil(data: bytes) -> np.ndarray:
    image = open_file(data, "JPEG")
    load(image, "JPEG")
    return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------------------------------------------------------ PNG


def _read_png(data: bytes, max_pixels: int) -> Picture:
    png = read_png(data)
    _check_size(png.width, png.height, max_pixels)
    canonical = check_pixels(png) and png.canonical and png.depth < 16
    if canonical:
        try:
            image = open_file(data, "PNG")
            load(image, "PNG")
        except Unusable:  # for its metadata
            canonical = False
    if png.depth == 16 and png.colour_type == 4:
        return _read_wide_grey_alpha(png)
    wide = False
    if not canonical:
        image = open_file(png.picture(), "PNG")
        wide = is_wide(image)
        load(image, "PNG")
    image.info.pop("transparency", None)  # PIL would convert it too, and warn
    with one_reason("PNG"):
        rgb, flags = eight_bit_rgb(
            image, wide=wide, declared_bits=png.significant_bits, reopen=lambda: open_file(png.picture(), "PNG")
        )
        transparent = png.has_key_colour or (png.colour_type in (4, 6) and has_transparent_pixels(image))
    if png.colour_type == PALETTE:
        canonical = canonical and int(np.asarray(image).max()) < len(png.palette) // 3
    orientation = displayed_by(png.metadata) if png.metadata else 1
    canonical = canonical and orientation == plain(png.exif)
    return Picture(rgb, orientation, flags + _png_flags(png, transparent), "png" if canonical else None)


def _read_wide_grey_alpha(png: Png) -> Picture:
    """PIL has no 16-bit grey with alpha. As 8-bit RGBA, whose filters work on as many bytes, it has two bytes of each."""
    image = open_file(png.picture(depth=8, colour_type=6), "PNG")
    load(image, "PNG")
    samples = np.asarray(image).view(">u2")  # (H, W, 2)
    rgb, flags = narrow(samples[:, :, :1].astype(np.uint16), png.significant_bits, certain=False)
    transparent = int(samples[:, :, 1].min()) < 0xFFFF
    return Picture(rgb, displayed_by(png.metadata), flags + _png_flags(png, transparent))


def _png_flags(png: Png, transparent: bool) -> list[str]:
    return (["grey"] if png.colour_type in (0, 4) else []) + (["alpha"] if transparent else [])


# -------------------------------------------------------------------------------------------------------------- other formats


def _read_other(data: bytes, kind: str, max_pixels: int) -> Picture:
    image = open_file(data, kind, max_pixels)
    _check_size(image.width, image.height, max_pixels)
    with one_reason(kind):
        refuse_without_scale(image, kind)
        fix_palette(image)
        wide = is_wide(image)
    load(image, kind)
    picture = _of_loaded(image, kind, wide=wide, reopen=lambda: open_file(data, kind))
    if picture.orientation == 1:
        if kind == "BMP" and is_plain_bmp(data):
            picture.kept = "bmp"
        elif kind == "WEBP" and is_plain_webp(data):  # a still picture
            picture.kept = "webp"
    return picture


def _of_loaded(image: Image.Image, kind: str, *, wide: bool, reopen: Callable[[], Image.Image] | None = None) -> Picture:
    with one_reason(kind):
        grey = image.mode.startswith("I") or image.mode in _GREY_MODES
        found = (("grey", grey), ("cmyk", image.mode == "CMYK"), ("alpha", has_transparent_pixels(image)))
        orientation = displayed(image)
        image.info.pop("transparency", None)  # PIL would convert it too, and warn
        rgb, flags = eight_bit_rgb(image, wide=wide, reopen=reopen)
    return Picture(rgb, orientation, [name for name, is_so in found if is_so] + flags)


def read_pil_image(image: Image.Image) -> Picture:
    """The same of an image that PIL has opened or made. It may be loaded, but is not changed otherwise.

    Raises:
        Unusable: the samples have no defined 8-bit scale, or it is damaged.
    """
    kind = image.format or "image"
    with one_reason(kind):
        refuse_without_scale(image, kind)
        wide = is_wide(image)
        image.load()
        if "transparency" in image.info:
            tags = getattr(image, "tag_v2", None)
            image = image.copy()
            if tags is not None:
                image.tag_v2 = tags  # type: ignore[attr-defined]
    return _of_loaded(image, kind, wide=wide)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(f"declares {width} x {height} pixels, more than the limit of {max_pixels}")
