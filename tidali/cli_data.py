"""The commands that make and look at data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidali.console import print_table, progress_bar, say

if TYPE_CHECKING:
    from shards.pack import PackReport, Progress

Workers = Annotated[int | None, typer.Option(min=1, help="Processes that pack. Default: all cores, fewer for small jobs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the data set in DEST if it is another one.")]
Dest = Annotated[Path, typer.Argument(help="Folder to make the data set in.")]


def shard(
    source: Annotated[Path, typer.Argument(help="Tiny-ImageNet (folder or zip), or any SPLIT/CLASS/*.jpg or CLASS/*.jpg.")],
    dest: Dest,
    seed: Annotated[int, typer.Option(help="Of train's order and of the held-out split.")] = 0,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Pack labelled images into shards: WebDataset tars with DALI indexes and a manifest.

    Run again, it keeps every finished shard that is right and mends the rest.
    """
    from shards.pack import pack
    from shards.plan import PackSettings
    from shards.scan import FileSource

    with _progress("packing") as progress:
        settings = PackSettings(seed=seed)
        report = pack(FileSource(source), dest, settings, workers=workers, overwrite=overwrite, progress=progress)
    _print_report(report)


def demo(
    dest: Dest,
    classes: Annotated[int, typer.Option(help="2 to 200.")] = 10,
    per_class: Annotated[int, typer.Option(help="Training images a class; val has a fifth of it, at least 5.")] = 250,
    seed: Annotated[int, typer.Option(help="Of the drawings and their order.")] = 0,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Make the built-in data set: drawn figures, 64 x 64, already packed. No network."""
    from shards.demo import pack_demo

    with _progress("drawing") as progress:
        report = pack_demo(
            dest, classes=classes, per_class=per_class, seed=seed, workers=workers, overwrite=overwrite, progress=progress
        )
    _print_report(report)


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    with progress_bar(note=False) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_report(report: PackReport) -> None:
    manifest = report.manifest
    rows = [
        (
            split.name,
            f"{split.samples:,}",
            len(split.shards),
            f"{split.size_bytes / 1e6:,.1f}",
            next(iter(split.image_sizes), "-") if len(split.image_sizes) < 2 else f"{len(split.image_sizes)} sizes",
        )
        for split in manifest.splits.values()
    ]
    title = f"{report.dest}: {len(manifest.classes)} classes"
    print_table(title, ("split", "samples", "shards", "MB", "height x width"), rows)
    if report.kept or report.repaired:
        redone = f"; damaged and written anew: {', '.join(report.repaired)}" if report.repaired else ""
        say(f"{report.written} shards written, {len(report.kept)} kept from an earlier run{redone}")
    if report.removed:
        say(f"removed left-over files: {', '.join(report.removed)}")
    if manifest.quarantine:
        say(f"warning: {len(manifest.quarantine)} files are no usable images and are in {report.dest}/quarantine:")
        for entry in manifest.quarantine[:10]:
            say(f"  {entry.source!r}: {entry.reason}")
        if len(manifest.quarantine) > 10:
            say(f"  ... the rest is listed in {report.dest}/dataset.json")
