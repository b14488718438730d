"""The one definition of what a packed data set is, shared by the packing tool and the loader. Standard library only.

A data set is a folder::

    dataset.json              the manifest, written last: a folder without it is not a data set
    train-000000.tar          USTAR; two members a sample: KEY.jpg (the source's bytes) and KEY.cls (b"007")
    train-000000.idx          DALI's index v1.2 of that tar
    train-000000.json         the shard's record: one entry a sample (key, source name, label, sizes, CRC-32)
    quarantine/...            bytes of source files that are no usable image, named in dataset.json

``KEY`` is ``{ordinal:08d}_{stem}``: the sample's position in its split's sorted source listing, which makes it unique, and the
source's file stem, cut to what every reader accepts. Unlabelled splits (a public test set) have no ``.cls`` members.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tidali.errors import DatasetError, UsageError

FORMAT = "tidali-dataset"
FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
INDEX_SIGNATURE = "v1.2"
BLOCK_BYTES = 512  # POSIX.1-1988 (USTAR) record: headers and data are padded to it
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
LABEL_EXTENSION = "cls"
IMAGE_EXTENSIONS = ("jpg", "png", "webp", "bmp")

# USTAR's name field holds 100 bytes; "00000000_" takes 9 and the longest extension ".webp" 5. Kept shorter than the rest (86)
# so that keys stay readable in listings.
_STEM_MAX_BYTES = 64
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*\.tar")
_QUARANTINED_NAME = re.compile(r"quarantine/[A-Za-z0-9_][A-Za-z0-9_-]*\.bin")
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


def read_member_header(header: bytes) -> tuple[str, int] | None:
    """Name and size of the regular file that a 512-byte header describes, or None where its checksum or type is wrong."""
    if len(header) != BLOCK_BYTES or header[257:262] != b"ustar":
        return None
    try:
        stated = int(header[148:156].rstrip(b"\0 ") or b"0", 8)
        size_bytes = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        name = header[:100].rstrip(b"\0").decode("ascii")
    except ValueError:
        return None
    if stated != sum(header[:148]) + 8 * 0x20 + sum(header[156:]) or header[156:157] not in (b"0", b"\0"):
        return None
    return name, size_bytes


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


# ------------------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecord:
    """What a shard's record says of one sample."""

    key: str
    source: str
    """Name inside the source, '/'-separated, as the source spells it."""
    label: int | None
    extension: str
    offset: int
    """Of the image's data in the tar, in bytes."""
    size_bytes: int
    crc32: int
    """Of the image's bytes: names the damaged sample where a shard's SHA-256 is wrong."""
    height: int
    width: int
    """As displayed, that is after the EXIF orientation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantined:
    """A source file that was left out, and why."""

    split: str
    source: str
    label: int | None
    reason: str
    file: str
    """Where its bytes are, relative to the data set."""

    def __post_init__(self) -> None:
        if not _QUARANTINED_NAME.fullmatch(self.file):  # a record may come from anywhere, and files are made by this name
            raise ValueError(f"{self.file!r} is no name of a quarantined file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar of a split, as the manifest states it."""

    name: str
    samples: int
    size_bytes: int
    sha256: str
    index_sha256: str
    record_sha256: str

    def __post_init__(self) -> None:
        if not _SHARD_NAME.fullmatch(self.name):  # a manifest may come from anywhere, and files are made by this name
            raise ValueError(f"{self.name!r} is no name of a shard")

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".idx"

    @property
    def record_name(self) -> str:
        return self.name.removesuffix(".tar") + ".json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One split of the data set. ``samples`` excludes quarantined ones."""

    name: str
    labelled: bool
    samples: int
    class_counts: tuple[int, ...]
    """Samples of each class, in class order; empty where unlabelled."""
    image_sizes: Mapping[str, int]
    """'HxW' -> samples."""
    extensions: Mapping[str, int]
    """Image member extension -> samples."""
    shards: tuple[Shard, ...]

    @property
    def single_image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels where all images have the same, else None."""
        return parse_image_size(next(iter(self.image_sizes))) if len(self.image_sizes) == 1 else None

    @property
    def content(self) -> str:
        """Says which samples these are, and in which order: what a saved position in them depends on."""
        return "".join(f"{shard.sha256}{shard.samples}" for shard in self.shards)

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassName:
    """A class: the id that the source's folders use, and the name that people read."""

    id: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """``dataset.json``. Holds nothing that differs between two packs of the same source: no time, no path of a machine."""

    classes: tuple[ClassName, ...]
    splits: Mapping[str, Split]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per RGB channel over every pixel of train, on a 0..1 scale."""
    quarantine: tuple[Quarantined, ...]
    counts: Mapping[str, int]
    """What was seen and handled: 'grey', 'exif_rotated', 'reencoded', ..."""
    source: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    format: str = field(default=FORMAT)
    version: int = field(default=FORMAT_VERSION)

    @property
    def label_digits(self) -> int:
        return label_digits(len(self.classes))

    def to_json(self) -> str:
        """The file's text. Its last entry is a checksum of the others, so that ``tidali verify`` notices any edit."""
        document = asdict(self)
        checksum = hashlib.sha256(json.dumps(document, ensure_ascii=False).encode()).hexdigest()
        return json.dumps({**document, "checksum": checksum}, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> Manifest:
        """
        Raises:
            DatasetError: not JSON, not a tidali data set, or of a newer format version.
        """
        try:
            document = json.loads(text)
            if document.get("format") != FORMAT:
                raise DatasetError(f"{where}: not a tidali data set's manifest")
            document.pop("checksum", None)
            if document.get("version") != FORMAT_VERSION:
                raise DatasetError(
                    f"{where}: format version {document.get('version')}, this tidali reads {FORMAT_VERSION}; "
                    f"pack the source again with --overwrite"
                )
            splits = {
                name: Split(
                    **{
                        **split,
                        "class_counts": tuple(split["class_counts"]),
                        "shards": tuple(Shard(**shard) for shard in split["shards"]),
                    }
                )
                for name, split in document.pop("splits").items()
            }
            document.update(
                classes=tuple(ClassName(**c) for c in document["classes"]),
                quarantine=tuple(Quarantined(**q) for q in document["quarantine"]),
                mean=tuple(document["mean"]),
                std=tuple(document["std"]),
            )
            return Manifest(splits=splits, **document)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DatasetError(
                f"{where}: damaged manifest ({type(error).__name__}: {error}); pack the source again with --overwrite"
            ) from None


# ------------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Dataset:
    """A packed data set on local disk: its folder and its manifest."""

    root: Path
    manifest: Manifest
    indexes: Mapping[str, Path] = field(default_factory=dict)
    """Tar name -> an index to read it by in place of its own."""
    mend: str = "pack the source again into this folder: what is right is kept"
    """What to do about damage."""

    def split(self, name: str) -> Split:
        """
        Raises:
            DatasetError: there is no such split, or it is empty.
        """
        split = self.manifest.splits.get(name)
        if split is None or not split.samples:
            have = ", ".join(s for s, v in self.manifest.splits.items() if v.samples) or "none"
            raise DatasetError(f"{self.root}: no {name!r} split with samples (splits: {have})")
        return split

    def labelled_split(self, name: str) -> Split:
        """
        Raises:
            DatasetError: there is no such split, or it is empty.
            UsageError: it has no labels.
        """
        split = self.split(name)
        if not split.labelled:
            raise UsageError(f"{self.root}: the {name!r} split has no labels, so it can be neither trained nor evaluated on")
        return split

    @property
    def default_res(self) -> int:
        """The train images' own side in pixels where they are all the same square of 32 or more, else 224."""
        height, width = self.split("train").single_image_size or (0, 0)
        return height if height == width >= 32 else 224

    def tar_paths(self, split: str) -> list[Path]:
        """The split's tars in order, without empty ones: DALI refuses an index of no samples."""
        return [self.root / shard.name for shard in self.split(split).shards if shard.samples]

    def index_paths(self, split: str) -> list[Path]:
        return [
            self.indexes.get(shard.name, self.root / shard.index_name) for shard in self.split(split).shards if shard.samples
        ]


def parse_image_size(text: str) -> tuple[int, int]:
    """'HxW' -> (height, width), in pixels."""
    height, _, width = text.partition("x")
    return int(height), int(width)


def file_sha256(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest_text(root: Path) -> str:
    """The manifest as it stands in a folder.

    Raises:
        DatasetError: there is none.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    try:
        return (root / MANIFEST_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DatasetError(f"{root}: no {MANIFEST_NAME} here; make a data set with 'tidali shard SOURCE {root}'") from None


def open_dataset(root: Path) -> Dataset:
    """The data set in a folder, checked for what costs milliseconds: see `check_shards`.

    Raises:
        DatasetError: no manifest, or a shard or index that is not what the manifest says.
    """
    path = root / MANIFEST_NAME
    try:
        text = manifest_text(root)
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    dataset = Dataset(root, Manifest.from_json(text, str(path)))
    for split in dataset.manifest.splits.values():
        check_shards(root, split)
    return dataset


def check_shards(root: Path, split: Split) -> None:
    """Check each shard's size on disk, its index's SHA-256, and the tar header before the last member that the index names.

    This is what keeps DALI from a crash or silent wrong data: it maps tars without looking at their headers, so a truncated
    one ends the process (SIGSEGV) and a stale index reads whatever lies at its offsets. Hashing the tars themselves is left to
    ``tidali verify``.

    Raises:
        DatasetError: names the first file that is missing or damaged, and the mend.
    """
    mend = "run 'tidali verify' to see all damage, and pack the source again to repair it"
    for shard in split.shards:
        tar, index = root / shard.name, root / shard.index_name
        try:
            size_bytes, index_bytes = tar.stat().st_size, index.read_bytes()
            if size_bytes != shard.size_bytes:
                raise DatasetError(f"{tar}: {size_bytes} bytes, the manifest says {shard.size_bytes}; {mend}")
            if hashlib.sha256(index_bytes).hexdigest() != shard.index_sha256:
                raise DatasetError(f"{index}: not the index that the manifest names (SHA-256 differs); {mend}")
            if shard.samples:
                expected = _last_component(index_bytes)
                with tar.open("rb") as file:
                    file.seek(expected.offset - BLOCK_BYTES)
                    if read_member_header(file.read(BLOCK_BYTES)) != (expected.name, expected.size_bytes):
                        raise DatasetError(f"{tar}: no header of {expected.name!r} where {index.name} has it; {mend}")
        except OSError as error:
            raise DatasetError(f"{error.filename or tar}: {error.strerror}; {mend}") from None
        except (ValueError, OverflowError):
            raise DatasetError(f"{index}: does not end in a sample, the manifest says {shard.samples}; {mend}") from None


def _last_component(index: bytes) -> Component:
    """The last tar member that an index names. Not by `parse_index`, which takes a hundred times as long.

    Raises:
        ValueError: it names none.
    """
    *_, extension, offset, size, name = index[index.rindex(b"\n", 0, -1) + 1 :].decode("ascii").split()
    if int(offset) < BLOCK_BYTES:
        raise ValueError("there is no room for its header")
    return Component(extension, int(offset), int(size), name)


def read_record(root: Path, shard: Shard) -> list[SampleRecord]:
    """The shard's samples in tar order.

    Raises:
        DatasetError: the record is missing or damaged.
    """
    path = root / shard.record_name
    try:
        return [SampleRecord(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["samples"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path}: damaged shard record ({type(error).__name__}); pack the source again") from None


def iter_records(dataset: Dataset, split: str) -> Iterator[tuple[Shard, SampleRecord]]:
    """Every sample of a split in its stored order, with the shard that holds it."""
    for shard in dataset.split(split).shards:
        for record in read_record(dataset.root, shard):
            yield shard, record
