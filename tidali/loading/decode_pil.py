"""Decoding without DALI: whole splits, where it has no wheel, slower and to the same pixels; and single images."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tidali.dataset.contract import Dataset, SampleRecord, read_record
from tidali.dataset.shard_bytes import parse_index
from tidali.errors import TidaliError

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (TIFF 6.0, tag 274)."""


def decoded_once(
    dataset: Dataset, split: str, *, square: int | None, device: torch.device | None = None, batch_size: int = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `tidali.loading.stream.decoded_once`; the pixels are on the CPU.

    Raises:
        TidaliError: an image cannot be decoded; names shard, key and offset.
    """
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    shards = [shard for shard in dataset.split(split).shards if shard.samples]
    for shard, index in zip(shards, dataset.index_paths(split), strict=True):
        path = dataset.root / shard.name
        listed = {part.offset for sample in parse_index(index.read_text(), str(index)) for part in sample}
        with path.open("rb") as file:
            for record in read_record(dataset.root, shard):
                if record.offset not in listed:
                    continue
                file.seek(record.offset)
                pixels.append(decode(file.read(record.size_bytes), square, str(path), record))
                labels.append(record.label or 0)
                if len(labels) == batch_size:
                    yield torch.from_numpy(np.stack(pixels)), torch.tensor(labels)
                    pixels, labels = [], []
    if labels:
        yield torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def decode(data: bytes, square: int | None, shard: str, record: SampleRecord) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright; a centred square where asked for.

    Raises:
        TidaliError: it cannot be decoded.
    """
    try:
        image = upright_rgb(Image.open(io.BytesIO(data)))
    except (OSError, SyntaxError, ValueError) as error:
        raise TidaliError(f"{shard}: {record.key} at offset {record.offset} cannot be decoded ({error})") from None
    if square is not None:
        scale = square / min(image.size)
        width, height = (max(round(side * scale), square) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - square) // 2, (height - square) // 2
        image = image.crop((left, top, left + square, top + square))
    return np.asarray(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any image as the packer stores it and DALI decodes it: RGB, upright by its EXIF orientation, alpha dropped, of 16-bit
    samples the high byte (PIL's own conversion cuts grey ones off at 255), of an animation the first frame.

    Raises:
        ValueError: 32-bit samples, which have no defined 8-bit scale.
        OSError, SyntaxError, ...: PIL's decoders raise whatever damaged bytes lead them to.
    """
    image.load()
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # those two give 16 bits as "I"
        raise ValueError("32-bit samples, which have no defined 8-bit scale")
    if image.mode.startswith("I"):
        rgb = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = _UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF is no damaged image
        return 1
