"""What the contact sheets of ``tidali info --sheet`` show."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from tidali.config import Recipe
from tidali.console import progress_bar, say
from tidali.dataset.contract import Dataset
from tidali.errors import counted
from tidali.files import write_atomically

if TYPE_CHECKING:
    from shards.sheet import Section


def write_sheet(path: Path, sections: list[Section]) -> None:
    """
    Raises:
        TidaliError: the file cannot be written.
    """
    from shards.sheet import draw_sheet

    png = io.BytesIO()
    draw_sheet(sections).save(png, format="PNG")
    write_atomically(path, png.getvalue())
    say(f"wrote {path}")


def random_samples(dataset: Dataset, split: str, seed: int) -> list[Section]:
    """Those that training with this seed takes first."""
    from shards.sheet import SHEET_IMAGES, Section, stored_cells
    from tidali.loading.order import epoch_order

    samples = dataset.split(split).samples
    positions = epoch_order(samples, seed, 0)[:SHEET_IMAGES].tolist()
    heading = f"{counted(len(positions), 'random sample')} of {split}, of {samples:,}, as stored; seed {seed}"
    return [Section(heading, stored_cells(dataset, split, positions))]


def before_and_after(dataset: Dataset, split: str, recipe: Recipe, res: int, seed: int) -> list[Section]:
    """The first of the same samples, each as stored and beside it as trained on."""
    from shards.sheet import SHEET_IMAGES, Cell, Section, stored_cells
    from tidali.loading.preview import seen_images

    seen = seen_images(dataset, split, recipe, res=res, count=SHEET_IMAGES // 2, seed=seed)
    stored = stored_cells(dataset, split, [one.position for one in seen])
    pairs = [
        (before, Cell(one.image, (one.caption, f"{res} wide, {res} high"))) for before, one in zip(stored, seen, strict=True)
    ]
    heading = f"{split}: as stored, and to its right as trained on: recipe {recipe.name}, {res} px, epoch 1, seed {seed}"
    return [Section(heading, [cell for pair in pairs for cell in pair])]


def odd_samples(dataset: Dataset, split: str) -> list[Section]:
    """Duplicates and the ends of what can be measured; their files are printed."""
    from shards.outliers import find_outliers

    with progress_bar() as bar:
        task = bar.add_task("looking at images", total=None)
        found = find_outliers(dataset, split, lambda done, total: bar.update(task, completed=done, total=total))
    for line in found.lines:
        say(line)
    if found.looked_at < (samples := dataset.split(split).samples):
        say(f"looked at {found.looked_at:,} of {counted(samples, 'image')}, evenly spread; for duplicates at all")
    return found.sections
