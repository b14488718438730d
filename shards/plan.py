"""The assignment of samples to shards: a pure function of the scan and the settings, made before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from shards.images import Resizing
from shards.items import Item, Items
from shards.scan import Scan
from tidali.dataset.contract import ClassName
from tidali.dataset.file_names import name_key, shown
from tidali.dataset.shard_bytes import BLOCK_BYTES, label_digits
from tidali.errors import UsageError
from tidali.files import printable

KERNELS = ("pil", "opencv")


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What a pack depends on besides its source. All of it is in the manifest."""

    seed: int = 0
    """Of train's order and of the held-out split."""
    shard_samples: int | None = 1000
    """Samples per shard; None if ``shard_size_bytes`` is given."""
    shard_size_bytes: int | None = None
    """A shard is closed before it would pass this size."""
    val_fraction: float = 0.0
    """Share of each class's train samples that is held out."""
    classes: tuple[str, ...] | int | None = None
    """Class ids to keep, or how many of the first; None keeps all."""
    size_px: int | None = None
    """Every image is resized to a square of this edge and encoded as JPEG; None keeps the source's bytes."""
    kernel: str = "pil"
    """Of that resize: 'pil' (bicubic, a = -0.5) or 'opencv' (bicubic, a = -0.75)."""
    shorter_side_px: int | None = None
    """Images whose shorter side is longer are shrunk to it, bicubic and antialiased, and encoded as JPEG."""
    quality: int | None = None
    """Of the JPEGs that ``shorter_side_px`` makes; 92 if None."""
    max_pixels: int = 1 << 26
    """Images that declare more are quarantined undecoded: 67 million pixels take 200 MB as RGB."""

    def __post_init__(self) -> None:
        if (self.shard_samples is None) == (self.shard_size_bytes is None):
            raise UsageError("give one of --shard-samples and --shard-size, not both")
        if self.shard_samples is not None and self.shard_samples < 1:
            raise UsageError(f"--shard-samples must be at least 1, not {self.shard_samples}")
        if self.shard_size_bytes is not None and not 1 << 12 <= self.shard_size_bytes < 1 << 40:
            raise UsageError(f"--shard-size must be from 4 KiB to 1 TiB, not {self.shard_size_bytes} bytes")
        if not 0 <= self.val_fraction < 1:
            raise UsageError(f"--val-fraction must be in [0, 1), not {self.val_fraction:g}")
        if isinstance(self.classes, int) and self.classes < 1:
            raise UsageError(f"--classes must be at least 1, not {self.classes}")
        if self.size_px is not None and not 1 <= self.size_px <= 8192:
            raise UsageError(f"--size must be from 1 to 8192 pixels, not {self.size_px}")
        if self.kernel not in KERNELS:
            raise UsageError(f"--kernel must be one of {', '.join(KERNELS)}, not {self.kernel!r}")
        if self.shorter_side_px is not None:
            if self.size_px is not None or self.kernel != "pil":
                raise UsageError("--shorter-side keeps the aspect and resizes as PIL does; leave --size and --kernel out")
            if not 1 <= self.shorter_side_px <= 8192:
                raise UsageError(f"--shorter-side must be from 1 to 8192 pixels, not {self.shorter_side_px}")
        if self.quality is not None and (self.shorter_side_px is None or not 1 <= self.quality <= 100):
            raise UsageError("--quality is that of the JPEGs which --shorter-side makes, from 1 to 100")
        if self.max_pixels < 1:
            raise UsageError(f"--max-pixels must be at least 1, not {self.max_pixels}")

    @property
    def resizing(self) -> Resizing:
        return Resizing(self.size_px, self.kernel, self.shorter_side_px, self.quality or Resizing.quality)

    def describe(self) -> dict[str, Any]:
        """The settings as the manifest states them; those of a resize only if it was asked for."""
        document = asdict(self)
        if isinstance(self.classes, tuple):
            document["classes"] = list(self.classes)
        if self.size_px is None:
            del document["kernel"]
        if self.shorter_side_px is None:
            del document["shorter_side_px"], document["quality"]
        else:
            document["quality"] = self.resizing.quality
        return document


class PlannedSample(NamedTuple):
    ordinal: int
    """Position in its split's listing, sorted by name."""
    item: Item


@dataclass(frozen=True, eq=False, slots=True)
class ShardTask:
    """One shard to write. It contains everything that the shard's bytes depend on, except the settings."""

    split: str
    number: int
    ordinals: np.ndarray
    """(n,) int32, of ``items``."""
    items: Items

    def __len__(self) -> int:
        return len(self.items)

    @property
    def samples(self) -> Iterator[PlannedSample]:
        return map(PlannedSample, self.ordinals.tolist(), self.items)

    @property
    def stem(self) -> str:
        return f"{self.split}-{self.number:06d}"

    @property
    def file_names(self) -> tuple[str, str, str]:
        """Of the tar, the index and the record."""
        return f"{self.stem}.tar", f"{self.stem}.idx", f"{self.stem}.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All shards of a pack, and what they depend on."""

    classes: tuple[ClassName, ...]
    labelled: Mapping[str, bool]
    """Split -> whether its samples have labels, in the manifest's order."""
    tasks: tuple[ShardTask, ...]
    source: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def samples(self) -> int:
        return sum(map(len, self.tasks))

    @property
    def id(self) -> str:
        return plan_id(self.source, self.settings, self.classes)


def plan_id(source: Mapping[str, Any], settings: Mapping[str, Any], classes: Sequence[ClassName]) -> str:
    """Digest of what a pack depends on. Each shard's record contains it, so that no shard of another plan is kept."""
    parts = [source, settings, [asdict(class_) for class_ in classes]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def make_plan(scan: Scan, settings: PackSettings) -> Plan:
    """
    Raises:
        UsageError: a setting does not fit the source.
    """
    classes, splits = _subset(scan, settings.classes)
    for split, items in splits.items():
        if not len(items):
            raise UsageError(f"{split} has no images of the chosen classes; choose others with --classes, or remove {split}")
    if settings.val_fraction:
        splits = _hold_out(splits, settings)
    tasks: list[ShardTask] = []
    for split, items in splits.items():
        ordinals = np.arange(len(items), dtype=np.int32)
        if split == "train":
            ordinals = ordinals[np.argsort(_random_ranks(settings.seed, "order", items), kind="stable")]
            items = items.take(ordinals)
        bounds = list(_bounds(items, settings, label_digits(len(classes))))
        tasks += [ShardTask(split, n, ordinals[a:b], items.take(slice(a, b))) for n, (a, b) in enumerate(pairwise(bounds))]
    return Plan(
        classes=classes,
        labelled={split: items[0].label is not None for split, items in splits.items()},
        tasks=tuple(tasks),
        source=scan.describe(),
        settings=settings.describe(),
    )


def _random_ranks(seed: int, purpose: str, items: Items) -> np.ndarray:
    """(n,) uint64, to sort by: the order is the same on every Python and machine, and adding a sample moves no other."""
    text = f"{seed}\0{purpose}\0".encode()
    digests = bytearray()
    for name in items.names():
        digests += hashlib.blake2b(text + name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _subset(scan: Scan, wanted: tuple[str, ...] | int | None) -> tuple[tuple[ClassName, ...], dict[str, Items]]:
    """The classes to keep, in the source's order, and their items with labels renumbered."""
    if wanted is None:
        return scan.classes, dict(scan.splits)
    if isinstance(wanted, int):
        if wanted > len(scan.classes):
            raise UsageError(f"--classes {wanted}: the source has {len(scan.classes)}")
        keep = set(range(wanted))
    else:
        label_of = {name_key(class_.id): label for label, class_ in enumerate(scan.classes)}
        unknown = [id_ for id_ in wanted if name_key(id_) not in label_of]
        if unknown or not wanted:
            raise UsageError(
                f"--classes: {shown(unknown[0])} is not a class of the source" if unknown else "--classes: names no classes"
            )
        keep = {label_of[name_key(id_)] for id_ in wanted}
    dropped = -2
    new_labels = np.full(len(scan.classes) + 1, dropped, np.int32)
    new_labels[sorted(keep)] = np.arange(len(keep))
    new_labels[-1] = -1  # of images without a label
    splits = {}
    for split, items in scan.splits.items():
        labels = new_labels[items.labels]
        kept = labels != dropped
        splits[split] = items.take(kept).labelled(labels[kept])
    return tuple(class_ for label, class_ in enumerate(scan.classes) if label in keep), splits


def _hold_out(splits: Mapping[str, Items], settings: PackSettings) -> dict[str, Items]:
    """Move a share of each class of train to 'val', or to 'heldout' where the source has its own val."""
    name = "heldout" if "val" in splits else "val"
    train, rest = splits["train"], {split: items for split, items in splits.items() if split != "train"}
    ranks = _random_ranks(settings.seed, "held out", train)
    by_class = np.lexsort((ranks, train.labels))
    held = np.zeros(len(train), bool)
    for members in np.split(by_class, np.flatnonzero(np.diff(train.labels[by_class])) + 1):
        count = max(1, round(settings.val_fraction * len(members)))
        if count >= len(members):
            where = printable(train[int(members.min())].name.rpartition("/")[0])
            raise UsageError(f"--val-fraction {settings.val_fraction:g} leaves no train sample of {len(members)} in {where}")
        held[members[:count]] = True
    return {"train": train.take(~held), name: train.take(held), **rest}


def _bounds(items: Items, settings: PackSettings, digits: int) -> Iterator[int]:
    """Where each shard begins, and the end of the last: as many samples as fit in each."""
    most_samples = settings.shard_samples or len(items)
    most_bytes = (settings.shard_size_bytes or 1 << 62) - 2 * BLOCK_BYTES  # without the end of the archive
    sample_bytes = _blocks(items.sizes_bytes) + np.where(items.labels >= 0, _blocks(digits), 0)
    ends_bytes = np.cumsum(sample_bytes)
    start = 0
    while start < len(items):
        yield start
        fit = int(np.searchsorted(ends_bytes, ends_bytes[start] - sample_bytes[start] + most_bytes, "right"))
        start = min(max(fit, start + 1), start + most_samples, len(items))
    yield len(items)


def _blocks(size_bytes: Any) -> Any:
    """A tar member's size with its header and padding."""
    return BLOCK_BYTES * (1 + -(-size_bytes // BLOCK_BYTES))
