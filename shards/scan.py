"""A source's layout, its classes in order and its splits. Everything is checked before DEST is changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shards.folder_layout import read_folders
from shards.image_tree import ImageTree
from shards.items import Items
from shards.source import Listing, Reader, list_folder
from shards.tiny_imagenet import WNIDS, read_tiny_imagenet
from shards.zip_source import list_zip
from tidali.dataset.contract import ClassName
from tidali.dataset.file_names import describe_left_out, printable_path, split_of, suffix_kind
from tidali.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The classes and splits of a source."""

    name: str
    layout: str
    classes: tuple[ClassName, ...]
    splits: Mapping[str, Items]
    """Items sorted by name. Every split but an unlabelled test has labels."""
    left_out: Mapping[str, int]
    """How many files are not packed, by kind: those without an image's suffix, and images in hidden and system folders."""
    reader: Reader
    fingerprint: str
    """SHA-256 over every image's name, size and label, and in a zip its CRC-32."""
    warnings: tuple[str, ...] = ()
    """What may be wrong with the source although it can be packed."""

    @property
    def images(self) -> int:
        return sum(len(items) for items in self.splits.values())

    def describe(self) -> dict[str, Any]:
        """The manifest's entry on the source: nothing in it depends on the machine."""
        return {"name": self.name, "layout": self.layout, "images": self.images, "fingerprint": self.fingerprint}


class Source(Protocol):
    """Anything that can be packed."""

    def scan(self) -> Scan: ...


@dataclass(frozen=True)
class FileSource:
    """A folder or zip of labelled images.

    Layouts: Tiny-ImageNet's (`shards.tiny_imagenet`); ``SPLIT/CLASS/*`` with the splits train, val and test in their usual
    spellings; ``CLASS/*``, which is train alone (`shards.folder_layout`). One folder around all that is seen through.
    """

    path: Path
    layout: str = "auto"

    def scan(self) -> Scan:
        """
        Raises:
            UsageError: it is not a data set, or not a valid one; the message names the file.
        """
        listing = list_source(self.path)
        tree = ImageTree(listing)
        left_out = listing.left_out + Counter(map(suffix_kind, listing.other_files.names()))
        # So that a zip and its extracted folder have the same names. Files beside the one folder (README) do not matter.
        if root := tree.unwrapped("", stop=lambda name: split_of(name) is not None):
            listing = listing.inside(root)
            tree = ImageTree(listing)
        layout = self.layout
        if layout == "auto":
            is_tiny = listing.other_files.find(WNIDS) is not None and "train" in listing.folders
            layout = "tiny-imagenet" if is_tiny else "folder"
        if layout == "tiny-imagenet":
            classes, splits = read_tiny_imagenet(listing, tree)
            about: list[str] = []
            del left_out[".txt files"]  # its annotations
        elif not tree.count[""]:
            held = f" (it holds {describe_left_out(left_out)})" if left_out else ""
            raise UsageError(f"{listing.location}: no data set: found no images in train/CLASS/ or CLASS/ folders{held}")
        else:
            classes, splits, about = read_folders(tree, folders_are_classes=self.layout == "folder")
        if outside := tree.count[""] - sum(map(len, splits.values())):
            left_out["images outside train, val and test"] = outside
        return Scan(
            name=printable_path(os.path.realpath(self.path)).rpartition("/")[2],
            layout=layout,
            classes=classes,
            splits=splits,
            left_out=left_out,
            reader=listing.reader,
            fingerprint=fingerprint(splits),
            warnings=(*listing.warnings, *about),
        )


def list_source(path: Path) -> Listing:
    """The files of a folder or a zip, without hidden ones and those of system folders.

    Raises:
        UsageError: the path does not exist, is empty, is neither a folder nor a zip, or a name in it cannot be trusted.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        listing = list_folder(path)
    elif stat.S_ISREG(mode):
        listing = list_zip(path)
    else:
        raise UsageError(f"{path}: no such folder or zip")
    if not len(listing.images) and not len(listing.other_files):
        held = f" (left out: {describe_left_out(listing.left_out)})" if listing.left_out else ""
        raise UsageError(f"{path}: contains no files{held}")
    return listing


def fingerprint(splits: Mapping[str, Items]) -> str:
    digest = hashlib.sha256()
    for split, items in sorted(splits.items()):
        digest.update(f"{split}\n".encode())
        for block in items.blocks():
            lines = [f"{name}\0{size}\0{where[-1] if where else ''}\0{label}\n" for name, size, where, label in block]
            digest.update("".join(lines).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
