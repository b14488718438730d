"""The bytes of a shard: tar members, keys, labels and DALI's index. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tidali.errors import DatasetError

INDEX_SIGNATURE = "v1.2"
BLOCK_BYTES = 512  # POSIX.1-1988 (USTAR) record: headers and data are padded to it
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
LABEL_EXTENSION = "cls"

# USTAR's name field holds 100 bytes; "00000000_" takes 9 and the longest extension ".webp" 5. Kept shorter than the rest (86)
# so that keys stay readable in listings.
_STEM_MAX_BYTES = 64
_UNSAFE_IN_KEY = re.compile(r"[^A-Za-z0-9_-]+")


# ---------------------------------------------------------------------------------------------------------------- tar members


_MODE_AND_OWNER = b"0000644\0" + b"0000000\0" * 2
_MTIME = b"00000000000\0"
_TYPE_AND_REST = b"".join(
    (
        b"0",  # a regular file
        bytes(100),  # link name
        b"ustar\x0000",
        bytes(32 + 32),  # user and group names
        b"0000000\0" * 2,  # device numbers
        bytes(155 + 12),  # name prefix, padding
    )
)
_CONSTANT_SUM = sum(_MODE_AND_OWNER + _MTIME + b" " * 8 + _TYPE_AND_REST)  # the checksum counts itself as spaces


def member_header(name: str, size_bytes: int) -> bytes:
    """The 512-byte USTAR header of a regular file, with mtime, uid and gid 0 and mode 0644.

    Equal headers for equal input are what makes two packs byte-identical. Layout: POSIX.1-1988, section 10.1.1.

    Raises:
        ValueError: the name is longer than 100 bytes or not ASCII, or the size does not fit 11 octal digits (8 GiB).
    """
    encoded = name.encode("ascii")
    if len(encoded) > 100 or size_bytes >= 8**11:
        raise ValueError(f"no USTAR header for {name!r} of {size_bytes} bytes")
    size = b"%011o\0" % size_bytes
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(encoded) + sum(size))
    return b"".join((encoded.ljust(100, b"\0"), _MODE_AND_OWNER, size, _MTIME, checksum, _TYPE_AND_REST))


def padding(size_bytes: int) -> bytes:
    """Zero bytes that bring a member's data to a multiple of 512."""
    return bytes(-size_bytes % BLOCK_BYTES)


def safe_key(ordinal: int, source_name: str) -> str:
    """The sample's key: unique by its ordinal, readable by its stem, safe in tar, index and webdataset.

    DALI's index is split at spaces and webdataset's keys end at the first dot, so everything but ASCII letters, digits, ``_``
    and ``-`` becomes ``_``.
    """
    stem = os.path.splitext(source_name.rsplit("/", 1)[-1])[0]
    return f"{ordinal:08d}_{_UNSAFE_IN_KEY.sub('_', stem)[:_STEM_MAX_BYTES]}"


def label_digits(num_classes: int) -> int:
    """How many ASCII digits a label takes: enough for the largest one."""
    return len(str(max(num_classes - 1, 0)))


def label_bytes(label: int, digits: int) -> bytes:
    """A ``.cls`` member: fixed-width ASCII digits."""
    return b"%0*d" % (digits, label)


# --------------------------------------------------------------------------------------------------------------------- index


class Component(NamedTuple):
    """One tar member of a sample, as DALI's index states it. A named tuple: the packer makes 220,000 of them."""

    extension: str
    offset: int
    """Of the data, not of its header."""
    size_bytes: int
    name: str


def format_index(samples: Iterable[Sequence[Component]]) -> str:
    """DALI's index v1.2: a signature and count, then one line a sample of ``ext offset size name`` groups."""
    lines = [" ".join(f"{c.extension} {c.offset} {c.size_bytes} {c.name}" for c in sample) for sample in samples]
    return "".join(f"{line}\n" for line in (f"{INDEX_SIGNATURE} {len(lines)}", *lines))


def parse_index(text: str, where: str) -> list[list[Component]]:
    """The samples of an index.

    Raises:
        DatasetError: it is not a well-formed v1.2 index; DALI would fail on it, or silently read a part.
    """
    lines = text.splitlines()
    head = lines[0].split() if lines else []
    if len(head) != 2 or head[0] != INDEX_SIGNATURE or not head[1].isdecimal():
        raise DatasetError(f"{where}: not a DALI index ({INDEX_SIGNATURE})")
    if int(head[1]) != len(lines) - 1:
        raise DatasetError(f"{where}: states {head[1]} samples but lists {len(lines) - 1}")
    samples = []
    for number, line in enumerate(lines[1:], start=2):
        parts = line.split(" ")
        if len(parts) % 4 or not all(p.isdecimal() for i in (1, 2) for p in parts[i::4]):
            raise DatasetError(f"{where}: line {number} is not made of 'ext offset size name'")
        groups = zip(parts[::4], parts[1::4], parts[2::4], parts[3::4], strict=True)
        samples.append([Component(ext, int(offset), int(size), name) for ext, offset, size, name in groups])
    return samples
