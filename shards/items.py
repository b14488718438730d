"""A source's files as columns of numbers and one text with all names: about 100 bytes a file, where objects take 600.

Iterating makes one `Item` after another."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

_NO_LABEL = -1
_WORD_BYTES = 8
_BLOCK_ITEMS = 1 << 12  # made into Python numbers at a time


class Item(NamedTuple):
    """One file of a source."""

    name: str
    """'/'-separated, relative to the data set's root inside the source."""
    size_bytes: int
    where: tuple[int, ...] = ()
    """What the reader needs in addition to the name. Of a zip member: header offset, stored bytes, method, CRC-32."""
    label: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class _Columns:
    """The names and numbers of n files, shared by all selections of them."""

    names: bytes | bytearray
    """One after another, UTF-8; eight bytes follow the last."""
    starts: np.ndarray
    """(n,) int64: where each name begins."""
    lengths: np.ndarray
    """(n,) int32, of the names in bytes."""
    numbers: np.ndarray
    """(n, 1 + k) int64: a file's size and the k numbers of `Item.where`."""


@dataclass(frozen=True, eq=False, slots=True)
class Items:
    """A selection of a source's files, in an order, with labels. Pickled, it takes only the files selected with it."""

    columns: _Columns
    rows: np.ndarray
    """(n,) int32: the files selected. `ItemsBuilder` sorts the files by name, so ascending rows are ascending names."""
    labels: np.ndarray
    """(n,) int32, -1 where there is none."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        (item,) = self.take([index])
        return item

    def __iter__(self) -> Iterator[Item]:
        for block in self.blocks():
            labels = [None if label == _NO_LABEL else label for label in block.labels.tolist()]
            sizes_bytes, *where = block._numbers().T.tolist()
            yield from map(Item, block.names(), sizes_bytes, zip(*where, strict=True) if where else repeat(()), labels)

    def blocks(self) -> Iterator[Items]:
        """All of them, some thousand at a time: few enough to make Python objects of."""
        return (self.take(slice(first, first + _BLOCK_ITEMS)) for first in range(0, len(self), _BLOCK_ITEMS))

    def names(self) -> Iterator[str]:
        return (name.decode("utf-8", "surrogatepass") for block in self.blocks() for name in block._encoded_names())

    def _encoded_names(self) -> list[bytes | bytearray]:
        starts, names = self.columns.starts[self.rows], self.columns.names
        ends = starts + self.columns.lengths[self.rows]
        return [names[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    @property
    def sizes_bytes(self) -> np.ndarray:
        """(n,) int64."""
        return self.columns.numbers[self.rows, 0]

    def _numbers(self) -> np.ndarray:
        return self.columns.numbers[self.rows]

    def take(self, which: np.ndarray | slice | Sequence[int]) -> Items:
        """Some of them, chosen as numpy chooses."""
        return Items(self.columns, self.rows[which], self.labels[which])

    def labelled(self, labels: int | np.ndarray) -> Items:
        """The same with one label for all, or one each (-1: none)."""
        return Items(self.columns, self.rows, np.broadcast_to(np.asarray(labels, np.int32), self.rows.shape))

    @staticmethod
    def join(parts: Sequence[Items]) -> Items:
        """The files of one or more selections from one source, sorted by name."""
        rows = np.concatenate([part.rows for part in parts])
        order = np.argsort(rows)
        return Items(parts[0].columns, rows[order], np.concatenate([part.labels for part in parts])[order])

    def inside(self, folder: str) -> Items:
        """The files in a folder, with names relative to it."""
        prefix = f"{folder}/"
        cut = len(prefix.encode("utf-8", "surrogatepass"))
        old = self.columns
        columns = _Columns(old.names, old.starts + cut, old.lengths - np.int32(cut), old.numbers)
        inside = np.fromiter((name.startswith(prefix) for name in self.names()), bool, len(self))
        return Items(columns, self.rows[inside], self.labels[inside])

    def first_repeated(self) -> str | None:
        """The first name that two files have, in a selection that is sorted by name."""
        lengths = self.columns.lengths[self.rows]
        same = lengths[1:] == lengths[:-1]
        for words in _words(self.columns, self.rows):
            same &= words[1:] == words[:-1]
        return self[int(np.argmax(same))].name if same.any() else None

    def find(self, name: str) -> Item | None:
        """The file of this name, in a selection that is sorted by name."""

        index = bisect_left(range(len(self)), name, key=lambda index: self[index].name)
        return self[index] if index < len(self) and self[index].name == name else None

    def __reduce__(self) -> tuple[Any, ...]:
        text = b"".join(self._encoded_names())
        return _restore, (text, self.columns.lengths[self.rows], self._numbers(), np.ascontiguousarray(self.labels))


def _restore(names: bytes, lengths: np.ndarray, numbers: np.ndarray, labels: np.ndarray) -> Items:
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return Items(_Columns(names, starts, lengths, numbers), np.arange(len(lengths), dtype=np.int32), labels)


class ItemsBuilder:
    """Takes a source's files one at a time."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._lengths = array("i")
        self._numbers = array("q")
        self._labels = array("i")

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, name: str, size_bytes: int, where: tuple[int, ...] = (), label: int | None = None) -> None:
        """As the fields of `Item`; each number is below 2 ** 63, and ``where`` of all files has the same length."""
        encoded = name.encode("utf-8", "surrogatepass")  # bytes that sort as the strings do
        self._names += encoded
        self._lengths.append(len(encoded))
        self._numbers.extend((size_bytes, *where))
        self._labels.append(_NO_LABEL if label is None else label)

    def build(self) -> Items:
        """All of them, sorted by name."""
        count = len(self)
        rows = np.arange(count, dtype=np.int32)
        lengths, labels = np.frombuffer(self._lengths, np.int32), np.frombuffer(self._labels, np.int32)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        numbers = np.frombuffer(self._numbers, np.int64).reshape(count, -1 if count else 1)
        self._names += bytes(_WORD_BYTES)
        columns = _Columns(self._names, starts, lengths, numbers)
        # Stable sorts from the last eight bytes to the first: 60 bytes a file while it lasts, where sorting strings takes 100.
        order = rows
        for words in _words(columns, rows):
            if words.min() != words.max():
                order = order[np.argsort(words[order], kind="stable")]
        for column in (starts, lengths, labels, *numbers.T):  # in place: two copies of all would be the packer's highest memory
            column[:] = column[order]
        return Items(columns, rows, labels)


def _words(columns: _Columns, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Eight bytes of each row's name at a time, from the last to the first, as (n,) uint64 that compare as the bytes do."""
    if not len(rows):
        return
    text = np.ndarray(len(columns.names) - _WORD_BYTES + 1, ">u8", columns.names, strides=(1,))  # overlapping
    first_bytes = np.array([(1 << 64) - (1 << (64 - 8 * count)) for count in range(_WORD_BYTES + 1)], np.uint64)
    longest = int(columns.lengths[rows].max())
    for at in range((longest - 1) // _WORD_BYTES * _WORD_BYTES, -1, -_WORD_BYTES):
        words = text[np.minimum(columns.starts + at, len(text) - 1)[rows]].astype(np.uint64)
        words &= first_bytes[np.clip(columns.lengths - at, 0, _WORD_BYTES)[rows]]
        yield words
