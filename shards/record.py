"""A shard's record: what is known of its samples, and what the manifest needs of it. Makes a resume and `verify` cheap."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tidali.dataset.contract import Quarantined, Shard

_SEAL = b',"checksum":"'
_QUARANTINED_FIELDS = tuple(field.name for field in fields(Quarantined))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSummary:
    """A shard as the manifest needs it. Holds nothing a sample, so that the packer's memory does not grow with them."""

    split: str
    plan_id: str
    shard: Shard
    class_counts: Mapping[int, int]
    image_sizes: Mapping[str, int]
    extensions: Mapping[str, int]
    counts: Mapping[str, int]
    pixels: int
    sums: tuple[int, ...]
    """Of each RGB channel over the shard's pixels, 0..255; exact."""
    square_sums: tuple[int, ...]
    quarantined: tuple[Quarantined, ...]


def seal(record: Mapping[str, Any]) -> bytes:
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
        raise ValueError("its checksum is wrong")
    record: dict[str, Any] = json.loads(sealed)
    return record


def summarise(stem: str, sealed: bytes, record: Mapping[str, Any]) -> ShardSummary:
    """The summary of shard ``stem`` ('train-000000') from its record, sealed and as read."""
    samples = record["samples"]
    return ShardSummary(
        split=stem.rpartition("-")[0],
        plan_id=record["plan"],
        shard=Shard(
            name=f"{stem}.tar",
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
        quarantined=tuple(Quarantined(**{f: entry[f] for f in _QUARANTINED_FIELDS}) for entry in record["quarantined"]),
    )
