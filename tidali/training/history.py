"""Reads training runs from their folders, finished or not. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidali.errors import UsageError

_NOT_COMPARED = {"out"}
"""Settings that name a run's place and do not change its results."""
_MAX_DIFFERENCES = 3
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
    """The lines of metrics.jsonl: finished epochs in order, at least one."""
    summary: Mapping[str, Any] | None
    """The content of summary.json; None before the run has ended."""

    @property
    def split(self) -> str:
        """The split that each epoch was evaluated on."""
        return next(name for name in _SPLITS if f"{name}_top1_percent" in self.epochs[-1])

    @property
    def best_epoch(self) -> Mapping[str, Any]:
        """The first epoch with the highest top-1, which training also chooses."""
        return max(self.epochs, key=lambda epoch: float(epoch[f"{self.split}_top1_percent"]))

    def column(self, field: str) -> list[float]:
        """A field's value in every epoch; NaN where it is missing."""
        return [float(epoch.get(field, "nan")) for epoch in self.epochs]


def read_runs(given: Sequence[str]) -> list[Run]:
    """
    Args:
        given: run folders.

    Raises:
        UsageError: a folder is not a run folder, or has no finished epoch yet.
    """
    folders = [Path(one) for one in given]
    names = [folder.absolute().name for folder in folders]
    return [
        _read_run(folder, name if names.count(name) == 1 else str(folder)) for folder, name in zip(folders, names, strict=True)
    ]


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


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder")
    config = _json_object(folder / "config.json")
    if config is None or not isinstance(config.get("recipe"), dict):
        raise UsageError(f"{folder}: not a run folder of 'tidali train': it has no such config.json")
    epochs = _epochs(folder / "metrics.jsonl")
    if not epochs:
        raise UsageError(f"{folder}: no finished epoch yet (metrics.jsonl is missing or empty)")
    return Run(
        folder=folder,
        name=name,
        settings=dict(_flattened(config)),
        epochs=epochs,
        summary=_json_object(folder / "summary.json"),
    )


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
            if any(f"{split}_top1_percent" in entry for split in _SPLITS):
                entries[int(entry["epoch"])] = entry
        except (ValueError, TypeError, KeyError):
            continue
    return tuple(entries[number] for number in sorted(entries))


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


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
