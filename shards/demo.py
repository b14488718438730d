"""The built-in data set: drawn figures, deterministic, learnable, whose classes cannot be told apart by colour alone.

A class is a shape, a texture and, above 50 classes, a hue. Position, size, tilt, colours, background and noise are random, so
that a network has to recognise the figure. Drawn with additions, multiplications and comparisons from raw PCG64 bits alone:
those are the same in every numpy and on every machine, where `sin` or a normal distribution need not be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from shards.items import Item, Items, ItemsBuilder
from shards.pack import PackReport, Progress, pack
from shards.plan import PackSettings
from shards.scan import Scan, fingerprint
from shards.source import Read
from tidali.dataset.contract import ClassName
from tidali.errors import UsageError

EDGE_PX = 64
JPEG_QUALITY = 90  # about 1.9 KB an image, near Tiny-ImageNet's

Drawing = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Each takes coordinates (64, 64) float64 in units of the figure's size and returns the distance from its edge, positive inside.
SHAPES: dict[str, Drawing] = {
    "disc": lambda x, y: 1 - np.sqrt(x * x + y * y),
    "square": lambda x, y: 0.85 - np.maximum(abs(x), abs(y)),
    "triangle": lambda x, y: np.minimum(0.75 - y, 0.5 * y + 0.5 - 0.87 * abs(x)),
    "cross": lambda x, y: np.minimum(1 - np.maximum(abs(x), abs(y)), 0.42 - np.minimum(abs(x), abs(y))),
    "diamond": lambda x, y: 0.75 * (1.1 - abs(x) - abs(y)),
}

# Each returns where the figure's second colour goes: 0..1. No texture is another's mirror image, because training flips images
# at random.
TEXTURES: dict[str, Drawing] = {
    "plain": lambda x, y: np.zeros_like(x),
    "banded": lambda x, y: _every(y, 3),
    "striped": lambda x, y: _every(x, 3),
    "checked": lambda x, y: abs(_every(x, 2) - _every(y, 2)),
    "dotted": lambda x, y: ((x * 3 % 1 - 0.5) ** 2 + (y * 3 % 1 - 0.5) ** 2 < 0.1).astype(np.float64),
    "ringed": lambda x, y: _every(np.sqrt(x * x + y * y), 3),
    "slanted": lambda x, y: _every(x + y, 2),
    "cored": lambda x, y: (x * x + y * y < 0.2).astype(np.float64),
    "gridded": lambda x, y: np.minimum(_every(x, 2), _every(y, 2)),
    "halved": lambda x, y: (y > 0).astype(np.float64),
}

HUES = ("red", "green", "cyan", "violet")
MAX_CLASSES = len(SHAPES) * len(TEXTURES) * len(HUES)
_HUE_JITTER = 0.11  # of the colour circle, to either side: the four do not overlap (0.125 would touch)


def demo_classes(count: int) -> tuple[ClassName, ...]:
    """The first ``count`` classes. The first ten differ in texture, and neighbours in shape too.

    Raises:
        UsageError: fewer than 2 or more than 200.
    """
    if not 2 <= count <= MAX_CLASSES:
        raise UsageError(f"--classes must be from 2 to {MAX_CLASSES}, not {count}")
    classes = []
    for label in range(count):
        shape, texture, hue = _traits(label)
        words = [HUES[hue]] if count > len(SHAPES) * len(TEXTURES) else []
        words += [tuple(TEXTURES)[texture], tuple(SHAPES)[shape]]
        classes.append(ClassName(id=f"{label:03d}-{'-'.join(words)}", name=" ".join(words)))
    return tuple(classes)


def _traits(label: int) -> tuple[int, int, int]:
    """Indices of shape, texture and hue: a different triple for each of the 200 labels."""
    tens, texture = divmod(label, len(TEXTURES))
    return (texture + tens) % len(SHAPES), texture, tens // len(SHAPES)


@dataclass(frozen=True, kw_only=True)
class DemoSource:
    """Splits train and val; val has a fifth of train's images a class, at least five."""

    classes: int = 10
    per_class: int = 250
    seed: int = 0

    def scan(self) -> Scan:
        """
        Raises:
            UsageError: a number out of range.
        """
        if self.per_class < 1:
            raise UsageError(f"--per-class must be at least 1, not {self.per_class}")
        classes = demo_classes(self.classes)
        splits = {
            "train": self._items(classes, "train", self.per_class),
            "val": self._items(classes, "val", max(5, self.per_class // 5)),
        }
        return Scan(
            name="demo",
            layout="demo",
            classes=classes,
            splits=splits,
            left_out={},
            reader=self,
            fingerprint=fingerprint(splits),
        )

    def _items(self, classes: tuple[ClassName, ...], split: str, per_class: int) -> Items:
        first = self.per_class if split == "val" else 0
        items = ItemsBuilder()
        for label, class_ in enumerate(classes):
            for n in range(first, first + per_class):
                items.add(f"{split}/{class_.id}/{n:06d}.jpg", 0, (n,), label)
        return items.build()

    def open(self) -> nullcontext[Read]:
        """Items are drawn when they are read, that is in the packer's workers."""
        return nullcontext(self._read)

    def _read(self, item: Item, limit_bytes: int) -> bytes:
        assert item.label is not None
        rgb = draw(self.seed, item.label, item.where[0])
        return simplejpeg.encode_jpeg(rgb, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")


def draw(seed: int, label: int, index: int) -> np.ndarray:
    """Image ``index`` of class ``label``: (64, 64, 3) uint8, RGB."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, label, index]))
    shape, texture, hue = _traits(label)
    u = (bits.random_raw(22) >> 11) * 2.0**-53  # uniform in [0, 1)
    x, y = _figure_coordinates(u[0:4])
    first = _colour(hue / len(HUES) + (2 * u[4] - 1) * _HUE_JITTER, 0.6 + 0.4 * u[5], 0.65 + 0.35 * u[6])
    second = first * (0.25 + 0.3 * u[7]) + (1 - first) * 0.15 * u[8]
    pattern = tuple(TEXTURES.values())[texture](x, y)
    cover = np.clip(8 * tuple(SHAPES.values())[shape](x, y) + 0.5, 0, 1)  # the edge is an eighth of the size: two pixels
    image = _background(u[9:20])
    image += (first[:, None, None] + (second - first)[:, None, None] * pattern - image) * cover
    image *= 0.7 + 0.45 * u[20]
    noise = bits.random_raw(3 * EDGE_PX * EDGE_PX // 8).view(np.uint8).reshape(3, EDGE_PX, EDGE_PX)
    image += (noise - 127.5) * ((0.04 + 0.1 * u[21]) / 255)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0).copy()


def _every(distance: np.ndarray, pairs: float) -> np.ndarray:
    """0 and 1 by turns, ``pairs`` times each in a unit of distance."""
    return np.floor(distance * (2 * pairs)) % 2


def _figure_coordinates(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (64, 64) in the figure's own frame, for four uniform numbers: place, size, tilt."""
    grid = (np.arange(EDGE_PX) + 0.5) / EDGE_PX * 2 - 1
    size = 0.55 + 0.3 * u[2]
    reach = 1 - 0.8 * size  # the figure may hang over the border by a fifth of its size
    dx = (grid - (2 * u[0] - 1) * reach)[None, :] / size
    dy = (grid - (2 * u[1] - 1) * reach)[:, None] / size
    t = (2 * u[3] - 1) * 0.13  # half the tilt's tangent: up to 15 degrees, by the rational form of cosine and sine
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return cos * dx + sin * dy, cos * dy - sin * dx


def _background(u: np.ndarray) -> np.ndarray:
    """A smooth blend of two random colours and a distracting block, (3, 64, 64) in 0..1."""
    one, two = _colour(u[0], 0.5 * u[1], 0.25 + 0.6 * u[2]), _colour(u[3], 0.5 * u[4], 0.25 + 0.6 * u[5])
    slope = (np.arange(EDGE_PX) + 0.5) / EDGE_PX - 0.5
    blend = 0.5 + (u[6] - 0.5) * slope[None, :] + (u[7] - 0.5) * slope[:, None]
    image = one[:, None, None] + (two - one)[:, None, None] * (2 * blend - 0.5)
    left, top = int(u[8] * 48), int(u[9] * 48)
    image[:, top : top + 16, left : left + 16] *= 0.6 + 0.8 * u[10]
    return image


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV to RGB (3,) in 0..1; the hue is taken modulo 1."""
    k = (np.array([5.0, 3.0, 1.0]) + hue % 1 * 6) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def pack_demo(
    dest: str | Path,
    *,
    classes: int = 10,
    per_class: int = 250,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Draw and pack the demo. The same arguments give the same bytes; a second call keeps correct shards.

    Raises:
        UsageError: a number out of range, or a ``dest`` that contains something else.
        TidaliError: writing failed.
    """
    source = DemoSource(classes=classes, per_class=per_class, seed=seed)
    return pack(source, dest, PackSettings(seed=seed), workers=workers, overwrite=overwrite, progress=progress)
