"""Resampling against PIL, torch and DALI. Differences are in grey levels, 0..255."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional

from tidali.config import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from tidali.doctor.parity import COMPARISONS, RESOLUTIONS, Row, matrix, parity_table, photographs, torch_bicubic
from tidali.loading import native
from tidali.loading.bicubic import CUBIC_A, centre_crop
from tidali.loading.resample import Resample, squares_of

GREY_LEVELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}


@pytest.fixture(scope="module", autouse=True, params=["torch", "compiled"])
def products(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds with torch's products and, where there is a compiler, with the C code."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "load", lambda: None)
        elif native.load() is None:
            pytest.skip("no C compiler")
        yield


def noise(n: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def assert_within(actual: torch.Tensor, expected: torch.Tensor, largest: float, mean: float | None = None) -> None:
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).abs()
    found = f"largest difference {difference.max():.3f}, mean {difference.mean():.4f}"
    assert difference.max() <= largest, found
    assert mean is None or difference.mean() <= mean, found


# ----------------------------------------------------------------------------------------------------------------------- torch

# Both sides are float32 sums of at most a hundred products below 255, in another order.
FLOAT32_LEVELS = 0.01


@settings(max_examples=40)
@given(st.integers(2, 90), st.integers(1, 100))
def test_the_plain_opencv_kernel_is_torchs(size: int, res: int):
    pixels = noise(2, size, size)
    assert_within(
        matrix(pixels, res, kernel="opencv", antialias=False), torch_bicubic(pixels, res, antialias=False), FLOAT32_LEVELS
    )


@settings(max_examples=40)
@given(st.integers(30, 90), st.integers(20, 100))
def test_the_antialiased_pil_kernel_is_torchs_away_from_the_border(size: int, res: int):
    pixels = noise(2, size, size)
    # The kernel reaches two source pixels, or two output pixels where there are fewer of those, and torch leaves out what lies
    # beyond the border. One more for the rounding of the window's ends.
    border = int(2 * max(res / size, 1)) + 2
    inner = (..., slice(border, -border), slice(border, -border))
    assert_within(matrix(pixels, res)[inner], torch_bicubic(pixels, res, antialias=True)[inner], FLOAT32_LEVELS)


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 100), st.integers(0, 255))
@settings(max_examples=40)
def test_one_colour_stays_that_colour(height: int, width: int, res: int, level: int):
    pixels = torch.full((1, height, width, 3), level, dtype=torch.uint8)
    assert_within(
        Resample((height, width), Preprocess(res=res, **GREY_LEVELS))(pixels),
        torch.full((1, 3, res, res), float(level)),
        FLOAT32_LEVELS,
    )


def test_normalisation_and_clamping():
    pixels = photographs(4)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    images = Resample((64, 64), Preprocess(res=128, mean=IMAGENET_MEAN, std=IMAGENET_STD))(pixels)
    expected = functional.interpolate(pixels.permute(0, 3, 1, 2).float(), (128, 128), mode="bicubic", antialias=True)
    overshoot = (expected < 0) | (expected > 255)
    assert overshoot.any()  # else the clamp would not be seen
    inner = (..., slice(4, -4), slice(4, -4))
    assert_within((images * std + mean)[inner] * 255, expected.clamp(0, 255)[inner], FLOAT32_LEVELS)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_boxes_of_the_whole_image_are_the_default():
    pixels = photographs(3)
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0]]).expand(3, -1)
    resample = Resample((64, 64), Preprocess(res=96, **GREY_LEVELS))
    assert_within(resample(pixels, boxes), resample(pixels), FLOAT32_LEVELS)


def test_an_unscaled_box_is_a_crop():
    pixels, boxes = noise(3, 20, 30), torch.tensor([[0.0, 0, 16, 16], [4, 14, 16, 16], [3, 5, 16, 16]])
    crops = Resample((20, 30), Preprocess(res=16, **GREY_LEVELS))(pixels, boxes)
    for crop, image, (top, left, *_) in zip(crops, pixels, boxes.int().tolist(), strict=True):
        assert_within(crop, image[top : top + 16, left : left + 16].permute(2, 0, 1), FLOAT32_LEVELS)


def test_a_box_is_resized_as_torch_resizes_the_crop_away_from_its_border():
    pixels, boxes = noise(2, 40, 50), torch.tensor([[3.0, 7, 20, 33], [0, 0, 38, 50]])
    images = Resample((40, 50), Preprocess(res=48, **GREY_LEVELS))(pixels, boxes)
    for image, source, (top, left, height, width) in zip(images, pixels, boxes.int().tolist(), strict=True):
        crop = source[None, top : top + height, left : left + width].permute(0, 3, 1, 2).float()
        expected = functional.interpolate(crop, (48, 48), mode="bicubic", antialias=True).clamp(0, 255)[0]
        # Two source pixels are 4.8 output pixels here; inside the box only, since outside it other pixels count.
        assert_within(image[:, 6:-6, 6:-6], expected[:, 6:-6, 6:-6], FLOAT32_LEVELS)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        (torch.bfloat16, 0.5),  # 0.46: half a unit in the last of 8 bits, below 4 standard deviations
        (torch.float16, 0.1),  # 0.06: the same of 11 bits
    ],
)
def test_half_precision_costs_less_than_a_grey_level(dtype: torch.dtype, largest: float):
    pixels = photographs(4)
    normalisation: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    exact = Resample((64, 64), Preprocess(res=224, **normalisation))(pixels)
    images = Resample((64, 64), Preprocess(res=224, **normalisation), dtype=dtype)(pixels)
    assert images.dtype == dtype
    scale = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert_within(images.float() * scale, exact * scale, largest)


def test_an_autocast_around_it_changes_nothing():
    pixels = photographs(1)
    resample = Resample((64, 64), Preprocess(res=96, **GREY_LEVELS))
    expected = resample(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resample(pixels), expected)


def test_pixels_of_another_size_are_refused():
    with pytest.raises(ValueError, match="made for"):
        Resample((64, 64), Preprocess(res=96, **GREY_LEVELS))(noise(1, 32, 64))


# ------------------------------------------------------------------------------------------------------------------------ DALI


@pytest.fixture(scope="module")
def table() -> list[Row]:
    pytest.importorskip("nvidia.dali")
    return parity_table()


def test_the_parity_table_holds(table: list[Row]):
    assert len(table) == len(COMPARISONS) * len(RESOLUTIONS)
    failed = [row for row in table if not row.within_tolerance]
    assert not failed


def test_the_parity_table_can_tell_kernels_apart(table: list[Row]):
    largest = {row.comparison.route: row.largest for row in table if row.res == 224 and row.comparison.against == "DALI"}
    assert largest["torch plain"] > 5 > largest["matrix"]


def run_dali(pixels: torch.Tensor, graph: Any, *inputs: NDArray[np.float32]) -> torch.Tensor:
    """A DALI CPU graph over decoded images: (N, 3, H, W)."""
    dali = pytest.importorskip("nvidia.dali")

    @dali.pipeline_def(batch_size=len(pixels), num_threads=2, device_id=None)
    def define() -> Any:
        images = dali.fn.external_source(repeat(list(pixels.numpy())), batch=True, layout="HWC")
        return graph(dali, images, *(dali.fn.external_source(repeat(list(values)), batch=True) for values in inputs))

    pipe = define()
    pipe.build()
    return torch.from_numpy(pipe.run()[0].as_array().copy()).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(50, 71), (71, 50), (40, 64), (48, 49), (33, 64), (300, 401)])
@pytest.mark.parametrize("res", [32, 65, 224])
def test_the_centre_crop_is_dalis(size: tuple[int, int], res: int):
    pixels = noise(2, *size)

    def graph(dali: Any, images: Any) -> Any:
        resized = dali.fn.resize(images, resize_shorter=res, interp_type=dali.types.INTERP_CUBIC, antialias=True)
        return dali.fn.crop(resized, crop=(res, res))

    # 0.5 for DALI's rounding to uint8, the rest for its kernel, which it interpolates in a table: at most 0.24 on noise.
    assert_within(Resample(size, Preprocess(res=res, **GREY_LEVELS))(pixels), run_dali(pixels, graph), 0.8, 0.3)


# ------------------------------------------------------------------------------------------------------- squares of any images


def squares(pixels: torch.Tensor, boxes: list[list[float]], res: int, kernel: Any = "pil") -> torch.Tensor:
    """(n, 3, res, res), rounded grey levels."""
    out = torch.empty(len(boxes), res, res, 3, dtype=torch.uint8)
    squares_of([image.numpy() for image in pixels], boxes, res, kernel, out)
    return out.permute(0, 3, 1, 2)


@settings(max_examples=40)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 100),
    st.sampled_from(sorted(CUBIC_A)),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_squares_are_what_resampling_makes_of_boxes(height: int, width: int, res: int, kernel: Any, place: list[float]):
    """Of noise, which shows every tap; boxes begin and end anywhere."""
    box = [place[0] * (height - 1), place[1] * (width - 1)]
    box += [max(place[2] * (height - box[0]), 0.5), max(place[3] * (width - box[1]), 0.5)]
    pixels = noise(1, height, width)
    exact = Resample((height, width), Preprocess(res=res, kernel=kernel, **GREY_LEVELS))(pixels, torch.tensor([box]))
    # Rounded to uint8, and of sums in another order; a tap more or less where a float32 edge is a whole number has no weight.
    assert_within(squares(pixels, [box], res, kernel), exact, 0.5 + 2 * FLOAT32_LEVELS)


@pytest.mark.parametrize("res", [24, 64, 96])
def test_boxes_and_squares_are_dalis_regions(res: int):
    pixels = noise(6, 40, 56)
    boxes = torch.tensor([[0.0, 0, 40, 56], [5, 9, 30, 20], [0, 40, 12, 16], [28, 0, 12, 50], [1, 2, 38, 52], [10, 10, 20, 20]])

    def graph(dali: Any, images: Any, start: Any, end: Any) -> Any:
        return dali.fn.resize(
            images, size=(res, res), roi_start=start, roi_end=end, interp_type=dali.types.INTERP_CUBIC, antialias=True
        )

    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    expected = run_dali(pixels, graph, start.numpy(), end.numpy())
    assert_within(Resample((40, 56), Preprocess(res=res, **GREY_LEVELS))(pixels, boxes), expected, 0.8, 0.3)
    # Squares are rounded as DALI's are; its kernel is at most 0.24 off on noise.
    assert_within(squares(pixels, boxes.tolist(), res), expected, 1)


def test_squares_of_images_of_several_sizes_are_each_ones_own():
    images = [noise(1, height, width)[0].numpy() for height, width in ((40, 56), (3, 200), (91, 17), (1, 1))]
    boxes = [[1.0, 2, 30, 40], [0, 50, 3, 60], [10, 0, 60, 17], [0, 0, 1, 1]]
    together = torch.empty(4, 48, 48, 3, dtype=torch.uint8)
    squares_of(images, boxes, 48, "pil", together)
    for image, box, square in zip(images, boxes, together, strict=True):
        alone = torch.empty(1, 48, 48, 3, dtype=torch.uint8)
        squares_of([image], [box], 48, "pil", alone)
        assert torch.equal(alone[0], square)


# ------------------------------------------------------------------------------------------------------------ the crop fraction


@pytest.mark.parametrize("crop_fraction", [1.0, 0.875, 0.5])
@pytest.mark.parametrize("size", [(64, 64), (50, 71), (300, 401), (33, 64)])
def test_the_crop_fraction_is_a_box_around_the_centre(size: tuple[int, int], crop_fraction: float):
    pixels, res = noise(2, *size), 56
    axes = [centre_crop(size, res, axis, crop_fraction) for axis in (0, 1)]
    boxes = torch.tensor([[axes[0][0], axes[1][0], res * axes[0][1], res * axes[1][1]]]).expand(2, -1)
    inside = Resample(size, Preprocess(res=res, crop_fraction=crop_fraction, **GREY_LEVELS))(pixels)
    assert_within(inside, Resample(size, Preprocess(res=res, **GREY_LEVELS))(pixels, boxes), FLOAT32_LEVELS)
    # And what resizing to res / crop_fraction and cropping the centre gives, where that is a whole number of pixels.
    resized = res / crop_fraction
    if size[0] == size[1] and resized == int(resized) and (int(resized) - res) % 2 == 0:
        margin = (int(resized) - res) // 2
        whole = Resample(size, Preprocess(res=int(resized), **GREY_LEVELS))(pixels)
        assert_within(inside, whole[:, :, margin : margin + res, margin : margin + res], FLOAT32_LEVELS)


@pytest.mark.parametrize("res", [32, 56])
def test_the_crop_fraction_is_dalis_resize_and_crop(res: int):
    size, resized = (70, 91), round(res / 0.875)

    def graph(dali: Any, images: Any) -> Any:
        shorter = dali.fn.resize(images, resize_shorter=resized, interp_type=dali.types.INTERP_CUBIC, antialias=True)
        return dali.fn.crop(shorter, crop=(res, res))

    pixels = noise(2, *size)
    inside = Resample(size, Preprocess(res=res, crop_fraction=res / resized, **GREY_LEVELS))(pixels)
    # As for the whole centre: rounding to uint8 and DALI's table. Its crop may begin half a pixel of the output elsewhere.
    assert_within(inside, run_dali(pixels, graph), 0.8, 0.3)


# ----------------------------------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("res", [20, 33])
def test_colour_is_each_samples_matrix_in_float64(dtype: torch.dtype, boxed: bool, res: int):
    """Against the resampled pixels of every sample times its matrix, then normalised and clamped; noise, and any matrices."""
    generator = torch.Generator().manual_seed(3)
    pixels = noise(5, 20, 20)
    colour = torch.eye(3, 4) + 0.4 * torch.randn(5, 3, 4, generator=generator)
    boxes = torch.tensor([[1.0, 2, 17, 15], [0, 0, 20, 20], [5, 5, 8, 8], [3, 0, 12, 20], [0, 9, 20, 11]]) if boxed else None
    mean, std = torch.tensor(IMAGENET_MEAN).double(), torch.tensor(IMAGENET_STD).double()
    # Without a clamp in between: the cubic's overshoot is coloured too. A scale that keeps it inside, taken back.
    squeezed = Resample((20, 20), Preprocess(res=res, mean=(0.0,) * 3, std=(1.0,) * 3))
    plain = unclamped(squeezed, pixels, boxes).double() / 255
    changed = torch.einsum("nij,njhw->nihw", colour[:, :, :3].double(), plain) + colour[:, :, 3, None, None].double()
    expected = (changed.clamp(0, 1) - mean[:, None, None]) / std[:, None, None]
    images = Resample((20, 20), Preprocess(res=res, mean=IMAGENET_MEAN, std=IMAGENET_STD), dtype=dtype)(pixels, boxes, colour)
    assert images.dtype == dtype
    # float32: hundreds of terms up to 10, in another order. Half precision: half a unit in the last place of numbers up to 2.7.
    bound = {torch.float32: 1e-4, torch.bfloat16: 2**-7 + 1e-4, torch.float16: 2**-10 + 1e-4}[dtype]
    assert (images.double() - expected).abs().max() <= bound


def unclamped(resample: Resample, pixels: torch.Tensor, boxes: torch.Tensor | None) -> torch.Tensor:
    """0..255, and what the cubic overshoots: by half the scale about the middle grey, so that the clamp does not meet it."""
    half = torch.cat((0.5 * torch.eye(3), torch.full((3, 1), 0.25)), 1).expand(len(pixels), 3, 4)
    return 255 * (2 * resample(pixels, boxes, half) - 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("res", [20, 33])
def test_one_matrix_for_all_is_that_of_each(dtype: torch.dtype, res: int):
    """The matrix that changes nothing, given for each sample: the shared normalisation's pixels."""
    pixels = noise(5, 20, 20)
    resample = Resample((20, 20), Preprocess(res=res, mean=IMAGENET_MEAN, std=IMAGENET_STD), dtype=dtype)
    same = torch.eye(3, 4).expand(5, 3, 4)
    difference = (resample(pixels, None, same).float() - resample(pixels).float()).abs().max()
    assert difference <= (1e-5 if dtype == torch.float32 else 2**-7)
