"""A measured case's own process: it prepares its batches, then checks and measures itself whenever it is asked to.

Every case, tidali's too, runs in one of these, so that all are measured alike: by their own clock, alone in their process. The
protocol is a JSON object a line: questions on standard input, answers on what was standard output, which is pointed at standard
error meanwhile, where the peers' own messages go.
"""

from __future__ import annotations

import atexit
import importlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from tidali.hardware.timing import Stopwatch


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every case is told. Plain values: it crosses to another Python as JSON."""

    target: str
    """``module:function``. The function takes the job and returns a `Subject`, or, where it is told of data, an iterable of
    batches: images (N, 3, res, res), labels (N,), an epoch each time it is iterated over."""
    package: str
    """The distribution whose version is told."""
    scratch: str
    """A folder that it may fill."""
    res: int
    batch_size: int
    classes: int

    @staticmethod
    def from_json(text: str) -> Job:
        """A job of the class that `to_json` was called on."""
        fields = json.loads(text)
        found: Job = _named(fields.pop("kind"))(**fields)
        return found

    def to_json(self) -> str:
        return json.dumps({"kind": f"{type(self).__module__}:{type(self).__name__}", **asdict(self)})


@dataclass(frozen=True, kw_only=True)
class DataJob(Job):
    """What a case that reads data is told. Its scratch folder is kept between resolutions, for the data in its own format."""

    root: str
    """The packed data set."""
    folder: str
    """Its train split as files, CLASS/KEY.jpg, the class a number."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    samples: int
    as_stored: bool
    """Every image has the size asked for: no resize."""
    cores: int


class Subject(Protocol):
    """What is measured."""

    device: Any
    """torch's, to be drained before the clock is read; None for the host."""
    cycle_steps: int
    """See `bench.measure.Case`."""
    first_step_s: float
    """What the very first step took, which is the first of `check`."""

    def step(self) -> int:
        """Do one batch; the images in it."""
        ...

    def check(self, batches: int | None) -> dict[str, Any]:
        """What the parent judges the case by.

        Args:
            batches: at most so many; None: an epoch.
        """
        ...


class Stream:
    """Batches taken one after the other, epoch after epoch."""

    device = None
    first_step_s = 0.0

    def __init__(self, loader: Iterable[Any], job: DataJob) -> None:
        self._loader, self._job = loader, job
        self.cycle_steps = max(job.samples // job.batch_size, 1)
        self._batches: Iterator[Any] | None = None

    def step(self) -> int:
        return len(self.next()[1])

    def next(self) -> Any:
        batch = self._next_of_epoch()
        if batch is None:
            batch = self._next_of_epoch()
        if batch is None:
            raise RuntimeError("it gives no batch: fewer samples a worker than a batch takes?")
        return batch

    def _next_of_epoch(self) -> Any:
        """None at an epoch's end. An iterator is not asked again after that: FFCV's would wait for ever."""
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches, None)
        if batch is None:
            self._batches = None
        return batch

    def check(self, batches: int | None) -> dict[str, Any]:
        """Over the batches: how many images of each label, and their pixels' mean of each label and channel, and deviation."""
        import torch

        classes = self._job.classes
        counts = torch.zeros(classes, dtype=torch.int64)
        sums = torch.zeros(classes, 3, dtype=torch.float64)
        squares, wrong_labels, shapes, dtypes = 0.0, 0, set(), set()
        watch = Stopwatch()
        for _ in range(batches) if batches is not None else itertools.count():
            batch = self._next_of_epoch()
            self.first_step_s = self.first_step_s or watch.elapsed_s()
            if batch is None:
                break
            images, labels = batch[0], torch.as_tensor(batch[1]).reshape(-1).long()
            shapes.add(tuple(images.shape[1:]))
            dtypes.add(str(images.dtype).removeprefix("torch."))
            if images.shape[1:] != (3, self._job.res, self._job.res):
                break
            known = (labels >= 0) & (labels < classes)
            wrong_labels += int((~known).sum())
            counts += torch.bincount(labels[known], minlength=classes)
            sums.index_add_(0, labels[known], images.double().mean(dim=(2, 3))[known])
            squares += float(images.double().square().mean(dim=(1, 2, 3)).sum())
        total = int(counts.sum())
        mean = sums.sum() / max(3 * total, 1)
        return {
            "counts": counts.tolist(),
            "unknown_labels": wrong_labels,
            "class_means": (sums / counts.clamp(min=1)[:, None]).tolist(),
            "mean": float(mean),
            "std": max(squares / max(total, 1) - float(mean) ** 2, 0.0) ** 0.5,
            "shapes": sorted(shapes),
            "dtypes": sorted(dtypes),
        }


def serve(job: Job) -> None:
    """Answer questions until standard input ends. ``check`` gives facts, ``measure`` the fields of a `bench.measure.Rates`,
    ``profile`` the lines of `bench.profile.profile_step`."""
    os.setpgid(0, 0)  # a group of its own, workers included, which the parent can hold still while others are measured
    # Under nohup it would be ignored, and is what ends a group that is held still when its parent is killed.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # The last thing that it does: its workers end with it, also where it ends because its parent was killed between questions.
    atexit.register(_end_workers)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        subject = _open(job)
        answer({"ready": True, "version": _version(job.package)})
        for line in sys.stdin:
            question = json.loads(line)
            if question["do"] == "check":
                answer(subject.check(question["batches"]))
            elif question["do"] == "profile":
                answer(_profile(subject, Path(question["path"])))
            else:
                answer(_measure(subject, question["min_seconds"]))
    except Exception as error:
        traceback.print_exc()
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        answer({"error": f"{type(error).__name__}: {text}" if text else type(error).__name__})


def _end_workers() -> None:
    """End the rest of the group, and leave this process its exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)


def _end_with(parent: int) -> None:
    """Should the parent be killed in the middle of a measurement, end the whole group."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _named(words: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = words.partition(":")
    return getattr(importlib.import_module(module), name)


def _open(job: Job) -> Subject:
    function: Callable[[Job], Any] = _named(job.target)
    found = function(job)
    if isinstance(job, DataJob) and not hasattr(found, "step"):
        return Stream(found, job)
    subject: Subject = found
    return subject


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # DALI has a distribution for each CUDA; tidali runs from a checkout too
        return "unknown"


def _measure(subject: Subject, min_seconds: float) -> dict[str, Any]:
    """By the protocol of every benchmark here: see `bench.measure`."""
    from bench.measure import Case, measure

    case = Case(name="", step=subject.step, device=subject.device, cycle_steps=subject.cycle_steps)
    rates = measure([case], repeats=1, min_seconds=min_seconds)[""]
    return {**asdict(rates), "first_step_s": subject.first_step_s}


def _profile(subject: Subject, path: Path) -> dict[str, Any]:
    from bench.profile import profile_step

    return {"lines": profile_step(subject.step, subject.device, path)}
