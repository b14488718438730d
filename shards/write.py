"""One shard: its tar, index and record, each of which appears whole or not at all."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shards.describe import Described, ShardDescription, bytes_limit
from shards.duplicates import Contents, read_contents
from shards.hashed_file import HashedFile
from shards.images import Inspected, Unusable, inspect
from shards.items import Item
from shards.plan import PackSettings, ShardTask
from shards.record import ShardSummary, seal, summarise, unseal
from shards.source import Reader, Unreadable
from shards.store import Store, publish_bytes
from tidali.dataset.shard_bytes import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    LABEL_EXTENSION,
    Component,
    label_bytes,
    member_header,
    padding,
    safe_key,
)
from tidali.files import file_digest, printable, replacing, resumable, sync


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
        return ShardResult(state, summarise(task.split, tar_name, path.read_bytes(), record), contents)


# ---------------------------------------------------------------------------------------------------------------------- write


def _write(
    task: ShardTask, folder: Path, reader: Reader, settings: PackSettings, plan_id: str, digits: int
) -> tuple[dict[str, Any], Contents]:
    path = folder / task.file_names[0]
    limit_bytes, resizing = bytes_limit(settings.max_pixels), settings.resizing
    with reader.open() as read, replacing(path) as temporary, open(temporary, "wb", buffering=1 << 20) as tar:
        shard = _OpenShard(task, folder, digits, tar)
        for ordinal, item in task.samples:
            key = safe_key(ordinal, item.name)
            data = b""
            try:
                data = read(item, limit_bytes)
                image = inspect(data, max_pixels=settings.max_pixels, resizing=resizing)
            except (Unreadable, Unusable) as error:
                shard.description.quarantine(
                    key, Described(key, item.name, item.label), str(error), getattr(error, "data", data)
                )
            else:
                shard.add(key, item, image)
        shard.put(END_OF_ARCHIVE)
    return shard.publish(plan_id), shard.description.contents


class _OpenShard:
    """A shard while it is written: the tar's position and hash, and what its index and record will say."""

    def __init__(self, task: ShardTask, folder: Path, digits: int, tar: BinaryIO) -> None:
        self.task = task
        self.digits = digits
        self.tar = tar
        self.digest = hashlib.sha256()
        self.offset = 0
        self.description = ShardDescription(task.split, folder)

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
        self.description.add(Described(key, item.name, item.label), components[0], components, image)

    def publish(self, plan_id: str) -> dict[str, Any]:
        """After the tar, its index and its record: the record, last, says that the shard is complete."""
        index, record = self.description.finish(plan_id, self.offset, self.digest.hexdigest())
        _, index_name, record_name = self.task.file_names
        publish_bytes(self.description.folder / index_name, index)
        publish_bytes(self.description.folder / record_name, seal(record))
        sync(self.description.folder)
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
        tar_name, index_name, _ = task.file_names
        summary = summarise(task.split, tar_name, sealed, record)  # refuses names that lead out of the folder
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
