"""Loss and accuracy, accumulated on the device, and the run's log of JSON lines."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tidali.errors import TidaliError
from tidali.files import write_atomically
from tidali.hardware.ranks import Ranks
from tidali.training.uncertainty import standard_error_percent


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over samples; means are derived from them, so that the sums of several ranks can be added."""

    samples: int
    loss_sum: float
    correct1: int
    correct5: int

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats, without label smoothing."""
        return self.loss_sum / max(self.samples, 1)

    @property
    def top1_percent(self) -> float:
        return 100.0 * self.correct1 / max(self.samples, 1)

    @property
    def top5_percent(self) -> float:
        return 100.0 * self.correct5 / max(self.samples, 1)

    @property
    def top1_standard_error_percent(self) -> float:
        """Of the top-1 accuracy, in percentage points."""
        return standard_error_percent(self.correct1, self.samples)

    @property
    def top5_standard_error_percent(self) -> float:
        return standard_error_percent(self.correct5, self.samples)

    def is_better(self, other: Score) -> bool:
        """By top-1, and where that is equal, by the loss. Of the same samples."""
        return (self.correct1, -self.loss) > (other.correct1, -other.loss)

    def to_dict(self) -> dict[str, float]:
        return {
            "samples": self.samples,
            "loss": self.loss,
            "top1_percent": self.top1_percent,
            "top5_percent": self.top5_percent,
        }


class Meter:
    """Accumulates loss and correct predictions on the device; the host waits for the device in `read` alone."""

    def __init__(self, device: torch.device) -> None:
        # Samples, loss, top-1 and top-5 hits. float64 on a CPU and CUDA alike: 100,000 losses add up to 1e-11 relative.
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._late = torch.zeros(4, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._late_ready = torch.cuda.Event() if device.type == "cuda" else None

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """
        Args:
            logits: (N, C), any float dtype.
            labels: (N,) int64.
        """
        logits = logits.float()
        loss_sum = functional.cross_entropy(logits, labels, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self.sums += torch.stack(
            [torch.full_like(loss_sum, labels.numel()), loss_sum, hits[:, 0].sum().to(loss_sum), hits.sum().to(loss_sum)]
        )

    def read(self, ranks: Ranks | None = None) -> Score:
        """The counts so far, summed over the ranks if given. Waits for the device."""
        return _score(self.sums if ranks is None else ranks.all_reduce_sum(self.sums.clone()))

    def peek(self) -> Score:
        """The counts at the time of an earlier call, for the progress bar. Never waits for the device."""
        if self._late_ready is None:
            return self.read()
        if not self._late_ready.query():
            return Score(samples=0, loss_sum=0.0, correct1=0, correct5=0)
        score = _score(self._late)
        self._late.copy_(self.sums, non_blocking=True)
        self._late_ready.record()
        return score


def _score(sums: Tensor) -> Score:
    samples, loss_sum, correct1, correct5 = sums.tolist()
    return Score(samples=int(samples), loss_sum=loss_sum, correct1=int(correct1), correct5=int(correct5))


class JsonlLog:
    """Appends JSON objects to a file, one per line."""

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        """
        Args:
            sync: each line is flushed to the disk, and survives a power cut.
        """
        self._path, self._sync = path, sync

    def keep_through(self, last: int, field: str = "epoch") -> None:
        """Remove the lines of later epochs, or steps, which a killed run will write again, and damaged lines.

        Raises:
            TidaliError: the file cannot be written.
        """
        if not self._path.exists():
            return

        def keeps(line: str) -> bool:
            with suppress(ValueError, KeyError, TypeError):
                return line.endswith("\n") and bool(json.loads(line)[field] <= last)
            return False

        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if keeps(line)]
        if kept != lines:
            write_atomically(self._path, "".join(kept).encode())

    def write(self, **fields: Any) -> None:
        """
        Raises:
            TidaliError: the disk is full or the file cannot be written.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(fields) + "\n")
                file.flush()
                if self._sync:
                    os.fsync(file.fileno())
        except OSError as error:
            raise TidaliError(f"{self._path}: cannot be written ({error.strerror})") from None
