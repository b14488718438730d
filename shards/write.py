"""One shard: its tar, index and record, each of which appears whole or not at all."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shards.duplicates import Contents, read_contents
from shards.hashed_file import HashedFile
from shards.images import Inspected, Unusable, inspect
from shards.items import Item
from shards.pixels import ChannelSums
from shards.plan import PackSettings, ShardTask
from shards.record import ShardSummary, seal, summarise, unseal
from shards.source import Reader, Unreadable
from shards.store import Store, publish_bytes
from tidali.dataset.contract import Quarantined
from tidali.dataset.shard_bytes import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    LABEL_EXTENSION,
    Component,
    format_index,
    label_bytes,
    member_header,
    padding,
    safe_key,
)
from tidali.files import file_digest, printable, replacing, resumable, sync

QUARANTINE = "quarantine"

# The most bytes that a file within the pixel limit needs: four 8-bit channels uncompressed, and 64 MiB of metadata. What is
# larger is not read, so that neither a zip bomb nor a film named .jpg fills the memory.
_BYTES_PER_PIXEL_LIMIT = 4
_METADATA_BYTES_LIMIT = 1 << 26


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A finished shard."""

    state: str
    """'written', 'kept' (it existed and was correct) or 'repaired' (it existed, of this plan or unreadable, and was wrong)."""
    summary: ShardSummary
    contents: Contents


def finish_shard(
    task: ShardTask, *, store: Store, reader: Reader, settings: PackSettings, plan_id: str, digits: int
) -> ShardResult:
    """Make sure that the task's shard is in the store: keep one that is correct in every byte, else write it.

    Raises:
        TidaliError: the source or the store failed (unreadable, full, read-only).
    """
    tar_name, index_name, record_name = task.file_names
    with resumable(store.location), store.workspace() as folder:
        store.fetch(folder, [record_name])
        path = folder / record_name
        there = path.read_bytes() if path.exists() else None
        kept = None if there is None else _finished(task, there, store, folder, plan_id)
        if kept is not None:
            return ShardResult("kept", *kept)
        record, contents = _write(task, folder, reader, settings, plan_id, digits)
        names = [entry["file"] for entry in record["quarantined"]]
        store.commit(folder, [*names, tar_name, index_name, record_name])
        state = "repaired" if there is not None and not _is_of_another_plan(there, plan_id) else "written"
        return ShardResult(state, summarise(task.stem, path.read_bytes(), record), contents)


# ---------------------------------------------------------------------------------------------------------------------- write


def _write(
    task: ShardTask, folder: Path, reader: Reader, settings: PackSettings, plan_id: str, digits: int
) -> tuple[dict[str, Any], Contents]:
    path = folder / task.file_names[0]
    limit_bytes = _BYTES_PER_PIXEL_LIMIT * settings.max_pixels + _METADATA_BYTES_LIMIT
    with reader.open() as read, replacing(path) as temporary, open(temporary, "wb", buffering=1 << 20) as tar:
        shard = _OpenShard(task, folder, digits, tar)
        for ordinal, item in task.samples:
            key = safe_key(ordinal, item.name)
            data = b""
            try:
                data = read(item, limit_bytes)
                image = inspect(data, max_pixels=settings.max_pixels, resizing=settings.resizing)
            except (Unreadable, Unusable) as error:
                shard.quarantine(key, item, str(error), getattr(error, "data", data))
            else:
                shard.add(key, item, image)
        shard.put(END_OF_ARCHIVE)
    return shard.publish(plan_id), shard.contents


class _OpenShard:
    """A shard while it is written: the tar's position and hash, and the content of its index and record."""

    def __init__(self, task: ShardTask, folder: Path, digits: int, tar: BinaryIO) -> None:
        self.task = task
        self.folder = folder
        self.digits = digits
        self.tar = tar
        self.digest = hashlib.sha256()
        self.offset = 0
        self.index: list[list[Component]] = []
        self.samples: list[dict[str, Any]] = []
        self.quarantined: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.channels = ChannelSums()
        self.contents = Contents()

    def put(self, block: bytes) -> None:
        self.tar.write(block)
        self.digest.update(block)
        self.offset += len(block)

    def add(self, key: str, item: Item, image: Inspected) -> None:
        members = [(image.extension, image.data)]
        if item.label is not None:
            members.append((LABEL_EXTENSION, label_bytes(item.label, self.digits)))
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
                "height": image.size[0],
                "width": image.size[1],
            }
        )
        if image.flags:
            self.counts.update(image.flags)
        self.channels.add(image.rgb)
        self.contents.add(image.data, item.label)

    def quarantine(self, key: str, item: Item, reason: str, data: bytes) -> None:
        """Keep the bytes beside the shards, under a name that does not depend on the source's."""
        name = f"{QUARANTINE}/{self.task.split}-{key}.bin"
        (self.folder / QUARANTINE).mkdir(exist_ok=True)
        publish_bytes(self.folder / name, data)
        entry = Quarantined(
            split=self.task.split, source=printable(item.name), label=item.label, reason=" ".join(reason.split()), file=name
        )
        self.quarantined.append({**asdict(entry), "key": key, "sha256": hashlib.sha256(data).hexdigest()})

    def publish(self, plan_id: str) -> dict[str, Any]:
        """After the tar, its index and its record: the record, last, says that the shard is complete."""
        if self.quarantined:
            sync(self.folder / QUARANTINE)
        index = format_index(self.index).encode()
        sums, square_sums = self.channels.sums()
        record = {
            "plan": plan_id,
            "size_bytes": self.offset,
            "sha256": self.digest.hexdigest(),
            "index_sha256": hashlib.sha256(index).hexdigest(),
            "pixels": self.channels.pixels,
            "sums": sums,
            "square_sums": square_sums,
            "counts": dict(sorted(self.counts.items())),
            "samples": self.samples,
            "quarantined": self.quarantined,
        }
        _, index_name, record_name = self.task.file_names
        publish_bytes(self.folder / index_name, index)
        publish_bytes(self.folder / record_name, seal(record))
        sync(self.folder)
        return record


# --------------------------------------------------------------------------------------------------------------------- resume


def _finished(task: ShardTask, sealed: bytes, store: Store, folder: Path, plan_id: str) -> tuple[ShardSummary, Contents] | None:
    """What is known of the task's shard, if its sealed record is of this plan and every file has its hash; else None."""
    try:
        record = unseal(sealed)
        planned = sorted((safe_key(ordinal, item.name), printable(item.name), item.label) for ordinal, item in task.samples)
        entries = [*record["samples"], *record["quarantined"]]
        recorded = sorted((entry["key"], entry["source"], entry["label"]) for entry in entries)
        if record["plan"] != plan_id or planned != recorded:
            return None
        summary = summarise(task.stem, sealed, record)  # refuses names that lead out of the folder, before any is used
        tar_name, index_name, _ = task.file_names
        store.fetch(folder, [index_name, tar_name, *(entry["file"] for entry in record["quarantined"])])
        if file_digest(folder / index_name) != record["index_sha256"] or any(
            file_digest(folder / entry["file"]) != entry["sha256"] for entry in record["quarantined"]
        ):
            return None
        with HashedFile(folder / tar_name) as tar:
            contents = read_contents(tar, record["samples"])
            return (summary, contents) if tar.sha256() == record["sha256"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _is_of_another_plan(sealed: bytes, plan_id: str) -> bool:
    """Whether the record is whole, and was written for another source or other settings."""
    try:
        return bool(unseal(sealed)["plan"] != plan_id)
    except (ValueError, KeyError, TypeError):
        return False
