"""Whether a case does the work that its rate is quoted for. Pure functions of what the case told of itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bench.case_worker import DataJob, Job

CHECK_SAMPLES = 2048
"""Looked at where a loader does not have to give a whole epoch."""

MEAN_TOLERANCE = 0.1
"""In standard deviations of a pixel. Decoders and resize kernels differ by a grey level, 0.02; which samples of an epoch were
left out, by less; 2,048 of them, whose own means differ by 0.7, by 0.016."""
STD_TOLERANCE = 0.15
"""A linear kernel makes an image of 224 px out of 64 smoother than a cubic one, by 0.02; pixels that were not divided by their
deviation are off by a factor of three."""
CLASS_MEANS_TOLERANCE = 0.5
"""Of the spread of the classes' mean colours: images paired with the wrong labels differ by 1.4 times the spread."""


def wrong_loader(
    facts: Mapping[str, Any], reference: Mapping[str, Any], job: DataJob, *, whole: bool, loose: int
) -> str | None:
    """What a loader's batches have wrong; None where they are the train split's, normalised.

    Args:
        facts, reference: `bench.case_worker.Stream.check` of it, and of every sample once, not mirrored.
        whole: it was asked for an epoch.
        loose: samples that an epoch may take from the next one.
    """
    counts, expected = facts["counts"], reference["counts"]
    given = sum(counts)
    if not facts["shapes"]:
        return "it gives no batch"
    if [list(shape) for shape in facts["shapes"]] != [[3, job.res, job.res]]:
        return f"its images are of {facts['shapes']}, not of (3, {job.res}, {job.res})"
    if not set(facts["dtypes"]) <= {"float32", "bfloat16"}:
        return f"its images are {', '.join(facts['dtypes'])}, not floating-point"
    if facts["unknown_labels"]:
        return f"{facts['unknown_labels']} of its labels are of no class"
    surplus = sum(max(count - most, 0) for count, most in zip(counts, expected, strict=True))
    if surplus > loose:
        return f"{surplus} of its labels are not the train split's"
    missing = job.samples - given
    if whole and missing >= job.batch_size * job.cores:  # each worker may drop a last batch
        return f"an epoch has {given} of the {job.samples} samples"
    if abs(facts["mean"] - reference["mean"]) > MEAN_TOLERANCE:
        return f"its pixels' mean is {facts['mean']:.2f}, not {reference['mean']:.2f}"
    if abs(facts["std"] / reference["std"] - 1) > STD_TOLERANCE:
        return f"its pixels' deviation is {facts['std']:.2f}, not {reference['std']:.2f}"
    if whole and _class_distance(facts, reference) > CLASS_MEANS_TOLERANCE:
        return "its labels are not those of its images"
    return None


def _class_distance(facts: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """How far the classes' mean colours are from the reference's, as a share of their spread over the classes."""
    pairs = [
        (mine, theirs)
        for mine, theirs, count in zip(facts["class_means"], reference["class_means"], facts["counts"], strict=True)
        if count
    ]
    centre = [sum(theirs[channel] for _, theirs in pairs) / len(pairs) for channel in range(3)]
    distance = sum((m - t) ** 2 for mine, theirs in pairs for m, t in zip(mine, theirs, strict=True))
    spread = sum((t - c) ** 2 for _, theirs in pairs for t, c in zip(theirs, centre, strict=True))
    return math.sqrt(distance / spread) if spread else 0.0


def wrong_training(facts: Mapping[str, Any], job: Job) -> str | None:
    """What a training step has wrong: of random weights, the first loss is near that of guessing."""
    if facts["images"] != job.batch_size or facts["shape"] != [3, job.res, job.res]:
        return f"its batch is {facts['images']} images of {facts['shape']}"
    guessing = math.log(job.classes)
    # An image's own loss is about 1 from the mean, and of few images they do not cancel: 4 of 32 px gave 6.33 for 5.30.
    if not abs(facts["loss"] - guessing) < max(1.0, 3.0 / math.sqrt(job.batch_size)):
        return f"its first loss is {facts['loss']:.2f}; guessing has {guessing:.2f}"
    return None
