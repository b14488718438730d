"""Byte-identical images in several splits, or under several classes: they make a result look better, or worse, than it is."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shards.hashed_file import HashedFile

_DIGEST_BYTES = 8
"""A million images have two different ones with the same digest in one of 40 million data sets."""
_NO_LABEL = -1


@dataclass(frozen=True, slots=True)
class Contents:
    """A digest and the label of each image of a shard, in the tar's order."""

    digests: array[int] = field(default_factory=lambda: array("Q"))
    labels: array[int] = field(default_factory=lambda: array("i"))

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


def read_contents(tar: HashedFile, samples: Iterable[Mapping[str, Any]]) -> Contents:
    """From a tar and its record's samples."""
    contents = Contents()
    for sample in samples:
        start = sample["offset"]
        contents.add(tar.read(start, start + sample["size_bytes"]), sample["label"])
    return contents


def find_repeated(shards: Sequence[tuple[str, Contents]]) -> Repeated:
    """Of the images of all shards, each with its split. Takes 30 bytes an image, and more only for those that are repeated."""
    if not shards:
        return Repeated()
    digests = np.concatenate([np.frombuffer(contents.digests, np.uint64) for _, contents in shards])
    order = np.argsort(digests)
    digests = digests[order]
    same = digests[1:] == digests[:-1]
    repeated = np.concatenate([same, [False]]) | np.concatenate([[False], same]) if len(digests) else same
    digests, images = digests[repeated], order[repeated]
    if not len(images):
        return Repeated()
    numbers = {split: number for number, split in enumerate(dict.fromkeys(split for split, _ in shards))}
    shard_of = np.searchsorted(np.cumsum([len(contents.digests) for _, contents in shards]), images, "right")
    splits = np.array([numbers[split] for split, _ in shards])[shard_of]
    labels = np.concatenate([np.frombuffer(contents.labels, np.int32) for _, contents in shards])[images]
    starts = np.flatnonzero(np.concatenate([[True], digests[1:] != digests[:-1]]))

    def differing(lowest: np.ndarray, highest: np.ndarray) -> frozenset[int]:
        differs = np.minimum.reduceat(lowest, starts) < np.maximum.reduceat(highest, starts)
        return frozenset(digests[starts[differs]].tolist())

    lowest_label = np.where(labels == _NO_LABEL, np.iinfo(np.int32).max, labels)  # an unlabelled image contradicts none
    return Repeated(differing(splits, splits), differing(lowest_label, labels))


def name_repeated(
    repeated: Repeated, shards: Iterable[tuple[str, Contents, Sequence[str]]], class_ids: Sequence[str]
) -> Iterator[str]:
    """A line for each repeated image, with all its places. ``shards``: split, contents, names of the samples in the source."""
    wanted = repeated.all
    places: defaultdict[int, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for split, contents, names in shards:
        for digest, label, name in zip(contents.digests, contents.labels, names, strict=True):
            if digest in wanted:
                class_ = "" if label == _NO_LABEL else f", class {class_ids[label]!r}"
                places[digest][f"{split}{class_}"].append(repr(name))
    named = (sorted(f"{', '.join(sorted(names))} ({place})" for place, names in found.items()) for found in places.values())
    yield from sorted(f"the same image: {', '.join(one)}" for one in named)
