"""Tiny-ImageNet's layout: ``wnids.txt``, ``words.txt``, ``train/CLASS/images``, ``val/images`` with ``val_annotations.txt``,
and ``test/images`` without labels. Many people sort val into ``val/CLASS`` folders; the annotations may then still be there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shards.folder_layout import Splits, keys_of_folders
from shards.image_tree import ImageTree
from shards.items import Items
from shards.source import Listing
from tidali.dataset.contract import ClassName
from tidali.dataset.file_names import name_key, shown
from tidali.errors import UsageError

WNIDS = "wnids.txt"
_WORDS = "words.txt"
_ANNOTATIONS = "val/val_annotations.txt"
_FIX = f"remove {_ANNOTATIONS} if the class folders in val are right"


def read_tiny_imagenet(listing: Listing, tree: ImageTree) -> tuple[tuple[ClassName, ...], Splits]:
    """The classes in wnids.txt's order, and the images of each split."""
    where = listing.location
    files = listing.other_files
    if files.find(WNIDS) is None:
        raise UsageError(f"{where}: no {WNIDS}, so this is not the Tiny-ImageNet layout; try --layout folder")
    ids = listing.read_text(WNIDS).split()
    label_of = {name_key(id_): label for label, id_ in enumerate(ids)}
    if len(label_of) != len(ids) or not ids:
        raise UsageError(f"{where}: {WNIDS} is empty or names a class twice")
    splits = {"train": _labelled_by_folder(tree, "train", label_of)}
    seen = set(splits["train"].labels.tolist())
    for label, id_ in enumerate(ids):
        if label not in seen:
            raise UsageError(f"{where}: class {id_} of {WNIDS} has no images in train/{id_}")
    if files.find(_ANNOTATIONS) is not None:
        splits["val"] = _labelled_val(listing, tree, label_of)
    elif tree.count["val"]:
        splits["val"] = _labelled_by_folder(tree, "val", label_of)
    if tree.count["test"]:
        splits["test"] = tree.all_images("test")
    names = _words(listing) if files.find(_WORDS) is not None else {}
    return tuple(ClassName(id=id_, name=names.get(id_, id_)) for id_ in ids), splits


def _labelled_by_folder(tree: ImageTree, split: str, label_of: Mapping[str, int]) -> Items:
    parts = [tree.none]
    if split in tree.images:
        name = shown(tree.images[split][0].name)
        raise UsageError(f"{tree.location}: {name} is in no class folder of {split}; move or remove it")
    for key, folder in keys_of_folders(tree.location, tree.folders(split)).items():
        if not tree.count[folder]:
            continue
        if key in label_of:
            parts.append(tree.all_images(folder).labelled(label_of[key]))
        else:
            fix = f"add {_ANNOTATIONS}, sort val into class folders, or remove it" if split == "val" else "remove it"
            raise UsageError(f"{tree.location}: {shown(folder)} is not a class of {WNIDS}; {fix}")
    return Items.join(parts)


def _labelled_val(listing: Listing, tree: ImageTree, label_of: Mapping[str, int]) -> Items:
    """Labelled by the annotations, which name files without their folders. Images in class folders must have the same label
    there, if they are annotated at all."""
    where = f"{listing.location}: {_ANNOTATIONS}"
    line_of: dict[str, int] = {}
    lines = listing.read_text(_ANNOTATIONS).splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, class_id = _annotation(line)
        if name_key(class_id) not in label_of:
            raise UsageError(f"{where} line {number}: {class_id!r} is not a class of {WNIDS}")
        if name in line_of:
            raise UsageError(f"{where} line {number}: {name} is annotated twice")
        line_of[name] = number
    items = tree.all_images("val")
    labels = np.full(len(items), -1, np.int32)
    image_of = np.full(len(lines) + 1, -1, np.int64)  # line -> position in items
    for index, path in enumerate(items.names()):
        number = line_of.get(path.rpartition("/")[2], 0)
        if not number:
            continue
        if image_of[number] >= 0:
            both = f"{items[int(image_of[number])].name} or {path}"
            raise UsageError(f"{where} line {number}: {shown(path.rpartition('/')[2])} may be {both}; {_FIX}")
        class_id = _annotation(lines[number - 1])[1]
        labels[index], image_of[number] = label_of[name_key(class_id)], index
        if _label_of_folder(path, label_of) not in (None, labels[index]):
            raise UsageError(f"{where} line {number}: says {class_id}, but the image is {shown(path)}; {_FIX}")
    for name, number in line_of.items():
        if image_of[number] < 0:
            raise UsageError(f"{where} line {number}: there is no image {shown(name)} in val; is the source complete?")
    for index in np.flatnonzero(labels < 0).tolist():
        path = items[index].name
        if (by_folder := _label_of_folder(path, label_of)) is None:
            raise UsageError(f"{where}: does not name {shown(path)}, which is in no class folder either; remove the image")
        labels[index] = by_folder
    return items.labelled(labels)


def _annotation(line: str) -> tuple[str, str]:
    """The file and the class that a line names."""
    name, _, rest = line.partition("\t")
    return name, rest.partition("\t")[0].strip()


def _label_of_folder(path: str, label_of: Mapping[str, int]) -> int | None:
    return label_of.get(name_key(path.split("/")[1]))


def _words(listing: Listing) -> dict[str, str]:
    pairs = (line.partition("\t") for line in listing.read_text(_WORDS).splitlines())
    return {id_.strip(): name.strip() for id_, _, name in pairs if name.strip()}
