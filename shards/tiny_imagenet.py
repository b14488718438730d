"""Tiny-ImageNet's layout: ``wnids.txt``, ``words.txt``, ``train/CLASS/images``, ``val/images`` with ``val_annotations.txt``,
and ``test/images`` without labels. Many people sort val into ``val/CLASS`` folders; the annotations may then still be there."""

from __future__ import annotations

from collections.abc import Mapping

from shards.folder_layout import Splits, keys_of_folders
from shards.image_tree import ImageTree
from shards.source import Item, Listing
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
    files = {item.name for item in listing.other_files}
    if WNIDS not in files:
        raise UsageError(f"{where}: no {WNIDS}, so this is not the Tiny-ImageNet layout; try --layout folder")
    ids = listing.read_text(WNIDS).split()
    label_of = {name_key(id_): label for label, id_ in enumerate(ids)}
    if len(label_of) != len(ids) or not ids:
        raise UsageError(f"{where}: {WNIDS} is empty or names a class twice")
    splits = {"train": _labelled_by_folder(tree, "train", label_of)}
    seen = {item.label for item in splits["train"]}
    for label, id_ in enumerate(ids):
        if label not in seen:
            raise UsageError(f"{where}: class {id_} of {WNIDS} has no images in train/{id_}")
    if _ANNOTATIONS in files:
        splits["val"] = _labelled_val(listing, tree, label_of)
    elif tree.count["val"]:
        splits["val"] = _labelled_by_folder(tree, "val", label_of)
    if tree.count["test"]:
        splits["test"] = list(tree.all_images("test"))
    names = _words(listing) if _WORDS in files else {}
    return tuple(ClassName(id=id_, name=names.get(id_, id_)) for id_ in ids), splits


def _labelled_by_folder(tree: ImageTree, split: str, label_of: Mapping[str, int]) -> list[Item]:
    items: list[Item] = []
    if split in tree.images:
        name = shown(tree.images[split][0].name)
        raise UsageError(f"{tree.location}: {name} is in no class folder of {split}; move or remove it")
    for key, folder in keys_of_folders(tree.location, tree.folders(split)).items():
        if key in label_of:
            items += [item.labelled(label_of[key]) for item in tree.all_images(folder)]
        elif tree.count[folder]:
            fix = f"add {_ANNOTATIONS}, sort val into class folders, or remove it" if split == "val" else "remove it"
            raise UsageError(f"{tree.location}: {shown(folder)} is not a class of {WNIDS}; {fix}")
    return items


def _labelled_val(listing: Listing, tree: ImageTree, label_of: Mapping[str, int]) -> list[Item]:
    """Labelled by the annotations, which name files without their folders. Images in class folders must have the same label
    there, if they are annotated at all."""
    where = f"{listing.location}: {_ANNOTATIONS}"
    annotated: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(listing.read_text(_ANNOTATIONS).splitlines(), start=1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        class_id = rest.partition("\t")[0].strip()
        if name_key(class_id) not in label_of:
            raise UsageError(f"{where} line {number}: {class_id!r} is not a class of {WNIDS}")
        if name in annotated:
            raise UsageError(f"{where} line {number}: {name} is annotated twice")
        annotated[name] = number, class_id
    images = {item.name: item for item in tree.all_images("val")}
    by_base: dict[str, list[str]] = {}
    for path in images:
        by_base.setdefault(path.rpartition("/")[2], []).append(path)
    for name, (number, class_id) in annotated.items():
        paths = by_base.get(name, [])
        if len(paths) != 1:
            what = f"there is no image {shown(name)} in val; is the source complete?"
            if paths:
                what = f"{shown(name)} may be {paths[0]} or {paths[1]}; {_FIX}"
            raise UsageError(f"{where} line {number}: {what}")
        label = label_of[name_key(class_id)]
        if _label_of_folder(paths[0], label_of) not in (None, label):
            raise UsageError(f"{where} line {number}: says {class_id}, but the image is {shown(paths[0])}; {_FIX}")
        images[paths[0]] = images[paths[0]].labelled(label)
    for path, item in images.items():
        if item.label is None:
            if (by_folder := _label_of_folder(path, label_of)) is None:
                raise UsageError(f"{where}: does not name {shown(path)}, which is in no class folder either; remove the image")
            images[path] = item.labelled(by_folder)
    return list(images.values())


def _label_of_folder(path: str, label_of: Mapping[str, int]) -> int | None:
    return label_of.get(name_key(path.split("/")[1]))


def _words(listing: Listing) -> dict[str, str]:
    pairs = (line.partition("\t") for line in listing.read_text(_WORDS).splitlines())
    return {id_.strip(): name.strip() for id_, _, name in pairs if name.strip()}
