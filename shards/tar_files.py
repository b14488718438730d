"""Tars that another program wrote, as a source: which there are, the split of each, their classes."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from shards.tar_samples import Label, TarContents, read_tar
from tidali.dataset.contract import ClassName
from tidali.dataset.file_names import name_key, printable_path, shown, split_of, visible_name, walk
from tidali.errors import UsageError, counted

_MOST_TARS = 1_000_000
_SMALL_JOB_BYTES = 1 << 25
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.z")


class Tar(NamedTuple):
    """A tar of a source."""

    name: str
    """'/'-separated, relative to the source's folder."""
    split: str


class TarSummary(NamedTuple):
    """What is known of a tar before its images are read."""

    samples: int
    labels: Mapping[Label | None, int]
    """Label -> samples."""
    digest: str
    """Of the names, sizes, places and labels of its samples."""
    faults: tuple[str, ...]
    label_faults: tuple[str, ...]
    left_out: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How a sample's label is found."""

    field: str | None = None
    """Of its JSON, see `shards.tar_samples.read_tar`."""
    numbers: Mapping[str, int] | None = None
    """Class id -> number, where labels are names; None where they are numbers."""

    def number(self, label: Label | None) -> int | None:
        """
        Raises:
            KeyError: a name that is none of the classes'.
        """
        if label is None or isinstance(label, int):
            return label
        return (self.numbers or {})[visible_name(label)]


# ----------------------------------------------------------------------------------------------------------------------- tars


def is_pattern(location: str) -> bool:
    """Whether a location that does not exist names several tars: by braces, or as a glob."""
    return not os.path.lexists(location) and any(character in location for character in "{*?[")


def find_tars(location: Path) -> tuple[Path, tuple[Tar, ...]]:
    """The tars of a folder, of one file, or of a pattern such as ``train-{000000..000255}.tar``, sorted by name; and their
    folder.

    Raises:
        UsageError: there are none, one is missing, or they cannot be divided into splits.
    """
    paths = sorted(_paths(location))
    if not paths:
        raise UsageError(f"{location}: no tars there")
    root = location if os.path.isdir(location) else Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    names = [os.path.relpath(path, root) for path in paths]
    return root, tuple(sorted((Tar(name, split) for name, split in zip(names, _splits(location, names), strict=True))))


def _paths(location: Path) -> Iterator[str]:
    if os.path.isdir(location):  # Path.is_dir raises where a pattern is longer than a name can be
        for name, _, is_folder in walk(location, Counter()):
            lower = name.lower()
            if not is_folder and lower.endswith(_COMPRESSED):
                raise UsageError(f"{location}/{name}: a compressed tar; decompress it first, for example with 'gunzip'")
            if not is_folder and lower.endswith(".tar"):
                yield f"{location}/{name}"
        return
    if not is_pattern(str(location)):
        if not os.path.isfile(location):
            raise UsageError(f"{location}: no such folder or tar")
        yield str(location)
        return
    try:
        ends = re.findall(r"\{(-?\d+)\.\.(-?\d+)", str(location))
        # braceexpand makes a list of each range, and lists of lists of braces beside each other.
        too_many = str(location).count("{") > 4 or any(abs(int(last) - int(first)) >= _MOST_TARS for first, last in ends)
        patterns = [] if too_many else list(islice(braceexpand(str(location)), _MOST_TARS + 1))
    except ValueError as error:
        raise UsageError(
            f"{location}: not a pattern of names ({error}); write, for example, '{{000000..000255}}.tar'"
        ) from None
    if too_many or len(patterns) > _MOST_TARS:
        raise UsageError(f"{location}: more than {_MOST_TARS:,} names, or more than four pairs of braces")
    for pattern in dict.fromkeys(patterns):
        if os.path.exists(pattern):
            found = [pattern]
        else:
            found = glob.glob(pattern) if any(character in pattern for character in "*?[") else []
        if not found:
            raise UsageError(f"{pattern}: no such tar, of those that {str(location)!r} names")
        yield from found


def _splits(location: Path, names: Sequence[str]) -> list[str]:
    """The split of each tar, by a folder above it or, where there are none of splits, by a word in its own name."""
    for of in (_split_of_folder, _split_of_name):
        splits = [of(name) for name in names]
        if not any(splits):
            continue
        without = [name for name, split in zip(names, splits, strict=True) if split is None]
        if without:
            named = next(name for name, split in zip(names, splits, strict=True) if split)
            what = f"{shown(named)} is named after a split, and {shown(without[0])} is not"
            raise UsageError(f"{location}: {what}; move or rename one of them, or give one split's tars at a time")
        if "train" not in splits:
            raise UsageError(f"{location}: has {', '.join(sorted(set(map(str, splits))))} but no train tars")
        return [str(split) for split in splits]
    return ["train"] * len(names)


def _split_of_folder(name: str) -> str | None:
    return next(filter(None, map(split_of, name.split("/")[:-1])), None)


def _split_of_name(name: str) -> str | None:
    words = re.split(r"[\W\d_]+", name.rpartition("/")[2].removesuffix(".tar"))
    splits = {split for word in words if (split := split_of(word))}
    return splits.pop() if len(splits) == 1 else None


# ------------------------------------------------------------------------------------------------------------------- contents


def read_summarised(tar: Tar, root: Path, label_field: str | None) -> tuple[TarSummary, TarContents]:
    """Reads its headers and labels."""
    contents = read_tar(root / tar.name, label_field)
    digest = hashlib.sha256()
    for sample in contents.samples:
        digest.update(f"{sample.members}\0{sample.label!r}\n".encode("utf-8", "surrogateescape"))
    labels = Counter(sample.label for sample in contents.samples)
    faults, label_faults = tuple(contents.faults), tuple(contents.label_faults)
    summary = TarSummary(len(contents.samples), labels, digest.hexdigest(), faults, label_faults, contents.left_out)
    return summary, contents


def summarise_for_index(tar: Tar, *, root: Path, label_field: str | None) -> TarSummary:
    """The same, where DALI's index must be able to hold the names."""
    summary, contents = read_summarised(tar, root, label_field)
    beyond = _names_beyond_index(contents, printable_path(root / tar.name))
    return summary._replace(faults=(*summary.faults, *beyond))


def small_job(root: Path, tars: Sequence[Tar]) -> bool:
    """Whether one core has read the tars before workers have started."""
    return sum((root / tar.name).stat().st_size for tar in tars) < _SMALL_JOB_BYTES


def _names_beyond_index(contents: TarContents, where: str) -> Iterator[str]:
    for sample in contents.samples:
        for member in sample.members:
            name = member.name
            if name.split() != [name] or not name.isprintable():  # which bytes that are not UTF-8 are not
                what = "DALI's index cannot hold a name with spaces, or that is not UTF-8"
                yield f"{where}: {shown(name)}: {what}; 'tidali shard' packs such tars anew"


def refuse_faults(tars: Iterable[Tar], summaries: Iterable[TarSummary]) -> None:
    """A test whose samples all have no label is unlabelled; of any other split every sample has one.

    Raises:
        UsageError: names the first fault and counts the others.
    """
    unlabelled = unlabelled_splits(tars, summaries)
    faults = [
        (*summary.faults, *(() if tar.split in unlabelled else summary.label_faults))
        for tar, summary in zip(tars, summaries, strict=True)
    ]
    faulty = [of_tar for of_tar in faults if of_tar]
    if faulty:
        more = sum(map(len, faulty)) - 1
        raise UsageError(f"{faulty[0][0]}" + (f"; and {more:,} more in {counted(len(faulty), 'tar')}" if more else ""))


def unlabelled_splits(tars: Iterable[Tar], summaries: Iterable[TarSummary]) -> set[str]:
    """Those without any label; only test may be."""
    labelled = {tar.split for tar, summary in zip(tars, summaries, strict=True) if set(summary.labels) - {None}}
    return {"test"} - labelled


def make_classes(
    where: str, summaries: Sequence[TarSummary], field: str | None, names: Sequence[str] | None
) -> tuple[tuple[ClassName, ...], Labels]:
    """The classes in the order of their numbers, and how labels become these numbers.

    Args:
        where: for messages.
        names: of the classes, in the order of their numbers; None if they are not known, so that classes are called by their
            numbers, or are sorted by name where labels are names.

    Raises:
        UsageError: labels of both kinds, or that are not the classes'.
    """
    found = {label for summary in summaries for label in summary.labels if label is not None}
    numbers, texts = {label for label in found if isinstance(label, int)}, {label for label in found if isinstance(label, str)}
    if numbers and texts:
        both = f"{min(numbers)} and {shown(min(texts))}"
        raise UsageError(f"{where}: some labels are numbers and some are names, such as {both}; make them one kind")
    if texts:
        ids = _ids(where, texts, names)
        return tuple(ClassName(id=id_, name=id_) for id_ in ids), Labels(field=field, numbers={i: n for n, i in enumerate(ids)})
    if not numbers:
        raise UsageError(f"{where}: no sample has a label")
    largest = max(numbers)
    if names is not None and largest >= len(names):
        from_1 = min(numbers) == 1 and largest == len(names)
        way_out = "; the labels count from 1: begin the file with a line for class 0, such as 'unused'" if from_1 else ""
        raise UsageError(
            f"{where}: a label is {largest}, and --class-names has only {len(names)} lines, which count from 0{way_out}"
        )
    if names is None and largest >= 2 * len(numbers) + 8:
        what = f"labels are up to {largest}, but only {len(numbers)} different ones occur"
        raise UsageError(
            f"{where}: {what}; if they are right, give all names with --class-names FILE, else another --label-field"
        )
    if names is None:
        names = [str(number) for number in range(largest + 1)]
    return tuple(ClassName(id=str(number), name=name) for number, name in enumerate(names)), Labels(field=field)


def _ids(where: str, texts: Iterable[str], names: Sequence[str] | None) -> list[str]:
    spelt: dict[str, str] = {}
    for text in sorted(texts):
        other = spelt.setdefault(name_key(text), text)
        if visible_name(other) != visible_name(text):
            both = f"{printable_path(other)!a} and {printable_path(text)!a}"
            raise UsageError(f"{where}: the labels {both} differ only in upper and lower case or in spaces; make them one")
    found = sorted({visible_name(text) for text in spelt.values()})
    if names is None:
        return found
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UsageError(f"--class-names: {shown(twice)} is there twice, and labels are names here")
    if missing := [id_ for id_ in found if id_ not in set(names)]:
        raise UsageError(f"--class-names: has no {shown(missing[0])}, which is a label in {where}")
    return list(names)


def read_class_names(path: Path) -> tuple[str, ...]:
    """A class's name a line, in the order of the labels.

    Raises:
        UsageError: the file cannot be read, is empty, or has an empty line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--class-names {path}: not a readable file of names ({error})") from None
    names = tuple(map(visible_name, lines))
    if not names or not all(names):
        line = names.index("") + 1 if names else 1
        raise UsageError(f"--class-names {path}: line {line} is empty; each line is a class, and the first one's label is 0")
    return names
