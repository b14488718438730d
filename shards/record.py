"""Shard records and the manifest built from them. Resuming and `verify` read records instead of decoding the images."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tidali.dataset.contract import ClassName, Manifest, Quarantined, Shard, Split
from tidali.errors import counted, some_of

_SEAL = b',"checksum":"'
_Channels = tuple[float, float, float]
_QUARANTINED_FIELDS = tuple(field.name for field in fields(Quarantined))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSummary:
    """What the manifest states of a shard. It has no entry per sample, so the packer's memory does not grow."""

    split: str
    plan_id: str
    shard: Shard
    tallies: bytes
    """JSON: how many samples have each label, image size and extension. Dictionaries would take 100 bytes a photograph."""
    counts: Mapping[str, int]
    pixels: int
    sums: tuple[int, ...]
    """Of each RGB channel over the shard's pixels, 0..255; exact."""
    square_sums: tuple[int, ...]
    quarantined: tuple[Quarantined, ...]

    def tally(self, name: str) -> dict[str, int]:
        """Of 'labels', 'image_sizes' or 'extensions'."""
        return dict(json.loads(self.tallies)[name])


def seal(record: Mapping[str, Any]) -> bytes:
    """The record's file: one JSON object whose last entry is the SHA-256 of everything before it."""
    body = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode().removesuffix(b"}")
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def unseal(sealed: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: not a record, or one that was changed.
    """
    body, _, checksum = sealed.rpartition(_SEAL)
    if checksum != hashlib.sha256(body).hexdigest().encode() + b'"}\n':
        raise ValueError("its checksum is wrong")
    record: dict[str, Any] = json.loads(sealed)
    return record


def summarise(split: str, tar_name: str, sealed: bytes, record: Mapping[str, Any]) -> ShardSummary:
    """The summary of a split's shard from its record, sealed and as read."""
    samples = record["samples"]
    return ShardSummary(
        split=split,
        plan_id=record["plan"],
        shard=Shard(
            name=tar_name,
            samples=len(samples),
            size_bytes=record["size_bytes"],
            sha256=record["sha256"],
            index_sha256=record["index_sha256"],
            record_sha256=hashlib.sha256(sealed).hexdigest(),
        ),
        tallies=json.dumps(
            {
                "labels": Counter(sample["label"] for sample in samples if sample["label"] is not None),
                "image_sizes": Counter(f"{sample['height']}x{sample['width']}" for sample in samples),
                "extensions": Counter(sample["extension"] for sample in samples),
            }
        ).encode(),
        counts=record["counts"],
        pixels=record["pixels"],
        sums=tuple(record["sums"]),
        square_sums=tuple(record["square_sums"]),
        quarantined=tuple(Quarantined(**{f: entry[f] for f in _QUARANTINED_FIELDS}) for entry in record["quarantined"]),
    )


# ------------------------------------------------------------------------------------------------------------------- manifest


def build_manifest(
    summaries: Sequence[ShardSummary],
    *,
    classes: tuple[ClassName, ...],
    labelled: Mapping[str, bool],
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Manifest:
    """``labelled`` names the splits, in order, and whether each has labels. Summaries are in shard order."""
    mean, std = mean_std([summary for summary in summaries if summary.split == "train"])
    return Manifest(
        classes=classes,
        splits={
            name: _split(name, has_labels, len(classes), [s for s in summaries if s.split == name])
            for name, has_labels in labelled.items()
        },
        mean=mean,
        std=std,
        quarantine=tuple(entry for summary in summaries for entry in summary.quarantined),
        counts=_total(summary.counts for summary in summaries),
        source=source,
        settings=settings,
        versions=versions,
    )


def _split(name: str, labelled: bool, num_classes: int, summaries: Sequence[ShardSummary]) -> Split:
    def tally(name: str) -> dict[str, int]:
        return _total(summary.tally(name) for summary in summaries)

    per_class = tally("labels")
    return Split(
        name=name,
        labelled=labelled,
        samples=sum(summary.shard.samples for summary in summaries),
        class_counts=tuple(per_class.get(str(label), 0) for label in range(num_classes)) if labelled else (),
        image_sizes=tally("image_sizes"),
        extensions=tally("extensions"),
        shards=tuple(summary.shard for summary in summaries),
    )


def _total(counts: Any) -> dict[Any, int]:
    total: Counter[Any] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def about_classes(manifest: Manifest, where: str) -> Iterator[str]:
    """Warnings of classes without images: in train, or in val alone and not because none of theirs is usable."""
    lost = {(entry.split, entry.label) for entry in manifest.quarantine}
    counts = {name: split.class_counts for name, split in manifest.splits.items() if split.labelled}
    for name in ("train", "val"):
        empty = [label for label, count in enumerate(counts.get(name, ())) if not count and (name, label) not in lost]
        without = [manifest.classes[label].id for label in empty if name == "train" or counts["train"][label]]
        if without:
            text = f"{where}: {name} has no image of {counted(len(without), 'class')}: {some_of(without, 8)}"
            yield f"{text}. {_COUNTED_FROM_1}" if name == "train" and _count_from_1(manifest.classes, counts) else text


_COUNTED_FROM_1 = (
    "The labels seem to count from 1, but classes count from 0: the network has an output for class 0, which is never right. "
    "That does no harm. The first line of a file for --class-names is the name of class 0, for example 'unused'"
)


def _count_from_1(classes: Sequence[ClassName], counts: Mapping[str, Sequence[int]]) -> bool:
    """Whether labels are numbers of classes without names, and the smallest is 1."""
    unnamed = all(one.id == one.name == str(number) for number, one in enumerate(classes[:2]))
    return unnamed and min((label for of in counts.values() for label, n in enumerate(of) if n), default=0) == 1


def mean_std(summaries: Sequence[ShardSummary]) -> tuple[_Channels, _Channels]:
    """Of each RGB channel over every pixel, on a 0..1 scale; zeros where there is no pixel.

    The sums are exact integers, so neither the order of shards nor the number of workers can show in the result.
    """
    pixels = sum(summary.pixels for summary in summaries)
    means, stds = [0.0] * 3, [0.0] * 3
    for channel in range(3 if pixels else 0):
        total = sum(summary.sums[channel] for summary in summaries)
        squares = sum(summary.square_sums[channel] for summary in summaries)
        means[channel] = total / (255 * pixels)
        stds[channel] = math.sqrt(pixels * squares - total * total) / (255 * pixels)
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
