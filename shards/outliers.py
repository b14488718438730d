"""The samples of a split that are most worth a look before training: duplicates, and the ends of what can be measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from shards.sheet import COLUMNS, Cell, Section, stored_cell
from tidali.dataset.contract import Dataset, SampleRecord, Shard, iter_records
from tidali.errors import DatasetError, counted
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
    """The duplicates, in other splits too, and of what can be decoded the eight smallest, largest and darkest images and those
    that are the most unusual for their class: by the distance of their colours, on a grid of 4 x 4, from the mean of the class,
    in multiples of the class's usual distance.

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
    area = {place: samples[place][1].height * samples[place][1].width for place in colours}
    by_area = sorted(area, key=area.__getitem__)
    sizes = [
        ("smallest", [(samples[place], "") for place in by_area[:COLUMNS]]),
        ("largest", [(samples[place], "") for place in by_area[: -COLUMNS - 1 : -1]]),
    ]
    unusual = _unusual(samples, colours)
    by_light, by_distance = sorted(light, key=light.__getitem__), sorted(unusual, key=unusual.__getitem__, reverse=True)
    unreadable = {samples[place][1].crc32 for place in broken}
    groups = [group for group in _duplicates(dataset, split, samples) if group[0][1][1].crc32 not in unreadable]
    across, within = ([group for group in groups if (len({name for name, _ in group}) > 1) == many] for many in (True, False))
    chosen: list[tuple[str, list[tuple[Sample, str]]]] = [
        (f"byte for byte the same in {split} and another split", _first_of(across)),
        ("byte for byte the same", _first_of(within)),
        *(sizes if len(set(area.values())) > 1 else ()),
        ("darkest", [(samples[place], f"mean {light[place]:.0f} of 255") for place in by_light[:COLUMNS]]),
        (
            "most unusual colours for their class",
            [(samples[place], f"{unusual[place]:.1f} x usual") for place in by_distance[:COLUMNS]],
        ),
    ]
    sections, lines = [], [f"cannot be decoded: {samples[place][1].source}" for place in broken]
    if across:
        of_split = sum(name == split for group in across for name, _ in group)
        lines.append(f"{counted(of_split, 'image')} of {split} {'is' if of_split == 1 else 'are'} in another split too")
    for heading, found in chosen:
        cells = []
        for (shard, record), note in found:
            image, (name, size) = stored_cell(dataset, shard, record)
            cells.append(Cell(image, (name, note or size, record.source.rsplit("/", 1)[-1])))
            lines.append(f"{heading}: {record.source} ({name}, {note or size})")
        sections.append(Section(f"{heading}{': none' if not cells else ''}", cells))
    return Outliers(sections, lines, len(looked_at))


def _duplicates(dataset: Dataset, split: str, samples: Sequence[Sample]) -> list[list[tuple[str, Sample]]]:
    """Groups of samples with equal bytes, each with the name of its split, the first of the given one. Those of different
    classes come first.

    Args:
        samples: of the given split.
    """
    alike: defaultdict[tuple[int, int], list[tuple[str, Sample]]] = defaultdict(list)
    for name in (split, *(other for other in dataset.manifest.splits if other != split)):
        for sample in samples if name == split else iter_records(dataset, name):
            key = sample[1].crc32, sample[1].size_bytes
            if name == split or key in alike:
                alike[key].append((name, sample))
    groups = []
    for found in alike.values():
        if len(found) > 1:
            first = dataset.stored_bytes(*found[0][1])  # equal checksums are not yet equal bytes
            groups.append([one for one in found if dataset.stored_bytes(*one[1]) == first])
    groups = [group for group in groups if len(group) > 1]
    return sorted(groups, key=lambda group: -len({record.label for _, (_, record) in group}))


def _first_of(groups: Sequence[Sequence[tuple[str, Sample]]]) -> list[tuple[Sample, str]]:
    """Of each group one for each of its splits and classes, or two, beside each other; as many as fill two rows."""
    shown = []
    for group in groups:
        differing = {(name, sample[1].label): (name, sample) for name, sample in reversed(group)}
        some = list(differing.values())[::-1] if len(differing) > 1 else group[:2]
        shown += [(sample, f"one of {len(group)}, {name}") for name, sample in some]
    return shown[: 2 * COLUMNS]


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
