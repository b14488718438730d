"""Writing a run's weights and state, at once or beside the next epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from torch import Tensor, nn

from tidali.errors import TidaliError
from tidali.files import lock
from tidali.model.checkpoint import SUFFIX, ModelCard, save_checkpoint
from tidali.training.resume import STATE_NAME, SavedState, write_state

_LOCK_ATTEMPTS = 3


class RunFiles:
    """The best and last weights and the state of a run.

    All are written together, the state last: whatever a kill interrupts, the state on the disk is of no later epoch than the
    weights beside it, so that a resumed run writes all that it may lack again.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._kept: dict[str, tuple[Mapping[str, Tensor], ModelCard]] = {}  # since the last save, by the file's name
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="tidali-save")
        self._writing: Future[None] | None = None
        self._held = ExitStack()

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.shutdown()  # waits for what is being written
        self._held.close()

    def hold(self) -> None:
        """Lock the folder until the run ends, so that no other process trains in it, and `tidali runs` sees that it goes on.

        Raises:
            TidaliError: another process trains in it.
        """
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                with suppress(OSError):  # a file system without locks
                    self._held.enter_context(lock(self._out, wait=False))
                return
            except TidaliError:  # it may also have been looked at in this moment
                if attempt == _LOCK_ATTEMPTS - 1:
                    raise
                time.sleep(0.05)

    def keep(self, model: nn.Module, card: ModelCard, *, is_best: bool) -> None:
        """Copy the weights, where they are, for the next save: training changes them meanwhile."""
        weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for name in ("best", "last") if is_best else ("last",):
            self._kept[name] = weights, card

    def save(self, state: SavedState, *, beside_training: bool) -> None:
        """Write the weights that were kept, then the state.

        Args:
            beside_training: return before they are written; an error is raised by the next save.

        Raises:
            TidaliError: this save's files, or the last one's, cannot be written.
        """
        if self._writing is not None:
            self._writing.result()
        kept, self._kept = self._kept, {}

        def write() -> None:
            for name, (weights, card) in kept.items():
                save_checkpoint(self._out / f"{name}{SUFFIX}", weights, card)
            write_state(self._out / STATE_NAME, state)

        self._writing = self._writer.submit(write)
        if not beside_training:
            self._writing.result()
