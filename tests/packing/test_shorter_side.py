"""Packing with --shorter-side: what is stored, recorded, compared when a pack is resumed, and verified."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from shards.verify import verify
from tidali.dataset.contract import MANIFEST_NAME, Manifest, iter_records, open_dataset
from tidali.errors import UsageError


def test_a_pack_by_the_shorter_side(make: Any, contents: Any, tmp_path: Path) -> None:
    tree = {
        f"{split}/{name}/{n}.jpg": make.jpeg(n, 40 + 20 * n, 48)
        for split in ("train", "val")
        for name in "ab"
        for n in range(3)
    }
    source = make.folder(tree, tmp_path / "source")
    packs = tmp_path / "first", tmp_path / "again"
    for dest in packs:
        manifest = make.pack(source, dest, shard_samples=2, shorter_side_px=44).manifest
    assert contents(packs[0]) == contents(packs[1])
    assert (manifest.settings["shorter_side_px"], manifest.settings["quality"], manifest.counts["resized"]) == (44, 92, 8)
    assert dict(manifest.splits["val"].image_sizes) == {"40x48": 2, "55x44": 2, "73x44": 2}  # 60 and 80 rows of 48
    dataset = open_dataset(packs[0])
    for _, record in iter_records(dataset, "val"):
        assert (record.height == 40) == (record.size_bytes == len(tree[record.source]))
    assert not verify(packs[0], decode=True).faults
    with pytest.raises(UsageError, match="other settings: quality is 92 there and 80 here"):
        make.pack(source, packs[0], shard_samples=2, shorter_side_px=44, quality=80)
    assert make.pack(source, packs[0], shard_samples=2, shorter_side_px=44, quality=92).written == 0
    path = packs[0] / MANIFEST_NAME
    document = Manifest.from_json(path.read_text(), "")
    path.write_text(dataclasses.replace(document, settings={**document.settings, "shorter_side_px": 40}).to_json())
    assert any("its shorter_side_px is 40, and an image of" in str(fault) for fault in verify(packs[0]).faults)
