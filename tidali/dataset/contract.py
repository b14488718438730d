"""The format of a packed data set, shared by the packing tool and the loader. Standard library only.

The bytes inside a tar and an index are `tidali.dataset.shard_bytes`'s.

A data set is a folder::

    dataset.json              the manifest, written last: a folder without it is not a data set
    train-000000.tar          USTAR; two members a sample: KEY.jpg (the source's bytes) and KEY.cls (b"007")
    train-000000.idx          DALI's index v1.2 of that tar
    train-000000.json         the shard's record: one entry a sample (key, source name, label, sizes, CRC-32)
    quarantine/...            bytes of source files that are not usable images, named in dataset.json

``KEY`` is ``{ordinal:08d}_{stem}``: the sample's position in its split's sorted source listing, which makes it unique, and the
source's file stem, cut to what every reader accepts. Unlabelled splits (a public test set) have no ``.cls`` members.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tidali.dataset.limited_copy import LimitedCopy
from tidali.dataset.shard_bytes import BLOCK_BYTES, Component, label_digits
from tidali.errors import DatasetError, NoDatasetError, UsageError

FORMAT = "tidali-dataset"
FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
ADOPTED = "adopted"
"""The layout of a source whose own tars are the shards."""
_SHARD_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]*/)?(?!dataset\.tar)[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
_QUARANTINED_NAME = re.compile(r"quarantine/[A-Za-z0-9_][A-Za-z0-9_-]*\.bin")


def is_shard_name(name: str) -> bool:
    """Whether a tar of this name below the data set's folder can be a shard. Its index and record are named after it."""
    return _SHARD_NAME.fullmatch(name) is not None


# ------------------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecord:
    """One sample's entry in a shard's record."""

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
    """A source file that is not a usable image, and why."""

    split: str
    source: str
    label: int | None
    reason: str
    file: str
    """Where its bytes are, relative to the data set."""

    def __post_init__(self) -> None:
        if not _QUARANTINED_NAME.fullmatch(self.file):  # a record may come from anywhere, and this name becomes a path
            raise ValueError(f"{self.file!r} is not a name of a quarantined file")


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
        if not is_shard_name(self.name):  # a manifest may come from anywhere, and this name becomes a path
            raise ValueError(f"{self.name!r} is not a name of a shard")

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".idx"

    @property
    def record_name(self) -> str:
        return self.name.removesuffix(".tar") + ".json"

    @property
    def files(self) -> tuple[tuple[str, str, int | None], ...]:
        """Name, SHA-256 and size in bytes of the tar, the index and the record; the manifest states only the tar's size."""
        return (
            (self.name, self.sha256, self.size_bytes),
            (self.index_name, self.index_sha256, None),
            (self.record_name, self.record_sha256, None),
        )


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
        """Height and width in pixels if all images have the same, else None."""
        return parse_image_size(next(iter(self.image_sizes))) if len(self.image_sizes) == 1 else None

    @property
    def largest_class_percent(self) -> float:
        """What is right if the most frequent class is always said. Labelled splits only."""
        return 100 * max(self.class_counts) / self.samples

    @property
    def content(self) -> str:
        """Identifies the samples and their order, on which a saved position depends."""
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
    """``dataset.json``. Contains nothing that differs between two packs of the same source: no time, no path."""

    classes: tuple[ClassName, ...]
    splits: Mapping[str, Split]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per RGB channel over every pixel of train, on a 0..1 scale."""
    quarantine: tuple[Quarantined, ...]
    counts: Mapping[str, int]
    """Images of each kind that was handled specially: 'grey', 'exif_rotated', 'reencoded', ..."""
    source: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    format: str = field(default=FORMAT)
    version: int = field(default=FORMAT_VERSION)

    @property
    def adopted(self) -> bool:
        """Whether the shards are tars that another program wrote: their records say what is in them, and headers, names and the
        labels' encoding are that program's."""
        return self.source.get("layout") == ADOPTED

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
    fix: str = "pack the source again into this folder: correct shards are kept"
    """How to fix damage, for messages."""
    copy: LimitedCopy | None = field(default=None, compare=False)
    """Of the data set behind a URL, where only some of its shards are in the folder at a time."""

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
        """The train images' own side in pixels if all are the same square of 32 or more, else 224."""
        height, width = self.split("train").single_image_size or (0, 0)
        return height if height == width >= 32 else 224

    def tar_paths(self, split: str) -> list[Path]:
        """The split's tars in order, without empty ones: DALI refuses an index of no samples.

        Raises:
            UsageError: they are not all in the folder.
        """
        if self.copy is not None:
            raise UsageError(
                f"{self.copy.url}: larger than TIDALI_CACHE_LIMIT ({self.copy.limit_bytes} bytes), and all its shards are "
                f"needed here; raise the limit"
            )
        return [self.root / shard.name for shard in self.split(split).shards if shard.samples]

    def stored_bytes(self, shard: Shard, record: SampleRecord) -> bytes:
        """The bytes of a sample's image, as the tar has them."""
        with open(self.open_tar(shard), "rb") as file:
            file.seek(record.offset)
            return file.read(record.size_bytes)

    def open_tar(self, shard: Shard) -> int:
        """A descriptor of a shard's tar, which is in the folder at least as long as it is open.

        Raises:
            OSError: it cannot be opened.
            TidaliError, DatasetError: it had to be fetched, and cannot be.
        """
        return os.open(self.root / shard.name, os.O_RDONLY) if self.copy is None else self.copy.hold(shard)

    def index_paths(self, split: str) -> list[Path]:
        return [self.root / shard.index_name for shard in self.split(split).shards if shard.samples]


def parse_image_size(text: str) -> tuple[int, int]:
    """'HxW' -> (height, width), in pixels."""
    height, _, width = text.partition("x")
    return int(height), int(width)


def manifest_text(root: Path) -> str:
    """The manifest's text.

    Raises:
        DatasetError: there is none.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    try:
        return (root / MANIFEST_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NoDatasetError(f"{root}: no {MANIFEST_NAME} here; make a data set with 'tidali shard SOURCE {root}'") from None


def open_dataset(root: Path) -> Dataset:
    """The data set in a folder, with the quick checks of `check_shards`.

    Raises:
        DatasetError: no manifest, or a shard or index that is not what the manifest says.
    """
    path = root / MANIFEST_NAME
    try:
        text = manifest_text(root)
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    manifest = Manifest.from_json(text, str(path))
    dataset = Dataset(root, manifest, f"run 'tidali adopt {root}' again") if manifest.adopted else Dataset(root, manifest)
    for split in dataset.manifest.splits.values():
        check_shards(root, split)
    return dataset


def check_shards(root: Path, split: Split) -> None:
    """Check each shard's size on disk, its index's SHA-256, and the tar header before the last member that the index names.

    Without these checks DALI could crash or silently read wrong data: it maps tars without looking at their headers, so a
    truncated one ends the process (SIGSEGV) and a stale index reads whatever lies at its offsets. Hashing the tars themselves
    is left to ``tidali verify``.

    Raises:
        DatasetError: names the first file that is missing or damaged, and the fix.
    """
    fix = "run 'tidali verify' to see all damage, and how to repair it"
    for shard in split.shards:
        tar, index = root / shard.name, root / shard.index_name
        try:
            size_bytes, index_bytes = tar.stat().st_size, index.read_bytes()
            if size_bytes != shard.size_bytes:
                raise DatasetError(f"{tar}: {size_bytes} bytes, the manifest says {shard.size_bytes}; {fix}")
            if hashlib.sha256(index_bytes).hexdigest() != shard.index_sha256:
                raise DatasetError(f"{index}: not the index that the manifest names (SHA-256 differs); {fix}")
            if shard.samples:
                expected = _last_component(index_bytes)
                with tar.open("rb") as file:
                    file.seek(expected.offset - BLOCK_BYTES)
                    if not _is_header_of(file.read(BLOCK_BYTES), expected):
                        raise DatasetError(f"{tar}: no header of {expected.name!r} where {index.name} has it; {fix}")
        except OSError as error:
            raise DatasetError(f"{error.filename or tar}: {error.strerror}; {fix}") from None
        except (ValueError, OverflowError):
            raise DatasetError(f"{index}: does not end in a sample, the manifest says {shard.samples}; {fix}") from None


def _is_header_of(block: bytes, member: Component) -> bool:
    """Whether a tar's block is the header of a member, by any program. Names that do not fit into it are elsewhere."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    fits = len(member.name) < 100 and member.name.isascii()
    return header.isreg() and header.size == member.size_bytes and (header.name == member.name or not fits)


def _last_component(index: bytes) -> Component:
    """The last tar member that an index names. Not by `parse_index`, which takes a hundred times as long.

    Raises:
        ValueError: it names none.
    """
    *_, extension, offset, size, name = index[index.rindex(b"\n", 0, -1) + 1 :].decode().rstrip("\n").split(" ")
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
    """Every sample of a split in its stored order, with the shard that contains it."""
    for shard in dataset.split(split).shards:
        for record in read_record(dataset.root, shard):
            yield shard, record
