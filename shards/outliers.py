"""The samples of a split that are most worth a look before training: duplicates, and the ends of what can be measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from shards.sheet import COLUMNS, Cell, Section, stored_cell
from tidali.dataset.contract import Dataset, SampleRecord, Shard, iter_records
from tidali.errors import DatasetError
from tidali.images.stored import stored_image

LOOKED_AT = 20_000
"""At most so many samples, evenly spread, are decoded: 64-pixel ones take seconds then, photographs some minutes."""
_SIDE = 4
"""Of the reduced image whose 4 x 4 colours are compared: enough for layout and light, too coarse for detail."""
_SMALLEST_CLASS = 3
"""Of fewer samples none is unusual."""

Sample = tuple[Shard, SampleRecord]


class Outliers(NamedTuple):
    """What was found."""

    sections: list[Section]
    """For `shards.sheet.draw_sheet`."""
    lines: list[str]
    """A line for each image of the sections: what it is, its file in the source, its class."""
    looked_at: int
    """How many images were decoded."""


def find_outliers(dataset: Dataset, split: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Outliers:
    """The duplicates, and of what can be decoded the eight smallest, largest and darkest images and those that are the most
    unusual for their class: by the distance of their colours, on a grid of 4 x 4, from the mean of the class, in multiples of
    the class's usual distance.

    Raises:
        DatasetError: no such split.
    """
    samples = list(iter_records(dataset, split))
    colours: dict[int, np.ndarray] = {}
    broken = []
    looked_at = range(0, len(samples), -(-len(samples) // LOOKED_AT))
    for done, place in enumerate(looked_at, start=1):
        try:
            image = stored_image(dataset, *samples[place])
            colours[place] = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32)
        except DatasetError:
            broken.append(place)
        progress(done, len(looked_at))
    light = {place: float(grid.mean()) for place, grid in colours.items()}
    by_area = sorted(colours, key=lambda place: samples[place][1].height * samples[place][1].width)
    unusual = _unusual(samples, colours)
    chosen: list[tuple[str, list[tuple[int, str]]]] = [
        ("byte for byte the same", [(place, "duplicate") for place in _duplicates(dataset, samples) if place not in broken]),
        ("smallest", [(place, "") for place in by_area[:COLUMNS]]),
        ("largest", [(place, "") for place in by_area[: -COLUMNS - 1 : -1]]),
        ("darkest", [(place, f"mean {light[place]:.0f} of 255") for place in sorted(light, key=light.__getitem__)[:COLUMNS]]),
        (
            "most unusual colours for their class",
            [
                (place, f"{unusual[place]:.1f} x usual")
                for place in sorted(unusual, key=unusual.__getitem__, reverse=True)[:COLUMNS]
            ],
        ),
    ]
    sections, lines = [], [f"cannot be decoded: {samples[place][1].source}" for place in broken]
    for heading, found in chosen:
        cells = []
        for place, note in found:
            shard, record = samples[place]
            image, (name, size) = stored_cell(dataset, shard, record)
            cells.append(Cell(image, (name, note or size, record.source.rsplit("/", 1)[-1])))
            lines.append(f"{heading}: {record.source} ({name}, {note or size})")
        sections.append(Section(f"{heading}{': none' if not cells else ''}", cells))
    return Outliers(sections, lines, len(looked_at))


def _duplicates(dataset: Dataset, samples: Sequence[Sample]) -> list[int]:
    """Samples with equal bytes, beside each other, those of different classes first; at most two rows of them."""
    alike = defaultdict(list)
    for place, (_, record) in enumerate(samples):
        alike[record.crc32, record.size_bytes].append(place)
    groups = []
    for places in alike.values():
        if len(places) > 1:
            first = dataset.stored_bytes(*samples[places[0]])  # equal checksums are not yet equal bytes
            groups.append([place for place in places if dataset.stored_bytes(*samples[place]) == first])
    groups = [group for group in groups if len(group) > 1]
    groups.sort(key=lambda group: -len({samples[place][1].label for place in group}))
    return [place for group in groups for place in group][: 2 * COLUMNS]


def _unusual(samples: Sequence[Sample], colours: dict[int, np.ndarray]) -> dict[int, float]:
    """Each sample's distance from the mean of its class, divided by the median of its class."""
    of_class = defaultdict(list)
    for place in colours:
        of_class[samples[place][1].label].append(place)
    out: dict[int, float] = {}
    for places in of_class.values():
        grids = np.stack([colours[place] for place in places]).reshape(len(places), -1)
        distances = np.linalg.norm(grids - grids.mean(0), axis=1)
        if len(places) >= _SMALLEST_CLASS:
            usual = max(float(np.median(distances)), 1.0)  # a grey level: a class of equal images has none that is unusual
            out |= dict(zip(places, (distances / usual).tolist(), strict=True))
    return out
