"""Images of unequal size: crops and centres against PIL's, whoever decodes; shapes that no photograph has.

Differences are in grey levels, 0..255.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tidali.config import Augment, Kernel, Preprocess
from tidali.dataset.contract import Dataset
from tidali.loading import native, stream
from tidali.loading.augment import crop_boxes
from tidali.loading.batches import Training
from tidali.loading.bicubic import bicubic_taps
from tidali.loading.dali import DaliDecoder, Placement, define_graph, regions
from tidali.loading.data import Data
from tidali.loading.decode import decode_rgb
from tidali.loading.order import centre_boxes, epoch_order
from tidali.loading.resample import squares_of
from tidali.loading.samples import SampleTable
from tidali.loading.thread_decoder import Job, ThreadDecoder

BICUBIC = Image.Resampling.BICUBIC
CPU = torch.device("cpu")
RATIO = (3 / 4, 4 / 3)


@pytest.fixture(params=["compiled", "torch"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("no C compiler")
    return request.param


@pytest.fixture(scope="module")
def table(photographs: Dataset) -> SampleTable:
    return SampleTable(photographs, "train")


def boxes_of(table: SampleTable, kind: str, side: int) -> Tensor:
    if kind == "crops":
        return crop_boxes(table.sizes, (0.08, 1.0), RATIO, torch.arange(len(table)), seed=1, epoch=2)
    if kind == "whole":  # each stretched to a square
        return torch.cat((torch.zeros(len(table), 2), table.sizes.float()), 1)
    return centre_boxes(table.sizes, side, {"centres": 1.0, "inner centres": 0.875}[kind])


def pil_square(pixels: np.ndarray, box: list[float], side: int) -> np.ndarray:
    """PIL's, of an image that its border is repeated around: beyond it PIL drops the taps, where tidali repeats the border."""
    around = 4 + int(2 * max(*box[2:], side) / side)  # pixels that a box's edge takes in, and a box beyond the border
    top, left, height, width = box
    image = Image.fromarray(np.pad(pixels, ((around, around), (around, around), (0, 0)), mode="edge"))
    corners = (left + around, top + around, left + width + around, top + height + around)
    return np.asarray(image.resize((side, side), BICUBIC, box=corners))


def decoded_by(decoder: Any, table: SampleTable, boxes: Tensor, side: int) -> Tensor:
    job = Job(np.arange(len(table)), boxes.numpy(), side)
    squares, bad = decoder.finish(job, decoder.start(job))
    assert not bad
    assert squares.shape == (len(table), side, side, 3)
    return squares


# ------------------------------------------------------------------------------------------------------------------ against PIL


@pytest.mark.parametrize("kind", ["crops", "centres", "inner centres", "whole"])
@pytest.mark.parametrize("side", [32, 64, 150])
def test_squares_are_pils(photographs: Dataset, table: SampleTable, upright, kind: str, side: int, code: str) -> None:
    boxes = boxes_of(table, kind, side)
    squares = decoded_by(ThreadDecoder(table, "pil", 2), table, boxes, side)
    for square, (pixels, _, key), box in zip(squares.numpy(), upright(photographs, "train"), boxes.tolist(), strict=True):
        # PIL rounds after each of its passes (0.5, then at most 1.2 times that of the first, and 0.5), tidali once (0.5): a
        # difference of less than 2 between whole numbers.
        assert np.abs(square.astype(int) - pil_square(pixels, box, side)).max() <= 1, key


@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
@pytest.mark.parametrize("cache", ["device", "off"])
def test_evaluation_is_pils_resize_of_the_shorter_side_and_centre_crop(
    photographs: Dataset, upright, cache: Any, crop_fraction: float
) -> None:
    res = 56  # 56 / 0.875 = 64 exactly, so that PIL's shorter side is a whole number of pixels
    data = Data(photographs, CPU, cache=cache)
    preprocess = Preprocess(res=res, crop_fraction=crop_fraction)
    images = torch.cat([images.clone() for images, _ in data.batches("val", preprocess, 7)])
    found = (255 * images).round().permute(0, 2, 3, 1).numpy()
    for image, (pixels, _, key) in zip(found, upright(photographs, "val"), strict=True):
        picture, shorter = Image.fromarray(pixels), round(res / crop_fraction)
        scale = min(picture.size) / shorter
        # As everybody does it the longer side becomes a whole number of pixels, for which PIL stretches it by less than one.
        # tidali keeps the shorter side's scale, so PIL is given the box around the centre that is as many such pixels.
        height, width = (int(side / scale + 0.5) for side in pixels.shape[:2])
        top, left = ((side - count * scale) / 2 for side, count in zip(pixels.shape[:2], (height, width), strict=True))
        around = 8
        grown = Image.fromarray(np.pad(pixels, ((around, around), (around, around), (0, 0)), mode="edge"))  # see `pil_square`
        corners = (left + around, top + around, left + width * scale + around, top + height * scale + around)
        resized = grown.resize((width, height), BICUBIC, box=corners)
        left, top = (width - res + 1) // 2, (height - res + 1) // 2  # DALI's rounding of half a pixel
        expected = np.asarray(resized.crop((left, top, left + res, top + res))).astype(int)
        assert np.abs(image - expected).max() <= 1, key  # as in `test_squares_are_pils`


@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
def test_evaluation_is_torchvisions_within_a_pixels_shift(photographs: Dataset, upright, crop_fraction: float) -> None:
    """Resize and CenterCrop round both sides and the crop's place: less than one pixel of the output on each side."""
    from torchvision.transforms import functional

    res = 56
    preprocess = Preprocess(res=res, crop_fraction=crop_fraction)
    images = torch.cat([images.clone() for images, _ in Data(photographs, CPU).batches("val", preprocess, 7)])
    for image, (pixels, _, key) in zip(images, upright(photographs, "val"), strict=True):
        resized = functional.resize(
            torch.from_numpy(pixels.copy()).permute(2, 0, 1), [round(res / crop_fraction)], antialias=True
        )
        crops = [
            functional.crop(resized, max(top, 0), max(left, 0), res, res)
            for top in ((resized.shape[1] - res) // 2 + shift for shift in (0, 1))
            for left in ((resized.shape[2] - res) // 2 + shift for shift in (0, 1))
        ]
        # Bilinear, and half a pixel off: 4 levels on average on these images, whose neighbours differ by up to 10.
        assert min((255 * image - crop).abs().mean() for crop in crops) < 4, key


@pytest.mark.parametrize("res", [32, 64])
def test_random_crops_in_batches_are_pils_of_the_same_boxes(
    photographs: Dataset, table: SampleTable, upright, res: int
) -> None:
    """Through the whole loader: the right box of the right image in the right place of the batch."""
    scale, truth = (0.2, 1.0), upright(photographs, "train")
    batches = Data(photographs, CPU).batches(
        "train", Preprocess(res=res), 8, training=Training(augment=Augment(crop_scale=scale), seed=7)
    )
    for epoch in (0, 2):
        batches.set_epoch(epoch)
        order = epoch_order(len(table), 7, epoch)
        boxes = crop_boxes(table.sizes, scale, RATIO, torch.arange(len(table)), seed=7, epoch=epoch).tolist()
        images, labels = (torch.cat(part) for part in zip(*[(i.clone(), of) for i, of in batches], strict=True))
        for image, label, sample in zip(images, labels.tolist(), order.tolist()[: len(labels)], strict=True):
            pixels, expected_label, key = truth[sample]
            assert label == expected_label
            found = (255 * image).round().permute(1, 2, 0).numpy()
            assert np.abs(found - pil_square(pixels, boxes[sample], res)).max() <= 1, key


# -------------------------------------------------------------------------------------------------------------- who decodes


def test_decoded_images_are_pils_upright(photographs: Dataset, table: SampleTable, upright) -> None:
    """Grey, CMYK, every EXIF orientation, PNG and WebP, to the bit."""
    decoder = ThreadDecoder(table, "pil", 2)
    encoded = table.read(np.arange(len(table)))
    for data, (pixels, _, key) in zip(encoded, upright(photographs, "train"), strict=True):
        image = decoder.decode(data)
        assert not isinstance(image, str)
        np.testing.assert_array_equal(image, pixels, err_msg=key)


@pytest.mark.parametrize("kind", ["crops", "centres", "inner centres", "whole"])
@pytest.mark.parametrize("kernel", ["pil", "opencv"])
@pytest.mark.parametrize("side", [32, 100])
def test_dalis_slices_are_the_threads_pixels(table: SampleTable, kind: str, kernel: Kernel, side: int, code: str) -> None:
    threads = ThreadDecoder(table, kernel, 2)
    dali = DaliDecoder(threads, CPU, batch_size=len(table), num_threads=2)
    boxes = boxes_of(table, kind, side)
    difference = (decoded_by(threads, table, boxes, side).int() - decoded_by(dali, table, boxes, side).int()).abs()
    # A box of a slice has another origin, so its float32 sums round differently: a pixel in a thousand to the other neighbour.
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("side", [32, 64, 224])
def test_a_slice_holds_all_that_its_square_reads(table: SampleTable, side: int) -> None:
    """By the taps of the matrix itself."""
    sizes = table.sizes.numpy()
    for kind in ("crops", "centres", "inner centres", "whole"):
        boxes = boxes_of(table, kind, side)
        starts, shapes = regions(boxes.numpy(), sizes, side)
        assert (starts >= 0).all()
        assert (shapes >= 1).all()
        assert (starts + shapes <= sizes).all()
        for axis in (0, 1):
            for number, (start, shape) in enumerate(zip(starts[:, axis], shapes[:, axis], strict=True)):
                scale = boxes[number : number + 1, axis + 2] / side
                taps = bicubic_taps(side, boxes[number : number + 1, axis], scale, max_scale=float(scale))
                read = (taps.first[0, :, None] + torch.arange(taps.weights.shape[2]))[taps.weights[0] != 0]
                read = read.clamp(0, int(sizes[number, axis]) - 1)
                assert start <= read.min()
                assert read.max() < start + shape


@pytest.mark.parametrize("kind", ["crops", "centres", "inner centres", "whole"])
@pytest.mark.parametrize("side", [32, 96])
def test_the_gpus_graph_makes_the_same_squares_on_a_cpu(table: SampleTable, kind: str, side: int) -> None:
    boxes = boxes_of(table, kind, side).numpy()
    pipe = define_graph(Placement(device_id=None), "resize boxes", batch_size=len(table), num_threads=2)
    pipe.build()
    encoded = [np.frombuffer(data or b"", np.uint8) for data in table.read(np.arange(len(table)))]
    ends = boxes[:, :2] + boxes[:, 2:]
    for _ in range(3):  # as many as its queue is long
        for name, values in (
            ("encoded", encoded),
            ("roi_start", list(boxes[:, :2])),
            ("roi_end", list(ends)),
            ("size", list(np.full_like(ends, side))),
        ):
            pipe.feed_input(name, values)
    pipe.schedule_run()
    squares = torch.from_numpy(pipe.outputs()[0].as_array().copy())
    ours = decoded_by(ThreadDecoder(table, "pil", 2), table, torch.from_numpy(boxes), side)
    difference = (squares.int() - ours.int()).abs()
    # DALI reads its kernel from a table (0.24 on noise), and both round: to whole numbers that differ by one at most.
    assert difference.max() <= 1
    assert difference.float().mean() < 0.2


@pytest.mark.parametrize("batch_size", [1, 5])
def test_pixels_do_not_depend_on_the_batch(table: SampleTable, batch_size: int) -> None:
    threads = ThreadDecoder(table, "pil", 2)
    dali = DaliDecoder(threads, CPU, batch_size=len(table), num_threads=2)
    boxes = boxes_of(table, "crops", 48)
    whole = decoded_by(dali, table, boxes, 48)
    positions = np.arange(len(table))
    for first in range(0, len(table), batch_size):
        job = Job(positions[first : first + batch_size], boxes[first : first + batch_size].numpy(), 48)
        part, bad = dali.finish(job, dali.start(job))
        assert not bad
        assert torch.equal(part, whole[first : first + batch_size])


# ---------------------------------------------------------------------------------------------------------------- single images


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB")]
)
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_one_image_of_every_kind(kind: str, mode: str, orientation: int | None, smooth, encoded) -> None:
    options = {}
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    data = encoded(smooth(4, 23, 37).convert(mode), kind, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode_rgb(memoryview(data), plain=False), expected)
    out = np.empty_like(expected)
    decode_rgb(memoryview(data), plain=False, out=out)
    np.testing.assert_array_equal(out, expected)


LARGER_BUFFERS = [("JPEG", size) for size in [(24, 37), (37, 23), (60, 60)]]


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *LARGER_BUFFERS,
        ("JPEG", (23, 36)),
        ("JPEG", (1, 1)),
        *(("PNG", size) for size in [(24, 37), (37, 23), (60, 60), (1, 1)]),
    ],
)
def test_an_image_of_another_size_than_its_record_is_refused(kind: str, size: tuple[int, int], smooth, encoded) -> None:
    """Or its pixels would be another image's beside them."""
    data = encoded(smooth(4, 23, 37), kind)
    with pytest.raises(Exception):  # noqa: B017, PT011 - the decoder's own, whatever it is
        decode_rgb(memoryview(data), plain=True, out=np.zeros((*size, 3), np.uint8))


# ------------------------------------------------------------------------------------------------------------- extreme shapes

SHAPES = [(1, 3000), (3000, 1), (1, 1), (20_000, 1), (2, 5), (300, 7)]
"""Height and width."""


@pytest.fixture(scope="module")
def extremes(pack_files: Callable[..., Dataset], smooth, encoded) -> Dataset:
    """As JPEG, which DALI decodes in parts, and as PNG."""
    files = {}
    for number, size in enumerate(SHAPES):
        for kind, name in (("JPEG", "jpg"), ("PNG", "png")):
            files |= {f"{split}/{name}/{number}.{name}": encoded(smooth(number, *size), kind) for split in ("train", "val")}
    return pack_files(files)


@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
@pytest.mark.parametrize("crops", [None, (0.25, 1.0)])
@pytest.mark.parametrize("decoder", ["dali", "threads"])
def test_extreme_shapes_give_right_squares(
    extremes: Dataset, upright, crop_fraction: float, crops: Any, decoder: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "threads":
        monkeypatch.setattr(stream, "dali_is_installed", lambda: False)
    table = SampleTable(extremes, "train")
    data, samples, side = Data(extremes, CPU, cache="off"), torch.arange(len(table)), 32
    if crops is None:
        batches = data.batches("train", Preprocess(res=side, crop_fraction=crop_fraction), len(table))
        boxes = centre_boxes(table.sizes, side, crop_fraction)
    else:
        batches = data.batches("train", Preprocess(res=side), len(table), training=Training(augment=Augment(crop_scale=crops)))
        boxes = crop_boxes(table.sizes, crops, RATIO, samples, seed=0, epoch=0)
        samples = epoch_order(len(table), 0, 0)
    ((images, _),) = batches
    truth = upright(extremes, "train")
    for image, sample in zip((255 * images).permute(0, 2, 3, 1).numpy(), samples.tolist(), strict=True):
        pixels, box = truth[sample][0], boxes[sample].tolist()
        np.testing.assert_allclose(image, by_numpy(pixels, box, side), rtol=0, atol=0.51, err_msg=f"{pixels.shape} {box}")


def by_numpy(pixels: np.ndarray, box: list[float], side: int) -> np.ndarray:
    """The definition in float64: Keys' cubic, antialiased, border pixels repeated. 0.5 off after rounding to uint8."""
    result = pixels.astype(np.float64)
    for axis in (0, 1):
        size, scale = pixels.shape[axis], box[axis + 2] / side
        stretch = max(scale, 1)
        matrix = np.zeros((side, size))
        for row in range(side):
            centre = box[axis] + (row + 0.5) * scale - 0.5
            taps = np.arange(np.floor(centre - 2 * stretch), np.ceil(centre + 2 * stretch) + 1)
            x = np.abs(taps - centre) / stretch
            weights = np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * (x**3 - 5 * x**2 + 8 * x - 4), 0))
            np.add.at(matrix[row], np.clip(taps, 0, size - 1).astype(int), weights / weights.sum())
        result = np.moveaxis(np.tensordot(matrix, result, (1, axis)), 0, axis)
    return result.clip(0, 255)


MEMORY = """
import resource, sys
import numpy as np
import torch
from tidali.loading import native
from tidali.loading.order import centre_boxes
from tidali.loading.resample import squares_of

if sys.argv[3] == "torch":
    native.load = lambda: None
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))  # or the machine's memory would be gone before this fails
height, width = int(sys.argv[1]), int(sys.argv[2])
small, out = np.zeros((64, 64, 3), np.uint8), torch.empty(1, 224, 224, 3, dtype=torch.uint8)
squares_of([small], centre_boxes(torch.tensor([[64, 64]]), 224).tolist(), 224, "pil", out)
image = np.zeros((height, width, 3), np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
squares_of([image], centre_boxes(torch.tensor([[height, width]]), 224).tolist(), 224, "pil", out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((1, 1_000_000), "compiled"),
        ((1_000_000, 1), "compiled"),
        ((1, 1_000_000), "torch"),
        ((1_000_000, 1), "torch"),
    ],
)
def test_memory_does_not_grow_with_the_aspect_ratio(shape: tuple[int, int], how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, shape), how],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # 16 bytes a pixel of one row, 15 MiB of a million, are the most that C needs; intermediate images took 14 GB.
    assert int(done.stdout) < 64 * 1024, f"{int(done.stdout) / 1024:.0f} MiB"


@pytest.mark.parametrize("res", [32, 224])
def test_squares_of_single_pixels_and_rows(res: int, code: str) -> None:
    """One colour stays that colour, wherever the box is."""
    for size in ((1, 1), (1, 9), (9, 1), (2, 2)):
        pixels = np.full((*size, 3), (250, 128, 3), np.uint8)
        boxes = [[0.0, 0.0, *map(float, size)], [size[0] - 1.0, 0.0, 1.0, 1.0], [0.25, 0.0, 0.5, 0.5]]
        out = torch.empty(3, res, res, 3, dtype=torch.uint8)
        squares_of([pixels] * 3, boxes, res, "pil", out)
        assert out.flatten(0, 2).unique(dim=0).tolist() == [[250, 128, 3]]
