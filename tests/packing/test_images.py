"""Single images: every format and damage with its outcome, and what is stored against two decoders."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shards.images import Inspected, Resizing, Unusable, inspect
from shards.pixels import ChannelSums
from shards.resample import resize

MAX_PIXELS = 1 << 20


def look(data: bytes, **resizing: Any) -> Inspected:
    return inspect(data, max_pixels=MAX_PIXELS, resizing=Resizing(**resizing))


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png16(make: Any, colour_type: int) -> tuple[bytes, np.ndarray]:
    """A 16-bit PNG of random samples, and them as (H, W, C) uint16."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    samples = np.random.default_rng(colour_type).integers(0, 65536, (9, 11, channels), dtype=np.uint16)
    return make.png16(samples), samples


def with_alpha(image: Image.Image) -> Image.Image:
    alpha = np.random.default_rng(0).integers(0, 256, (image.height, image.width), dtype=np.uint8)
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


# name -> (how its bytes are made, what they are stored as, what is counted). "kept" means byte for byte.
USABLE: dict[str, tuple[Callable[[Any], bytes], str, set[str]]] = {
    "jpeg": (lambda m: m.jpeg(1), "jpg kept", set()),
    "jpeg 4:4:4": (lambda m: m.encode(m.image(1), subsampling=0), "jpg kept", set()),
    "jpeg grey": (lambda m: m.encode(m.image(1).convert("L")), "jpg kept", {"grey"}),
    "jpeg cmyk": (lambda m: m.encode(m.image(1).convert("CMYK")), "jpg kept", {"cmyk"}),
    "jpeg stored as rgb": (lambda m: m.encode(m.image(1), keep_rgb=True), "jpg kept", set()),
    "jpeg progressive": (lambda m: m.encode(m.image(1), progressive=True), "jpg kept", set()),
    "jpeg with junk behind": (lambda m: m.jpeg(1) + b"junk" * 50, "jpg kept", set()),
    "jpeg 1 x 1": (lambda m: m.jpeg(1, 1, 1), "jpg kept", set()),
    "jpeg 1 x 2000": (lambda m: m.jpeg(1, 1, 2000), "jpg kept", set()),
    **{
        f"jpeg exif {o}": (lambda m, o=o: m.encode(m.image(1), exif=exif(o)), "jpg kept", {"exif_rotated"} if o > 1 else set())
        for o in range(1, 9)
    },
    "jpeg exif out of range": (lambda m: m.encode(m.image(1), exif=exif(9)), "jpg kept", set()),
    "png": (lambda m: m.encode(m.image(1), "PNG"), "png kept", set()),
    "png alpha": (lambda m: m.encode(with_alpha(m.image(1)), "PNG"), "png kept", {"alpha"}),
    "png grey": (lambda m: m.encode(m.image(1).convert("L"), "PNG"), "png kept", {"grey"}),
    "png grey alpha": (lambda m: m.encode(with_alpha(m.image(1)).convert("LA"), "PNG"), "png kept", {"grey", "alpha"}),
    "png palette": (lambda m: m.encode(m.image(1).quantize(32), "PNG"), "png kept", set()),
    "png palette alpha": (lambda m: m.encode(m.image(1).quantize(32), "PNG", transparency=3), "png kept", {"alpha"}),
    "png 1 bit": (lambda m: m.encode(m.image(1).convert("1"), "PNG"), "png kept", {"grey"}),
    "png exif 6": (lambda m: m.encode(m.image(1), "PNG", exif=exif(6)), "png kept", {"exif_rotated"}),
    "png 16-bit grey": (lambda m: png16(m, 0)[0], "png", {"grey", "sixteen_bit", "reencoded"}),
    "png 16-bit rgb": (lambda m: png16(m, 2)[0], "png", {"sixteen_bit", "reencoded"}),
    "png 16-bit rgb alpha": (lambda m: png16(m, 6)[0], "png", {"sixteen_bit", "alpha", "reencoded"}),
    "png animated": (
        lambda m: m.encode(m.image(1), "PNG", save_all=True, append_images=[m.image(2)]),
        "png",
        {"reencoded"},
    ),
    "webp": (lambda m: m.encode(m.image(1), "WEBP", quality=80), "webp kept", set()),
    "webp lossless": (lambda m: m.encode(m.image(1), "WEBP", lossless=True), "webp kept", set()),
    "webp alpha": (lambda m: m.encode(with_alpha(m.image(1)), "WEBP"), "webp kept", {"alpha"}),
    "webp exif 6": (
        lambda m: m.encode(m.image(1), "WEBP", lossless=True, exif=exif(6)),
        "png",
        {"exif_rotated", "reencoded"},
    ),
    "webp animated": (
        lambda m: m.encode(m.image(1), "WEBP", save_all=True, append_images=[m.image(2)]),
        "png",
        {"reencoded"},
    ),
    "bmp": (lambda m: m.encode(m.image(1), "BMP"), "bmp kept", set()),
    "bmp palette": (lambda m: m.encode(m.image(1).quantize(32), "BMP"), "bmp kept", set()),
    "bmp grey": (lambda m: m.encode(m.image(1).convert("L"), "BMP"), "bmp kept", {"grey"}),
    "gif": (lambda m: m.encode(m.image(1).quantize(32), "GIF"), "png", {"reencoded"}),
    "tiff": (lambda m: m.encode(m.image(1), "TIFF"), "png", {"reencoded"}),
    "ppm": (lambda m: m.encode(m.image(1), "PPM"), "png", {"reencoded"}),
    "jpeg 2000": (lambda m: m.encode(m.image(1), "JPEG2000"), "png", {"reencoded"}),
}

# name -> (how its bytes are made, what the reason says)
UNUSABLE: dict[str, tuple[Callable[[Any], bytes], str]] = {
    "empty": (lambda m: b"", "empty file"),
    "one byte": (lambda m: b"\xff", "no image"),
    "text": (lambda m: b"this is no image\n" * 20, "no image"),
    "zeros": (lambda m: bytes(4000), "no image"),
    "jpeg without its end marker": (lambda m: m.jpeg(1)[:-2], "damaged JPEG: Premature end"),
    "jpeg cut at half": (lambda m: m.jpeg(1)[: len(m.jpeg(1)) // 2], "damaged JPEG: Premature end"),
    "jpeg cut inside its headers": (lambda m: m.jpeg(1)[:100], "no image|damaged"),
    "jpeg progressive, cut": (lambda m: m.encode(m.image(1), progressive=True)[:-60], "damaged JPEG: Premature end"),
    "jpeg cmyk, cut": (lambda m: m.encode(m.image(1).convert("CMYK"))[:-60], "damaged JPEG: Premature end"),
    "jpeg with a corrupt middle": (
        lambda m: m.jpeg(1)[:800] + b"\xff" * 20 + m.jpeg(1)[820:],
        "damaged JPEG: (Corrupt JPEG data|Unsupported marker)",
    ),
    "png cut": (lambda m: m.encode(m.image(1), "PNG")[:-200], "damaged PNG"),
    "png with a flipped bit": (
        lambda m: bytes(b ^ (i == 200) for i, b in enumerate(m.encode(m.image(1), "PNG"))),
        "damaged PNG",
    ),
    "webp cut": (lambda m: m.encode(m.image(1), "WEBP", quality=80)[:-100], "damaged|no image"),
    "bmp cut": (lambda m: m.encode(m.image(1), "BMP")[:-100], "damaged BMP"),
    "gif cut": (lambda m: m.encode(m.image(1).quantize(32), "GIF")[:200], "damaged GIF"),
    "png that declares 100,000 x 100,000": (
        lambda m: m.png(2, 8, (100_000, 100_000), b"\0"),
        "declares 100000 x 100000 pixels",
    ),
    "jpeg that declares 65,000 x 65,000": (
        lambda m: m.jpeg(1).replace(struct.pack(">HH", 40, 48), struct.pack(">HH", 65_000, 65_000), 1),
        "declares 65000 x 65000 pixels, more than the limit of 1048576 .*--max-pixels",
    ),
    "gif that declares 60,000 x 60,000": (
        # PIL would make room for them while it reads the header: 4 GiB for a file of 57 bytes.
        lambda m: b"GIF89a`\xea`\xea\x80\0\0" + bytes(6) + b"!\xf9\4\t\0\0\1\0,\0\0\0\0`\xea`\xea\0\2\2D\1\0;",
        "declares more than twice as many pixels as the limit of 1048576 .*--max-pixels",
    ),
    "tiff of 32-bit floats": (
        lambda m: m.encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
        "no defined 8-bit scale",
    ),
    "postscript": (lambda m: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "no image"),
}


@pytest.mark.parametrize("name", USABLE)
def test_usable(make: Any, name: str) -> None:
    source, stored, flags = USABLE[name][0](make), *USABLE[name][1:]
    got = look(source)
    assert got.extension == stored.split()[0]
    assert set(got.flags) == flags
    assert (got.data == source) == stored.endswith("kept")
    expected = upright_rgb(source) if "16-bit" not in name else upright_rgb(got.data)
    assert np.array_equal(upright_rgb(got.data), expected), "the stored pixels are the source's"
    assert got.size == expected.shape[:2]
    assert np.array_equal(np.sort(got.rgb.reshape(-1, 3), axis=0), np.sort(expected.reshape(-1, 3), axis=0))


def upright_rgb(data: bytes) -> np.ndarray:
    """PIL's pixels as displayed: (H, W, 3) uint8."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable(make: Any, name: str) -> None:
    source, message = UNUSABLE[name]
    with pytest.raises(Unusable, match=message):
        look(source(make))


@given(
    cut=st.integers(0, 10_000),
    flips=st.lists(st.integers(0, 10_000), max_size=3),
    kind=st.sampled_from(["JPEG", "CMYK", "PNG", "WEBP", "GIF", "TIFF"]),
)
def test_damage_is_usable_or_unusable(make: Any, cut: int, flips: list[int], kind: str) -> None:
    """Nothing but `Unusable` ever comes out, and what is called usable decodes in PIL too."""
    data = bytearray(damageable(make, kind)) + b"tail"
    for flip in flips:
        data[flip % len(data)] ^= 1 << flip % 8
    damaged = bytes(data[: cut % (len(data) + 1)])
    try:
        got = look(damaged)
    except Unusable:
        return
    assert upright_rgb(got.data).shape == (*got.size, 3)


def damageable(make: Any, kind: str) -> bytes:
    """An image of 16 x 16; of a GIF and a TIFF three frames, which PIL reads when it is asked how many there are."""
    image = make.image(3, 16, 16)
    if kind == "CMYK":
        return make.encode(image.convert("CMYK"))
    if kind in ("GIF", "TIFF"):
        return make.encode(image, kind, save_all=True, append_images=[make.image(n, 16, 16) for n in (4, 5)])
    return make.encode(image, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_each_byte_of_several_frames_may_be_damaged(make: Any, kind: str) -> None:
    """What `hypothesis` would find on a lucky day: every cut, and every byte's worst values."""
    whole = damageable(make, kind)
    outcomes = set()
    for at in range(8, len(whole), 1 + len(whole) // 1000):
        for damaged in (whole[:at], *(whole[:at] + bytes([value]) + whole[at + 1 :] for value in (0, 255))):
            try:
                outcomes.add(look(damaged).extension)
            except Unusable:
                outcomes.add("unusable")
    assert outcomes == {"png", "unusable"}


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_sixteen_bits_become_their_high_byte(make: Any, colour_type: int) -> None:
    data, samples = png16(make, colour_type)
    high = (samples >> 8).astype(np.uint8)
    colours = high[:, :, :3] if colour_type in (2, 6) else np.repeat(high[:, :, :1], 3, axis=2)
    assert np.array_equal(upright_rgb(look(data).data), colours)


@pytest.mark.parametrize("name", USABLE)
def test_dali_decodes_what_is_stored_as_pil_does(make: Any, dali_rgb: Callable[[bytes], np.ndarray], name: str) -> None:
    """The rule by which formats are kept or encoded anew: what is stored has one meaning. Bit for bit, orientation included."""
    data = look(USABLE[name][0](make)).data
    assert np.array_equal(dali_rgb(data), upright_rgb(data))


@given(sizes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), max_size=8), fill=st.sampled_from([None, 0, 255]))
def test_channel_sums_are_exact(sizes: list[tuple[int, int]], fill: int | None) -> None:
    rng = np.random.default_rng(len(sizes))
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    if fill is not None:
        images = [np.full_like(image, fill) for image in images]
    check_sums(images)


def test_channel_sums_do_not_overflow() -> None:
    check_sums([np.full((64, 64, 3), 255, np.uint8)] * 600)
    check_sums([np.full((1200, 1300, 3), 253, np.uint8)])


def check_sums(images: list[np.ndarray]) -> None:
    channels = ChannelSums()
    for image in images:
        channels.add(image)
    flat = np.concatenate([np.zeros((0, 3), np.uint8), *(image.reshape(-1, 3) for image in images)]).astype(np.int64)
    assert channels.pixels == len(flat)
    assert channels.sums() == (flat.sum(axis=0).tolist(), (flat**2).sum(axis=0).tolist())


# ------------------------------------------------------------------------------------------------------------- offline resize


@pytest.mark.parametrize(("height", "width", "size_px"), [(64, 64, 224), (40, 48, 64), (300, 200, 64), (1, 1, 8), (5, 7, 1)])
def test_opencv_kernel_is_opencvs(make: Any, height: int, width: int, size_px: int) -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV, the oracle of its own kernel, is not installed")
    rgb = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = resize(rgb, size_px, "opencv").astype(int)
    theirs = cv2.resize(rgb, (size_px, size_px), interpolation=cv2.INTER_CUBIC).astype(int)
    # One grey level: OpenCV's vectorised vertical pass rounds in float where its scalar one, and ours, uses integers.
    assert abs(ours - theirs).max() <= 1, f"mean {abs(ours - theirs).mean():.4f}"
    assert ours.shape == (size_px, size_px, 3)


def test_kernels_differ_and_keep_flat_colour(make: Any) -> None:
    rgb = np.asarray(make.image(5, 64, 64))
    pil = Image.fromarray(rgb).resize((224, 224), Image.Resampling.BICUBIC)
    assert np.array_equal(resize(rgb, 224, "pil"), np.asarray(pil))
    assert not np.array_equal(resize(rgb, 224, "opencv"), np.asarray(pil))
    flat = np.full((9, 9, 3), 77, np.uint8)
    for kernel in ("pil", "opencv"):
        assert (resize(flat, 31, kernel) == 77).all()


@pytest.mark.parametrize("name", ["jpeg", "jpeg exif 6", "png alpha", "gif", "jpeg grey"])
def test_resized_images_are_square_jpegs(make: Any, name: str) -> None:
    source = USABLE[name][0](make)
    got = look(source, size_px=56, kernel="pil")
    assert (got.extension, got.size) == ("jpg", (56, 56))
    assert "resized" in got.flags
    assert "reencoded" not in got.flags
    wanted = Image.fromarray(upright_rgb(source)).resize((56, 56), Image.Resampling.BICUBIC)
    ours, theirs = (np.asarray(i.convert("L")).astype(int) for i in (Image.fromarray(upright_rgb(got.data)), wanted))
    # Luminance, as the halved chroma cannot hold noise. Quality 95: 1.5 grey levels measured on the worst of these five.
    assert abs(ours - theirs).mean() < 2


@pytest.mark.parametrize("name", ["jpeg", "jpeg exif 6", "png alpha", "webp", "png 16-bit rgb"])
def test_the_shorter_side_is_shrunk_upright_as_pil_does(make: Any, name: str) -> None:
    source = make.png16(np.full((40, 48, 3), 0x8000, np.uint16)) if "16-bit" in name else USABLE[name][0](make)
    upright = Image.fromarray(upright_rgb(source)) if "16-bit" not in name else Image.new("RGB", (48, 40), (128,) * 3)
    got = look(source, shorter_side_px=24)
    assert got.size == ((29, 24) if name == "jpeg exif 6" else (24, 29))  # 48 * 24 / 40 = 28.8
    assert (got.extension, got.flags[-1]) == ("jpg", "resized")
    stored = Image.open(io.BytesIO(got.data))
    assert stored.getexif().get(0x0112) is None
    wanted = upright.resize(stored.size, Image.Resampling.BICUBIC)
    ours, theirs = (np.asarray(i.convert("L")).astype(int) for i in (stored, wanted))
    # Luminance, as the halved chroma cannot hold noise. Quality 92: 1.9 grey levels measured on the worst of these five.
    assert abs(ours - theirs).mean() < 2.5


def test_grey_stays_grey_when_it_is_shrunk(make: Any) -> None:
    grey = make.image(1, 80, 60).convert("L")
    got = look(make.encode(grey, "PNG"), shorter_side_px=30, quality=100)
    stored = Image.open(io.BytesIO(got.data))
    assert (stored.mode, got.size, got.rgb.shape) == ("L", (40, 30), (40, 30, 3))
    wanted = np.asarray(grey.resize((30, 40), Image.Resampling.BICUBIC)).astype(int)
    assert abs(np.asarray(stored).astype(int) - wanted).max() <= 2  # quality 100 rounds the coefficients: 1 measured


@pytest.mark.parametrize("name", ["jpeg", "jpeg exif 6", "png alpha", "webp"])
def test_images_that_are_small_enough_keep_their_bytes(make: Any, name: str) -> None:
    source = USABLE[name][0](make)
    got = look(source, shorter_side_px=40)
    assert got.data == source
    assert "resized" not in got.flags


def test_an_image_too_long_for_a_jpeg_is_stored_as_png(make: Any) -> None:
    got = look(make.encode(Image.new("RGB", (65_600, 3), (9, 99, 199)), "PNG"), shorter_side_px=2)
    assert (got.extension, got.size) == ("jpg", (2, 43733))
    got = look(make.encode(Image.new("RGB", (100_000, 4), (9, 99, 199)), "PNG"), shorter_side_px=3)
    assert (got.extension, got.size) == ("png", (3, 75_000))
    assert np.asarray(Image.open(io.BytesIO(got.data))).reshape(-1, 3).max(axis=0).tolist() == [9, 99, 199]
