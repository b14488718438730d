"""Where a data set is kept while it is made: a local folder, or any fsspec URL."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tidali.dataset.remote import filesystem, is_remote
from tidali.errors import TidaliError, UsageError
from tidali.files import lock, replacing, sync_folder

PARTIAL_SUFFIX = ".part"


class Store(Protocol):
    """A flat place for files. Picklable: the workers put finished shards into it. Names are relative and '/'-separated."""

    @property
    def location(self) -> str: ...

    def locked(self) -> AbstractContextManager[None]:
        """Hold the place for this packer, as far as it allows that; made first where it is not there.

        Raises:
            TidaliError: another packer holds it.
            UsageError: it cannot be written.
        """

    def names(self) -> list[str]:
        """What is in it, without what is in its folders."""

    def names_in(self, folder: str) -> list[str]:
        """What is in one of its folders; nothing where there is no such folder."""

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None where there is none."""

    def publish(self, name: str, data: bytes) -> None:
        """Write a file that appears whole or not at all, and survives a power cut once this returns."""

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""

    def workspace(self) -> AbstractContextManager[Path]:
        """A local folder to make files in."""

    def fetch(self, workspace: Path, names: Iterable[str]) -> None:
        """Bring files into a workspace; those that are not there are left out."""

    def commit(self, workspace: Path, names: Iterable[str]) -> None:
        """Bring files of a workspace into the store, in this order."""


def open_store(location: str | Path) -> Store:
    """
    Raises:
        TidaliError: a URL of a kind that needs a package that is not installed.
    """
    text = str(location)
    if is_remote(text):
        filesystem(text)  # a missing package shall be known before the source is read
        return RemoteStore(text.rstrip("/"))
    return LocalStore(Path(location))


@contextmanager
def local_copy(location: str) -> Iterator[Path]:
    """The folder itself; of a URL a temporary copy of everything there, unchecked."""
    store = open_store(location)
    with store.workspace() as folder:
        names = store.names() if is_remote(location) else []
        folders = [name for name in names if "." not in name]
        store.fetch(folder, [name for name in names if name not in folders])
        for inner in folders:
            store.fetch(folder, [f"{inner}/{name}" for name in store.names_in(inner)])
        yield folder


# ---------------------------------------------------------------------------------------------------------------------- local


@dataclass(frozen=True)
class LocalStore:
    """A folder. Workers write straight into it, under temporary names."""

    root: Path

    @property
    def location(self) -> str:
        return str(self.root)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The lock is on the folder itself, so nothing is left behind when the process dies."""
        with ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(self.root, wait=False))
            except OSError as error:
                raise UsageError(f"{self.root}: {error.strerror}; choose another DEST") from None
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise UsageError(f"{self.root}: Permission denied; choose another DEST")
            yield

    def names(self) -> list[str]:
        return sorted(os.listdir(self.root))

    def names_in(self, folder: str) -> list[str]:
        path = self.root / folder
        return sorted(os.listdir(path)) if path.is_dir() else []

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def publish(self, name: str, data: bytes) -> None:
        publish_bytes(self.root / name, data)
        sync_folder(self.root)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        yield self.root

    def fetch(self, workspace: Path, names: Iterable[str]) -> None:
        pass  # the workspace is the store

    def commit(self, workspace: Path, names: Iterable[str]) -> None:
        pass  # the workspace is the store


def partial_path(path: Path) -> Path:
    """A shard's file name while it is written.

    Unlike `tidali.files.temporary_path` it does not contain the machine: the next run, which holds the lock, removes all of
    them, also those of Ray's workers on other machines. It contains the process's id: a worker that outlives its killed packer
    for a moment must not write into the file of its successor.
    """
    return path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")


def publish_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all. `sync_folder` is left to the caller, once for several files."""
    with replacing(path, partial_path(path)) as partial:
        partial.write_bytes(data)


# --------------------------------------------------------------------------------------------------------------------- remote


@dataclass(frozen=True)
class RemoteStore:
    """A prefix behind a URL. A shard is made in a temporary local folder and uploaded whole; nothing there can be locked."""

    url: str

    @property
    def location(self) -> str:
        return self.url

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def names(self) -> list[str]:
        return self.names_in("")

    def names_in(self, folder: str) -> list[str]:
        with _remote_errors(self.url) as (fs, root):
            fs.invalidate_cache()
            path = f"{root}/{folder}".rstrip("/")
            try:
                return sorted(entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False) if entry != path)
            except FileNotFoundError:
                return []

    def read(self, name: str) -> bytes | None:
        with _remote_errors(self.url) as (fs, root):
            try:
                data: bytes = fs.cat_file(f"{root}/{name}")
                return data
            except FileNotFoundError:
                return None

    def publish(self, name: str, data: bytes) -> None:
        with _remote_errors(self.url) as (fs, root):
            fs.pipe_file(f"{root}/{name}", data)

    def remove(self, name: str) -> None:
        with _remote_errors(self.url) as (fs, root), suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{name}")

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="tidali-") as name:
            yield Path(name)

    def fetch(self, workspace: Path, names: Iterable[str]) -> None:
        with _remote_errors(self.url) as (fs, root):
            for name in names:
                (workspace / name).parent.mkdir(exist_ok=True)
                try:
                    fs.get_file(f"{root}/{name}", str(workspace / name))
                except FileNotFoundError:
                    (workspace / name).unlink(missing_ok=True)

    def commit(self, workspace: Path, names: Iterable[str]) -> None:
        with _remote_errors(self.url) as (fs, root):
            for name in names:
                # Whole or not at all on object stores: an upload that ends early leaves no object.
                fs.put_file(str(workspace / name), f"{root}/{name}")


@contextmanager
def _remote_errors(url: str) -> Iterator[tuple[Any, str]]:
    try:
        yield filesystem(url)
    except (TidaliError, KeyboardInterrupt):
        raise
    except Exception as error:  # every kind of remote has exceptions of its own
        raise TidaliError(f"{url}: {type(error).__name__}: {error}") from None
