"""A data set of tars that another program wrote, in place: an index and a record beside each tar, and a manifest."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.adopt_tar import AdoptTask, adopt_tar, beside, is_record
from shards.executor import default_workers, in_task_order, run_tasks
from shards.pack import PackReport, Progress, about_repeated, library_versions, publish_manifest, samples_done
from shards.plan import plan_id
from shards.record import about_classes, build_manifest
from shards.store import LocalStore
from shards.tar_files import (
    Tar,
    TarSummary,
    find_tars,
    make_classes,
    refuse_faults,
    small_job,
    summarise_for_index,
    unlabelled_splits,
)
from shards.write import ShardResult
from tidali.dataset.contract import ADOPTED, MANIFEST_NAME, Manifest, is_shard_name
from tidali.dataset.file_names import printable_path, shown
from tidali.errors import DatasetError, TidaliError, UsageError
from tidali.files import remove_left_over, resumable, sync

_SPLIT_ORDER = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class AdoptSettings:
    """What an adopted data set depends on besides its tars and the names of its classes. All of it is in the manifest."""

    label_field: str | None = None
    """The field of the samples' JSON that is the label; None for the ``.cls`` member, or where there is none 'label'."""
    val_fraction: float = 0.0
    """Share of the tars that become val, where no tar is named after a split."""
    max_pixels: int = 1 << 26
    """Images that declare more are quarantined."""


def adopt(
    folder: Path,
    settings: AdoptSettings | None = None,
    *,
    class_names: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Make the tars of a folder a data set, without changing a byte of them, or bring such a data set up to date.

    Args:
        class_names: in the order of the labels, see `shards.tar_files.make_classes`.
        progress: called with the samples done and their number.

    Raises:
        UsageError: no tars, or tars that tidali or DALI could not read; the message names the first, and the sample.
        TidaliError: reading or writing failed, or a worker died. The same call resumes.
    """
    settings = settings or AdoptSettings()
    store = LocalStore(folder)
    _refuse_place(folder)
    with resumable(folder), store.locked():
        old = _old_manifest(folder)
        _, tars = find_tars(folder)
        _refuse_names(folder, tars)
        for parent in {(folder / tar.name).parent for tar in tars}:
            remove_left_over(parent)
        tars = _hold_out(tars, settings.val_fraction)
        if workers is None:
            workers = 1 if small_job(folder, tars) else default_workers()
        summarise_one = functools.partial(summarise_for_index, root=folder, label_field=settings.label_field)
        summaries: list[TarSummary] = in_task_order(run_tasks(summarise_one, tars, workers))
        refuse_faults(tars, summaries)
        classes, labels = make_classes(str(folder), summaries, settings.label_field, class_names)
        source = _describe(folder, tars, summaries)
        plan = plan_id(source, asdict(settings), classes)
        _refuse_foreign_files(folder, tars)
        _remove_stale(folder, old, tars, plan)
        job = functools.partial(adopt_tar, root=folder, labels=labels, plan=plan, max_pixels=settings.max_pixels)
        on_done = samples_done([summary.samples for summary in summaries], progress)
        results: list[ShardResult] = in_task_order(run_tasks(job, _tasks(tars, summaries), workers), on_done)
        unlabelled = unlabelled_splits(tars, summaries)
        splits = [split for split in _SPLIT_ORDER if any(tar.split == split for tar in tars)]
        manifest = build_manifest(
            [result.summary for result in results],
            classes=classes,
            labelled={split: split not in unlabelled for split in splits},
            source=source,
            settings=asdict(settings),
            versions=library_versions(),
        )
        warnings = (*_check_losses(folder, manifest), *about_repeated(store, results))
        publish_manifest(store, manifest)
    return PackReport(
        location=str(folder),
        manifest=manifest,
        written=sum(result.state == "written" for result in results),
        kept=tuple(result.summary.shard.name for result in results if result.state == "kept"),
        repaired=(),
        removed=(),
        left_out=sum((Counter(summary.left_out) for summary in summaries), Counter()),
        warnings=warnings,
    )


# ------------------------------------------------------------------------------------------------------------ what is refused


def _refuse_place(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the local folder that holds the tars")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder}: cannot be written to, and the indexes go beside the tars; pack them with 'tidali shard'")


def _old_manifest(folder: Path) -> Manifest | None:
    """The manifest of an earlier call.

    Raises:
        UsageError: there is a file of that name which no such call wrote.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.from_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return None
    except (DatasetError, UnicodeDecodeError):
        raise UsageError(f"{path}: not the manifest of an adopted data set; move it away") from None
    if not manifest.adopted:
        raise UsageError(f"{folder}: a data set that 'tidali shard' packed already; there is nothing to adopt")
    return manifest


def _refuse_names(folder: Path, tars: Sequence[Tar]) -> None:
    for tar in tars:
        if not is_shard_name(tar.name):
            rule = "it must be of ASCII letters, digits, '_', '-' and '.', and lie in the folder or in one of its folders"
            raise UsageError(f"{folder}: the name {shown(tar.name)} cannot be that of a shard: {rule}; rename or move the tar")


def _refuse_foreign_files(folder: Path, tars: Sequence[Tar]) -> None:
    """A record is always written before its index, so an index without one is somebody else's."""
    for tar in tars:
        index, record = (beside(folder, tar.name, suffix) for suffix in (".idx", ".json"))
        if record.exists():
            if not is_record(record):
                raise UsageError(f"{record}: not written by tidali, and its record of {tar.name} goes there; move it away")
        elif index.exists():
            raise UsageError(f"{index}: not written by tidali, and its index of {tar.name} goes there; move it away")


def _remove_stale(folder: Path, old: Manifest | None, tars: Sequence[Tar], plan: str) -> None:
    """Of an earlier call for other tars, labels or settings: its manifest, and what is beside tars that are no longer there."""
    if old is None or plan_id(old.source, old.settings, old.classes) == plan:
        return
    names = {tar.name for tar in tars}
    for shard in (shard for split in old.splits.values() for shard in split.shards if shard.name not in names):
        if is_record(folder / shard.record_name):
            (folder / shard.index_name).unlink(missing_ok=True)
            (folder / shard.record_name).unlink()
    (folder / MANIFEST_NAME).unlink()
    sync(folder)


# ----------------------------------------------------------------------------------------------------------------------- plan


def _hold_out(tars: tuple[Tar, ...], fraction: float) -> tuple[Tar, ...]:
    """With a fraction, that share of the tars becomes val, chosen by a hash of their names."""
    if not fraction:
        return tars
    if any(tar.split != "train" for tar in tars):
        raise UsageError("--val-fraction: the tars are divided into splits by their names already")
    count = max(1, round(fraction * len(tars)))
    if not 0 < fraction < 1 or count >= len(tars):
        raise UsageError(f"--val-fraction {fraction:g} of {len(tars)} tars leaves none to train on; whole tars are held out")
    held = set(sorted((tar.name for tar in tars), key=lambda name: hashlib.blake2b(name.encode()).digest())[:count])
    return tuple(tar._replace(split="val" if tar.name in held else "train") for tar in tars)


def _describe(folder: Path, tars: Sequence[Tar], summaries: Sequence[TarSummary]) -> dict[str, Any]:
    lines = [f"{tar.split}\0{tar.name}\0{summary.digest}\n" for tar, summary in zip(tars, summaries, strict=True)]
    return {
        "name": printable_path(os.path.realpath(folder)).rpartition("/")[2],
        "layout": ADOPTED,
        "images": sum(summary.samples for summary in summaries),
        "fingerprint": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def _tasks(tars: Sequence[Tar], summaries: Sequence[TarSummary]) -> list[AdoptTask]:
    ordinals: Counter[str] = Counter()
    tasks = []
    for tar, summary in zip(tars, summaries, strict=True):
        tasks.append(AdoptTask(tar, ordinals[tar.split]))
        ordinals[tar.split] += summary.samples
    return tasks


def _check_losses(folder: Path, manifest: Manifest) -> list[str]:
    """Warnings of classes without an image.

    Raises:
        TidaliError: a split has no usable image.
    """
    for name, split in manifest.splits.items():
        if not split.samples:
            lost = [entry for entry in manifest.quarantine if entry.split == name]
            why = f": {lost[0].source!r} for this: {lost[0].reason}" if lost else ""
            raise TidaliError(f"{folder}: no usable image in the tars of {name}{why}")
    return list(about_classes(manifest, str(folder)))
