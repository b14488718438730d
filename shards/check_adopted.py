"""An adopted tar against its record: the tar is read once more, as when it was adopted."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.check_image import SecondDecoder, image_faults
from shards.duplicates import Contents
from shards.tar_files import Labels
from shards.tar_samples import read_tar
from tidali.dataset.shard_bytes import format_index


def check_adopted(
    path: Path,
    record: dict[str, Any],
    labels: Labels,
    contents: Contents,
    decode: bool,
    second_decoder: SecondDecoder | None,
) -> Iterator[tuple[str | None, str]]:
    """What is wrong with it, each with the key of its sample.

    Args:
        contents: what is in it is added here.
    """
    tar = read_tar(path, labels.field)
    for fault in tar.faults:
        yield None, fault.removeprefix(f"{path}: ")
    samples = {sample.key: sample for sample in tar.samples}
    index = []
    with open(path, "rb") as file:
        for entry in record["samples"]:
            key, size = entry["key"], (entry["height"], entry["width"])
            sample = samples.pop(key, None)
            if sample is None:
                yield key, "is in its record and not in the tar"
                continue
            index.append(sample.members)
            if sample.image[:3] != (entry["extension"], entry["offset"], entry["size_bytes"]):
                yield key, "its image is not where its record says"
                continue
            try:
                label = labels.number(sample.label)
            except KeyError:
                label = None
            if label != entry["label"]:
                yield key, f"its label is {sample.label!r} in the tar, and {entry['label']} in its record"
            data = os.pread(file.fileno(), entry["size_bytes"], entry["offset"])
            contents.add(data, entry["label"])
            if zlib.crc32(data) != entry["crc32"]:
                yield key, "the image's bytes are not those that were adopted (CRC-32)"
            elif decode:
                yield from ((key, text) for text, _ in image_faults(data, size, None, entry["source"], second_decoder))
    for key in sorted(samples.keys() - {entry["key"] for entry in record["quarantined"]}):
        yield key, "is in the tar and not in its record"
    if hashlib.sha256(format_index(index).encode("utf-8", "surrogateescape")).hexdigest() != record["index_sha256"]:
        yield None, "its index does not list what is in the tar"
