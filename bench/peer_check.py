"""Whether a case does the work that its rate is measured for. Pure functions of the facts that the case reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bench.case_worker import DataJob, Job

CHECK_SAMPLES = 2048
"""How many samples are checked where it need not be a whole epoch."""

MEAN_TOLERANCE = 0.1
"""In standard deviations of a pixel. Decoders and resize kernels make a difference of one grey level, 0.02; dropped samples of
an epoch less; a choice of 2,048 samples, whose own means vary by 0.7, makes 0.016."""
STD_TOLERANCE = 0.15
"""Relative. A linear kernel that enlarges from 64 to 224 px gives a smoother image than a cubic one, by 0.02; pixels that were
not divided by their standard deviation are off by a factor of three."""
CLASS_MEANS_TOLERANCE = 0.5
"""As a fraction of the spread of the classes' mean colours. Images with the wrong labels differ by 1.4 times the spread."""


def why_wrong_loader(
    facts: Mapping[str, Any], reference: Mapping[str, Any], job: DataJob, *, whole: bool, carried_over: int
) -> str | None:
    """What is wrong with a loader's batches; None if they are the normalised images of the train split.

    Args:
        facts, reference: `bench.case_worker.Stream.check` of the loader, and of every sample once, not flipped.
        whole: the facts are of a whole epoch.
        carried_over: how many samples of the next epoch it may contain.
    """
    counts, expected = facts["counts"], reference["counts"]
    wrong = why_wrong_form(facts, job)
    if wrong is not None:
        return wrong
    if facts["unknown_labels"]:
        return f"{facts['unknown_labels']} of its labels belong to no class"
    surplus = sum(max(count - most, 0) for count, most in zip(counts, expected, strict=True))
    if surplus > carried_over:
        return f"{surplus} of its labels are not in the train split"
    if whole and job.samples - sum(counts) >= job.batch_size * job.cores:  # each worker may drop a last batch
        return f"an epoch has {sum(counts)} of the {job.samples} samples"
    if job.crops:  # their pixels are not those of whole images; `bench.crops` checks them on images of its own
        return None
    if abs(facts["mean"] - reference["mean"]) > MEAN_TOLERANCE:
        return f"the mean of its pixels is {facts['mean']:.2f}, not {reference['mean']:.2f}"
    if abs(facts["std"] / reference["std"] - 1) > STD_TOLERANCE:
        return f"the standard deviation of its pixels is {facts['std']:.2f}, not {reference['std']:.2f}"
    if whole and _class_distance(facts, reference) > CLASS_MEANS_TOLERANCE:
        return "its labels are not those of its images"
    return None


def why_wrong_form(facts: Mapping[str, Any], job: DataJob) -> str | None:
    """What is wrong with the shape or dtype of a loader's batches; None if nothing is."""
    if not facts["shapes"]:
        return "it returns no batch"
    if [list(shape) for shape in facts["shapes"]] != [[3, job.res, job.res]]:
        return f"its images have shape {facts['shapes']}, not (3, {job.res}, {job.res})"
    if not set(facts["dtypes"]) <= {"float32", "bfloat16"}:
        return f"its images are {', '.join(facts['dtypes'])}, not floating-point"
    return None


def _class_distance(facts: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Distance of the classes' mean colours from the reference's, as a fraction of their spread over the classes."""
    pairs = [
        (mine, theirs)
        for mine, theirs, count in zip(facts["class_means"], reference["class_means"], facts["counts"], strict=True)
        if count
    ]
    centre = [sum(theirs[channel] for _, theirs in pairs) / len(pairs) for channel in range(3)]
    distance = sum((m - t) ** 2 for mine, theirs in pairs for m, t in zip(mine, theirs, strict=True))
    spread = sum((t - c) ** 2 for _, theirs in pairs for t, c in zip(theirs, centre, strict=True))
    return math.sqrt(distance / spread) if spread else 0.0


def why_wrong_training(facts: Mapping[str, Any], job: Job) -> str | None:
    """What is wrong with a training step; None if nothing is. With random weights the first loss is near that of guessing."""
    if facts["images"] != job.batch_size or facts["shape"] != [3, job.res, job.res]:
        return f"its batch is {facts['images']} images of {facts['shape']}"
    guessing = math.log(job.classes)
    # One image's loss is about 1 away from the mean, and in a small batch this does not average out: 4 of 32 px gave 6.33 for
    # 5.30.
    if not abs(facts["loss"] - guessing) < max(1.0, 3.0 / math.sqrt(job.batch_size)):
        return f"its first loss is {facts['loss']:.2f}; guessing has {guessing:.2f}"
    return None
