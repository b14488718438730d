"""Check that a packed data set is unchanged: every hash, header, label and count, and on request every image."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.check import Fault, ShardCheck, check_shard
from shards.check_image import SecondDecoder
from shards.duplicates import find_repeated, name_repeated
from shards.executor import default_workers, in_task_order, run_tasks
from shards.pack import PLAN_NAME
from shards.plan import plan_id
from shards.record import build_manifest
from shards.tar_files import Labels
from tidali.dataset.contract import MANIFEST_NAME, Manifest, Shard, manifest_text, parse_image_size, read_record
from tidali.errors import DatasetError
from tidali.files import TEMPORARY_SUFFIX

_REPACK = "pack the source again into this folder: correct shards are kept"
_REPACK_ANEW = f"{_REPACK}, with --overwrite"  # a manifest with other content belongs to another pack
_ADOPT_AGAIN = "if a tar was changed, restore it; then run 'tidali adopt' on this folder again"
_MOST_DIFFERENCES = 8
_SHARD_FILE = re.compile(r".*\.(tar|idx)|[a-z]+-\d{6,}\.json")


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """How much was checked, and what is wrong."""

    faults: tuple[Fault, ...]
    repeated: tuple[str, ...] = ()
    """Byte-identical images in several splits or under several classes, a line for each: no damage, the source has them so."""
    shards: int = 0
    samples: int = 0
    size_bytes: int = 0


def verify(
    root: Path, *, decode: bool = False, second_decoder: SecondDecoder | None = None, workers: int | None = None
) -> VerifyReport:
    """Check a data set in a local folder; with ``decode`` every image too, by PIL and libjpeg-turbo.

    Args:
        second_decoder: a function that other processes can import: decodes each image once more.

    Raises:
        DatasetError: there is no manifest to check against.
    """
    path = root / MANIFEST_NAME
    try:
        text = manifest_text(root)
    except (OSError, UnicodeDecodeError) as error:
        return VerifyReport(faults=(Fault(MANIFEST_NAME, f"cannot be read: {error}", _REPACK_ANEW),))
    try:
        manifest = Manifest.from_json(text, str(path))
    except DatasetError as error:
        return VerifyReport(faults=(Fault(MANIFEST_NAME, str(error).partition("; ")[0], _REPACK_ANEW),))
    shards = [(split.name, shard) for split in manifest.splits.values() for shard in split.shards]
    checks = _check_shards(root, manifest, shards, workers, decode=decode, second_decoder=second_decoder)
    faults = [fault for check in checks for fault in check.faults]
    faults += _extra_files(root, manifest)
    faults += _ordinals(shards, checks)
    faults += _manifest_faults(manifest, text, checks)
    if manifest.adopted:
        faults = [replace(fault, fix=_ADOPT_AGAIN) for fault in faults]
    return VerifyReport(
        faults=tuple(faults),
        repeated=tuple(_repeated(root, manifest, shards, checks)),
        shards=len(shards),
        samples=sum(split.samples for split in manifest.splits.values()),
        size_bytes=sum(split.size_bytes for split in manifest.splits.values()),
    )


def _check_shards(
    root: Path,
    manifest: Manifest,
    shards: list[tuple[str, Shard]],
    workers: int | None,
    *,
    decode: bool,
    second_decoder: SecondDecoder | None,
) -> list[ShardCheck]:
    job = functools.partial(
        check_shard,
        root=root,
        num_classes=len(manifest.classes),
        unlabelled=frozenset(name for name, split in manifest.splits.items() if not split.labelled),
        file_of={digest: name for _, shard in shards for name, digest, _ in shard.files},
        decode=decode,
        second_decoder=second_decoder,
        adopted=_labels(manifest) if manifest.adopted else None,
    )
    if workers is None:
        workers = default_workers() if sum(shard.samples for _, shard in shards) > 20_000 or decode else 1
    return in_task_order(run_tasks(job, shards, workers))


def _labels(manifest: Manifest) -> Labels:
    """How the labels of an adopted data set are found: they are names where the classes' ids are not their numbers."""
    ids = [class_.id for class_ in manifest.classes]
    numbers = None if ids == [str(number) for number in range(len(ids))] else {id_: number for number, id_ in enumerate(ids)}
    return Labels(field=manifest.settings.get("label_field"), numbers=numbers)


def _extra_files(root: Path, manifest: Manifest) -> Iterator[Fault]:
    known = {name for split in manifest.splits.values() for shard in split.shards for name, _, _ in shard.files}
    folders = {name.rpartition("/")[0] for name in known} | {""}
    names = (
        f"{folder}/{name}".lstrip("/") for folder in folders if (root / folder).is_dir() for name in os.listdir(root / folder)
    )
    for name in sorted(names):
        if name == PLAN_NAME or name.endswith(TEMPORARY_SUFFIX):
            yield Fault(name, "left by a packer that did not finish", "run the same 'tidali shard' command again")
        elif _SHARD_FILE.fullmatch(name) and name not in known:
            yield Fault(name, "is in no split of the manifest", "remove it, or pack again if the manifest is what is wrong")


def _repeated(root: Path, manifest: Manifest, shards: list[tuple[str, Shard]], checks: list[ShardCheck]) -> Iterator[str]:
    repeated = find_repeated([(split, check.contents) for (split, _), check in zip(shards, checks, strict=True)])
    holders = (
        (split, check.contents, [record.source for record in read_record(root, shard)])
        for (split, shard), check in zip(shards, checks, strict=True)
        if not repeated.all.isdisjoint(check.contents.digests)
    )
    return name_repeated(repeated, holders, [class_.id for class_ in manifest.classes])


def _ordinals(shards: list[tuple[str, Shard]], checks: list[ShardCheck]) -> Iterator[Fault]:
    """Each key begins with the sample's position in the split's listing, which must be unique."""
    for split in dict.fromkeys(name for name, _ in shards):
        mine = [(shard.name, check) for (name, shard), check in zip(shards, checks, strict=True) if name == split]
        ordinals = np.sort(np.concatenate([np.frombuffer(check.ordinals, np.int64) for _, check in mine]))
        for ordinal in np.unique(ordinals[1:][ordinals[1:] == ordinals[:-1]]).tolist():
            names = [name for name, check in mine for _ in range(check.ordinals.count(ordinal))]
            yield Fault(names[-1], f"key {ordinal:08d}_... is in {' and in '.join(names)}: a sample twice", _REPACK)


def _manifest_faults(manifest: Manifest, text: str, checks: list[ShardCheck]) -> Iterator[Fault]:
    """The manifest can be derived from the shards' records: build it again, and name what differs."""
    faults = list(_differences(manifest, checks))
    if len(faults) > _MOST_DIFFERENCES:
        faults[_MOST_DIFFERENCES:] = [f"and {len(faults) - _MOST_DIFFERENCES} more values differ"]
    if not faults and manifest.to_json() != text:
        faults = ["was edited: its checksum is not that of its text"]
    yield from (Fault(MANIFEST_NAME, fault, _REPACK_ANEW) for fault in faults)


def _differences(manifest: Manifest, checks: list[ShardCheck]) -> Iterator[str]:
    summaries = [check.summary for check in checks if check.summary is not None]
    expected_id = plan_id(manifest.source, manifest.settings, manifest.classes)
    if any(summary.plan_id != expected_id for summary in summaries):
        yield "its source, settings or classes are not those that the shards were packed with"
    limit_px = manifest.settings.get("shorter_side_px")
    too_large = (
        []
        if limit_px is None
        else [size for summary in summaries for size in summary.tally("image_sizes") if min(parse_image_size(size)) > limit_px]
    )
    if too_large:
        yield f"its shorter_side_px is {limit_px}, and an image of {too_large[0]} pixels is in a shard"
    if len(summaries) < len(checks):
        return
    again = build_manifest(
        summaries,
        classes=manifest.classes,
        labelled={name: split.labelled for name, split in manifest.splits.items()},
        source=manifest.source,
        settings=manifest.settings,
        versions=manifest.versions,
    )
    ours, theirs = (json.loads(json.dumps(asdict(m))) for m in (manifest, again))
    for where, here, there in _walk(ours, theirs, ""):
        yield f"{where} is {here}, the shards' records say {there}"


def _walk(here: Any, there: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """Every leaf in which two JSON documents differ."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        pairs: Iterable[tuple[Any, Any, str]] = (
            (here.get(key), there.get(key), f"{where}.{key}".removeprefix(".")) for key in {**here, **there}
        )
    elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        pairs = ((a, b, f"{where}[{n}]") for n, (a, b) in enumerate(zip(here, there, strict=True)))
    elif here != there:
        yield where, json.dumps(here)[:80], json.dumps(there)[:80]
        return
    else:
        return
    for a, b, place in pairs:
        yield from _walk(a, b, place)
