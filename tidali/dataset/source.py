"""Open a packed data set: a folder directly, a URL through a local copy."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tidali.dataset.contract import MANIFEST_NAME, Dataset, Manifest, open_dataset
from tidali.dataset.remote import filesystem, is_remote, reached
from tidali.errors import DatasetError, TidaliError
from tidali.files import cache_folder, lock, remove_left_over, replacing, write_atomically

_PARALLEL_DOWNLOADS = 8  # a shard of 1,000 small images is 3 MB: requests wait for the network, not for a core
_BLOCK_BYTES = 1 << 20


def open_data(location: str) -> Dataset:
    """The data set in a folder or behind an fsspec URL, checked as `tidali.dataset.contract.open_dataset` does.

    DALI reads a tar over a network one member after another, so each shard is copied once into the cache folder
    (`tidali.files.cache_folder`), its SHA-256 checked on the way. Processes that start together share one copy:
    one fetches, the others wait. The copy is named after the manifest's SHA-256, so a repacked data set is fetched again.

    Raises:
        DatasetError: no data set there, or a file of it that is missing or damaged.
        TidaliError: the location cannot be reached, or a package for it is missing.
    """
    if not is_remote(location):
        return open_dataset(Path(location))
    folder = stage(location)
    fix = f"delete {folder}, which is a copy of {location}: it is fetched again"
    try:
        return replace(open_dataset(folder), fix=fix)
    except DatasetError as error:
        raise DatasetError(f"{str(error).partition('; ')[0]}; {fix}") from None


def read_manifest(location: str) -> Manifest:
    """The manifest alone, without its shards.

    Raises:
        DatasetError: there is none, or it is damaged.
    """
    if not is_remote(location):
        return open_dataset(Path(location)).manifest
    return _remote_manifest(location)[1]


def stage(url: str) -> Path:
    """The local copy of a data set behind a URL."""
    url = url.rstrip("/")
    text, manifest = _remote_manifest(url)
    folder = cache_folder() / f"{url.rpartition('/')[2]}-{hashlib.sha256(text).hexdigest()[:16]}"
    files = [file for split in manifest.splits.values() for shard in split.shards for file in shard.files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, wait=True):
            remove_left_over(folder)
            there = {path.name: path.stat().st_size for path in folder.iterdir()}
            # The manifest states the size of tars only. An index is hashed whenever it is opened.
            missing = [
                (name, sha256) for name, sha256, size in files if there.get(name) is None or size not in (None, there[name])
            ]
            with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
                list(pool.map(lambda file: _fetch(url, folder, *file), missing))
            copy = folder / MANIFEST_NAME
            if not copy.exists() or copy.read_bytes() != text:
                write_atomically(copy, text)
    except OSError as error:
        raise TidaliError(f"{error.filename or folder}: {error.strerror or error}; TIDALI_CACHE names another folder") from None
    return folder


def _remote_manifest(url: str) -> tuple[bytes, Manifest]:
    with reached(url) as (fs, root):
        try:
            data: bytes = fs.cat_file(f"{root}/{MANIFEST_NAME}")
        except FileNotFoundError:
            raise DatasetError(f"{url}: no {MANIFEST_NAME} here; make a data set with 'tidali shard SOURCE {url}'") from None
    return data, Manifest.from_json(data.decode("utf-8", "replace"), f"{url}/{MANIFEST_NAME}")


def _fetch(url: str, folder: Path, name: str, sha256: str) -> None:
    """Copy one file, hashing it on the way; it gets its name only if the hash is right and the content is on the disk."""
    fs, root = filesystem(url)
    digest = hashlib.sha256()
    fix = f"'tidali verify {url}' shows all damage, packing again repairs it"
    try:
        with replacing(folder / name) as temporary:
            with fs.open(f"{root}/{name}", "rb", cache_type="readahead") as remote, open(temporary, "wb") as local:
                while block := remote.read(_BLOCK_BYTES):
                    digest.update(block)
                    local.write(block)
            if digest.hexdigest() != sha256:
                raise DatasetError(f"{url}/{name}: damaged there or on the way (its SHA-256 is not the manifest's); {fix}")
    except TidaliError:
        raise
    except FileNotFoundError:
        raise DatasetError(f"{url}/{name}: missing; {fix}") from None
    except OSError as error:
        if error.filename and str(error.filename).startswith(str(folder)):
            raise
        raise TidaliError(f"{url}/{name}: {error}") from None
    except Exception as error:  # each fsspec implementation raises exceptions of its own
        raise TidaliError(f"{url}/{name}: {type(error).__name__}: {error}") from None
