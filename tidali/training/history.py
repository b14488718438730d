"""Reads training runs from their folders, finished or not. Standard library only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidali.errors import UsageError
from tidali.training.judgement import Figures, Finding, diverged, judge

_NOT_COMPARED = {"out"}
"""Settings that name a run's place and do not change its results."""
_MAX_DIFFERENCES = 3
_LONGEST_HEADER = 1 << 24
_LAST_BYTES = 1 << 12
_SPLITS = ("heldout", "val")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The contents of a run folder."""

    folder: Path
    name: str
    """The folder's name, or the path as given where two runs share it."""
    settings: Mapping[str, str]
    """Every setting in config.json, by the name that ``--set`` takes, as text."""
    epochs: tuple[Mapping[str, Any], ...]
    """The lines of metrics.jsonl: finished epochs in order; at least one, but for `open_run`."""
    summary: Mapping[str, Any] | None
    """The content of summary.json; None before the run has ended."""
    step: Mapping[str, Any] | None = None
    """The last line of steps.jsonl (`tidali.training.step_log`)."""

    @property
    def split(self) -> str:
        """The split that each epoch was evaluated on."""
        return next(name for name in _SPLITS if f"{name}_top1_percent" in self.epochs[-1])

    @property
    def best_epoch(self) -> Mapping[str, Any]:
        """The epoch whose weights are the best ones: with the highest top-1, of equals with the lowest loss, of equals the
        first. Earlier versions took the first with the highest top-1, so what a finished run says of itself comes first."""
        chosen = (self.summary or {}).get("best_epoch")
        of_number = {epoch["epoch"]: epoch for epoch in self.epochs}
        return of_number.get(chosen) or max(self.epochs, key=self._rank)

    def _rank(self, epoch: Mapping[str, Any]) -> tuple[float, float]:
        loss = _number(epoch.get(f"{self.split}_loss"))
        return float(epoch[f"{self.split}_top1_percent"]), -math.inf if math.isnan(loss) else -loss

    @property
    def classes(self) -> int | None:
        """How many there are, by the last epoch or else by the weights; None where that is not known."""
        logged = self.epochs[-1].get("classes") if self.epochs else None
        return logged if isinstance(logged, int) and logged > 0 else _classes_of(self.folder)

    @property
    def figures(self) -> Figures | None:
        """The result after the last epoch, to be judged; None without one, or where it is not known of how many images and
        classes it is."""
        if not self.epochs:
            return None
        last, classes = self.epochs[-1], self.classes
        samples = _count(last.get(f"{self.split}_samples"))
        if not samples or classes is None:
            return None
        return Figures(
            split=self.split,
            samples=samples,
            classes=classes,
            top1_percent=float(last[f"{self.split}_top1_percent"]),
            loss=self.column(f"{self.split}_loss")[-1],
            largest_class_percent=last.get("largest_class_percent"),
            losses=self.column(f"{self.split}_loss"),
            train_losses=self.column("train_loss"),
            train_top1_percent=self.column("train_top1_percent")[-1],
            train_samples=_count(last.get("train_samples")),
            train_left_out=_count(last.get("train_left_out")),
            batch_size=_count(self.settings.get("batch_size")),
            lr=_number(self.settings.get("lr")),
            ema_decay=_number(self.settings.get("ema_decay", 0)),
            norm_images=_count(self.settings.get("norm_images")),
            steps=_count(last.get("step")),
        )

    @property
    def diverged(self) -> Finding | None:
        """Why the run ended before its last epoch, if that is because the loss or the weights were not finite."""
        if self.step is None or self.summary is not None or not (what := self.step.get("not_finite")):
            return None
        return diverged(what, _count(self.step.get("step")), _number(self.settings.get("lr")))

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with the result, and what to try. Of a run that diverged the rest only follows from it."""
        if self.diverged is not None:
            return [self.diverged]
        figures = self.figures
        return judge(figures) if figures is not None else []

    def column(self, field: str) -> list[float]:
        """A field's value in every epoch; NaN where it is missing."""
        return [_number(epoch.get(field)) for epoch in self.epochs]


def read_runs(given: Sequence[str]) -> list[Run]:
    """
    Args:
        given: run folders.

    Raises:
        UsageError: a folder is not a run folder, or has no finished epoch yet.
    """
    folders = [Path(one) for one in given]
    names = [folder.absolute().name for folder in folders]
    runs = [
        open_run(folder, name if names.count(name) == 1 else str(folder)) for folder, name in zip(folders, names, strict=True)
    ]
    for run in runs:
        if not run.epochs:
            why = f"; {run.diverged}" if run.diverged is not None else " yet (metrics.jsonl is missing or empty)"
            raise UsageError(f"{run.folder}: no finished epoch{why}")
    return runs


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Setting -> its value in each run, for the settings that differ."""
    fields = list(dict.fromkeys(field for run in runs for field in run.settings if field not in _NOT_COMPARED))
    rows = {field: [run.settings.get(field, "-") for run in runs] for field in fields}
    return {field: values for field, values in rows.items() if len(set(values)) > 1}


def labels(runs: Sequence[Run]) -> list[str]:
    """Each run's name and the settings that differ, such as 'small (stem small, lr 0.1)'."""
    differing = differing_settings(runs)
    out = []
    for place, run in enumerate(runs):
        parts = [f"{field} {values[place]}" for field, values in list(differing.items())[:_MAX_DIFFERENCES]]
        more = ["…"] if len(differing) > _MAX_DIFFERENCES else []
        out.append(f"{run.name} ({', '.join(parts + more)})" if parts else run.name)
    return out


def open_run(folder: Path, name: str) -> Run:
    """A run that may have no finished epoch yet.

    Raises:
        UsageError: not a run folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder")
    config = json_object(folder / "config.json")
    if config is None or not isinstance(config.get("recipe"), dict):
        raise UsageError(f"{folder}: not a run folder of 'tidali train': it has no such config.json")
    return Run(
        folder=folder,
        name=name,
        settings=dict(_flattened(config)),
        epochs=_epochs(folder / "metrics.jsonl"),
        summary=json_object(folder / "summary.json"),
        step=_last_step(folder),
    )


def _last_step(folder: Path) -> dict[str, Any] | None:
    """The last line of the run's steps.jsonl that is whole; None without one. Reads no more than the end of the file."""
    try:
        with (folder / "steps.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _LAST_BYTES, 0))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and line.endswith(b"\n"):
                return found
    return None


def _epochs(path: Path) -> tuple[Mapping[str, Any], ...]:
    """One entry per epoch. The later of two counts, as a killed run writes an epoch again when it is resumed. Incomplete lines
    are ignored."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ()
    entries: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if any(isinstance(entry.get(f"{split}_top1_percent"), int | float) for split in _SPLITS):
                entries[int(entry["epoch"])] = entry
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return tuple(entries[number] for number in sorted(entries))


def json_object(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _classes_of(folder: Path) -> int | None:
    """The number of classes by the metadata of the run's weights, as earlier versions did not log it: a safetensors file begins
    with the length of its header in 8 bytes, then the header, which is JSON (`tidali.model.checkpoint`)."""
    for path in (folder / "last.safetensors", folder / "best.safetensors"):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))
            return len(json.loads(header["__metadata__"]["tidali"])["classes"]) or None
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _number(value: object) -> float:
    """NaN where it is none, as in a file that was damaged."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _count(value: object) -> int:
    number = _number(value)
    return int(number) if math.isfinite(number) else 0


def _flattened(document: Mapping[str, Any], section: str = "") -> list[tuple[str, str]]:
    """Every setting and its value as text. The names of a recipe's fields have no prefix, as for ``--set``."""
    out: list[tuple[str, str]] = []
    for field, value in document.items():
        if isinstance(value, dict):
            out += _flattened(value, "" if field == "recipe" else f"{section}{field}.")
        else:
            out.append(("recipe" if (field, section) == ("name", "") else f"{section}{field}", _as_text(value)))
    return out


def _as_text(value: object) -> str:
    if isinstance(value, list) and value:
        return ", ".join(_as_text(one) for one in value)
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
