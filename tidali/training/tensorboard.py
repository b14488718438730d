"""A run's metrics as TensorBoard events; the package is an optional dependency."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TensorBoardLog:
    """Writes one scalar per field and epoch, named as in metrics.jsonl."""

    def __init__(self, folder: Path, *, first_epoch: int) -> None:
        """
        Args:
            first_epoch: events of this and later epochs, written before the run was killed, are discarded.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def write(self, epoch: int, **fields: Any) -> None:
        for name, value in fields.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()
