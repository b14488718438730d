"""The process of one case: it prepares its batches, then checks and measures itself on request.

All cases of a benchmark, tidali's too, run in such processes, so that all are measured alike: by their own clock, alone in
their process. The protocol is one JSON object per line: requests on standard input, answers on what was standard output.
Meanwhile standard output is redirected to standard error, so that the peers' own messages go there.
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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tidali.config import AmpChoice, CompileChoice, DeviceChoice, Stem
from tidali.hardware.timing import Stopwatch
from tidali.hardware.versions import installed_version


@dataclass(frozen=True, kw_only=True)
class Job:
    """The parameters of every case. Plain values: they are passed to another Python as JSON."""

    target: str
    """``module:function``. The function takes the job and returns a `Subject` or a `bench.measure.Case`; or, for a `DataJob`,
    an iterable of batches: images (N, 3, res, res), labels (N,), one epoch per iteration."""
    package: str
    """The distribution whose version is reported."""
    scratch: str
    """A folder that the case may write to."""
    res: int
    batch_size: int
    classes: int
    threads: int | None = None
    """OMP_NUM_THREADS of the process; None: as in this one."""
    stem: Stem = "imagenet"
    """Of a training loop, as are the fields below."""
    device: DeviceChoice = "auto"
    amp: AmpChoice = "auto"
    compile: CompileChoice = "auto"
    averaged: bool = True
    """tidali also keeps averaged weights, as ``tidali train`` does."""

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
    """The parameters of a case that reads data. Its scratch folder is kept between resolutions, for the data in its own
    format."""

    root: str
    """The packed data set."""
    folder: str
    """Its train split as files, CLASS/KEY.jpg, where CLASS is a number."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    samples: int
    as_stored: bool
    """Every stored image has the requested size, so none needs a resize."""
    cores: int
    crops: bool = False
    """Random resized crops (`bench.crops`) instead of whole images."""


class Subject(Protocol):
    """What is measured."""

    device: Any
    """torch's, drained before the clock is read; None for the host."""
    cycle_steps: int
    """See `bench.measure.Case`."""
    first_step_s: float
    """Duration of the very first step, which is the first step of `check`."""

    def step(self) -> int:
        """Do one batch. Returns the number of its images."""
        ...

    def check(self, batches: int | None) -> dict[str, Any]:
        """Facts from which the parent decides whether the case does the right work (`bench.peer_check`).

        Args:
            batches: the most batches to look at; None: an epoch.
        """
        ...


class Stream:
    """Batches of a loader, one after the other, epoch after epoch."""

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
            raise RuntimeError("it returns no batch: has each worker fewer samples than a batch?")
        return batch

    def _next_of_epoch(self) -> Any:
        """None at the end of an epoch. An iterator is not used again after that: FFCV's would wait for ever."""
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches, None)
        if batch is None:
            self._batches = None
        return batch

    def crops(self, count: int) -> dict[str, Any]:
        """Where the next crops of the check set, at least ``count``, come from: `bench.crops.read_crops` of all, their labels,
        and the shapes and dtypes of the images."""
        import torch

        from bench.crops import read_crops

        found: dict[str, Any] = {"labels": [], "shapes": set(), "dtypes": set()}
        while len(found["labels"]) < count:
            batch = self.next()
            images = batch[0]
            found["shapes"].add(tuple(images.shape[1:]))
            found["dtypes"].add(str(images.dtype).removeprefix("torch."))
            if images.shape[1:] != (3, self._job.res, self._job.res):
                break
            found["labels"] += torch.as_tensor(batch[1]).reshape(-1).tolist()
            for name, values in read_crops(images, self._job.mean, self._job.std).items():
                found.setdefault(name, []).extend(values)
        return {**found, "shapes": sorted(found["shapes"]), "dtypes": sorted(found["dtypes"])}

    def check(self, batches: int | None) -> dict[str, Any]:
        """Over these batches: the number of images per label, the mean of their pixels per label and channel, and the standard
        deviation."""
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
    """Answer requests until standard input ends: ``check`` and ``crops`` with facts, ``measure`` with the fields of a
    `bench.measure.Rates`, ``profile`` with the lines of `bench.profile.profile_step`."""
    os.setpgid(0, 0)  # a process group of its own, workers included, which the parent suspends while others are measured
    # SIGHUP ends a suspended group when its parent is killed. Under nohup it would be ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Runs last, so that the workers end with this process, also if it ends because its parent was killed between requests.
    atexit.register(_end_workers)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        subject = _open(job)
        answer({"ready": True, "version": installed_version(job.package) or "unknown"})
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "check":
                answer(subject.check(request["batches"]))
            elif request["do"] == "crops":
                assert isinstance(subject, Stream)
                answer(subject.crops(request["count"]))
            elif request["do"] == "profile":
                from bench.profile import profile_step

                answer({"lines": profile_step(subject.step, subject.device, Path(request["path"]))})
            else:
                answer(_measure(subject, request["min_seconds"]))
    except Exception as error:
        traceback.print_exc()
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        answer({"error": f"{type(error).__name__}: {text}" if text else type(error).__name__})


def _end_workers() -> None:
    """End the rest of the process group, without changing this process's exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)


def _end_with(parent: int) -> None:
    """End the whole group if the parent is killed during a measurement."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _named(words: str) -> Any:
    """The object that ``module:name`` refers to."""
    module, _, name = words.partition(":")
    return getattr(importlib.import_module(module), name)


def _open(job: Job) -> Subject:
    found: Any = _named(job.target)(job)
    subject: Subject = Stream(found, job) if isinstance(job, DataJob) and not hasattr(found, "step") else found
    return subject


def _measure(subject: Subject, min_seconds: float) -> dict[str, Any]:
    """Measured as every other benchmark is: see `bench.measure`."""
    from bench.measure import Case

    case = Case(step=subject.step, device=subject.device, cycle_steps=subject.cycle_steps, min_seconds=min_seconds)
    fields = asdict(case.measure())
    return {**fields, "first_step_s": getattr(subject, "first_step_s", 0.0) or fields["first_step_s"]}
