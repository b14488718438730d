"""Local copies of some of the shards behind a URL, where TIDALI_CACHE_LIMIT does not allow a copy of all.

Processes of one machine share the folder. What they agree by are locks that the kernel releases when a process dies:

- the folder, held for moments: whoever chooses what to fetch or to drop, or gives a file its name;
- ``.NAME.part``, held by the one process that fetches this shard. One that nobody holds is left of a killed process. It has the
  shard's full size from the start, so what the folder's files take is never more than what they will take;
- a shard, held together by all who read it. Only one that nobody holds is dropped.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from tidali.dataset.fetch import fetch, retrying
from tidali.errors import TidaliError
from tidali.files import TEMPORARY_SUFFIX, lock, replacing

PARALLEL_FETCHES = 8
"""A shard of 1,000 small images is 3 MB: requests wait for the network, not for a core."""
_POLL_S = 0.02
_POLLS = 15_000
"""Five minutes: other processes may hold what would have to be dropped, but not for so long."""
BLOCK_BYTES = 4096
"""To which a file system rounds a file's size up."""


class Shard(Protocol):
    """What is fetched: `tidali.dataset.contract.Shard`."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    @property
    def record_name(self) -> str: ...
    @property
    def record_sha256(self) -> str: ...


class Needs(NamedTuple):
    """What a reader needs."""

    shards: tuple[Shard, ...]
    """In the order of need."""
    first_needed: int
    """Those before it this process has read."""
    first_kept: int
    """Those from here on other processes still read perhaps: they are not dropped."""


class LimitedCopy:
    """The folder of a data set's copies. All records are there, and the tars that were needed last or are needed next."""

    def __init__(self, url: str, folder: Path, limit_bytes: int, shards: Sequence[Shard]) -> None:
        """Fetch the records.

        Args:
            limit_bytes: that all files of the folder may take.
            shards: of all splits.

        Raises:
            DatasetError: a record is missing or damaged in the store.
            TidaliError: the store does not answer.
            OSError: the folder cannot be written.
        """
        self.url, self.folder, self.limit_bytes = url, folder, limit_bytes
        self.on_failure: Callable[[str], None] = lambda text: None
        """Called with a message when the store does not answer and is tried again."""
        self._answers = True
        self._readers: dict[str, Needs] = {}
        self._wanted: dict[str, int] = {}
        """The shards that are needed first, as many as there is room for: name -> number in the order of need."""
        self._to_fetch: list[Shard] = []
        """Of those, in order, the ones that no thread has begun with."""
        self._fetching: set[str] = set()
        self._mutex = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, wait=True):
            for part in folder.glob(f".*{TEMPORARY_SUFFIX}"):
                _drop(part)
            self._fetch_records(shards)
            others = [path.stat() for path in folder.iterdir() if not _is_tar(path.name)]
        self.room_bytes = limit_bytes - sum(map(_taken_bytes, others))
        """What the limit leaves for tars."""

    def _fetch_records(self, shards: Sequence[Shard]) -> None:
        def fetch_record(shard: Shard) -> None:
            with replacing(self.folder / shard.record_name) as temporary, open(temporary, "wb") as local:
                fetch(self.url, shard.record_name, shard.record_sha256, local)

        missing = [shard for shard in shards if not (self.folder / shard.record_name).exists()]
        with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
            list(pool.map(lambda shard: retrying(lambda: fetch_record(shard)), missing))

    def expect(self, reader: str, needs: Needs) -> None:
        """Fetch ahead, by threads, what a reader needs from now on. What was said for other readers is needed after it."""
        with self._mutex:
            if next(iter(self._readers), None) == reader and self._readers[reader] == needs:
                return
            self._readers.pop(reader, None)
            self._readers = {reader: needs, **self._readers}
            self._wanted, self._to_fetch, room_bytes = {}, [], self.room_bytes
            for one in self._readers.values():
                for number, shard in enumerate(islice(one.shards, one.first_kept, None), one.first_kept):
                    room_bytes -= shard.size_bytes
                    if room_bytes < 0:
                        break
                    self._wanted.setdefault(shard.name, len(self._wanted))
                    if number >= one.first_needed:
                        self._to_fetch.append(shard)
            self._start_fetches()

    def _start_fetches(self) -> None:
        """To be called with the mutex."""
        while self._to_fetch and len(self._fetching) < PARALLEL_FETCHES:
            shard = self._to_fetch.pop(0)
            if shard.name not in self._fetching and not (self.folder / shard.name).exists():
                self._fetching.add(shard.name)
                threading.Thread(target=self._fetch_ahead, args=(shard,), daemon=True, name="tidali-fetch").start()

    def _fetch_ahead(self, shard: Shard) -> None:
        found = None
        with suppress(TidaliError, OSError):  # whoever needs the shard fetches it again, and says what is wrong
            found = retrying(lambda: self._fetch(shard, ahead=True), self._failed)
        with self._mutex:
            self._fetching.discard(shard.name)
            if found == "full":
                self._to_fetch.clear()  # until `expect` is told of progress
            self._start_fetches()

    def _failed(self, text: str) -> None:
        """Say it once, until the store answers again."""
        if self._answers:
            self._answers = False
            self.on_failure(text)

    def hold(self, shard: Shard) -> int:
        """A descriptor of the shard's local tar, which nobody drops as long as it is open. Waits until the tar is here.

        Raises:
            DatasetError: it is missing or damaged in the store.
            TidaliError: the store does not answer, or nothing can be dropped for it.
        """
        try:
            return retrying(lambda: self._held(shard), self._failed)
        except OSError as error:
            where = error.filename or self.folder
            raise TidaliError(f"{where}: {error.strerror or error}; TIDALI_CACHE names another folder") from None

    def _held(self, shard: Shard) -> int:
        for _ in range(_POLLS):
            descriptor = self._open(shard)
            if descriptor is not None:
                return descriptor
            if self._fetch(shard) != "here":
                time.sleep(_POLL_S)
        raise TidaliError(
            f"{self.url}/{shard.name}: no room for it in {self.folder} for {_POLL_S * _POLLS:.0f} s, as all that is there is "
            f"in use; raise TIDALI_CACHE_LIMIT ({self.limit_bytes} bytes), or give each run a TIDALI_CACHE of its own"
        )

    def _open(self, shard: Shard) -> int | None:
        try:
            descriptor = os.open(self.folder / shard.name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # it was dropped in between
        return None

    def _fetch(self, shard: Shard, *, ahead: bool = False) -> Literal["here", "elsewhere", "full"]:
        """Fetch a shard that is not here: once.

        Args:
            ahead: only if nothing has to be dropped for it that is needed earlier.

        Returns:
            It is here; or another thread or process fetches it; or there is no room.
        """
        path = self.folder / shard.name
        part = self.folder / f".{shard.name}{TEMPORARY_SUFFIX}"
        with lock(self.folder, wait=True):
            if path.exists():
                return "here"
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock_at_once(descriptor):
                os.close(descriptor)
                return "elsewhere"
            os.ftruncate(descriptor, 0)
            if not self._make_room(shard, ahead=ahead):
                part.unlink()
                os.close(descriptor)
                return "full"
            os.ftruncate(descriptor, shard.size_bytes)
        try:
            with open(descriptor, "wb", closefd=False) as local:
                fetch(self.url, shard.name, shard.sha256, local)
            self._answers = True
            os.fsync(descriptor)
            with lock(self.folder, wait=True):
                part.rename(path)
        except BaseException:
            with lock(self.folder, wait=True):
                part.unlink()
            raise
        finally:
            os.close(descriptor)
        return "here"

    def _make_room(self, shard: Shard, *, ahead: bool) -> bool:
        """Drop shards that nobody holds, those that are needed last or not at all first, until there is room for another. To be
        called with the folder locked."""
        taken_bytes, tars = BLOCK_BYTES + shard.size_bytes, []
        wanted, last = self._wanted, len(self._wanted)
        with os.scandir(self.folder) as entries:
            for entry in entries:
                status = entry.stat()
                taken_bytes += _taken_bytes(status)
                if _is_tar(entry.name):
                    tars.append((-wanted.get(entry.name, last), status.st_mtime_ns, _taken_bytes(status), entry.path))
        for number, _, size_bytes, path in sorted(tars):
            if taken_bytes <= self.limit_bytes or (ahead and -number < wanted.get(shard.name, last)):
                break
            if _drop(path):
                taken_bytes -= size_bytes
        return taken_bytes <= self.limit_bytes


def _is_tar(name: str) -> bool:
    return name.endswith(".tar")


def _taken_bytes(status: os.stat_result) -> int:
    """What it takes when it is whole: one that is being fetched has its full size, and few of its blocks yet."""
    return max(-(-status.st_size // BLOCK_BYTES) * BLOCK_BYTES, 512 * status.st_blocks)


def _lock_at_once(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _drop(path: Path | str) -> bool:
    """Remove a file that nobody holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if free := _lock_at_once(descriptor):
            os.unlink(path)
        return free
    finally:
        os.close(descriptor)
