"""A run's metrics as TensorBoard events; the package is an optional dependency."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tidali.errors import UsageError


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


def require_tensorboard() -> None:
    """
    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs the package tensorboard: pip install 'tidali[tensorboard]'")
