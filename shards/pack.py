"""The packer: scan, plan, write the shards in parallel, and the manifest last."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards.describe import QUARANTINE
from shards.duplicates import find_repeated
from shards.executor import default_workers, in_task_order, run_tasks, start_early
from shards.plan import PackSettings, Plan, make_plan
from shards.record import about_classes, build_manifest
from shards.scan import Scan, Source
from shards.store import Store, open_store
from shards.write import ShardResult, finish_shard
from tidali import __version__
from tidali.dataset.contract import MANIFEST_NAME, Manifest, Quarantined
from tidali.dataset.remote import is_remote
from tidali.dataset.shard_bytes import label_digits
from tidali.errors import TidaliError, UsageError, some_of
from tidali.files import TEMPORARY_SUFFIX, resumable

PLAN_NAME = ".tidali-plan.json"
_SHARD_FILE = r"(train|val|heldout|test)-\d{6,}\.(tar|idx|json)"
# Temporary files of any process and, with Ray, of any machine: the packer that removes them holds the folder's lock.
_OURS = re.compile(rf"{_SHARD_FILE}|\.*({_SHARD_FILE}|(dataset|tidali-plan)\.json)\..*{re.escape(TEMPORARY_SUFFIX)}")

# Below this a pool costs more than it saves: its workers take about 0.4 s to start, one core packs that many in that time.
_SMALL_JOB_SAMPLES = 4000

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in samples."""


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """The result of a run."""

    location: str
    manifest: Manifest
    written: int
    """Shards."""
    kept: tuple[str, ...]
    """Correct shards of an earlier run."""
    repaired: tuple[str, ...]
    """Damaged shards of an earlier run, rewritten."""
    removed: tuple[str, ...]
    """Left-over files of an earlier run."""
    left_out: Mapping[str, int]
    """How many files of the source are not packed, by kind."""
    warnings: tuple[str, ...]
    """What may be wrong with the data set although it can be used."""


def pack(
    source: Source,
    dest: str | Path,
    settings: PackSettings | None = None,
    *,
    workers: int | None = None,
    executor: str = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack a source into ``dest``, a folder or fsspec URL, or resume or repair what the same call began there.

    The bytes written depend on the source and the settings alone, not on ``workers`` (None: enough for
    all cores, or this process alone where the job is small) or ``executor`` ('local' or 'ray').

    Raises:
        UsageError: no data set in the source, a setting that does not fit it, or a ``dest`` that contains something else.
        TidaliError: reading or writing failed, or a worker died. Finished shards are kept, and the same call resumes from them.
    """
    settings = settings or PackSettings()
    store = open_store(dest)
    _refuse_overlap(source, dest)
    if workers != 1 and executor == "local":
        start_early()
    with resumable(store.location):
        scan = source.scan()
        plan = make_plan(scan, settings)
        with store.locked():
            _claim(store, plan, overwrite=overwrite)
            removed = _sweep(store, plan)
            results = _write_shards(plan, scan, settings, store, _run(executor, plan, workers), progress)
            _sweep(store, plan)  # what a lost worker left, whose task another one did
            _refuse_missing(store, plan)
            manifest = build_manifest(
                [result.summary for result in results],
                classes=plan.classes,
                labelled=plan.labelled,
                source=plan.source,
                settings=plan.settings,
                versions=library_versions(),
            )
            about = (*_check_losses(store, manifest), *about_classes(manifest, store.location), *about_repeated(store, results))
            warnings = (*scan.warnings, *about)
            publish_manifest(store, manifest)
    by_state = {state: tuple(r.summary.shard.name for r in results if r.state == state) for state in ("kept", "repaired")}
    return PackReport(
        location=store.location,
        manifest=manifest,
        written=sum(result.state == "written" for result in results),
        kept=by_state["kept"],
        repaired=by_state["repaired"],
        removed=removed,
        left_out=scan.left_out,
        warnings=warnings,
    )


Run = Callable[..., Any]


def _run(executor: str, plan: Plan, workers: int | None) -> Run:
    if executor == "ray":
        from shards.ray_executor import run_tasks_on_ray

        return functools.partial(run_tasks_on_ray, workers=workers)
    if workers is None:
        workers = 1 if plan.samples < _SMALL_JOB_SAMPLES else default_workers()
    return functools.partial(run_tasks, workers=workers)


def _write_shards(
    plan: Plan, scan: Scan, settings: PackSettings, store: Store, run: Run, progress: Progress | None
) -> list[ShardResult]:
    job = functools.partial(
        finish_shard,
        store=store,
        reader=scan.reader,
        settings=settings,
        plan_id=plan.id,
        digits=label_digits(len(plan.classes)),
    )
    try:
        return in_task_order(run(job, plan.tasks), samples_done([len(task) for task in plan.tasks], progress))
    except BaseException:
        with suppress(OSError, TidaliError):
            _sweep(store, plan)  # a stopped worker's partial files may be what filled the disk
        raise


def samples_done(samples: Sequence[int], progress: Progress | None) -> Callable[[int], None]:
    """What is called with the index of each task that is done, to call ``progress``, which is first told the total.

    Args:
        samples: of each task.
    """
    done, total = 0, sum(samples)
    if progress is not None:
        progress(0, total)

    def count(index: int) -> None:
        nonlocal done
        done += samples[index]
        if progress is not None:
            progress(done, total)

    return count


# ----------------------------------------------------------------------------------------------------------------------- DEST


def _refuse_overlap(source: Source, dest: str | Path) -> None:
    root = getattr(source, "path", None)
    if root is None or is_remote(str(dest)):
        return
    here, there = (Path(os.path.realpath(path)) for path in (dest, root))  # Path.resolve raises on a link to itself
    if here == there or here.is_relative_to(there) or there.is_relative_to(here):
        raise UsageError(f"{dest}: DEST and SOURCE ({root}) lie inside each other; choose another DEST")


def _claim(store: Store, plan: Plan, *, overwrite: bool) -> None:
    """Write the plan into the store, unless it contains something else.

    The plan stays until the manifest is there: it is how a second run knows what the first one was doing.
    """
    there = _existing_plan(store)
    if there is None and any(not name.endswith(TEMPORARY_SUFFIX) or not _OURS.fullmatch(name) for name in store.names()):
        raise UsageError(f"{store.location}: not empty and no data set; choose another DEST")
    ours = {"source": dict(plan.source), "settings": dict(plan.settings)}
    different = there is not None and there != ours
    if there is not None and different and not overwrite:
        text = f"{store.location}: contains a pack of {_difference(there, ours)}"
        raise UsageError(f"{text}; choose another DEST, or --overwrite to replace it")
    store.publish(PLAN_NAME, json.dumps(ours, indent=1).encode() + b"\n")
    if different:
        store.remove(MANIFEST_NAME)


def _existing_plan(store: Store) -> dict[str, Any] | None:
    """Source and settings of what is in the store: of an unfinished run, else of the finished data set."""
    for name in (PLAN_NAME, MANIFEST_NAME):
        text = store.read(name)
        if text is None:
            continue
        try:
            document = json.loads(text)
            return {key: dict(document[key]) for key in ("source", "settings")}
        except (ValueError, KeyError, TypeError):
            return {"source": {}, "settings": {}, "damaged": name}
    return None


def _difference(there: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first source field or setting in which two plans differ, described."""
    if "damaged" in there:
        return f"an unknown source ({there['damaged']} is damaged)"
    for part, what in (("source", "another source"), ("settings", "other settings")):
        for key in {**there[part], **ours[part]}:
            old, new = there[part].get(key), ours[part].get(key)
            if old != new:
                return f"{what}: {key} is {_short(old)} there and {_short(new)} here"
    return "another kind"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sweep(store: Store, plan: Plan) -> tuple[str, ...]:
    """Remove an earlier run's files that are not of this plan: partial files, and shards beyond the last."""
    expected = {name for task in plan.tasks for name in task.file_names}
    stale = [name for name in store.names() if _OURS.fullmatch(name) and name not in expected]
    for name in stale:
        store.remove(name)
    return tuple(name for name in stale if not name.endswith(TEMPORARY_SUFFIX))


def _refuse_missing(store: Store, plan: Plan) -> None:
    """
    Raises:
        TidaliError: workers on other machines wrote into a folder of the same name there.
    """
    there = set(store.names())
    missing = [name for task in plan.tasks for name in task.file_names if name not in there]
    if missing:
        raise TidaliError(
            f"{store.location}: {some_of(missing, 1)} were written on other machines, which do not share this folder; give a "
            f"DEST that all machines of the Ray cluster see under this name, or a URL"
        )


def _check_losses(store: Store, manifest: Manifest) -> Iterator[str]:
    """Warnings of classes that lost all their images of a split because none is usable.

    Raises:
        TidaliError: a split lost all its images, or train all those of a class.
    """
    for name, split in manifest.splits.items():
        lost = [entry for entry in manifest.quarantine if entry.split == name]
        if lost and not split.samples:
            raise TidaliError(_loss(store, name, lost, "fix the source"))
        without = {entry.label for entry in lost if entry.label is not None and not split.class_counts[entry.label]}
        for label in sorted(without):
            mine = [entry for entry in lost if entry.label == label]
            what = f"class {manifest.classes[label].id!r} of {name}"
            if name == "train":
                raise TidaliError(_loss(store, what, mine, "fix the source or leave the class out with --classes"))
            yield _loss(store, what, mine)


def _loss(store: Store, what: str, lost: Sequence[Quarantined], fix: str = "") -> str:
    text = f"no usable image in {what}: all {len(lost)} are in {QUARANTINE}/, {lost[0].source!r} for this: {lost[0].reason}"
    return f"{store.location}: {text}" + (f"; {fix}, and choose another DEST" if fix else "")


def about_repeated(store: Store, results: Sequence[ShardResult]) -> Iterator[str]:
    repeated = find_repeated([(result.summary.split, result.contents) for result in results])
    if text := str(repeated):
        yield f"{text}; 'tidali verify {store.location}' lists them"


def library_versions() -> dict[str, str]:
    """Of what decides a pack's bytes besides its source and settings."""
    return {"tidali": __version__, **{name: version(name) for name in ("simplejpeg", "pillow")}}


def publish_manifest(store: Store, manifest: Manifest) -> None:
    """Write the manifest, which ends a pack, and remove what an earlier one left."""
    expected = {entry.file for entry in manifest.quarantine}
    for name in store.names(QUARANTINE):
        if f"{QUARANTINE}/{name}" not in expected:
            store.remove(f"{QUARANTINE}/{name}")
    text = manifest.to_json().encode()
    if store.read(MANIFEST_NAME) != text:
        store.publish(MANIFEST_NAME, text)
    store.remove(PLAN_NAME)
