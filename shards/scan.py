"""A source's layout, its classes in order and its splits. Everything is checked before DEST is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

from shards.source import Item, Listing, Reader, list_source
from tidali.dataset.contract import ClassName
from tidali.errors import UsageError
from tidali.files import printable

# By suffix here, by content in `shards.images`: a text file named .jpg is a corrupt image, one named .txt is not an image.
_SUFFIXES = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm jp2 j2k avif heic"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_ANNOTATIONS = "val/val_annotations.txt"


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The classes and splits of a source."""

    name: str
    layout: str
    classes: tuple[ClassName, ...]
    splits: Mapping[str, list[Item]]
    """Items sorted by name. Every split but an unlabelled test has labels."""
    ignored_files: int
    """Files whose suffix is not that of an image."""
    reader: Reader
    fingerprint: str
    """SHA-256 over every image's name, size and label, and in a zip its CRC-32."""

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

    Layouts: Tiny-ImageNet's (``wnids.txt``, ``words.txt``, ``train/CLASS/images``, ``val/images`` with ``val_annotations.txt``,
    ``test/images`` without labels); ``SPLIT/CLASS/*`` with the splits train, val and test; ``CLASS/*``, which is train alone.
    One folder around all that is seen through.
    """

    path: Path
    layout: str = "auto"

    def scan(self) -> Scan:
        """
        Raises:
            UsageError: it is not a data set, or not a valid one; the message names the file.
        """
        listing = _unwrap(list_source(self.path))
        layout = self.layout
        if layout == "auto":
            names = {item.name for item in listing.items if "/" not in item.name}
            layout = "tiny-imagenet" if "wnids.txt" in names and "train" in listing.folders else "folder"
        classes, splits = _tiny_imagenet(listing) if layout == "tiny-imagenet" else _folder(listing)
        _refuse_same_but_for_case(listing.location, classes)
        for items in splits.values():
            items.sort(key=attrgetter("name"))
        images = sum(len(items) for items in splits.values())
        texts = sum(item.name.endswith(".txt") for item in listing.items) if layout == "tiny-imagenet" else 0  # its annotations
        return Scan(
            name=printable(self.path.resolve().name),
            layout=layout,
            classes=classes,
            splits=splits,
            ignored_files=len(listing.items) - images - texts,
            reader=listing.reader,
            fingerprint=fingerprint(splits),
        )


def fingerprint(splits: Mapping[str, Iterable[Item]]) -> str:
    digest = hashlib.sha256()
    for split, items in sorted(splits.items()):
        lines = [f"{name}\0{size}\0{where[-1] if where else ''}\0{label}\n" for name, size, where, label in items]
        digest.update(f"{split}\n{''.join(lines)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _unwrap(listing: Listing) -> Listing:
    """The listing from inside the one folder around everything, so that a zip and its extracted folder have the same names."""
    while True:
        top = {folder for folder in listing.folders if "/" not in folder}
        if len(top) != 1 or any("/" not in item.name for item in listing.items) or top <= _SPLIT_FOLDERS.keys():
            return listing
        (root,) = top
        if not any(folder.count("/") == 1 for folder in listing.folders):
            return listing  # a single class of a CLASS/* source
        listing = listing.inside(root)


def _is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES


# -------------------------------------------------------------------------------------------------------------- SPLIT/CLASS/*


def _folder(listing: Listing) -> tuple[tuple[ClassName, ...], dict[str, list[Item]]]:
    where = listing.location
    top = {folder for folder in listing.folders if "/" not in folder}
    split_folders = {folder: _SPLIT_FOLDERS[folder] for folder in sorted(top) if folder in _SPLIT_FOLDERS}
    if not split_folders:
        split_folders = {"": "train"}
    elif "train" not in split_folders:
        raise UsageError(f"{where}: has {', '.join(split_folders)} but no train folder")
    by_split: dict[str, dict[str, list[Item]]] = {}
    for folder, split in split_folders.items():
        if split in by_split:
            raise UsageError(
                f"{where}: two folders for {split}: {', '.join(f for f, s in split_folders.items() if s == split)}"
            )
        by_split[split] = _images_by_class(listing, f"{folder}/" if folder else "")
    in_splits = sum(len(items) for found in by_split.values() for items in found.values())
    stray = [i.name for i in listing.items if _is_image(i.name)] if in_splits else []
    if not in_splits or not by_split["train"]:
        raise UsageError(f"{where}: no data set: found no images in train/CLASS/ or CLASS/ folders")
    if len(stray) != in_splits:
        covered = {i.name for found in by_split.values() for items in found.values() for i in items}
        first = next(name for name in stray if name not in covered)
        raise UsageError(f"{where}: {printable(first)!r} is not in a class folder of a split; move or remove it")
    ids = sorted(by_split["train"])
    label_of = {id_: label for label, id_ in enumerate(ids)}
    splits: dict[str, list[Item]] = {}
    for split, found in by_split.items():
        for id_, items in found.items():
            if id_ not in label_of:
                raise UsageError(f"{where}: {split} has a class {printable(id_)!r} that train does not have")
            if not items and split == "train":
                raise UsageError(f"{where}: class folder {printable(id_)!r} of train contains no images; remove it or fill it")
        splits[split] = [item.labelled(label_of[id_]) for id_, items in found.items() for item in items]
    return tuple(ClassName(id=printable(id_), name=printable(id_)) for id_ in ids), splits


def _images_by_class(listing: Listing, prefix: str) -> dict[str, list[Item]]:
    """Images below each folder right under ``prefix``, at any depth, and the folders that hold none."""
    found: dict[str, list[Item]] = {
        folder.removeprefix(prefix): []
        for folder in listing.folders
        if folder.startswith(prefix) and "/" not in folder[len(prefix) :]
    }
    found.pop("", None)
    start = len(prefix)
    for item in listing.items:
        name = item.name
        end = name.find("/", start)
        if end > 0 and name.startswith(prefix) and _is_image(name):
            found[name[start:end]].append(item)
    return found


# -------------------------------------------------------------------------------------------------------------- Tiny-ImageNet


def _tiny_imagenet(listing: Listing) -> tuple[tuple[ClassName, ...], dict[str, list[Item]]]:
    where = listing.location
    files = {item.name for item in listing.items}
    if "wnids.txt" not in files:
        raise UsageError(f"{where}: no wnids.txt, so this is not the Tiny-ImageNet layout; try --layout folder")
    ids = listing.read_text("wnids.txt").split()
    if len(set(ids)) != len(ids) or not ids:
        raise UsageError(f"{where}: wnids.txt is empty or names a class twice")
    label_of = {id_: label for label, id_ in enumerate(ids)}
    splits = {"train": _labelled_by_folder(listing, "train", label_of)}
    seen = {item.label for item in splits["train"]}
    for id_, label in label_of.items():
        if label not in seen:
            raise UsageError(f"{where}: class {id_} of wnids.txt has no images in train/{id_}")
    if _ANNOTATIONS in files:
        splits["val"] = _labelled_by_annotations(listing, label_of)
    elif "val" in listing.folders:
        splits["val"] = _labelled_by_folder(listing, "val", label_of)
    test = [item for item in listing.items if item.name.startswith("test/") and _is_image(item.name)]
    if test:
        splits["test"] = test
    names = _words(listing) if "words.txt" in files else {}
    return tuple(ClassName(id=id_, name=names.get(id_, id_)) for id_ in ids), splits


def _labelled_by_folder(listing: Listing, split: str, label_of: Mapping[str, int]) -> list[Item]:
    items = []
    for class_id, images in _images_by_class(listing, f"{split}/").items():
        if class_id not in label_of:
            raise UsageError(f"{listing.location}: {split}/{printable(class_id)} is not a class of wnids.txt")
        label = label_of[class_id]
        items += [Item(name, size_bytes, where, label) for name, size_bytes, where, _ in images]
    return items


def _labelled_by_annotations(listing: Listing, label_of: Mapping[str, int]) -> list[Item]:
    where = f"{listing.location}: {_ANNOTATIONS}"
    images = {i.name.removeprefix("val/images/"): i for i in listing.items if i.name.startswith("val/") and _is_image(i.name)}
    labelled: dict[str, Item] = {}
    for number, line in enumerate(listing.read_text(_ANNOTATIONS).splitlines(), start=1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        class_id = rest.partition("\t")[0].strip()
        if name not in images:
            raise UsageError(f"{where} line {number}: no file val/images/{name}")
        if class_id not in label_of:
            raise UsageError(f"{where} line {number}: {class_id!r} is not a class of wnids.txt")
        if name in labelled:
            raise UsageError(f"{where} line {number}: {name} is annotated twice")
        labelled[name] = images[name].labelled(label_of[class_id])
    for name in images:
        if name not in labelled:
            raise UsageError(f"{where}: does not name {printable(name)!r}")
    return list(labelled.values())


def _words(listing: Listing) -> dict[str, str]:
    pairs = (line.partition("\t") for line in listing.read_text("words.txt").splitlines())
    return {id_.strip(): name.strip() for id_, _, name in pairs if name.strip()}


def _refuse_same_but_for_case(where: str, classes: Iterable[ClassName]) -> None:
    """Such a pair is nearly always one class spelt in two ways, and many file systems can store only one of the two."""
    seen: dict[str, str] = {}
    for class_ in classes:
        other = seen.setdefault(class_.id.casefold(), class_.id)
        if other != class_.id:
            raise UsageError(f"{where}: classes {other!r} and {class_.id!r} differ in upper and lower case alone; rename one")
