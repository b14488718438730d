"""Images that were sound when they were packed and are damaged now: found before the first step, named and left out.

Every image was decoded when it was packed, so one whose bytes are still the same decodes. A shard's SHA-256 tells that all are;
where it differs, each image's CRC-32 tells which are not. DALI never meets a damaged image, which it would answer with an
exception at best: with several of them at hand its threads have ended the process (SIGSEGV, DALI 2.4.0 on a CPU).
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tidali.console import warn
from tidali.dataset.contract import Dataset, Shard, file_sha256, read_record
from tidali.dataset.shard_bytes import LABEL_EXTENSION, format_index, label_bytes, parse_index
from tidali.errors import DatasetError
from tidali.hardware.device import rank_threads

DEFAULT_SHARE = 0.001
"""Of a split's images that may be bad before the run fails: more is no accident, and wants repairing."""


@dataclass(frozen=True, kw_only=True)
class CorruptImage:
    """One whose bytes, or whose label's, have changed."""

    shard: str
    key: str
    offset: int
    """Of its data in the tar, in bytes."""

    def __str__(self) -> str:
        return f"{self.shard}: {self.key} at offset {self.offset}"


def drop_corrupt(dataset: Dataset, split: str, max_bad: int | None = None) -> Dataset:
    """The data set without the split's damaged images, each of them named. Reads every shard of the split once.

    Args:
        max_bad: how many may be left out; by default 0.1 % of the split.

    Raises:
        DatasetError: there are more, or a shard is damaged between its images.
    """
    samples = dataset.split(split).samples
    limit = int(DEFAULT_SHARE * samples) if max_bad is None else max_bad
    bad = find_corrupt(dataset, split)
    if not bad:
        return dataset
    if len(bad) > limit:
        raise DatasetError(
            f"{dataset.root}: {len(bad)} of the {samples} images of {split!r} are damaged, the first {bad[0]}, and --max-bad "
            f"is {limit}; 'tidali verify' names them all; {dataset.fix}"
        )
    for image in bad:
        warn(f"left out, damaged: {image}")
    warn(f"{len(bad)} of the {samples} images of {split!r} are left out; {dataset.fix}")
    return without(dataset, split, bad)


def find_corrupt(dataset: Dataset, split: str) -> list[CorruptImage]:
    """The split's damaged images, in stored order.

    Raises:
        DatasetError: a shard is damaged between its images.
    """
    shards = dataset.split(split).shards
    with ThreadPoolExecutor(rank_threads()) as pool:  # hashing lets go of the interpreter's lock
        sound = pool.map(lambda shard: file_sha256(dataset.root / shard.name) == shard.sha256, shards)
        return [
            image
            for shard, is_sound in zip(shards, sound, strict=True)
            if not is_sound
            for image in _corrupt_in(dataset, shard)
        ]


def without(dataset: Dataset, split: str, bad: Sequence[CorruptImage]) -> Dataset:
    """The same data set with indexes of its own, in a temporary folder, that do not list the bad images."""
    folder = Path(tempfile.mkdtemp(prefix="tidali-index-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # whoever holds the data set may open a reader until then
    offsets = {(image.shard, image.offset) for image in bad}
    indexes = dict(dataset.indexes)
    shards = []
    for shard in dataset.split(split).shards:
        index = dataset.root / shard.index_name
        samples = parse_index(index.read_text(), str(index))
        kept = [sample for sample in samples if not any((shard.name, part.offset) in offsets for part in sample)]
        if len(kept) < len(samples):
            indexes[shard.name] = folder / shard.index_name
            indexes[shard.name].write_text(format_index(kept))
        shards.append(replace(shard, samples=len(kept)))
    reduced = replace(dataset.split(split), samples=sum(shard.samples for shard in shards), shards=tuple(shards))
    manifest = replace(dataset.manifest, splits={**dataset.manifest.splits, split: reduced})
    return replace(dataset, manifest=manifest, indexes=indexes)


def _corrupt_in(dataset: Dataset, shard: Shard) -> list[CorruptImage]:
    """Samples whose image or label is not what was packed."""
    digits = dataset.manifest.label_digits
    index = dataset.root / shard.index_name
    bad = []
    with (dataset.root / shard.name).open("rb") as file:
        for record, parts in zip(read_record(dataset.root, shard), parse_index(index.read_text(), str(index)), strict=True):
            content = {}
            for part in parts:
                file.seek(part.offset)
                content[part.extension] = file.read(part.size_bytes)
            label = b"" if record.label is None else label_bytes(record.label, digits)
            if zlib.crc32(content[record.extension]) != record.crc32 or content.get(LABEL_EXTENSION, b"") != label:
                bad.append(CorruptImage(shard=shard.name, key=record.key, offset=record.offset))
    if not bad:
        raise DatasetError(
            f"{dataset.root / shard.name}: damaged between its images (SHA-256 differs); 'tidali verify' says where; "
            f"{dataset.fix}"
        )
    return bad
