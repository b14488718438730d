"""The manifest from the shards' summaries: when packing, and again when verifying."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from shards.record import ShardSummary
from tidali.dataset.contract import ClassName, Manifest, Split

Triple = tuple[float, float, float]


def build_manifest(
    summaries: Sequence[ShardSummary],
    *,
    classes: tuple[ClassName, ...],
    labelled: Mapping[str, bool],
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Manifest:
    """``labelled`` names the splits, in order, and whether each has labels. Summaries are in shard order."""
    mean, std = mean_std([summary for summary in summaries if summary.split == "train"])
    return Manifest(
        classes=classes,
        splits={
            name: _split(name, has_labels, len(classes), [s for s in summaries if s.split == name])
            for name, has_labels in labelled.items()
        },
        mean=mean,
        std=std,
        quarantine=tuple(entry for summary in summaries for entry in summary.quarantined),
        counts=_total(summary.counts for summary in summaries),
        source=source,
        settings=settings,
        versions=versions,
    )


def _split(name: str, labelled: bool, num_classes: int, summaries: Sequence[ShardSummary]) -> Split:
    per_class = _total(summary.class_counts for summary in summaries)
    return Split(
        name=name,
        labelled=labelled,
        samples=sum(summary.shard.samples for summary in summaries),
        class_counts=tuple(per_class.get(label, 0) for label in range(num_classes)) if labelled else (),
        image_sizes=_total(summary.image_sizes for summary in summaries),
        extensions=_total(summary.extensions for summary in summaries),
        shards=tuple(summary.shard for summary in summaries),
    )


def _total(counts: Any) -> dict[Any, int]:
    total: Counter[Any] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def mean_std(summaries: Sequence[ShardSummary]) -> tuple[Triple, Triple]:
    """Of each RGB channel over every pixel, on a 0..1 scale; zeros where there is no pixel.

    The sums are exact integers, so neither the order of shards nor the number of workers can show in the result.
    """
    pixels = sum(summary.pixels for summary in summaries)
    means, stds = [0.0] * 3, [0.0] * 3
    for channel in range(3 if pixels else 0):
        total = sum(summary.sums[channel] for summary in summaries)
        squares = sum(summary.square_sums[channel] for summary in summaries)
        means[channel] = total / (255 * pixels)
        stds[channel] = math.sqrt(pixels * squares - total * total) / (255 * pixels)
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
