"""Contact sheets: samples of a split with their class names, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from tidali.dataset.contract import Dataset, SampleRecord, Shard, iter_records
from tidali.images.stored import stored_image

COLUMNS = 8
SHEET_IMAGES = 6 * COLUMNS
_CELL_PX, _LINE_PX, _GAP_PX = 128, 16, 6
_FONT_PX = 12
"""PIL's built-in font leaves no room between words in smaller sizes."""


class Cell(NamedTuple):
    """An image and the lines below it."""

    image: Image.Image
    lines: tuple[str, ...]


class Section(NamedTuple):
    """A heading and the cells below it, in rows of eight."""

    heading: str
    cells: Sequence[Cell]


def stored_cells(dataset: Dataset, split: str, positions: Sequence[int]) -> list[Cell]:
    """Samples of a split, upright, with their class's name and their size.

    Args:
        positions: in the split's stored order.

    Raises:
        DatasetError: no such split, or a sample that does not decode.
    """
    wanted = set(positions)
    found = {place: pair for place, pair in enumerate(iter_records(dataset, split)) if place in wanted}
    return [stored_cell(dataset, *found[place]) for place in positions]


def stored_cell(dataset: Dataset, shard: Shard, record: SampleRecord) -> Cell:
    """
    Raises:
        DatasetError: the sample does not decode.
    """
    name = dataset.manifest.classes[record.label].name if record.label is not None else record.key
    return Cell(stored_image(dataset, shard, record), (name, f"{record.width} wide, {record.height} high"))


def draw_sheet(sections: Sequence[Section]) -> Image.Image:
    """An RGB image. Each cell's image is enlarged or reduced to fit."""
    font = ImageFont.load_default(_FONT_PX)
    heights = [max((len(cell.lines) for cell in section.cells), default=0) for section in sections]  # of captions, in lines
    steps_y = [_CELL_PX + lines * _LINE_PX + _GAP_PX for lines in heights]
    rows = [-(-len(section.cells) // COLUMNS) for section in sections]
    columns = max((min(len(section.cells), COLUMNS) for section in sections), default=1)
    heading_px = _LINE_PX + _GAP_PX
    widest = max(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(_ascii(one.heading), font) for one in sections)
    width = max(columns * (_CELL_PX + _GAP_PX) + _GAP_PX, int(widest) + 2 * _GAP_PX)
    height = sum(heading_px + count * step for count, step in zip(rows, steps_y, strict=True)) + _GAP_PX
    sheet = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(sheet), _GAP_PX
    for section, step_y, count in zip(sections, steps_y, rows, strict=True):
        draw.text((_GAP_PX, y), _ascii(section.heading), "black", font)
        y += heading_px
        for place, cell in enumerate(section.cells):
            left, top = _GAP_PX + place % COLUMNS * (_CELL_PX + _GAP_PX), y + place // COLUMNS * step_y
            image = ImageOps.contain(cell.image, (_CELL_PX, _CELL_PX))
            sheet.paste(image, (left + (_CELL_PX - image.width) // 2, top + (_CELL_PX - image.height) // 2))
            for number, line in enumerate(cell.lines):
                text = shown = _ascii(line)
                while len(text) > 1 and draw.textlength(shown, font) > _CELL_PX:
                    text = text[:-1]
                    shown = f"{text}..."
                draw.text((left, top + _CELL_PX + number * _LINE_PX), shown, "black" if number == 0 else "#555555", font)
        y += count * step_y
    return sheet


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()  # PIL's built-in font has only these characters
