"""Byte-identical images in several splits, or under several classes: they make a result look better, or worse, than it is."""

from __future__ import annotations

import hashlib
import mmap
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_DIGEST_BYTES = 8
"""A million images have two different ones with the same digest in one of 40 million data sets."""
_NO_LABEL = -1


@dataclass(frozen=True, slots=True)
class Contents:
    """A digest and the label of each image of a shard, in the tar's order."""

    digests: array[int] = field(default_factory=lambda: array("Q"))
    labels: array[int] = field(default_factory=lambda: array("q"))

    def add(self, image: bytes, label: int | None) -> None:
        digest = hashlib.blake2b(image, digest_size=_DIGEST_BYTES).digest()
        self.digests.append(int.from_bytes(digest, "little"))
        self.labels.append(_NO_LABEL if label is None else label)


@dataclass(frozen=True, slots=True)
class Repeated:
    """Digests of images that occur more than once."""

    in_splits: frozenset[int] = frozenset()
    """In several splits."""
    in_classes: frozenset[int] = frozenset()
    """Under several labels."""

    @property
    def all(self) -> frozenset[int]:
        return self.in_splits | self.in_classes

    def __str__(self) -> str:
        parts = [(self.in_splits, "in more than one split"), (self.in_classes, "under more than one class")]
        text = ", ".join(f"{len(found):,} {what}" for found, what in parts if found)
        return text and f"byte-identical images: {text}"


def read_contents(tar: Path, samples: Iterable[Mapping[str, Any]]) -> Contents:
    """From a tar and its record's samples.

    Raises:
        OSError, ValueError: the tar cannot be read, or is empty.
    """
    contents = Contents()
    with open(tar, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for sample in samples:
            start = sample["offset"]
            contents.add(data[start : start + sample["size_bytes"]], sample["label"])
    return contents


def find_repeated(shards: Sequence[tuple[str, Contents]]) -> Repeated:
    """Of the images of all shards, each with its split."""
    numbers = {split: number for number, split in enumerate(dict.fromkeys(split for split, _ in shards))}
    digests = np.concatenate([np.empty(0, np.uint64), *(np.frombuffer(c.digests, np.uint64) for _, c in shards)])
    if not len(digests):
        return Repeated()
    splits = np.concatenate([np.full(len(c.digests), numbers[split]) for split, c in shards])
    labels = np.concatenate([np.frombuffer(c.labels, np.int64) for _, c in shards])
    order = np.argsort(digests, kind="stable")
    digests, splits, labels = digests[order], splits[order], labels[order]
    starts = np.flatnonzero(np.concatenate([[True], digests[1:] != digests[:-1]]))

    def differing(lowest: np.ndarray, highest: np.ndarray) -> frozenset[int]:
        differs = np.minimum.reduceat(lowest, starts) < np.maximum.reduceat(highest, starts)
        return frozenset(digests[starts[differs]].tolist())

    lowest_label = np.where(labels == _NO_LABEL, np.iinfo(np.int64).max, labels)  # an unlabelled image contradicts none
    return Repeated(differing(splits, splits), differing(lowest_label, labels))


def name_repeated(
    repeated: Repeated, shards: Iterable[tuple[str, Contents, Sequence[str]]], class_ids: Sequence[str]
) -> Iterator[str]:
    """A line for each repeated image, with all its places. ``shards``: split, contents, names of the samples in the source."""
    wanted = repeated.all
    places: dict[int, list[str]] = {}
    for split, contents, names in shards:
        for digest, label, name in zip(contents.digests, contents.labels, names, strict=True):
            if digest in wanted:
                class_ = "" if label == _NO_LABEL else f", class {class_ids[label]!r}"
                places.setdefault(digest, []).append(f"{name!r} ({split}{class_})")
    yield from sorted(f"the same image: {', '.join(sorted(found))}" for found in places.values())
