"""Open a packed data set wherever it is: a folder as it stands, anything behind a URL by way of a local copy."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tidali.contract import MANIFEST_NAME, Dataset, Manifest, open_dataset
from tidali.errors import DatasetError, TidaliError
from tidali.remote import filesystem, is_remote

_PARALLEL_DOWNLOADS = 8  # a shard of 1,000 small images is 3 MB: requests wait for the network, not for a core
_BLOCK_BYTES = 1 << 20


def open_data(location: str) -> Dataset:
    """The data set in a folder or behind an fsspec URL, checked as `tidali.contract.open_dataset` does.

    DALI reads a tar over a network one member after another, so each shard is copied once into the cache folder
    (``$TIDALI_CACHE``, else ``~/.cache/tidali``), its SHA-256 checked on the way. Processes that start together share one copy:
    one fetches, the others wait. The copy is bound to the manifest's content, so a data set packed anew is fetched anew.

    Raises:
        DatasetError: no data set there, or a file of it that is missing or damaged.
        TidaliError: the location cannot be reached, or a package for it is missing.
    """
    return open_dataset(stage(location) if is_remote(location) else Path(location))


def read_manifest(location: str) -> Manifest:
    """The manifest alone, without its shards.

    Raises:
        DatasetError: there is none, or it is damaged.
    """
    if not is_remote(location):
        return open_dataset(Path(location)).manifest
    return Manifest.from_json(_remote_manifest(location).decode("utf-8", "replace"), f"{location}/{MANIFEST_NAME}")


def stage(url: str) -> Path:
    """The local copy of a data set behind a URL."""
    url = url.rstrip("/")
    text = _remote_manifest(url)
    manifest = Manifest.from_json(text.decode("utf-8", "replace"), f"{url}/{MANIFEST_NAME}")
    folder = cache_folder() / f"{url.rpartition('/')[2]}-{hashlib.sha256(text).hexdigest()[:16]}"
    wanted = [
        file
        for split in manifest.splits.values()
        for shard in split.shards
        for file in (
            (shard.name, shard.sha256),
            (shard.index_name, shard.index_sha256),
            (shard.record_name, shard.record_sha256),
        )
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            missing = [file for file in wanted if not (folder / file[0]).exists()]
            with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
                list(pool.map(lambda file: _fetch(url, folder, *file), missing))
            if not (folder / MANIFEST_NAME).exists():
                _publish(folder / MANIFEST_NAME, text)
    except OSError as error:
        raise TidaliError(f"{error.filename or folder}: {error.strerror or error}; TIDALI_CACHE names another folder") from None
    return folder


def cache_folder() -> Path:
    override = os.environ.get("TIDALI_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "tidali"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process fetches; the others wait here and find everything there. The kernel lets go when a process dies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remote_manifest(url: str) -> bytes:
    fs, root = filesystem(url)
    try:
        data: bytes = fs.cat_file(f"{root}/{MANIFEST_NAME}")
    except FileNotFoundError:
        raise DatasetError(f"{url}: no {MANIFEST_NAME} here; make a data set with 'tidali shard SOURCE {url}'") from None
    except Exception as error:  # every kind of remote has exceptions of its own
        raise TidaliError(f"{url}: {type(error).__name__}: {error}") from None
    return data


def _fetch(url: str, folder: Path, name: str, sha256: str) -> None:
    """Copy one file, hashing it on the way; it gets its name only if it is right."""
    fs, root = filesystem(url)
    partial = folder / f"{name}.part"
    digest = hashlib.sha256()
    try:
        with fs.open(f"{root}/{name}", "rb", cache_type="readahead") as remote, open(partial, "wb") as local:
            while block := remote.read(_BLOCK_BYTES):
                digest.update(block)
                local.write(block)
    except FileNotFoundError:
        raise DatasetError(f"{url}/{name}: missing; 'tidali verify {url}' shows all damage, packing again mends it") from None
    except OSError as error:
        if error.filename and str(error.filename).startswith(str(folder)):
            raise
        raise TidaliError(f"{url}/{name}: {error}") from None
    except Exception as error:
        raise TidaliError(f"{url}/{name}: {type(error).__name__}: {error}") from None
    if digest.hexdigest() != sha256:
        partial.unlink()
        text = "damaged there or on the way (its SHA-256 is not the manifest's)"
        raise DatasetError(f"{url}/{name}: {text}; 'tidali verify {url}' shows all damage, packing again mends it")
    os.replace(partial, folder / name)


def _publish(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(data)
    os.replace(partial, path)
