"""The layouts SPLIT/CLASS/* and CLASS/*: which folders are splits and which are classes, by their names and by their shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from shards.image_tree import ImageTree
from shards.items import Items
from tidali.dataset.contract import ClassName
from tidali.dataset.file_names import name_key, shown, split_of, visible_name
from tidali.errors import UsageError
from tidali.files import printable

Splits = dict[str, Items]

_KINDS_OF_FILES = {
    *("images", "image", "imgs", "img", "jpegimages", "data", "dataset"),
    *("annotations", "annotation", "labels", "masks", "trimaps"),
}
"""Names of folders beside each other that say what is in them, not of what class it is."""


def read_folders(tree: ImageTree, *, folders_are_classes: bool) -> tuple[tuple[ClassName, ...], Splits, list[str]]:
    """The classes, sorted by name; the images of each split; and what may be wrong with that.

    Args:
        folders_are_classes: where folders may be either splits or classes, take them for classes instead of refusing.
    """
    where = tree.location
    split_folders = _split_folders(tree, folders_are_classes)
    _refuse_stray(tree, split_folders)
    train = keys_of_folders(where, tree.folders(tree.unwrapped(split_folders["train"])))
    ids = _class_ids(tree, train, folders_are_classes)
    labels = {key: label for label, key in enumerate(sorted(ids, key=ids.__getitem__))}
    splits: Splits = {}
    for split, folder in split_folders.items():
        if not tree.count[folder]:
            raise UsageError(f"{where}: {folder} holds no images; fill it or remove it")
        root = tree.unwrapped(folder, stop=lambda name: name_key(name) in labels)
        found = train if split == "train" else keys_of_folders(where, tree.folders(root))
        parts = [tree.none]
        for key, inner in found.items():
            if not tree.count[inner]:
                continue
            if key in labels:
                parts.append(tree.all_images(inner).labelled(labels[key]))
            else:
                name = shown(inner.rpartition("/")[2])
                raise UsageError(f"{where}: {split} has a class {name} that train does not have; move or remove it")
        splits[split] = Items.join(parts)
    warnings = [] if folders_are_classes else list(_about_shape(tree, list(train.values())))
    return tuple(ClassName(id=id_, name=id_) for id_ in sorted(ids.values())), splits, warnings


def keys_of_folders(where: str, folders: Iterable[str]) -> dict[str, str]:
    """The key of each folder's name -> the folder.

    Two folders with one key are nearly always one class spelt in two ways, and many file systems can store only one of the two.
    """
    found: dict[str, str] = {}
    for folder in folders:
        other = found.setdefault(name_key(folder.rpartition("/")[2]), folder)
        if other != folder:
            what = "differ only in upper and lower case, in spaces, or in how their letters are encoded"
            raise UsageError(f"{where}: the folders {printable(other)!a} and {printable(folder)!a} {what}; make them one")
    return found


def _split_folders(tree: ImageTree, folders_are_classes: bool) -> dict[str, str]:
    """Split -> its folder; the root as train where there are no folders of splits."""
    where = tree.location
    named = {folder: split for folder in tree.folders("") if (split := split_of(folder))}
    others = [folder for folder in tree.filled("") if folder not in named]
    flat = [folder for folder in named if tree.count[folder] and not tree.filled(folder)]
    if others and flat:
        if not folders_are_classes:
            what = f"{shown(flat[0])} has a split's name, but holds images itself and is beside {shown(others[0])}"
            raise UsageError(f"{where}: {what}; move or remove it, or add --layout folder if it is a class")
        return {"train": ""}
    if not any(tree.count[folder] for folder in named):
        return {"train": ""}
    found: dict[str, str] = {}
    for folder, split in named.items():
        if split in found:
            both = f"{shown(found[split])} and {shown(folder)}"
            raise UsageError(f"{where}: two folders for {split}: {both}; make them one, or rename one")
        found[split] = folder
    if "train" not in found:
        raise UsageError(f"{where}: has {', '.join(named)} but no train folder; name the one to train on 'train'")
    return found


def _refuse_stray(tree: ImageTree, split_folders: dict[str, str]) -> None:
    """Every image must be in a class folder of a split."""
    for folder in split_folders.values():
        if folder in tree.images and not tree.filled(folder):
            images = tree.images[folder]
            what = f"{folder or 'the source'} holds {len(images):,} images, but no folders of classes"
            fix = f"sort them into {f'{folder}/CLASS'.lstrip('/')} folders"
            if folder:
                fix += f", or move {folder} out of the source"
            if "ilsvrc2012_val" in images[0].name.lower():
                fix += "; ImageNet's LOC_val_solution.csv, or its development kit, lists the class of each"
            raise UsageError(f"{tree.location}: no data set: {what}; {fix}")
    roots = tuple(split_folders.values())
    for folder, images in tree.images.items():
        if folder in roots or (roots != ("",) and folder.partition("/")[0] not in roots):
            name = images[0].name
            raise UsageError(f"{tree.location}: {shown(name)} is not in a class folder of a split; move or remove it")


def _class_ids(tree: ImageTree, folders: dict[str, str], folders_are_classes: bool) -> dict[str, str]:
    """The key of each of train's classes -> its id."""
    where = tree.location
    for folder in folders.values():
        if not tree.count[folder]:
            raise UsageError(f"{where}: class folder {shown(folder)} of train contains no images; remove it or fill it")
    if not folders_are_classes:
        _refuse_missed_level(tree, list(folders.values()))
        for key, folder in folders.items():
            if key in _KINDS_OF_FILES and len(folders) > 1:
                what = f"{shown(folder)} is rather a kind of files than a class"
                fix = "give the folder that holds the classes, or add --layout folder if it is a class"
                raise UsageError(f"{where}: {what}; {fix}")
    ids = {}
    for key, folder in folders.items():
        ids[key] = visible_name(printable(folder.rpartition("/")[2]))
        if not ids[key]:
            raise UsageError(f"{where}: the name of the class folder {printable(folder)!a} is invisible; rename it")
    return ids


def _refuse_missed_level(tree: ImageTree, classes: list[str]) -> None:
    """Folders that hold no image themselves, and share the names of their folders, are rather splits, persons or cameras than
    classes: as classes they would be learnt with nobody noticing."""
    inside = {folder: tree.filled(tree.unwrapped(folder)) for folder in classes}
    names = Counter(name_key(inner.rpartition("/")[2]) for found in inside.values() if len(found) > 1 for inner in found)
    shared = sorted(name for name, count in names.items() if count > 1)
    if 2 * len(shared) < len(names) or not shared or any(folder in tree.images for folder in classes):
        return
    holders = [folder for folder, found in inside.items() if len(found) > 1]
    what = f"{shown(holders[0])} and {shown(holders[1])} hold no images themselves, and both hold {shown(shared[0])}"
    splits = "if they are splits, rename them to train, val and test; if they are groups, move the classes up"
    raise UsageError(f"{tree.location}: {what}; {splits}; if they are the classes, add --layout folder")


def _about_shape(tree: ImageTree, classes: list[str]) -> Iterator[str]:
    """Such folders may be classes themselves."""
    inside = {folder: tree.filled(tree.unwrapped(folder)) for folder in classes if folder not in tree.images}
    several = [folder for folder, found in inside.items() if len(found) > 1]
    if several:
        names = ", ".join(shown(inner.rpartition("/")[2]) for inner in inside[several[0]][:3])
        what = f"{len(several)} classes hold no images themselves but several folders, such as {shown(several[0])} with {names}"
        yield f"{tree.location}: {what}; each was taken as one class"
    if len(classes) == 1:
        name = shown(classes[0].rpartition("/")[2])
        what = f"has only one class, {name}: whatever a network learns, its accuracy will be 100 %"
        yield f"{tree.location}: {what}; SOURCE must be the folder around the folders of classes, or of splits"
