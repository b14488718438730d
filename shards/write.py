"""One shard: its tar, index and record, written so that each appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shards.images import Inspected, Unusable, inspect
from shards.plan import ShardTask
from shards.source import Item, Read, Reader, Unreadable, printable
from tidali.contract import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    LABEL_EXTENSION,
    Component,
    Quarantined,
    Shard,
    format_index,
    member_header,
    padding,
    safe_key,
)
from tidali.errors import TidaliError

QUARANTINE = "quarantine"
PARTIAL_SUFFIX = ".part"

# What an image within the pixel limit can take at most: 4 bytes a pixel uncompressed (BMP, TIFF), 8 at 16 bits, and metadata.
_BYTES_PER_PIXEL_LIMIT = 8
_METADATA_BYTES_LIMIT = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """What `inspect` does with each image."""

    max_pixels: int
    size_px: int | None
    kernel: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What the manifest needs of one finished shard. Holds nothing a sample, so that the packer's memory does not grow."""

    split: str
    number: int
    state: str
    """'written', 'kept' (it was there and right) or 'repaired' (it was there and wrong)."""
    shard: Shard
    class_counts: Mapping[int, int]
    image_sizes: Mapping[str, int]
    extensions: Mapping[str, int]
    counts: Mapping[str, int]
    pixels: int
    sums: tuple[int, ...]
    square_sums: tuple[int, ...]
    quarantined: tuple[Quarantined, ...]


def finish_shard(
    task: ShardTask, *, dest: Path, reader: Reader, options: ImageOptions, plan_id: str, digits: int
) -> ShardResult:
    """Make sure that the task's shard is in ``dest``: keep one that is right in every byte, else write it.

    Raises:
        TidaliError: the source or ``dest`` failed (unreadable, full, read-only).
    """
    try:
        sealed = load_finished(task, dest, plan_id)
        if sealed is not None:
            return _summarise(task, "kept", sealed)
        was_there = (dest / f"{task.stem}.json").exists()
        sealed = _write(task, dest=dest, reader=reader, options=options, plan_id=plan_id, digits=digits)
    except OSError as error:
        where = f"{error.filename or dest}: {error.strerror}"
        raise TidaliError(f"{where}; mend that and run the same command again, it goes on from here") from None
    return _summarise(task, "repaired" if was_there else "written", sealed)


# ---------------------------------------------------------------------------------------------------------------------- write


def _write(task: ShardTask, *, dest: Path, reader: Reader, options: ImageOptions, plan_id: str, digits: int) -> bytes:
    path = dest / f"{task.stem}.tar"
    partial = _partial(path)
    try:
        with reader.open() as read, open(partial, "wb", buffering=1 << 20) as tar:
            shard = _OpenShard(task, dest, digits, tar)
            for ordinal, item in task.samples:
                key = safe_key(ordinal, item.name)
                data = b""
                try:
                    data = _read(read, item, options.max_pixels)
                    image = inspect(data, max_pixels=options.max_pixels, size_px=options.size_px, kernel=options.kernel)
                except (Unreadable, Unusable) as error:
                    shard.quarantine(key, item, str(error), getattr(error, "data", data))
                else:
                    shard.add(key, item, image)
            shard.put(END_OF_ARCHIVE)
            tar.flush()
            os.fsync(tar.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return shard.publish(plan_id)


def _read(read: Read, item: Item, max_pixels: int) -> bytes:
    return read(item, _BYTES_PER_PIXEL_LIMIT * max_pixels + _METADATA_BYTES_LIMIT)


class _OpenShard:
    """A shard while it grows: the tar's position and hash, and what its index and record will say."""

    def __init__(self, task: ShardTask, dest: Path, digits: int, tar: BinaryIO) -> None:
        self.task = task
        self.dest = dest
        self.digits = digits
        self.tar = tar
        self.digest = hashlib.sha256()
        self.offset = 0
        self.index: list[list[Component]] = []
        self.samples: list[dict[str, Any]] = []
        self.quarantined: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.sums = [0] * 7  # pixels, sum and square sum of R, G, B

    def put(self, block: bytes) -> None:
        self.tar.write(block)
        self.digest.update(block)
        self.offset += len(block)

    def add(self, key: str, item: Item, image: Inspected) -> None:
        members = [(image.extension, image.data)]
        if item.label is not None:
            members.append((LABEL_EXTENSION, b"%0*d" % (self.digits, item.label)))
        components: list[Component] = []
        blocks: list[bytes] = []
        offset = self.offset
        for extension, data in members:
            name = f"{key}.{extension}"
            components.append(Component(extension, offset + BLOCK_BYTES, len(data), name))
            blocks += (member_header(name, len(data)), data, padding(len(data)))
            offset += BLOCK_BYTES + len(data) + len(blocks[-1])
        self.put(b"".join(blocks))
        self.index.append(components)
        self.samples.append(
            {
                "key": key,
                "source": printable(item.name),
                "label": item.label,
                "extension": image.extension,
                "offset": components[0].offset,
                "size_bytes": len(image.data),
                "crc32": zlib.crc32(image.data),
                "height": image.height,
                "width": image.width,
            }
        )
        self.counts.update(image.flags)
        for at, value in enumerate((image.pixels, *image.sums, *image.square_sums)):
            self.sums[at] += value

    def quarantine(self, key: str, item: Item, reason: str, data: bytes) -> None:
        """Keep the bytes beside the shards, under a name of our own making."""
        name = f"{QUARANTINE}/{self.task.split}-{key}.bin"
        (self.dest / QUARANTINE).mkdir(exist_ok=True)
        publish_bytes(self.dest / name, data)
        entry = Quarantined(
            split=self.task.split, source=printable(item.name), label=item.label, reason=" ".join(reason.split()), file=name
        )
        self.quarantined.append({**asdict(entry), "key": key, "sha256": hashlib.sha256(data).hexdigest()})

    def publish(self, plan_id: str) -> bytes:
        """After the tar, its index and its record: the record, last, says that the shard is complete."""
        if self.quarantined:
            sync_folder(self.dest / QUARANTINE)
        index = format_index(self.index).encode()
        pixels, *sums = self.sums
        record = {
            "plan": plan_id,
            "size_bytes": self.offset,
            "sha256": self.digest.hexdigest(),
            "index_sha256": hashlib.sha256(index).hexdigest(),
            "pixels": pixels,
            "sums": sums[:3],
            "square_sums": sums[3:],
            "counts": dict(sorted(self.counts.items())),
            "samples": self.samples,
            "quarantined": self.quarantined,
        }
        sealed = seal(record)
        publish_bytes(self.dest / f"{self.task.stem}.idx", index)
        publish_bytes(self.dest / f"{self.task.stem}.json", sealed)
        sync_folder(self.dest)
        return sealed


_SEAL = b',"checksum":"'


def seal(record: dict[str, Any]) -> bytes:
    """The record's file: one JSON object whose last entry is the SHA-256 of everything before it."""
    body = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode().removesuffix(b"}")
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def unseal(sealed: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: not a record, or one that was changed.
    """
    body, _, checksum = sealed.rpartition(_SEAL)
    if checksum != hashlib.sha256(body).hexdigest().encode() + b'"}\n':
        raise ValueError("the record's checksum is wrong")
    record: dict[str, Any] = json.loads(sealed)
    return record


def _partial(path: Path) -> Path:
    """The name while it is written. With the process's id: a worker that outlives its killed packer for a moment must not write
    into the file of its successor."""
    return path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")


def publish_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all. Syncing the folder is left to the caller, once for several files."""
    partial = _partial(path)
    with open(partial, "wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------------------------- resume


def load_finished(task: ShardTask, dest: Path, plan_id: str) -> bytes | None:
    """The sealed record of the task's shard, if it is of this plan and every file is what it says; else None."""
    try:
        sealed = (dest / f"{task.stem}.json").read_bytes()
        record = unseal(sealed)
        right = (
            record["plan"] == plan_id
            and _planned(task) == _recorded(record)
            and (dest / f"{task.stem}.tar").stat().st_size == record["size_bytes"]
            and file_sha256(dest / f"{task.stem}.idx") == record["index_sha256"]
            and all(file_sha256(dest / entry["file"]) == entry["sha256"] for entry in record["quarantined"])
            and file_sha256(dest / f"{task.stem}.tar") == record["sha256"]
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return sealed if right else None


def _planned(task: ShardTask) -> list[tuple[str, int | None]]:
    return sorted((safe_key(ordinal, item.name), item.label) for ordinal, item in task.samples)


def _recorded(record: dict[str, Any]) -> list[tuple[str, int | None]]:
    return sorted((entry["key"], entry["label"]) for part in ("samples", "quarantined") for entry in record[part])


def file_sha256(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _summarise(task: ShardTask, state: str, sealed: bytes) -> ShardResult:
    record = unseal(sealed)
    samples = record["samples"]
    return ShardResult(
        split=task.split,
        number=task.number,
        state=state,
        shard=Shard(
            name=f"{task.stem}.tar",
            samples=len(samples),
            size_bytes=record["size_bytes"],
            sha256=record["sha256"],
            index_sha256=record["index_sha256"],
            record_sha256=hashlib.sha256(sealed).hexdigest(),
        ),
        class_counts=Counter(sample["label"] for sample in samples if sample["label"] is not None),
        image_sizes=Counter(f"{sample['height']}x{sample['width']}" for sample in samples),
        extensions=Counter(sample["extension"] for sample in samples),
        counts=record["counts"],
        pixels=record["pixels"],
        sums=tuple(record["sums"]),
        square_sums=tuple(record["square_sums"]),
        quarantined=tuple(
            Quarantined(**{key: entry[key] for key in ("split", "source", "label", "reason", "file")})
            for entry in record["quarantined"]
        ),
    )
