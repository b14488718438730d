"""Which input size a training step has: one for a whole run, or a fixed list gone through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tidali.config import SizeOrder
from tidali.loading import counter

_STREAM = 6  # of random numbers; `tidali.loading.order` has 0 and `tidali.loading.augment` 1 to 5


@dataclass(frozen=True, kw_only=True)
class SizePlan:
    """The input side of each step, a pure function of the epoch and the step, so the same on every rank and after a resume."""

    sides: tuple[int, ...]
    """In pixels, each once, in the order in which ``progressive`` goes through them."""
    order: SizeOrder = "progressive"
    epochs: int = 1
    """Of the whole run."""
    seed: int = 0

    @staticmethod
    def of(
        res: int, train_sizes: Sequence[int] = (), order: SizeOrder = "progressive", *, epochs: int = 1, seed: int = 0
    ) -> SizePlan:
        """A recipe's sizes, or the one resolution where it has none."""
        return SizePlan(sides=tuple(dict.fromkeys(train_sizes)) or (res,), order=order, epochs=epochs, seed=seed)

    def at(self, epoch: int, step: int) -> int:
        """The side in pixels of a step's images; ``epoch`` of the run and ``step`` of the epoch are counted from 0."""
        if self.order == "mixed":
            return self.sides[counter.key(self.seed, _STREAM, epoch, step) % len(self.sides)]
        return self.sides[min(epoch * len(self.sides) // self.epochs, len(self.sides) - 1)]
