"""The samples of a split: where each one's bytes are, and what its shard's record says of it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tidali.dataset.contract import Dataset, read_record
from tidali.errors import DatasetError
from tidali.hardware.limits import free_memory, rank_threads, way_out
from tidali.loading import native
from tidali.loading.window import ShardNeeds

_FIELDS = ("label", "offset", "size_bytes", "crc32", "height", "width")  # the integers of a record's sample, in its order
_SAMPLES = b'"samples":['


class Places(NamedTuple):
    """Where samples' encoded bytes are."""

    shards: NDArray[np.int64]
    """(n,)."""
    begins: NDArray[np.int64]
    """(n,): in the shard's tar, in bytes."""
    ends: NDArray[np.int64]


class SampleTable:
    """All samples of one split, by their position in its stored order; 36 bytes of memory each.

    The tars are mapped, not read: a batch touches the pages of its own samples alone. Where the local copy is limited, a batch
    waits for its shards in `expect`, and a shard that no batch reads any more is unmapped and may be dropped.
    """

    def __init__(self, dataset: Dataset, split: str) -> None:
        """
        Raises:
            DatasetError: there is no such split, or a shard's record is missing or damaged.
            UsageError: the split has no labels.
        """
        info = dataset.labelled_split(split)
        self.dataset, self.split, self.info = dataset, split, info
        self.shards = [shard for shard in info.shards if shard.samples]
        self._starts = np.array([0, *accumulate(shard.samples for shard in self.shards)])
        self._tars: MutableMapping[int, _Mapped] = {} if dataset.copy is None else weakref.WeakValueDictionary()
        self.needs = ShardNeeds(self.shards)
        self._mapping = Lock()
        # numpy arrays, because other threads may not write to tensors that were created in torch's inference mode.
        self._labels, self._image_sizes = np.empty(info.samples, np.int64), np.empty((info.samples, 2), np.int32)
        self._offsets, self._sizes_bytes = np.empty(info.samples, np.int64), np.empty(info.samples, np.uint32)
        self._crc32s = np.empty(info.samples, np.uint32)
        if (library := native.load()) is not None:
            native.explain_bus_error(library)
        with ThreadPoolExecutor(rank_threads()) as pool:  # reading, hashing and scanning let go of the interpreter's lock
            list(pool.map(self._read_record, range(len(self.shards))))
        self._expected = 0  # samples, by `expect`
        # The kernel keeps in free memory what was read, of which training takes some too.
        self._fits_memory = int(self._sizes_bytes.sum()) < free_memory().size_bytes // 2
        self.labels = torch.from_numpy(self._labels)
        """(N,) int64."""
        self.sizes = torch.from_numpy(self._image_sizes)
        """(N, 2) int32: height and width in pixels, as displayed."""

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def identity(self) -> str:
        """What the samples and their order are, for checkpoints: a hash of the shards' hashes."""
        return hashlib.sha256(f"{self.info.content}{self.info.single_image_size}".encode()).hexdigest()

    def _read_record(self, number: int) -> None:
        shard = self.shards[number]
        path = self.dataset.root / shard.record_name
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}; {self.dataset.fix}") from None
        if hashlib.sha256(text).hexdigest() != shard.record_sha256:
            raise DatasetError(f"{path}: not the record that the manifest names (SHA-256 differs); {self.dataset.fix}")
        values = _integers(text, shard.samples)
        part = slice(*self._starts[number : number + 2])
        self._labels[part], self._image_sizes[part] = values[:, 0], values[:, 4:]
        self._offsets[part], self._sizes_bytes[part], self._crc32s[part] = values[:, 1:4].T

    def places(self, positions: NDArray[np.int64]) -> Places:
        begins = self._offsets[positions]
        return Places(np.searchsorted(self._starts, positions, "right") - 1, begins, begins + self._sizes_bytes[positions])

    def expect(self, positions: NDArray[np.int64]) -> tuple[_Mapped, ...]:
        """Tell the kernel that these samples are read next: it fetches those that are not in memory, many at a time.

        Only as long as there may be any: at 64 px it takes a twentieth of a stream's time.

        Returns:
            Where the local copy is limited, the shards of these samples: they stay in it as long as something refers to this.

        Raises:
            DatasetError, TidaliError: a shard had to be fetched, and cannot be.
        """
        held: tuple[_Mapped, ...] = ()
        if self.dataset.copy is not None and len(positions):
            needed = np.unique(self.places(positions).shards)
            self.dataset.copy.expect(self.split, self.needs.at(needed))
            held = tuple(map(self._tar, needed.tolist()))
        library = native.load()
        if library is not None and len(positions) and (self._expected < len(self) or not self._fits_memory):
            self._expected += len(positions)
            encoded = self.in_memory(positions)
            begin_pages = encoded.addresses // mmap.PAGESIZE * mmap.PAGESIZE
            native.expect(library, begin_pages, encoded.addresses + encoded.sizes_bytes - begin_pages)
        return held

    def in_memory(self, positions: NDArray[np.int64]) -> native.Encoded:
        """Samples' encoded bytes, as long as their shards are held (see `expect`)."""
        shards, begins, ends = self.places(positions)
        tars = np.array([self._tar(shard).address for shard in shards.tolist()], np.uint64)
        return native.Encoded(
            tars + begins.astype(np.uint64), (ends - begins).astype(np.uint64), np.ascontiguousarray(self._crc32s[positions])
        )

    def read(self, positions: NDArray[np.int64]) -> Iterator[memoryview | None]:
        """Samples' encoded bytes; None where they are not those that were packed, by their CRC-32."""
        columns = (*self.places(positions), self._crc32s[positions])
        for shard, begin, end, crc32 in zip(*(column.tolist() for column in columns), strict=True):
            data = self._tar(shard).view[begin:end]
            yield data if zlib.crc32(data) == crc32 else None

    def describe(self, position: int) -> str:
        """Shard, key and offset of a sample."""
        number = int(np.searchsorted(self._starts, position, "right")) - 1
        shard = self.shards[number]
        record = read_record(self.dataset.root, shard)[position - int(self._starts[number])]
        return f"{shard.name}: {record.key} at offset {record.offset}"

    def _tar(self, shard: int) -> _Mapped:
        tar = self._tars.get(shard)
        return tar if tar is not None else self._map(shard)

    def _map(self, shard: int) -> _Mapped:
        with self._mapping:  # two threads must not map one tar: the first's mapping would end while it is read
            tar = self._tars.get(shard)
            if tar is None:
                path = self.dataset.root / self.shards[shard].name
                try:
                    tar = _Mapped(self.dataset.open_tar(self.shards[shard]), keep_open=self.dataset.copy is not None)
                except OSError as error:
                    fix = way_out(error) or self.dataset.fix
                    raise DatasetError(f"{path}: cannot be mapped ({os.strerror(error.errno or 0)}); {fix}") from None
                self._tars[shard] = tar
            return tar


class _Mapped:
    """A file as memory, to read alone. Not Python's `mmap`, which keeps each file open: 1,000 shards are too many."""

    def __init__(self, descriptor: int, *, keep_open: bool) -> None:
        """
        Args:
            descriptor: of the file; closed at once, or when nothing refers to the memory any more.

        Raises:
            OSError: it cannot be mapped.
        """
        length = os.fstat(descriptor).st_size
        address = _libc().mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        failed = address == ctypes.c_void_p(-1).value
        if failed or not keep_open:
            os.close(descriptor)
        if failed:
            raise OSError(ctypes.get_errno(), "mmap")
        self.address: int = address
        content = (ctypes.c_ubyte * length).from_address(address)
        # Every view of a part refers to it, so none outlives the mapping. At exit the kernel unmaps it, after whoever reads it.
        weakref.finalize(content, _libc().munmap, address, length).atexit = False
        if keep_open:
            weakref.finalize(content, os.close, descriptor).atexit = False
        self.view = memoryview(content).cast("B").toreadonly()


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size, address, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_int64)
    libc.munmap.argtypes = (address, size)
    return libc


def _integers(record: bytes, samples: int) -> NDArray[np.int64]:
    """(samples, 6) int64: `_FIELDS` of each sample of a shard's record; a label that is null is -1.

    The compiled scan takes 0.1 us a sample, where `json` takes 5: 1,280,000 samples are 7 s.
    """
    library, begin = native.load(), record.find(_SAMPLES)
    if library is not None and begin >= 0:
        values = native.integers(library, record, begin + len(_SAMPLES), len(_FIELDS) * samples)
        if values is not None:
            return values.reshape(samples, len(_FIELDS))
    entries = json.loads(record)["samples"]
    return np.array([[-1 if entry[name] is None else entry[name] for name in _FIELDS] for entry in entries], np.int64)
