"""The packer: scan, plan, write the shards in parallel, and the manifest last."""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards.executor import run_tasks
from shards.plan import PackSettings, Plan, make_plan
from shards.scan import Scan, Source
from shards.write import PARTIAL_SUFFIX, QUARANTINE, ImageOptions, ShardResult, finish_shard, publish_bytes, sync_folder
from tidali.contract import MANIFEST_NAME, Manifest, Split, label_digits
from tidali.errors import DatasetError, TidaliError, UsageError

PLAN_NAME = ".tidali-plan.json"
_OURS = re.compile(r"(train|val|heldout|test)-\d{6}\.(tar|idx|json)(\.\d+\.part)?|(dataset|\.tidali-plan)\.json\.\d+\.part")

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in samples."""


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What a run did."""

    dest: Path
    manifest: Manifest
    written: int
    """Shards."""
    kept: tuple[str, ...]
    """Shards of an earlier run that were right."""
    repaired: tuple[str, ...]
    """Shards of an earlier run that were damaged and were written anew."""
    removed: tuple[str, ...]
    """Left-over files of an earlier run."""
    ignored_files: int
    """Files of the source that are no images by their suffix."""


def pack(
    source: Source,
    dest: Path,
    settings: PackSettings | None = None,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack a source into ``dest``, or go on with, or repair, what the same call began there.

    The bytes written depend on the source and the settings alone, not on ``workers`` (None: all cores, or none beside this
    process where the job is small).

    Raises:
        UsageError: no data set in the source, a setting that does not fit it, or a ``dest`` that holds something else.
        TidaliError: reading or writing failed, or a worker died. What is finished stays, and the same call goes on from there.
    """
    settings = settings or PackSettings()
    scan = source.scan()
    plan = make_plan(scan, settings)
    _refuse_overlap(source, dest)
    with _locked(dest):
        _claim(dest, plan, overwrite=overwrite)
        removed = _sweep(dest, plan)
        results = _write_shards(plan, scan, settings, dest, workers, progress)
        manifest = _manifest(plan, results)
        _remove_stray_quarantine(dest, manifest)
        _publish_manifest(dest, manifest)
    return PackReport(
        dest=dest,
        manifest=manifest,
        written=sum(result.state == "written" for result in results),
        kept=_names(results, "kept"),
        repaired=_names(results, "repaired"),
        removed=removed,
        ignored_files=scan.ignored_files,
    )


def _names(results: Sequence[ShardResult], state: str) -> tuple[str, ...]:
    return tuple(result.shard.name for result in results if result.state == state)


# ----------------------------------------------------------------------------------------------------------------------- DEST


def _refuse_overlap(source: Source, dest: Path) -> None:
    root = getattr(source, "path", None)
    if root is not None and root.is_dir() and dest.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"{dest}: lies inside the source {root}; choose a folder outside it")


@contextmanager
def _locked(dest: Path) -> Iterator[None]:
    """Hold ``dest`` for this process. The lock is on the folder itself, so nothing is left behind when the process dies."""
    try:
        dest.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(dest, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{dest}: {error.strerror}; choose another DEST") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TidaliError(f"{dest}: another tidali is packing into it; wait for it to end") from None
        if not os.access(dest, os.W_OK | os.X_OK):
            raise UsageError(f"{dest}: Permission denied; choose another DEST")
        yield
    finally:
        os.close(descriptor)


def _claim(dest: Path, plan: Plan, *, overwrite: bool) -> None:
    """Write the plan into ``dest``, unless that holds something else.

    The plan stays until the manifest is there: it is how a second run knows what the first one was doing.
    """
    there = _existing_plan(dest)
    if there is None and any(not _OURS.fullmatch(name) or not name.endswith(PARTIAL_SUFFIX) for name in os.listdir(dest)):
        raise UsageError(f"{dest}: not empty and no data set; choose another DEST")
    ours = {"source": dict(plan.source), "settings": dict(plan.settings)}
    different = there is not None and there != ours
    if different and not overwrite:
        assert there is not None
        raise UsageError(
            f"{dest}: holds a pack of {_difference(there, ours)}; choose another DEST, or --overwrite to replace it"
        )
    _guarded(lambda: publish_bytes(dest / PLAN_NAME, json.dumps(ours, indent=1).encode() + b"\n"), dest)
    if different:
        (dest / MANIFEST_NAME).unlink(missing_ok=True)
    sync_folder(dest)


def _existing_plan(dest: Path) -> dict[str, Any] | None:
    """Source and settings of what is in ``dest``: of an unfinished run, else of the finished data set."""
    for name in (PLAN_NAME, MANIFEST_NAME):
        path = dest / name
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return {key: document[key] for key in ("source", "settings")}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            return {"source": {}, "settings": {}, "damaged": name}
    return None


def _difference(there: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first setting or source field in which two plans differ, in words."""
    if "damaged" in there:
        return f"an unknown source ({there['damaged']} is damaged)"
    for part in ("source", "settings"):
        for key in (*there[part], *ours[part]):
            old, new = there[part].get(key), ours[part].get(key)
            if old != new:
                return f"another {part.removesuffix('s')}: {key} is {_short(old)} there and {_short(new)} here"
    return "something else"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sweep(dest: Path, plan: Plan) -> tuple[str, ...]:
    """Remove what an earlier run left and this plan does not have: partial files, and shards beyond the last."""
    expected = {f"{task.stem}.{suffix}" for task in plan.tasks for suffix in ("tar", "idx", "json")}
    stale = sorted(name for name in os.listdir(dest) if _OURS.fullmatch(name) and name not in expected)
    for name in stale:
        (dest / name).unlink(missing_ok=True)
    return tuple(name for name in stale if not name.endswith(PARTIAL_SUFFIX))


def _remove_stray_quarantine(dest: Path, manifest: Manifest) -> None:
    folder = dest / QUARANTINE
    if not manifest.quarantine:
        shutil.rmtree(folder, ignore_errors=True)
        return
    expected = {entry.file.removeprefix(f"{QUARANTINE}/") for entry in manifest.quarantine}
    for name in set(os.listdir(folder)) - expected:
        (folder / name).unlink()


# --------------------------------------------------------------------------------------------------------------------- shards


def _write_shards(
    plan: Plan, scan: Scan, settings: PackSettings, dest: Path, workers: int | None, progress: Progress | None
) -> list[ShardResult]:
    finish = functools.partial(
        finish_shard,
        dest=dest,
        reader=scan.reader,
        options=ImageOptions(max_pixels=settings.max_pixels, size_px=settings.size_px, kernel=settings.kernel),
        plan_id=plan.id,
        digits=label_digits(len(plan.classes)),
    )
    results: list[ShardResult | None] = [None] * len(plan.tasks)
    done = 0
    for index, result in run_tasks(finish, plan.tasks, workers):
        results[index] = result
        done += len(plan.tasks[index].samples)
        if progress is not None:
            progress(done, plan.samples)
    return [result for result in results if result is not None]


# ------------------------------------------------------------------------------------------------------------------- manifest


def _manifest(plan: Plan, results: Sequence[ShardResult]) -> Manifest:
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.counts)
    mean, std = _mean_std([result for result in results if result.split == "train"])
    return Manifest(
        classes=plan.classes,
        splits={split: _split(plan, split, [r for r in results if r.split == split]) for split in plan.labelled},
        mean=mean,
        std=std,
        quarantine=tuple(entry for result in results for entry in result.quarantined),
        counts=dict(sorted(counts.items())),
        source=plan.source,
        settings=plan.settings,
        versions={name: version(name) for name in ("tidali", "simplejpeg", "pillow")},
    )


def _split(plan: Plan, name: str, results: Sequence[ShardResult]) -> Split:
    labelled = plan.labelled[name]
    class_counts: Counter[int] = Counter()
    image_sizes: Counter[str] = Counter()
    extensions: Counter[str] = Counter()
    for result in results:
        class_counts.update(result.class_counts)
        image_sizes.update(result.image_sizes)
        extensions.update(result.extensions)
    return Split(
        name=name,
        labelled=labelled,
        samples=sum(result.shard.samples for result in results),
        class_counts=tuple(class_counts[label] for label in range(len(plan.classes))) if labelled else (),
        image_sizes=dict(sorted(image_sizes.items())),
        extensions=dict(sorted(extensions.items())),
        shards=tuple(result.shard for result in results),
    )


def _mean_std(results: Sequence[ShardResult]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Of each RGB channel over every pixel, on a 0..1 scale. From exact integers, with one rounding at the end."""
    pixels = sum(result.pixels for result in results)
    if not pixels:
        raise DatasetError("no usable image in train; nothing was packed")
    means, stds = [], []
    for channel in range(3):
        total = sum(result.sums[channel] for result in results)
        squares = sum(result.square_sums[channel] for result in results)
        means.append(total / (255 * pixels))
        stds.append(math.sqrt(pixels * squares - total * total) / (255 * pixels))
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])


def _publish_manifest(dest: Path, manifest: Manifest) -> None:
    text = manifest.to_json().encode()
    path = dest / MANIFEST_NAME
    _guarded(lambda: None if path.exists() and path.read_bytes() == text else publish_bytes(path, text), dest)
    sync_folder(dest)
    (dest / PLAN_NAME).unlink()


def _guarded(step: Callable[[], None], dest: Path) -> None:
    try:
        step()
    except OSError as error:
        raise TidaliError(f"{error.filename or dest}: {error.strerror}; mend that and run the same command again") from None
