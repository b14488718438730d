"""What a shard's index and record say, collected sample by sample."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from shards.duplicates import Contents
from shards.images import Inspected
from shards.pixels import ChannelSums
from shards.store import publish_bytes
from tidali.dataset.contract import Quarantined
from tidali.dataset.shard_bytes import Component, format_index
from tidali.files import printable, sync

QUARANTINE = "quarantine"

_BYTES_PER_PIXEL_LIMIT = 4
_METADATA_BYTES_LIMIT = 1 << 26


def bytes_limit(max_pixels: int) -> int:
    """The most bytes that a file within the pixel limit needs: four 8-bit channels uncompressed, and 64 MiB of metadata.

    What is larger is not read, so that neither a zip bomb nor a film named .jpg fills the memory.
    """
    return _BYTES_PER_PIXEL_LIMIT * max_pixels + _METADATA_BYTES_LIMIT


class Described(NamedTuple):
    """What names a sample."""

    key: str
    """Of its members in the tar."""
    source: str
    """Its image's name inside the source, bytes that are not UTF-8 as surrogates."""
    label: int | None


class ShardDescription:
    """The content of a shard's index and record, and the files that were left out of it."""

    def __init__(self, split: str, folder: Path) -> None:
        """
        Args:
            folder: where the quarantine's folder is.
        """
        self.split, self.folder = split, folder
        self.contents = Contents()
        self._index: list[Sequence[Component]] = []
        self._samples: list[dict[str, Any]] = []
        self._quarantined: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()
        self._channels = ChannelSums()

    def add(self, named: Described, image: Component, members: Sequence[Component], inspected: Inspected) -> None:
        """A sample with its image's place in the tar, and those of all its members."""
        self._index.append(members)
        self._samples.append(
            {
                "key": named.key,
                "source": printable(named.source),
                "label": named.label,
                "extension": image.extension,
                "offset": image.offset,
                "size_bytes": len(inspected.data),
                "crc32": zlib.crc32(inspected.data),
                "height": inspected.size[0],
                "width": inspected.size[1],
            }
        )
        if inspected.flags:
            self._counts.update(inspected.flags)
        self._channels.add(inspected.rgb)
        self.contents.add(inspected.data, named.label)

    def quarantine(self, safe_key: str, named: Described, reason: str, data: bytes) -> None:
        """Keep the bytes beside the shards, under a name that does not depend on the source's."""
        name = f"{QUARANTINE}/{self.split}-{safe_key}.bin"
        (self.folder / QUARANTINE).mkdir(exist_ok=True)
        publish_bytes(self.folder / name, data)
        entry = Quarantined(
            split=self.split,
            source=printable(named.source),
            label=named.label,
            reason=" ".join(reason.split()),
            file=name,
        )
        self._quarantined.append({**asdict(entry), "key": named.key, "sha256": hashlib.sha256(data).hexdigest()})

    def finish(self, plan_id: str, size_bytes: int, sha256: str) -> tuple[bytes, dict[str, Any]]:
        """The index and the record of a tar of this size and hash."""
        if self._quarantined:
            sync(self.folder / QUARANTINE)
        index = format_index(self._index).encode()
        sums, square_sums = self._channels.sums()
        record = {
            "plan": plan_id,
            "size_bytes": size_bytes,
            "sha256": sha256,
            "index_sha256": hashlib.sha256(index).hexdigest(),
            "pixels": self._channels.pixels,
            "sums": sums,
            "square_sums": square_sums,
            "counts": dict(sorted(self._counts.items())),
            "samples": self._samples,
            "quarantined": self._quarantined,
        }
        return index, record
