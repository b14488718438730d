"""The manifest, and a data set on disk against every cheap kind of damage."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidali.dataset.contract import MANIFEST_NAME, Manifest, Quarantined, Shard, Split, iter_records, open_dataset, read_record
from tidali.dataset.shard_bytes import format_index, member_header, parse_index
from tidali.errors import DatasetError

# ------------------------------------------------------------------------------------------------------------------- manifest

documents = st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=8), max_size=3)
counts = st.dictionaries(st.text(max_size=8), st.integers(0), max_size=3)
triples = st.tuples(*[st.floats(0, 1)] * 3)
shard_names = st.builds("{}-{:06d}.tar".format, st.sampled_from(["train", "val", "heldout", "test"]), st.integers(0, 999999))
splits = st.builds(
    Split, image_sizes=counts, extensions=counts, shards=st.lists(st.builds(Shard, name=shard_names), max_size=2).map(tuple)
)
quarantined_names = st.builds("quarantine/{}-{:08d}_{}.bin".format, st.just("train"), st.integers(0, 10**9), st.just("a_b-c"))
manifests = st.builds(
    Manifest,
    quarantine=st.lists(st.builds(Quarantined, file=quarantined_names), max_size=2).map(tuple),
    splits=st.dictionaries(st.text(max_size=8), splits, max_size=2),
    mean=triples,
    std=triples,
    counts=counts,
    source=documents,
    settings=documents,
    versions=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2),
)


@given(manifests)
def test_manifest_round_trip(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json(), "dataset.json")
    assert again == manifest
    assert again.to_json() == manifest.to_json()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda document: "{", "damaged manifest"),
        (lambda document: "[]", "damaged manifest"),
        (lambda document: "{}", "not a tidali data set"),
        (lambda document: {**document, "format": "other"}, "not a tidali data set"),
        (lambda document: {**document, "version": 2}, "format version 2, this tidali reads 1"),
        (lambda document: {**document, "surprise": 1}, "damaged manifest .*surprise"),
        (lambda document: {key: document[key] for key in document if key != "classes"}, "damaged manifest .*classes"),
        (lambda document: {**document, "splits": {"train": {"name": "train"}}}, "damaged manifest"),
        (
            lambda document: json.dumps(document).replace("val-000000.tar", "../000000.tar"),
            "damaged manifest .*not a name of a shard",
        ),
        (
            lambda document: {
                **document,
                "quarantine": [{"split": "train", "source": "a", "label": 0, "reason": "", "file": "quarantine/../../a.bin"}],
            },
            "damaged manifest .*not a name of a quarantined file",
        ),
    ],
)
def test_manifest_that_is_refused(demo_data: Path, change: Callable[..., object], complaint: str) -> None:
    changed = change(json.loads((demo_data / MANIFEST_NAME).read_text()))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    with pytest.raises(DatasetError, match=f"^where: .*{complaint}"):
        Manifest.from_json(text, "where")


# -------------------------------------------------------------------------------------------------------------------- reading


def test_demo_opens_and_its_records_agree_with_its_tars(demo_data: Path) -> None:
    dataset = open_dataset(demo_data)
    for split, samples in {"train": 160, "val": 32}.items():
        records = list(iter_records(dataset, split))
        assert len(records) == dataset.split(split).samples == samples
        for shard, record in records:
            with (demo_data / shard.name).open("rb") as tar:
                tar.seek(record.offset - 512)
                header = tar.read(512)
            assert header == member_header(f"{record.key}.{record.extension}", record.size_bytes)


def test_missing_split_names_those_there_are(demo_data: Path) -> None:
    with pytest.raises(DatasetError, match=r"no 'test' split with samples \(splits: train, val\)"):
        open_dataset(demo_data).split("test")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


def _restate_index(root: Path, text: str) -> None:
    """Replace train's first index by one that the manifest names too, so that only the tar itself can contradict it."""
    index = root / "train-000000.idx"
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    index.write_text(text)
    manifest = root / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace(digest, hashlib.sha256(text.encode()).hexdigest()))


def _shift_index(root: Path) -> None:
    samples = parse_index((root / "train-000000.idx").read_text(), "")
    moved = [[part._replace(offset=part.offset - 512) for part in sample] for sample in samples]
    _restate_index(root, format_index(moved))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda root: (root / MANIFEST_NAME).unlink(), r"no dataset.json here; make a data set"),
        (lambda root: (root / MANIFEST_NAME).write_bytes(b"\xff\xfe"), r"dataset\.json: cannot be read"),
        (lambda root: (root / "train-000000.tar").unlink(), r"train-000000\.tar: No such file"),
        (lambda root: (root / "val-000000.idx").unlink(), r"val-000000\.idx: No such file"),
        (lambda root: _truncate(root / "train-000000.tar"), r"train-000000\.tar: \d+ bytes, the manifest says \d+"),
        (lambda root: (root / "train-000000.idx").write_text("v1.2 0\n"), r"train-000000\.idx: not the index"),
        (lambda root: shutil.copy(root / "val-000000.idx", root / "train-000000.idx"), r"train-000000\.idx: not the index"),
        (lambda root: _restate_index(root, "v1.2 0\n"), r"train-000000\.idx: does not end in a sample, the manifest says \d+"),
        (lambda root: _restate_index(root, ""), r"train-000000\.idx: does not end in a sample"),
        (lambda root: _restate_index(root, "v1.2 1\njpg 5 5 a.jpg\n"), r"train-000000\.idx: does not end in a sample"),
        (_shift_index, r"train-000000\.tar: no header of '\S+\.cls' where train-000000\.idx has it"),
    ],
    ids=[
        "no manifest",
        "manifest not text",
        "no tar",
        "no index",
        "truncated tar",
        "stale index",
        "swapped index",
        "index of no samples",
        "empty index",
        "index of an offset before the tar",
        "wrong offsets",
    ],
)
def test_damage_is_named(demo_copy: Path, damage: Callable[[Path], object], complaint: str) -> None:
    damage(demo_copy)
    with pytest.raises(DatasetError, match=complaint) as refused:
        open_dataset(demo_copy)
    assert "\n" not in str(refused.value)


def test_a_tar_that_cannot_be_opened(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its owner's will; staged, as the tests may run as root."""
    opened = Path.open

    def refuse_tars(path: Path, *args: Any, **options: Any) -> Any:
        if path.suffix == ".tar":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse_tars)
    with pytest.raises(DatasetError, match=r"train-000000\.tar: Permission denied; run 'tidali verify'"):
        open_dataset(demo_data)


@pytest.mark.parametrize("text", ["", "{}", '{"samples": [{}]}', '{"samples": 3}'])
def test_damaged_record(demo_copy: Path, text: str) -> None:
    shard = open_dataset(demo_copy).split("val").shards[0]
    (demo_copy / shard.record_name).write_text(text)
    with pytest.raises(DatasetError, match=r"val-000000\.json: damaged shard record"):
        read_record(demo_copy, shard)
