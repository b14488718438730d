"""WebDataset tars that another program wrote, as a source to pack."""

from __future__ import annotations

import functools
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shards.executor import default_workers, in_task_order, run_tasks
from shards.items import Item, Items, ItemsBuilder
from shards.scan import FileSource, Scan, Source, fingerprint
from shards.source import Read, Unreadable
from shards.tar_files import (
    Labels,
    Tar,
    TarSummary,
    find_tars,
    is_pattern,
    make_classes,
    read_summarised,
    refuse_faults,
    small_job,
)
from shards.tar_samples import Label
from tidali.dataset.contract import MANIFEST_NAME, ClassName, Manifest
from tidali.dataset.file_names import is_image_name, printable_path, walk
from tidali.errors import DatasetError, TidaliError, UsageError

LAYOUT = "webdataset"


def open_source(path: Path, layout: str, *, label_field: str | None, class_names: tuple[str, ...] | None) -> Source:
    """The source that a location and a layout name: with the layout 'auto' tars, where there are tars and no images.

    Raises:
        UsageError: options of tars for a source of another layout.
    """
    if layout == LAYOUT or (layout == "auto" and _holds_tars(path)):
        return TarSource(path, label_field, class_names)
    if label_field is not None or class_names is not None:
        raise UsageError(f"{path}: no WebDataset tars, to which --label-field and --class-names apply; leave them out")
    return FileSource(path, layout)


def _holds_tars(path: Path) -> bool:
    if not os.path.isdir(path):
        return is_pattern(str(path)) or path.name.lower().endswith(".tar")
    tars = 0
    for name, _, is_folder in walk(path, Counter()):
        if not is_folder and is_image_name(name):
            return False
        tars += not is_folder and name.lower().endswith(".tar")
    return tars > 0


@dataclass(frozen=True)
class TarSource:
    """Tars in a folder, one tar, or a pattern of names: every sample has one image, and a label in ``.cls`` or ``.json``."""

    path: Path
    label_field: str | None = None
    """See `shards.tar_samples.read_tar`."""
    class_names: tuple[str, ...] | None = None
    """See `shards.tar_files.make_classes`."""

    def scan(self) -> Scan:
        """
        Raises:
            UsageError: no tars, or tars that cannot be read; the message names the first, and the sample.
        """
        root, tars = find_tars(self.path)
        job = functools.partial(_list_tar, root=root, label_field=self.label_field)
        workers = 1 if small_job(root, tars) else default_workers()
        listings: list[_TarListing] = in_task_order(run_tasks(job, tars, workers))
        summaries = [listing.summary for listing in listings]
        refuse_faults(tars, summaries)
        classes, labels = make_classes(str(self.path), summaries, self.label_field, self.class_names)
        if self.class_names is None and labels.numbers is None:
            classes = _packed_classes(root, len(classes)) or classes
        splits = {
            split: _items([pair for pair in zip(tars, listings, strict=True) if pair[0].split == split], labels)
            for split in ("train", "val", "test")
            if any(tar.split == split for tar in tars)
        }
        for split, items in splits.items():
            if not len(items):
                raise UsageError(f"{self.path}: the tars of {split} hold no images")
        return Scan(
            name=printable_path(os.path.realpath(root)).rpartition("/")[2],
            layout=LAYOUT,
            classes=classes,
            splits=splits,
            left_out=sum((Counter(summary.left_out) for summary in summaries), Counter()),
            reader=TarReader(os.fsencode(root)),
            fingerprint=fingerprint(splits),
        )


def _packed_classes(root: Path, least: int) -> tuple[ClassName, ...] | None:
    """Those of the packed data set that the tars are, if they are one."""
    try:
        manifest = Manifest.from_json((root / MANIFEST_NAME).read_text(encoding="utf-8"), "")
    except (OSError, UnicodeDecodeError, DatasetError):
        return None
    return manifest.classes if len(manifest.classes) >= least else None


class _TarListing(NamedTuple):
    """A tar's samples in columns: a tenth of what they take as objects, and quick to send."""

    summary: TarSummary
    names: bytes
    """Of the images, each ended by a zero byte, which no name has."""
    sizes_bytes: array[int]
    offsets: array[int]
    labels: array[int]
    """Places in ``distinct``."""
    distinct: list[Label | None]


def _list_tar(tar: Tar, *, root: Path, label_field: str | None) -> _TarListing:
    summary, contents = read_summarised(tar, root, label_field)
    distinct = list(summary.labels)
    places = {label: place for place, label in enumerate(distinct)}
    images = [sample.image for sample in contents.samples]
    return _TarListing(
        summary,
        b"".join(image.name.encode("utf-8", "surrogateescape") + b"\0" for image in images),
        array("q", (image.size_bytes for image in images)),
        array("q", (image.offset for image in images)),
        array("i", (places[sample.label] for sample in contents.samples)),
        distinct,
    )


def _items(listings: Sequence[tuple[Tar, _TarListing]], labels: Labels) -> Items:
    builder = ItemsBuilder()
    for tar, listing in listings:
        numbers = [labels.number(label) for label in listing.distinct]
        names = listing.names.decode("utf-8", "surrogateescape").split("\0")
        for name, size, offset, place in zip(names, listing.sizes_bytes, listing.offsets, listing.labels, strict=False):
            builder.add(f"{tar.name}/{name}", size, (len(tar.name), offset), numbers[place])
    return builder.build()


@dataclass(frozen=True)
class TarReader:
    """Reads images out of tars by their offsets. An item's name begins with that of its tar."""

    root: bytes

    def open(self) -> nullcontext[Read]:
        return nullcontext(self._read)

    def _read(self, item: Item, limit_bytes: int) -> bytes:
        if item.size_bytes > limit_bytes:
            raise Unreadable(f"file of {item.size_bytes:,} bytes, more than an image within the pixel limit can take")
        name_length, offset = item.where
        path = self.root + b"/" + item.name[:name_length].encode("utf-8", "surrogateescape")
        try:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), item.size_bytes, offset)
        except OSError as error:
            raise TidaliError(f"{printable_path(path)}: {error.strerror}") from None
        if len(data) != item.size_bytes:
            raise TidaliError(f"{printable_path(path)}: changed while it was being packed; run the command again")
        return data
