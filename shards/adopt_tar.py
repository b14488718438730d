"""One adopted tar: its record and its index, which appear beside it whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from shards.describe import Described, ShardDescription, bytes_limit
from shards.duplicates import read_contents
from shards.hashed_file import HashedFile
from shards.images import Inspected
from shards.record import seal, summarise, unseal
from shards.store import publish_bytes
from shards.tar_files import Labels, Tar
from shards.tar_samples import TarSample, read_tar
from shards.write import ShardResult
from tidali.dataset.shard_bytes import safe_key
from tidali.errors import TidaliError
from tidali.files import file_digest, resumable, sync
from tidali.images.errors import Unusable
from tidali.images.read import read_picture


class AdoptTask(NamedTuple):
    tar: Tar
    first_ordinal: int
    """Of its samples in its split."""


def adopt_tar(task: AdoptTask, *, root: Path, labels: Labels, plan: str, max_pixels: int) -> ShardResult:
    """Make sure that the tar's record and index are beside it: keep those that are right, else write them."""
    tar = task.tar
    path = root / tar.name
    with resumable(root):
        if (kept := _kept(root, tar, plan)) is not None:
            return kept
        before, sha256 = path.stat(), file_digest(path)
        contents = read_tar(path, labels.field)
        description = ShardDescription(tar.split, root)
        with open(path, "rb") as file:
            for ordinal, sample in enumerate(contents.samples, start=task.first_ordinal):
                _add(description, ordinal, tar, sample, labels.number(sample.label), file.fileno(), max_pixels)
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise TidaliError(f"{path}: changed while it was being read; run the command again")
        index, record = description.finish(plan, before.st_size, sha256)
        sealed = seal(record)
        publish_bytes(beside(root, tar.name, ".json"), sealed)
        sync(path.parent)
        publish_bytes(beside(root, tar.name, ".idx"), index)
        sync(path.parent)
    return ShardResult("written", summarise(tar.split, tar.name, sealed, record), description.contents)


def _add(
    description: ShardDescription, ordinal: int, tar: Tar, sample: TarSample, label: int | None, file: int, max_pixels: int
) -> None:
    named = Described(sample.key, f"{tar.name}/{sample.image.name}", label)
    data = b""
    try:
        if sample.image.size_bytes > bytes_limit(max_pixels):
            raise Unusable(f"file of {sample.image.size_bytes:,} bytes, more than an image within the pixel limit can take")
        data = os.pread(file, sample.image.size_bytes, sample.image.offset)
        picture = read_picture(data, max_pixels=max_pixels)
        if picture.kept is None:
            raise Unusable("decoders do not read its bytes alike; 'tidali shard' packs it as PNG, in tars of its own")
    except Unusable as error:
        description.quarantine(safe_key(ordinal, sample.image.name), named, str(error), data)
    else:
        inspected = Inspected(picture.rgb, sample.image.extension, data, picture.flags, picture.size)
        description.add(named, sample.image, sample.members, inspected)


def _kept(root: Path, tar: Tar, plan: str) -> ShardResult | None:
    """The result of an earlier call for the tar, if everything is as it was then."""
    try:
        sealed = beside(root, tar.name, ".json").read_bytes()
        record = unseal(sealed)
        if record["plan"] != plan:
            return None
        summary = summarise(tar.split, tar.name, sealed, record)  # refuses names that lead out of the folder
        right = file_digest(beside(root, tar.name, ".idx")) == record["index_sha256"] and all(
            file_digest(root / entry["file"]) == entry["sha256"] for entry in record["quarantined"]
        )
        with HashedFile(root / tar.name) as hashed:
            contents = read_contents(hashed, record["samples"])
            return ShardResult("kept", summary, contents) if right and hashed.sha256() == record["sha256"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def beside(folder: Path, tar_name: str, suffix: str) -> Path:
    """The path of a tar's index (``.idx``) or record (``.json``)."""
    return folder / (tar_name.removesuffix(".tar") + suffix)


def is_record(path: Path) -> bool:
    """Whether the file is a shard's record."""
    try:
        return "plan" in unseal(path.read_bytes())
    except (ValueError, OSError):
        return False
