"""All training runs below a folder: finished, running, stopped, diverged, damaged. Standard library only, so that a list of
them is there at once."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from tidali.errors import TidaliError, UsageError
from tidali.files import is_locked
from tidali.training.history import Run, open_run
from tidali.training.judgement import Finding

State = Literal["finished", "running", "stopped", "diverged", "unreadable"]

_MAX_DEPTH = 4
"""A study's runs are in STUDY/runs/ROW, below a folder of studies."""
_FILES = {"config.json", "metrics.jsonl", "state.safetensors"}
"""A folder with one of them may be a run's."""
_MACHINE = {"data", "out", "device", "cache", "decoder", "tensorboard", "max_bad", "checkpoint_minutes"}
"""Settings that are not among what distinguishes a run: where it was, and on what."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run in a list of runs."""

    name: str
    """Its path below the folder that was looked through."""
    folder: Path
    begun_s: float
    """When its settings were written, in seconds of Unix time."""
    state: State
    problem: str = ""
    """Why it cannot be read."""
    run: Run | None = None
    """None where it cannot be read. Its epochs may be empty."""
    differs: Mapping[str, str]
    """The settings that most other runs on the same data do not have."""

    @property
    def step(self) -> Mapping[str, Any] | None:
        """The last line of steps.jsonl."""
        return self.run.step if self.run is not None else None

    @property
    def data(self) -> str:
        return os.path.basename(self.run.settings.get("data", "").rstrip("/")) if self.run is not None else ""

    @property
    def epochs(self) -> int:
        """That it was to be trained for; 0 if that is not known."""
        text = self.run.settings.get("epochs", "") if self.run is not None else ""
        return int(text) if text.isdecimal() else 0

    @property
    def epochs_done(self) -> float:
        """Passes over the data: of finished epochs, and where it goes on or was stopped, also of the one that was begun."""
        finished = float(len(self.run.epochs)) if self.run is not None else 0.0
        begun = self.step.get("epoch") if self.step is not None and self.state != "finished" else None
        return max(finished, float(begun)) if isinstance(begun, int | float) else finished

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with its result, and what to try."""
        return self.run.findings if self.run is not None else []

    @property
    def problems(self) -> list[str]:
        """The kinds of the findings, without those that qualify a result and do not spoil it."""
        return [one.kind for one in self.findings if one.kind not in ("left out", "few images", self.state)]

    def figure(self, which: Literal["best", "last"]) -> float | None:
        """Top-1 in percent."""
        if self.run is None or not self.run.epochs:
            return None
        epoch = self.run.best_epoch if which == "best" else self.run.epochs[-1]
        return float(epoch[f"{self.run.split}_top1_percent"])

    @property
    def images_per_s(self) -> float | None:
        """In training: the median of the finished epochs, else the latest rate."""
        rates = [rate for rate in self.run.column("images_per_s") if rate > 0] if self.run is not None else []
        latest = self.step.get("images_per_s") if self.step is not None else None
        return median(rates) if rates else float(latest) if isinstance(latest, int | float) else None

    @property
    def report(self) -> Path | None:
        """The page about it, where there is one in its folder."""
        page = self.folder / "report.html"
        return page if page.is_file() else None

    def to_dict(self) -> dict[str, Any]:
        """For a program: JSON values, with units in their names."""
        run = self.run if self.run is not None and self.run.epochs else None
        return {
            "name": self.name,
            "folder": str(self.folder),
            "data": self.run.settings.get("data") if self.run is not None else None,
            "differs": dict(self.differs),
            "state": self.state,
            "problem": self.problem or None,
            "epochs": self.epochs or None,
            "epochs_done": self.epochs_done,
            "evaluated_on": run.split if run is not None else None,
            "best_epoch": run.best_epoch["epoch"] if run is not None else None,
            "best_top1_percent": self.figure("best"),
            "last_top1_percent": self.figure("last"),
            "last_loss": run.epochs[-1].get(f"{run.split}_loss") if run is not None else None,
            "images_per_s": self.images_per_s,
            "findings": [str(finding) for finding in self.findings],
            "last_step": self.step,
            "report": str(self.report) if self.report is not None else None,
        }


def list_runs(root: Path) -> list[Entry]:
    """The runs in and below a folder, in the order in which they were begun.

    Raises:
        UsageError: there is no such folder.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; 'tidali train' makes one run folder below runs/ for each training run")
    found = [_entry(folder, root) for folder in _run_folders(root)]
    entries = [entry for entry in found if entry is not None]
    return sorted(_with_differences(entries), key=lambda entry: (entry.begun_s, entry.name))


def _run_folders(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        if _FILES & set(files):
            below.clear()
            yield Path(folder)
        depth = len(Path(folder).relative_to(root).parts)
        below[:] = sorted(name for name in below if depth < _MAX_DEPTH and not name.startswith("."))


def _entry(folder: Path, root: Path) -> Entry | None:
    """None where the folder is another program's, or cannot be opened."""
    name = str(folder.relative_to(root)) if folder != root else folder.absolute().name
    config = folder / "config.json"
    try:
        begun_s = (config if config.is_file() else folder).stat().st_mtime
        is_running = is_locked(folder)
    except OSError:  # it was removed in this moment
        return None
    try:
        run = open_run(folder, name)
    except TidaliError:
        whole = config.is_file() and config.stat().st_size > 0
        if whole and not any((folder / other).exists() for other in _FILES - {"config.json"}):
            return None
        problem = (
            "config.json is damaged" if whole else "config.json is empty" if config.is_file() else "config.json is missing"
        )
        return Entry(name=name, folder=folder, begun_s=begun_s, state="unreadable", problem=problem, differs={})
    ended: State = "finished" if run.summary is not None else "stopped" if run.diverged is None else "diverged"
    state: State = "running" if is_running else ended
    return Entry(name=name, folder=folder, begun_s=begun_s, state=state, run=run, differs={})


def _with_differences(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Each with the settings whose value most of the others on its data do not have."""
    of_data: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        of_data[entry.data].append(entry)
    for group in of_data.values():
        settings = [entry.run.settings if entry.run is not None else {} for entry in group]
        names = {name for one in settings for name in one if name not in _MACHINE}
        counts = {name: Counter(one[name] for one in settings if name in one) for name in names}
        for entry, own in zip(group, settings, strict=True):
            rare = [name for name in own if name in counts and 2 * (counts[name][own[name]] - 1) < counts[name].total() - 1]
            yield replace(entry, differs={name: own[name] for name in rare})
