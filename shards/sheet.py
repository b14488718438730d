"""A contact sheet: random samples of a split with their class names."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from tidali.dataset.contract import Dataset, SampleRecord, Shard, iter_records
from tidali.images.stored import stored_image

_COLUMNS = 8
SHEET_IMAGES = 6 * _COLUMNS
_CELL_PX, _CAPTION_PX, _GAP_PX = 128, 14, 6


def contact_sheet(dataset: Dataset, split: str, *, seed: int = 0) -> Image.Image:
    """48 random samples, upright, each above its class's name; equal seeds give equal sheets.

    Raises:
        DatasetError: no such split, or a sample that does not decode.
    """
    rng = random.Random(seed)
    chosen: list[tuple[Shard, SampleRecord]] = []
    # One pass that keeps as many at a time as are shown (Vitter's algorithm R).
    for seen, pair in enumerate(iter_records(dataset, split), start=1):
        if len(chosen) < SHEET_IMAGES:
            chosen.append(pair)
        elif (place := rng.randrange(seen)) < SHEET_IMAGES:
            chosen[place] = pair
    rng.shuffle(chosen)
    classes = dataset.manifest.classes
    return draw_sheet(
        [
            (stored_image(dataset, shard, record), classes[record.label].name if record.label is not None else record.key)
            for shard, record in chosen
        ]
    )


def draw_sheet(captioned: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """RGB images, enlarged or reduced to equal cells in rows of eight, each above its caption."""
    rows = -(-len(captioned) // _COLUMNS)
    step_x, step_y = _CELL_PX + _GAP_PX, _CELL_PX + _CAPTION_PX + _GAP_PX
    sheet = Image.new("RGB", (min(len(captioned), _COLUMNS) * step_x + _GAP_PX, rows * step_y + _GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (full, caption) in enumerate(captioned):
        x, y = _GAP_PX + place % _COLUMNS * step_x, _GAP_PX + place // _COLUMNS * step_y
        image = ImageOps.contain(full, (_CELL_PX, _CELL_PX))
        sheet.paste(image, (x + (_CELL_PX - image.width) // 2, y + (_CELL_PX - image.height) // 2))
        text = caption.encode("ascii", "replace").decode()  # PIL's built-in font has only these characters
        while len(text) > 1 and draw.textlength(text, font) > _CELL_PX:
            text = text[:-1]
        draw.text((x, y + _CELL_PX), text, "black", font)
    return sheet
