"""What happens within an epoch: loss and throughput every so many steps, in steps.jsonl and as TensorBoard events."""

from __future__ import annotations

from pathlib import Path

from tidali.hardware.timing import Stopwatch
from tidali.training.metrics import JsonlLog, Score
from tidali.training.tensorboard import TensorBoardLog

POINTS_AN_EPOCH = 50


class StepLog:
    """Lines of steps.jsonl: ``step``; ``epoch``, the passes over the data so far; ``lr``; ``train_loss``, the mean since the
    line before, of the main rank's images; ``images_per_s`` since then, over all ranks, with what compiling took. A run that
    ended as something was not finite has a last line with ``not_finite``, which says what, instead of the two.

    A file of its own, as a line of metrics.jsonl is an epoch for whoever reads it.
    """

    def __init__(self, folder: Path, *, epoch_steps: int, batch_size: int, step: int, tensorboard: bool) -> None:
        """
        Args:
            batch_size: over all ranks.
            step: of the run; the lines of later steps are removed.
        """
        self._epoch_steps, self._batch_size = epoch_steps, batch_size
        self._every = max(epoch_steps // POINTS_AN_EPOCH, 1)
        self._log = JsonlLog(folder / "steps.jsonl", sync=False)
        self._log.keep_through(step, "step")
        # A folder of its own: TensorBoard discards by number, and epochs have other numbers than steps.
        self._events = TensorBoardLog(folder / "tensorboard" / "steps", first_epoch=step + 1) if tensorboard else None

    def begin_epoch(self, step: int, score: Score) -> None:
        """
        Args:
            score: this epoch's so far; not empty after a resume.
        """
        self._step, self._score, self._watch = step, score, Stopwatch()

    def update(self, step: int, lr: float, score: Score) -> None:
        """After a step. Writes a line if it is time for one and there are newer counts; a GPU's are some steps late."""
        samples = score.samples - self._score.samples
        if step - self._step < self._every or samples <= 0:
            return
        rates = {
            "lr": lr,
            "train_loss": (score.loss_sum - self._score.loss_sum) / samples,
            "images_per_s": (step - self._step) * self._batch_size / self._watch.elapsed_s(),
        }
        self._log.write(step=step, epoch=step / self._epoch_steps, **rates)
        if self._events is not None:
            self._events.write(step, **rates)
        self.begin_epoch(step, score)

    def diverged(self, step: int, lr: float, what: str) -> None:
        """Write the last line: a resume removes it with those of other steps that are done again."""
        self._log.write(step=step, epoch=step / self._epoch_steps, lr=lr, not_finite=what)
