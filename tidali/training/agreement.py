"""How ranks come to act alike after the same step."""

from __future__ import annotations

import torch

from tidali.hardware.ranks import Ranks
from tidali.hardware.timing import Stopwatch

RANKS_AGREE_S = 2.0
RANKS_AGREE_STEPS = 20
"""How often ranks ask each other: on CPUs after each step; on GPUs, where that makes each rank wait for its device, about once
in so many seconds and at least once in so many steps. torchrun waits 30 s for a stop."""


class Agreement:
    """Of the ranks of a run. Every rank asks after every step."""

    def __init__(self, ranks: Ranks, device: torch.device, step: int) -> None:
        """
        Args:
            step: of the run, at which it begins or goes on.
        """
        self._ranks, self._device = ranks, device
        self._last, self._next, self._since = step, step + 1, Stopwatch()

    def any_rank(self, step: int, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank; all False, on every rank, between the steps at which they ask each other."""
        if self._ranks.world_size == 1:
            return list(flags)
        if step < self._next:
            return [False] * len(flags)
        *agreed, elapsed_s = self._ranks.all_reduce_max([*flags, self._since.peek_s()], self._device)
        step_s = elapsed_s / (step - self._last)
        self._last, self._since = step, Stopwatch()
        self._next = step + steps_between_agreements(step_s, self._device)
        return [bool(flag) for flag in agreed]


def steps_between_agreements(step_s: float, device: torch.device) -> int:
    """After how many steps of this length ranks ask again; the same number on all ranks where ``step_s`` is."""
    if device.type == "cpu":
        return 1
    return min(max(int(RANKS_AGREE_S / max(step_s, 1e-6)), 1), RANKS_AGREE_STEPS)
