"""What a study's runs were made from: a finished one is kept only where the settings, images and weights are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidali.config import TrainSettings
from tidali.dataset.contract import Dataset
from tidali.errors import UsageError
from tidali.training.run_folder import write_json

INPUTS_NAME = "inputs.json"
"""Beside the runs' folders: of each, by its name, the hashes of what decides a run besides its settings."""


def content_hash(dataset: Dataset, split: str) -> str:
    """Of a split's samples, in their order and their shards."""
    return hashlib.sha256(dataset.split(split).content.encode()).hexdigest()


def record_inputs(folder: Path, inputs: Mapping[str, str | None]) -> None:
    """Before a run into the folder: what it will be made from."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(folder.parent / INPUTS_NAME, {**read_json(folder.parent / INPUTS_NAME), folder.name: inputs})


def refuse_other_inputs(folder: Path, inputs: Mapping[str, str | None]) -> None:
    """
    Raises:
        UsageError: the run in the folder was made from other images or weights, or nothing says from which.
    """
    recorded = read_json(folder.parent / INPUTS_NAME).get(folder.name, {})
    different = [name for name, value in inputs.items() if recorded.get(name) != value]
    if different:
        raise UsageError(
            f"{folder}: made from other {' and '.join(different)}, by the hashes in {folder.parent / INPUTS_NAME}; "
            f"give another --out, or remove the folder to train it anew"
        )


def refuse_other_settings(folder: Path, wanted: TrainSettings) -> None:
    """
    Raises:
        UsageError: the run in the folder was made with other settings.
    """

    def comparable(settings: TrainSettings) -> dict[str, Any]:
        return {**settings.to_dict(), "data": "", "init": "", "out": ""}  # the first two are compared by their content

    where = folder / "config.json"
    try:
        there = comparable(TrainSettings.from_dict(json.loads(where.read_text(encoding="utf-8")), str(where)))
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: holds no run's settings ({error}); remove the folder to train that row anew") from None
    asked = comparable(wanted)
    different = [name for name, value in asked.items() if there[name] != value]
    if different:
        raise UsageError(
            f"{folder}: made with other settings ({', '.join(different)}); give another --out, or remove it to train it anew"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON document; empty where there is none.

    Raises:
        UsageError: it is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable ({error}); remove it to have what it holds made anew") from None
