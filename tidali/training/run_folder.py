"""The run folder: its JSON files and their contents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidali.errors import TidaliError, UsageError
from tidali.files import write_atomically
from tidali.hardware.device import DevicePlan
from tidali.hardware.versions import versions
from tidali.training.engine import EpochResult
from tidali.training.metrics import Score


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a training run."""

    out: Path
    best: Score
    best_epoch: int
    last: Score
    last_flip: Score | None
    """The last weights with flip TTA, where the recipe has it."""
    images_per_s: float
    """Median over the epochs, without evaluation."""
    minutes: float


def make_run_folder(out: Path) -> None:
    """Make the folder and begin ``config.json`` in it: of two runs that start together, one gets the folder.

    Raises:
        UsageError: it exists and is not empty.
        TidaliError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = not any(out.iterdir())
        if free:
            with suppress(FileExistsError):
                os.close(os.open(out / "config.json", os.O_CREAT | os.O_EXCL))
                return
    except OSError as error:
        raise TidaliError(f"--out {out}: cannot be made ({error.strerror})") from None
    raise UsageError(f"--out {out}: not empty; give a new folder")


@contextmanager
def new_run_folder(name: str) -> Iterator[str]:
    """A folder of this name, made at once so that no other run gets it; where there is one, the first of NAME-2, NAME-3, ...
    that there is not. A run that does not begin leaves nothing: the folder goes again, if it is empty.

    Raises:
        TidaliError: it cannot be made.
    """
    parent = Path(name).parent
    made_parent = not parent.exists()
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = next(folder for folder in map(Path, names) if _made(folder))
    except OSError as error:
        raise TidaliError(f"{name}: cannot be made ({error.strerror}); give --out a folder that you may write to") from None
    try:
        yield str(folder)
    finally:
        with suppress(OSError):  # not empty: the run began
            folder.rmdir()
            if made_parent:
                parent.rmdir()


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def epoch_fields(trained: EpochResult, score: Score, split: str) -> dict[str, float]:
    """The fields of a line of metrics.jsonl, with units in their names."""
    return {
        "train_loss": trained.score.loss,
        "train_top1_percent": trained.score.top1_percent,
        "images_per_s": trained.images_per_s,
        "epoch_s": trained.seconds,
        "data_wait_share": trained.data_wait_share,
        "compile_s": trained.compile_s,
        **{f"{split}_{name}": value for name, value in score.to_dict().items()},
    }


def summary(result: RunResult, plan: DevicePlan, split: str) -> dict[str, Any]:
    """The content of summary.json."""
    return {
        "evaluated_on": split,
        "best_epoch": result.best_epoch,
        "best": result.best.to_dict(),
        "last": result.last.to_dict(),
        "last_flip": result.last_flip.to_dict() if result.last_flip is not None else None,
        "images_per_s": result.images_per_s,
        "minutes": result.minutes,
        "device": plan.describe(),
        "versions": versions(),
    }


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
