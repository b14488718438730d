"""The destination of a pack: a local folder, or any fsspec URL."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tidali.dataset.remote import filesystem, is_remote, reached
from tidali.errors import UsageError
from tidali.files import lock, replacing, sync


def open_store(location: str | Path) -> Store:
    """
    Raises:
        TidaliError: a URL of a kind that needs a package that is not installed.
    """
    text = str(location)
    if is_remote(text):
        filesystem(text)  # report a missing package before the source is read
        return RemoteStore(text.rstrip("/"))
    return LocalStore(Path(location))


@contextmanager
def local_copy(location: str) -> Iterator[Path]:
    """The folder itself; for a URL a temporary copy of everything there, unchecked."""
    store = open_store(location)
    with store.workspace() as folder:
        names = store.names() if is_remote(location) else []
        folders = [name for name in names if "." not in name]
        store.fetch(folder, [name for name in names if name not in folders])
        for inner in folders:
            store.fetch(folder, [f"{inner}/{name}" for name in store.names(inner)])
        yield folder


# ---------------------------------------------------------------------------------------------------------------------- local


@dataclass(frozen=True)
class LocalStore:
    """A folder. Workers write straight into it, under temporary names.

    `LocalStore` and `RemoteStore` have the same methods: a flat place for files, whose names are relative and '/'-separated.
    Both can be pickled: the workers put finished shards into them.
    """

    root: Path

    @property
    def location(self) -> str:
        return str(self.root)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store for this packer, as far as its kind allows that; it is created if it does not exist.

        The lock is on the folder itself, so nothing is left behind when the process dies.

        Raises:
            TidaliError: another packer holds it.
            UsageError: it cannot be written.
        """
        with ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(self.root, wait=False))
            except OSError as error:
                raise UsageError(f"{self.root}: {error.strerror}; choose another DEST") from None
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise UsageError(f"{self.root}: Permission denied; choose another DEST")
            yield

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders directly in the store, or in one of its folders; empty if there is no such folder."""
        path = self.root / folder
        return sorted(os.listdir(path)) if path.is_dir() else []

    def read(self, name: str) -> bytes | None:
        """A file's content, or None if there is no such file."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def publish(self, name: str, data: bytes) -> None:
        """Write a file that appears whole or not at all, and survives a power cut once this returns."""
        publish_bytes(self.root / name, data)
        sync(self.root)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A local folder to create files in."""
        yield self.root

    def fetch(self, workspace: Path, names: Iterable[str]) -> None:
        """Copy files of the store into a workspace; names that do not exist are skipped. Here the workspace is the store."""

    def commit(self, workspace: Path, names: Iterable[str]) -> None:
        """Copy files of a workspace into the store, in this order. Here the workspace is the store."""


def publish_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all. Flushing the folder is left to the caller, once for several files."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


# --------------------------------------------------------------------------------------------------------------------- remote


@dataclass(frozen=True)
class RemoteStore:
    """A prefix behind a URL. A shard is made in a temporary local folder and uploaded whole; nothing there can be locked."""

    location: str
    """The URL."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def names(self, folder: str = "") -> list[str]:
        with reached(self.location) as (fs, root):
            fs.invalidate_cache()
            path = f"{root}/{folder}".rstrip("/")
            try:
                return sorted(entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False) if entry != path)
            except FileNotFoundError:
                return []

    def read(self, name: str) -> bytes | None:
        with reached(self.location) as (fs, root):
            try:
                data: bytes = fs.cat_file(f"{root}/{name}")
                return data
            except FileNotFoundError:
                return None

    def publish(self, name: str, data: bytes) -> None:
        with reached(self.location) as (fs, root):
            fs.pipe_file(f"{root}/{name}", data)

    def remove(self, name: str) -> None:
        with reached(self.location) as (fs, root), suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{name}")

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="tidali-") as name:
            yield Path(name)

    def fetch(self, workspace: Path, names: Iterable[str]) -> None:
        with reached(self.location) as (fs, root):
            for name in names:
                (workspace / name).parent.mkdir(exist_ok=True)
                try:
                    fs.get_file(f"{root}/{name}", str(workspace / name))
                except FileNotFoundError:
                    (workspace / name).unlink(missing_ok=True)

    def commit(self, workspace: Path, names: Iterable[str]) -> None:
        with reached(self.location) as (fs, root):
            for name in names:
                # Whole or not at all on object stores: an upload that ends early leaves no object.
                fs.put_file(str(workspace / name), f"{root}/{name}")


Store = LocalStore | RemoteStore
