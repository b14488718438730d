"""Samples that are corrupt when they are read: named, counted, and left out of their batch.

Every image was decoded when it was packed, and its CRC-32 is in its shard's record, so one whose bytes are still the same
decodes. A sample is checked whenever it is read; nothing is read beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable

from tidali.console import warn
from tidali.errors import DatasetError
from tidali.loading.samples import SampleTable

DEFAULT_SHARE = 0.001
"""Of a split's samples that may be corrupt before the run fails: more than this is hardly an accident."""


class CorruptSamples:
    """The corrupt samples of one split that have been found so far."""

    def __init__(self, table: SampleTable, max_bad: int | None = None) -> None:
        """
        Args:
            max_bad: how many may be left out; by default 0.1 % of the split.
        """
        self._table = table
        self._limit = int(DEFAULT_SHARE * len(table)) if max_bad is None else max_bad
        self.positions: set[int] = set()
        """In the split's stored order."""

    def __len__(self) -> int:
        return len(self.positions)

    def add(self, position: int, reason: str, *, every_rank: bool = True) -> None:
        """Record a sample and print a warning, the first time.

        Args:
            every_rank: other ranks do not read it, so this one has to name it.

        Raises:
            DatasetError: more are corrupt than may be left out.
        """
        if position in self.positions:
            return
        self.positions.add(position)
        warn(f"left out, corrupt: {self._table.describe(position)} ({reason})", every_rank=every_rank)
        self._check()

    def merge(self, found: Iterable[Iterable[int]]) -> None:
        """Add what all ranks have found. They have already printed it.

        Raises:
            DatasetError: more are corrupt than may be left out.
        """
        self.positions.update(*found)
        self._check()

    def _check(self) -> None:
        if len(self) > self._limit:
            dataset = self._table.dataset
            raise DatasetError(
                f"{dataset.root}: {len(self)} of the {len(self._table)} samples of {self._table.split!r} are corrupt by now, "
                f"and --max-bad is {self._limit}; 'tidali verify --decode' names all; {dataset.fix}"
            )
