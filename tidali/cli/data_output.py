"""What the commands that make or show a data set print of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tidali.console import print_table, say, show, suggest, warn
from tidali.dataset.file_names import describe_left_out
from tidali.errors import counted, span

if TYPE_CHECKING:
    from shards.pack import PackReport
    from tidali.dataset.contract import Manifest

_LISTED_FILES = 10
_NOTED = {
    "alpha": "with transparent pixels. Transparency is dropped: training and prediction see the colours that are stored below. "
    "If those are not meant to be seen, composite the images on a background first",
    "sixteen_bit_dark": "with 16-bit samples, none of which is above an eighth of the range: nearly black as packed. If they "
    "hold 12 bits, declare that in the files (sBIT in PNG, MaxSampleValue in TIFF), or scale them first",
}
"""What is said after packing of images of a kind, by the name it is counted under."""

_IN_WORDS = {
    "exif_rotated": "turned by EXIF",
    "cmyk": "in CMYK",
    "alpha": "with transparent pixels",
    "sixteen_bit": "of 16 bits",
    "sixteen_bit_dark": "of 16 bits and nearly black",
    "reencoded": "converted to PNG",
}
"""Other kinds are called by the name they are counted under."""
_LISTED_CLASSES = 50
_LISTED_ENDS = 10


def print_pack(report: PackReport) -> None:
    manifest = report.manifest
    _print_splits(f"{report.location}: {counted(len(manifest.classes), 'class')}", manifest)
    if report.kept or report.repaired:
        rewritten = f"; damaged and rewritten: {', '.join(report.repaired)}" if report.repaired else ""
        say(f"{counted(report.written, 'shard')} written, {len(report.kept):,} kept from an earlier run{rewritten}")
    if report.removed:
        say(f"removed left-over files: {', '.join(report.removed)}")
    if report.left_out:
        say(f"left out: {describe_left_out(report.left_out)}")
    for text in report.warnings:
        warn(text)
    for kind, note in _NOTED.items():
        if count := manifest.counts.get(kind):
            warn(f"{counted(count, 'image')} {note}")
    if manifest.quarantine:
        files = counted(len(manifest.quarantine), "file")
        warn(f"not usable as images: {files}; the bytes are in {report.location}/quarantine")
        for entry in manifest.quarantine[:_LISTED_FILES]:
            warn(f"{entry.source!r}: {entry.reason}")
        if len(manifest.quarantine) > _LISTED_FILES:
            warn(f"and {len(manifest.quarantine) - _LISTED_FILES} more, see 'tidali info {report.location} --json'")


def _print_splits(title: str, manifest: Manifest) -> None:
    rows = []
    for split in manifest.splits.values():
        counts = split.class_counts
        per_class = span(f"{min(counts):,}", f"{max(counts):,}") if counts else "no labels"
        sizes = next(iter(split.image_sizes), "-") if len(split.image_sizes) < 2 else f"{len(split.image_sizes):,} sizes"
        kinds = ", ".join(f"{count:,} {extension}" for extension, count in split.extensions.items()) or "-"
        amounts = (f"{split.samples:,}", f"{len(split.shards):,}", f"{split.size_bytes / 1e6:,.1f}")
        rows.append((split.name, *amounts, per_class, sizes, kinds))
    print_table(title, ("split", "samples", "shards", "MB", "per class", "height x width", "stored as"), rows)


def suggest_next(dest: object, report: PackReport, *hold_out: object) -> None:
    """Suggest to train on a data set or, where there is nothing to evaluate on, the command that holds out a tenth of it."""
    splits = report.manifest.splits
    if any(splits[name].samples and splits[name].labelled for name in ("val", "heldout") if name in splits):
        suggest("train on it", "tidali", "train", "--data", dest)
    else:
        suggest("hold out a tenth of the images, as training needs a split to evaluate on", *hold_out, "--val-fraction", 0.1)


def _print_classes(manifest: Manifest) -> None:
    """Each class and its images in each split. Of very many classes only those with the fewest and the most."""
    splits = [split for split in manifest.splits.values() if split.class_counts]
    names = [one.name if one.name == one.id else f"{one.name} ({one.id})" for one in manifest.classes]
    rows = [(name, [split.class_counts[label] for split in splits]) for label, name in enumerate(names)]
    title = ""
    if len(rows) > _LISTED_CLASSES and splits:
        rows = sorted(rows, key=lambda row: row[1])
        rows = rows[:_LISTED_ENDS] + rows[-_LISTED_ENDS:]
        title = f"the classes with the fewest and the most images of {splits[0].name}; --json has all"
    if splits:
        cells = [(name, *(f"{count:,}" for count in counts)) for name, counts in rows]
        print_table(title, ("class", *(split.name for split in splits)), cells)


def print_info(data: str, manifest: Manifest) -> None:
    _print_splits(f"{data}: {counted(len(manifest.classes), 'class')}", manifest)
    _print_classes(manifest)
    facts: list[tuple[str, object]] = [
        ("source", f"{manifest.source.get('name')} ({manifest.source.get('layout')})"),
        ("settings", ", ".join(f"{key} {_shown(value)}" for key, value in manifest.settings.items() if value is not None)),
        ("mean of train", ", ".join(f"{value:.4f}" for value in manifest.mean)),
        ("std of train", ", ".join(f"{value:.4f}" for value in manifest.std)),
        (
            "noticed",
            ", ".join(f"{n:,} {_IN_WORDS.get(kind, kind)}" for kind, n in manifest.counts.items()) or "nothing unusual",
        ),
        ("packed with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        ("format", manifest.version),
        ("quarantined", f"{len(manifest.quarantine):,}"),
    ]
    for name, fact in facts:
        show(f"{name:<14} {fact}", hang=15)
    for entry in manifest.quarantine:
        show(f"quarantined: {entry.source!r}: {entry.reason}")


def _shown(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def info_document(data: str, manifest: Manifest) -> dict[str, object]:
    """The manifest with the size and number of shards of each split in place of the list of shards with their hashes."""
    document = json.loads(manifest.to_json())
    del document["checksum"]
    for name, split in manifest.splits.items():
        document["splits"][name]["size_bytes"] = split.size_bytes
        document["splits"][name]["shards"] = len(split.shards)
    return {"data": data, **document}
