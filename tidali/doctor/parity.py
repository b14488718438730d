"""How far different ways of resizing pixels to network input are apart, in grey levels of 0..255.

``tidali doctor`` prints these differences, and the tests hold them below the tolerances here.

The reference is the DALI graph on a CPU. It gets the images as PNG, so that every route sees the same pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tidali.config import IMAGENET_MEAN, IMAGENET_STD, Kernel, Preprocess
from tidali.loading.resample import Resample

RESOLUTIONS = (32, 64, 128, 224)
_GREY_LEVELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # a normalisation that leaves pixels at 0..255

Route = Callable[[Tensor, int], Tensor]
"""(N, S, S, 3) uint8 pixels and a resolution -> (N, 3, res, res) float32, in grey levels 0..255."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two routes that should agree, and their tolerances on photographs, in grey levels."""

    route: str
    against: str = "DALI"
    largest_allowed: float
    mean_allowed: float
    reason: str
    """Why the tolerances are what they are."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of a comparison at one resolution."""

    comparison: Comparison
    res: int
    """In pixels."""
    largest: float
    """Largest difference of any channel of any pixel, in grey levels."""
    mean: float

    @property
    def within_tolerance(self) -> bool:
        return self.largest <= self.comparison.largest_allowed and self.mean <= self.comparison.mean_allowed


def dali(pixels: Tensor, res: int) -> Tensor:
    """The graph that decodes and resizes a GPU's stream, run on the CPU."""
    from tidali.loading.dali import QUEUE_DEPTH, Placement, define_graph

    pipe = define_graph(Placement(device_id=None), "resize boxes", batch_size=len(pixels), num_threads=2)
    pipe.build()
    start, end = np.zeros(2, np.float32), np.array(pixels.shape[1:3], np.float32)
    inputs = {"roi_start": start, "roi_end": end, "size": np.array([res, res], np.float32)}
    for _ in range(QUEUE_DEPTH):  # as many as the first run is
        pipe.feed_input("encoded", [_png(image) for image in pixels.numpy()])
        for name, value in inputs.items():
            pipe.feed_input(name, [value] * len(pixels))
    pipe.schedule_run()
    return torch.from_numpy(pipe.outputs()[0].as_array().copy()).permute(0, 3, 1, 2).float()


def pil(pixels: Tensor, res: int) -> Tensor:
    resized = [np.asarray(Image.fromarray(image).resize((res, res), Image.Resampling.BICUBIC)) for image in pixels.numpy()]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float()


def torch_bicubic(pixels: Tensor, res: int, *, antialias: bool) -> Tensor:
    images = functional.interpolate(pixels.permute(0, 3, 1, 2).float(), (res, res), mode="bicubic", antialias=antialias)
    return images.clamp(0, 255)


def matrix(pixels: Tensor, res: int, *, kernel: Kernel = "pil", antialias: bool = True) -> Tensor:
    preprocess = Preprocess(res=res, kernel=kernel, **_GREY_LEVELS)
    return Resample((pixels.shape[1], pixels.shape[2]), preprocess, antialias=antialias)(pixels)


def matrix_bfloat16(pixels: Tensor, res: int) -> Tensor:
    """As a network sees it: normalised with ImageNet's constants, then rounded to bfloat16."""
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    size = (pixels.shape[1], pixels.shape[2])
    images = Resample(size, Preprocess(res=res, mean=IMAGENET_MEAN, std=IMAGENET_STD), dtype=torch.bfloat16)(pixels)
    return 255 * (images.float() * std + mean)


ROUTES: dict[str, Route] = {
    "DALI": dali,
    "PIL": pil,
    "torch antialiased": partial(torch_bicubic, antialias=True),
    "torch plain": partial(torch_bicubic, antialias=False),
    "matrix": matrix,
    "matrix, a = -0.75": partial(matrix, kernel="opencv", antialias=False),
    "matrix, bfloat16": matrix_bfloat16,
}

COMPARISONS = (
    Comparison(
        route="matrix",
        largest_allowed=1.0,
        mean_allowed=0.3,
        reason="DALI rounds to uint8 (0.5 at most, 0.25 on average) and reads its kernel from a table (0.2)",
    ),
    Comparison(
        route="matrix, bfloat16",
        largest_allowed=1.5,
        mean_allowed=0.3,
        reason="as without bfloat16, and 8 bits of a normalised pixel are 0.46 grey levels at most",
    ),
    Comparison(
        route="PIL",
        largest_allowed=16.0,
        mean_allowed=0.5,
        reason="PIL clamps to uint8 between its two passes, and drops the taps beyond the border where DALI repeats the border",
    ),
    Comparison(
        route="torch antialiased",
        largest_allowed=12.0,
        mean_allowed=0.5,
        reason="torch drops the taps beyond the border where DALI repeats the border; 8 pixels inside, they differ by 1",
    ),
    Comparison(
        route="matrix, a = -0.75",
        against="torch plain",
        largest_allowed=0.01,
        mean_allowed=0.01,
        reason="the same kernel and border, in float32: only the order of the sums differs",
    ),
    Comparison(
        route="torch plain",
        largest_allowed=100.0,
        mean_allowed=16.0,
        reason="another kernel (a = -0.75), and not antialiased: shown because it is so large; do not mix the two",
    ),
)


def photographs(count: int = 8, size: int = 64, seed: int = 0) -> Tensor:
    """Random images with the spectrum of photographs (amplitude 1/f), and enough contrast that some pixels are clipped.

    Returns:
        (count, size, size, 3) uint8.
    """
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 3, size, size)))
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None, :]).clamp(min=1 / size)
    images = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(size, size))
    images = 128 + 60 * images / images.std(dim=(2, 3), keepdim=True)
    return images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def parity_table(pixels: Tensor | None = None, resolutions: Sequence[int] = RESOLUTIONS) -> list[Row]:
    """The results of every comparison at every resolution.

    Args:
        pixels: (N, S, S, 3) uint8; `photographs` by default, which the tolerances are for. Noise differs by more.
    """
    pixels = photographs() if pixels is None else pixels
    rows = []
    for res in resolutions:
        images = {name: route(pixels, res) for name, route in ROUTES.items()}
        for comparison in COMPARISONS:
            difference = (images[comparison.route] - images[comparison.against]).abs()
            rows.append(Row(comparison=comparison, res=res, largest=difference.max().item(), mean=difference.mean().item()))
    return rows


def _png(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return np.frombuffer(file.getvalue(), np.uint8)
