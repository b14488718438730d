"""One shard against the manifest: its files' hashes, then every member's header, bytes and label."""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.check_adopted import check_adopted
from shards.check_image import SecondDecoder, image_faults
from shards.duplicates import Contents
from shards.hashed_file import HashedFile
from shards.record import ShardSummary, summarise, unseal
from shards.tar_files import Labels
from tidali.dataset.contract import Shard
from tidali.dataset.shard_bytes import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    LABEL_EXTENSION,
    Component,
    format_index,
    label_bytes,
    label_digits,
    member_header,
    padding,
    parse_index,
)
from tidali.errors import DatasetError
from tidali.files import file_digest

_FIX = "pack the source again into this folder: correct shards are kept, this one is rewritten"
_MOST_FAULTS_A_FILE = 10


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a file, and how to fix it."""

    file: str
    """Relative to the data set."""
    text: str
    fix: str = _FIX
    key: str | None = None
    """Of the sample, if the fault is in one sample."""
    offset: int | None = None
    """In the file, in bytes."""

    def __str__(self) -> str:
        key = f": sample {self.key}" if self.key else ""
        offset = f" at byte {self.offset}" if self.offset is not None else ""
        return f"{self.file}{key}{offset}: {self.text}; {self.fix}"


@dataclass(slots=True)
class ShardCheck:
    """The result of checking one shard."""

    faults: list[Fault] = field(default_factory=list)
    summary: ShardSummary | None = None
    """From the record, if it is intact."""
    ordinals: array[int] = field(default_factory=lambda: array("q"))
    """Of the samples and of the quarantined files."""
    contents: Contents = field(default_factory=Contents)
    """Of an intact shard; empty otherwise."""


def check_shard(
    task: tuple[str, Shard],
    *,
    root: Path,
    num_classes: int,
    unlabelled: frozenset[str],
    file_of: Mapping[str, str],
    decode: bool,
    second_decoder: SecondDecoder | None,
    adopted: Labels | None,
) -> ShardCheck:
    """Check a split's shard; with ``decode`` every image too.

    Args:
        adopted: how the labels of a shard are found that another program wrote; None of a packed one.
        file_of: every SHA-256 of the manifest -> its file, to recognise swapped ones.
    """
    split, shard = task
    check = ShardCheck()
    record = _check_record(root, split, shard, file_of, check, has_ordinals=adopted is None)
    digits = 0 if split in unlabelled else label_digits(num_classes)
    index_fault = _hash_fault(root, shard.index_name, shard.index_sha256, None, file_of)
    if record is not None and record["sha256"] != shard.sha256:
        record = None  # the record of another tar: checking this tar against it would report a thousand false faults
    expected = [] if record is None or adopted is not None else list(_expected_members(record, digits))
    found: list[Fault] = []
    contents = Contents()

    def read_tar(path: Path) -> str:
        if record is not None and adopted is not None:
            texts = check_adopted(path, record, adopted, contents, decode, second_decoder)
            found.extend(Fault(shard.name, text, key=key) for key, text in texts)
            return file_digest(path)
        with HashedFile(path) as tar:
            if record is not None:
                found.extend(_check_members(shard.name, tar, expected, contents, decode, second_decoder))
            return tar.sha256()

    tar_fault = _hash_fault(root, shard.name, shard.sha256, shard.size_bytes, file_of, read_tar)
    if record is not None:
        if index_fault and adopted is None:
            index_fault = _which_line(root, shard, record, digits, index_fault)
        if tar_fault and "is that of" in tar_fault.text:
            found.clear()
        found += _check_labels(shard, record, num_classes, digits)
        check.faults += found[:_MOST_FAULTS_A_FILE]
        if len(found) > _MOST_FAULTS_A_FILE:
            check.faults.append(Fault(shard.name, f"and {len(found) - _MOST_FAULTS_A_FILE} more faults"))
        if found and tar_fault and "SHA-256" in tar_fault.text:
            tar_fault = None  # the members' faults are more precise
        check.faults += _check_quarantine(root, record)
        if not tar_fault and not found:
            check.contents = contents
    check.faults += [fault for fault in (tar_fault, index_fault) if fault]
    return check


# ---------------------------------------------------------------------------------------------------------------------- files


def _hash_fault(
    root: Path,
    name: str,
    sha256: str,
    size_bytes: int | None,
    file_of: Mapping[str, str],
    read: Callable[[Path], str] = file_digest,
) -> Fault | None:
    """``read`` returns the SHA-256 of a file."""
    try:
        size_there = (root / name).stat().st_size
        if size_there == 0:
            return Fault(name, "is empty")
        there = read(root / name)
    except FileNotFoundError:
        return Fault(name, "is missing")
    except OSError as error:
        return Fault(name, f"cannot be read: {error.strerror}")
    if there == sha256:
        return None
    if there in file_of:
        return Fault(name, f"its content is that of {file_of[there]}")
    if size_bytes is not None and size_there != size_bytes:
        what = "truncated" if size_there < size_bytes else "too long"
        return Fault(name, f"{what}: {size_there} bytes, the manifest says {size_bytes}")
    return Fault(name, "its SHA-256 is not the manifest's")


def _check_record(
    root: Path, split: str, shard: Shard, file_of: Mapping[str, str], check: ShardCheck, *, has_ordinals: bool
) -> dict[str, Any] | None:
    fault = _hash_fault(root, shard.record_name, shard.record_sha256, None, file_of)
    if fault:
        check.faults.append(fault)
    try:
        sealed = (root / shard.record_name).read_bytes()
        record = unseal(sealed)
        if fault and "is that of" in fault.text:
            return None
        check.summary = summarise(split, shard.name, sealed, record)
        entries = [*record["samples"], *record["quarantined"]] if has_ordinals else []
        check.ordinals = array("q", [int(entry["key"].partition("_")[0]) for entry in entries])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not fault:
            check.faults.append(Fault(shard.record_name, f"is not a record of a shard ({error})"))
        return None
    return record


def _check_quarantine(root: Path, record: dict[str, Any]) -> Iterator[Fault]:
    for entry in record["quarantined"]:
        fault = _hash_fault(root, entry["file"], entry["sha256"], None, {})
        empty_as_it_should_be = fault and fault.text == "is empty" and entry["sha256"] == hashlib.sha256().hexdigest()
        if fault and not empty_as_it_should_be:
            yield Fault(fault.file, fault.text, key=entry["key"])


# -------------------------------------------------------------------------------------------------------------------- members


@dataclass(frozen=True, slots=True)
class _Member:
    """The expected name, place and content of a tar member."""

    key: str
    component: Component
    crc32: int
    display_size: tuple[int, int] | None
    """Height and width of an image, None of a label."""
    source: str
    label: int | None


def _expected_members(record: dict[str, Any], digits: int) -> Iterator[_Member]:
    for sample in record["samples"]:
        key, offset, size_bytes = sample["key"], sample["offset"], sample["size_bytes"]
        image = Component(sample["extension"], offset, size_bytes, f"{key}.{sample['extension']}")
        yield _Member(key, image, sample["crc32"], (sample["height"], sample["width"]), sample["source"], sample["label"])
        if digits and sample["label"] is not None:
            offset += size_bytes + len(padding(size_bytes)) + BLOCK_BYTES
            label = label_bytes(sample["label"], digits)
            component = Component(LABEL_EXTENSION, offset, len(label), f"{key}.{LABEL_EXTENSION}")
            yield _Member(key, component, zlib.crc32(label), None, sample["source"], sample["label"])


def _check_members(
    name: str,
    tar: HashedFile,
    expected: list[_Member],
    contents: Contents,
    decode: bool,
    second_decoder: SecondDecoder | None,
) -> Iterator[Fault]:
    end = 0
    for member in expected:
        part = member.component
        if part.offset + part.size_bytes > len(tar):
            yield Fault(name, f"ends before the end of {part.name}", key=member.key, offset=part.offset)
        else:
            if part.offset != end + BLOCK_BYTES:
                yield Fault(name, f"{part.name} does not follow the member before it", key=member.key, offset=part.offset)
            header = tar.read(part.offset - BLOCK_BYTES, part.offset)
            data = tar.read(part.offset, part.offset + part.size_bytes)
            yield from _check_member(name, header, data, member, decode, second_decoder)
            if member.display_size is not None:
                contents.add(data, member.label)
        end = part.offset + part.size_bytes + len(padding(part.size_bytes))
    if tar.read(end, len(tar)) != END_OF_ARCHIVE and len(tar) > end:
        yield Fault(name, "does not end as a tar does after its last sample", offset=end)


def _check_member(
    name: str, header: bytes, data: bytes, member: _Member, decode: bool, second_decoder: SecondDecoder | None
) -> Iterator[Fault]:
    part = member.component
    if header != member_header(part.name, part.size_bytes):
        text = f"no header of {part.name} with {part.size_bytes} bytes"
        yield Fault(name, text, key=member.key, offset=part.offset - BLOCK_BYTES)
    if zlib.crc32(data) != member.crc32:
        what = "the image's bytes are not those that were packed (CRC-32)"
        if member.display_size is None:
            what = f"the label reads {data.decode('ascii', 'replace')!r}, which is not what was packed"
        yield Fault(name, what, key=member.key, offset=part.offset)
    elif decode and member.display_size is not None:
        for text, fix in image_faults(data, member.display_size, part.extension, member.source, second_decoder):
            yield Fault(name, text, fix, key=member.key, offset=part.offset)


def _check_labels(shard: Shard, record: dict[str, Any], num_classes: int, digits: int) -> Iterator[Fault]:
    for sample in record["samples"]:
        label = sample["label"]
        if (label is None) != (digits == 0) or (label is not None and not 0 <= label < num_classes):
            yield Fault(shard.record_name, f"label {label} of {num_classes} classes", key=sample["key"])


def _which_line(root: Path, shard: Shard, record: dict[str, Any], digits: int, fault: Fault) -> Fault:
    """The first line in which a wrong index differs from the tar, if the index can be read."""
    if "SHA-256" not in fault.text:
        return fault
    samples: dict[str, list[Component]] = {}
    for member in _expected_members(record, digits):
        samples.setdefault(member.key, []).append(member.component)
    try:
        text = (root / shard.index_name).read_text(encoding="ascii")
        parse_index(text, shard.index_name)
    except (OSError, ValueError):
        return Fault(shard.index_name, "not readable as an index")
    except DatasetError as error:
        return Fault(shard.index_name, str(error))
    right, there = format_index(samples.values()).splitlines(), text.splitlines()
    for number, (a, b) in enumerate(zip(right, there, strict=False), start=1):
        if a != b:
            key = tuple(samples)[number - 2] if number > 1 else None
            return Fault(shard.index_name, f"line {number} says '{b[:60]}', the tar has '{a[:60]}'", key=key)
    return Fault(shard.index_name, f"lists {len(there) - 1} samples, the tar has {len(right) - 1}")
