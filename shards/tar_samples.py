"""The samples of one WebDataset tar that another program wrote: each one's members, its image and its label.

The tar is read by Python's tarfile and not by the webdataset library, which reads tars as streams: it has no offsets, which
DALI's index and workers that read single images need, and does not notice that a tar was cut off between two members. Nothing
is extracted or unpickled: of a sample only its label is read, which is text or a field of JSON.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tidali.dataset.file_names import is_image_name, printable_path, shown
from tidali.dataset.shard_bytes import BLOCK_BYTES, END_OF_ARCHIVE, LABEL_EXTENSION, Component
from tidali.errors import some_of
from tidali.images.kinds import other_kind

JSON_EXTENSION = "json"
DEFAULT_FIELD = "label"
_LABEL_BYTES_LIMIT = 1 << 24
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members, which it leaves out
_NUMBER = re.compile(r"[0-9]{1,9}")

Label = int | str
"""A number, or a class's name."""


class TarSample(NamedTuple):
    """Consecutive members of a tar whose names are the same up to the first dot."""

    key: str
    """Their name up to that dot, with folders."""
    members: tuple[Component, ...]
    """All files of the sample, in the tar's order; an extension is what follows the first dot."""
    image: Component
    label: Label | None


@dataclass
class TarContents:
    """What a tar holds. A fault is one line, which names the tar."""

    samples: list[TarSample] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    label_faults: list[str] = field(default_factory=list)
    """Of the samples whose label is None, one each."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files and samples without an image are not part of the data set, by kind."""


class _Damaged(Exception):
    """A tar that cannot be read to its end."""


def read_tar(path: Path, label_field: str | None) -> TarContents:
    """
    Args:
        label_field: of the samples' JSON, that is their label; None for the ``.cls`` member, or where a sample has none the
            field 'label'.

    Raises:
        OSError: it cannot be read.
    """
    contents = TarContents()
    where = printable_path(path)
    with open(path, "rb") as file:
        try:
            members = list(_members(file, contents, where))
        except _Damaged as damage:
            contents.faults.append(f"{where}: {damage}")
            return contents
        seen: set[str] = set()
        for key, group in groupby(members, key=_key):
            _add_sample(contents, f"{where}: sample {shown(key)}", key, tuple(group), seen)
        contents.samples = [_labelled(sample, file, contents, where, label_field) for sample in contents.samples]
    return contents


def _key(component: Component) -> str:
    return component.name[: -len(component.extension) - 1]


def _add_sample(contents: TarContents, where: str, key: str, members: tuple[Component, ...], seen: set[str]) -> None:
    repeated = [name for name, count in Counter(member.name.lower() for member in members).items() if count > 1]
    images = [member for member in members if is_image_name(member.name)]
    if key in seen or repeated:
        what = "the same key twice in one tar: the members of a sample must follow one another; write the tar again"
        contents.faults.append(f"{where}: {what}")
    elif len(images) > 1:
        names = ", ".join(shown(image.name) for image in images[:3])
        rule = "a sample is what has the same name up to the first dot, and has one image"
        contents.faults.append(f"{where}: {len(images)} images ({names}); {rule}: write the tar again")
    elif not images:
        contents.left_out["samples without an image"] += 1
    else:
        contents.samples.append(TarSample(key, members, images[0], None))
    seen.add(key)


# -------------------------------------------------------------------------------------------------------------------- members


def _members(file: BinaryIO, contents: TarContents, where: str) -> Iterator[Component]:
    """The files that belong to samples.

    Raises:
        _Damaged: it is no tar, or the tar is damaged.
    """
    for member in _all_members(file):
        stem, dot, extension = member.name.rpartition("/")[2].partition(".")
        if member.isdir() or _META.match(member.name):
            continue
        if not member.isfile() or member.issparse():
            kind = "a sparse file" if member.issparse() else "a link or a device"
            contents.faults.append(f"{where}: {shown(member.name)} is {kind}; write the tar again with whole files")
        elif not stem:
            contents.left_out["hidden files in tars"] += 1
        elif not dot or not extension:
            contents.left_out["files without a suffix in tars"] += 1
        else:
            yield Component(extension, member.offset_data, member.size, member.name)


def _all_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    end, last = 0, ""
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.offset < end or tar.offset < member.offset_data:
                    raise _Damaged(f"damaged at byte {end}: a header that leads backwards; download or write it again")
                end, last = tar.offset, member.name
                yield member
    except _Damaged:
        raise
    except (
        Exception
    ) as error:  # of a damaged header tarfile raises OSError, ValueError, OverflowError, RecursionError and others
        file.seek(0)
        kind = other_kind(file.read(4096)) if not end else None
        if kind is not None and kind[0] != "a tar archive":
            fix = "decompress it, for example with 'gunzip'" if kind[0].startswith("data compressed") else kind[1]
            raise _Damaged(f"no tar but {kind[0]}; {fix}") from None
        if not end:
            raise _Damaged(f"no tar ({error})") from None
        raise _Damaged(f"cut off or damaged after {shown(last)} ({error}); download or write it again") from None
    _check_end(file, end, last)


def _check_end(file: BinaryIO, end: int, last: str) -> None:
    """tarfile takes a header that it cannot read, and the end of the file, for the end of the archive."""
    file.seek(end)
    block = file.read(len(END_OF_ARCHIVE))
    after = f"after {shown(last)}" if last else "at its beginning"
    if len(block) < len(END_OF_ARCHIVE) and not block.strip(b"\0"):
        fix = "download or write it again; if nothing is missing, 'truncate -s +1024 FILE' writes that end"
        raise _Damaged(f"cut off {after}: it has no two blocks of zeros there, as a tar's end does; {fix}")
    if block[:BLOCK_BYTES].strip(b"\0"):
        raise _Damaged(f"damaged at byte {end}, {after}: no header of a member; download or write it again")
    while block:
        if block.strip(b"\0"):
            raise _Damaged(f"it goes on after its end {after}, as two tars in one file do; write the tar again")
        block = file.read(1 << 20)


# --------------------------------------------------------------------------------------------------------------------- labels


class _NoLabel(Exception):
    """Why a sample has none."""


def _labelled(sample: TarSample, file: BinaryIO, contents: TarContents, where: str, label_field: str | None) -> TarSample:
    try:
        return sample._replace(label=_read_label(sample, file, label_field))
    except _NoLabel as reason:
        contents.label_faults.append(f"{where}: sample {shown(sample.key)}: {reason}")
        return sample


def _read_label(sample: TarSample, file: BinaryIO, label_field: str | None) -> Label:
    by_extension = {member.extension.lower(): member for member in sample.members}
    member = by_extension.get(LABEL_EXTENSION) if label_field is None else None
    if member is not None:
        return _parsed(_read_text(file, member), member.name)
    member = by_extension.get(JSON_EXTENSION)
    if member is None:
        wanted = f".{JSON_EXTENSION}" if label_field is not None else f".{LABEL_EXTENSION} and no .{JSON_EXTENSION}"
        raise _NoLabel(f"no label: it has no {wanted}; add it, or leave the sample out of the tar")
    try:
        document = json.loads(_read_text(file, member))
    except (ValueError, RecursionError):
        raise _NoLabel(f"no label: {shown(member.name)} is not JSON") from None
    name = label_field or DEFAULT_FIELD
    value = document.get(name) if isinstance(document, dict) else None
    if value is None:
        fields = some_of(sorted(map(str, document)), 8) if isinstance(document, dict) else ""
        raise _NoLabel(f"no label: its JSON has no field {name!r}; name the one that it has with --label-field ({fields})")
    if isinstance(value, str):
        return _parsed(value, f"{member.name}, field {name!r}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise _NoLabel(f"the field {name!r} of its JSON is {str(value)[:40]!r}: no number or name of a class")
    return _parsed(str(value), f"{member.name}, field {name!r}")


def _read_text(file: BinaryIO, member: Component) -> str:
    if member.size_bytes > _LABEL_BYTES_LIMIT:
        raise _NoLabel(f"{shown(member.name)} has {member.size_bytes:,} bytes, too many for a label")
    try:
        return os.pread(file.fileno(), member.size_bytes, member.offset).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _NoLabel(f"{shown(member.name)} is not UTF-8 text") from None


def _parsed(text: str, place: str) -> Label:
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return int(text)
    if not text or not text.isprintable() or len(text) > 256 or re.fullmatch(r"[-+]?[\d.]+", text):
        raise _NoLabel(f"the label in {shown(place)} is {text[:40]!r}: no number or name of a class")
    return text
