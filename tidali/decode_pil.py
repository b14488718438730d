"""Decoding without DALI, for systems that it has no wheel for: slower, and the same pixels."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tidali.contract import Dataset, SampleRecord, parse_index, read_record
from tidali.errors import TidaliError


def decoded_once(
    dataset: Dataset, split: str, *, square: int | None, device: torch.device | None = None, batch_size: int = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `tidali.loader.decoded_once`; the pixels are on the CPU.

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
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise TidaliError(f"{shard}: {record.key} at offset {record.offset} cannot be decoded ({error})") from None
    if square is not None:
        scale = square / min(image.size)
        width, height = (max(round(side * scale), square) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - square) // 2, (height - square) // 2
        image = image.crop((left, top, left + square, top + square))
    return np.asarray(image)
