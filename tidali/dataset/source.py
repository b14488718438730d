"""Open a packed data set: a folder directly, a URL through a local copy."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tidali.dataset.contract import MANIFEST_NAME, Dataset, Manifest, Shard, open_dataset
from tidali.dataset.fetch import fetch, retrying
from tidali.dataset.limited_copy import PARALLEL_FETCHES, LimitedCopy
from tidali.dataset.remote import is_remote, reached
from tidali.errors import DatasetError, NoDatasetError, TidaliError
from tidali.files import cache_folder, cache_limit_bytes, lock, remove_left_over, replacing, write_atomically


def open_data(location: str) -> Dataset:
    """The data set in a folder or behind an fsspec URL, checked as `tidali.dataset.contract.open_dataset` does.

    DALI reads a tar over a network one member after another, so each shard is copied once into the cache folder
    (`tidali.files.cache_folder`), its SHA-256 checked on the way. Processes that start together share one copy:
    one fetches, the others wait. The copy is named after the manifest's SHA-256, so a repacked data set is fetched again.

    Where the copy would be larger than ``$TIDALI_CACHE_LIMIT``, only the shards' records are fetched here, and shards while
    they are read (`tidali.dataset.limited_copy`).

    Raises:
        DatasetError: no data set there, or a file of it that is missing or damaged.
        TidaliError: the location cannot be reached, or a package for it is missing.
        UsageError: TIDALI_CACHE_LIMIT is not a number of bytes.
    """
    if not is_remote(location):
        return open_dataset(Path(location))
    url, limit_bytes = location.rstrip("/"), cache_limit_bytes()
    text, manifest = _remote_manifest(url)
    folder = cache_folder() / f"{url.rpartition('/')[2]}-{hashlib.sha256(text).hexdigest()[:16]}"
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    try:
        if limit_bytes is not None and _copy_bytes(url, shards) > limit_bytes:
            if any("/" in shard.name for shard in shards):
                fix = "make it larger, or put the tars into one folder, adopt that and upload it"
                raise TidaliError(f"{url}: its tars are in folders, and it is larger than TIDALI_CACHE_LIMIT; {fix}")
            folder = folder.with_name(f"{folder.name}-part")
            copy = LimitedCopy(url, folder, limit_bytes, shards)
            return Dataset(folder, manifest, fix=_fix(folder, url), copy=copy)
        _stage(url, folder, text, shards)
    except OSError as error:
        raise TidaliError(f"{error.filename or folder}: {error.strerror or error}; TIDALI_CACHE names another folder") from None
    try:
        return replace(open_dataset(folder), fix=_fix(folder, url))
    except DatasetError as error:
        raise DatasetError(f"{str(error).partition('; ')[0]}; {_fix(folder, url)}") from None


def _fix(folder: Path, url: str) -> str:
    return f"delete {folder}, which is a copy of {url}: it is fetched again"


def read_manifest(location: str) -> Manifest:
    """The manifest alone, without its shards.

    Raises:
        DatasetError: there is none, or it is damaged.
    """
    if not is_remote(location):
        return open_dataset(Path(location)).manifest
    return _remote_manifest(location)[1]


def _stage(url: str, folder: Path, text: bytes, shards: Sequence[Shard]) -> None:
    """Copy a whole data set into the folder, or what is missing of it.

    Args:
        text: the manifest's.
    """
    files = [file for shard in shards for file in shard.files]
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, wait=True):
        for parent in {folder, *((folder / name).parent for name, _, _ in files)}:  # an adopted one's shards may be in folders
            parent.mkdir(exist_ok=True)
            remove_left_over(parent)
        there = {name: (folder / name).stat().st_size for name, _, _ in files if (folder / name).exists()}
        # The manifest states the size of tars only. An index is hashed whenever it is opened.
        missing = [
            (name, sha256, size or 0)
            for name, sha256, size in files
            if there.get(name) is None or size not in (None, there[name])
        ]
        needed_bytes, free_bytes = sum(size for _, _, size in missing), shutil.disk_usage(folder).free
        if needed_bytes > free_bytes:
            raise TidaliError(
                f"{folder}: {needed_bytes} bytes of {url} are to be copied here and {free_bytes} are free; set TIDALI_CACHE to "
                f"a folder on a larger disk, or TIDALI_CACHE_LIMIT to what the copy may take, such as 20GB"
            )

        def fetch_file(file: tuple[str, str, int]) -> None:
            """It gets its name only if the hash is right and the content is on the disk."""
            name, sha256, _ = file
            with replacing(folder / name) as temporary, open(temporary, "wb") as local:
                fetch(url, name, sha256, local)

        with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
            list(pool.map(lambda file: retrying(lambda: fetch_file(file)), missing))
        copy = folder / MANIFEST_NAME
        if not copy.exists() or copy.read_bytes() != text:
            write_atomically(copy, text)


def _copy_bytes(url: str, shards: Sequence[Shard]) -> int:
    """What a copy of all shards takes. The manifest states the size of tars only: the others' sizes are asked of the store."""
    names = {name for shard in shards for name, _, _ in shard.files}
    with reached(url) as (fs, root):
        found = fs.find(root, detail=True)
    listed = sum(entry["size"] or 0 for path, entry in found.items() if path.rpartition("/")[2] in names)
    return max(listed, sum(shard.size_bytes for shard in shards))


def _remote_manifest(url: str) -> tuple[bytes, Manifest]:
    with reached(url) as (fs, root):
        try:
            data: bytes = fs.cat_file(f"{root}/{MANIFEST_NAME}")
        except FileNotFoundError:
            raise NoDatasetError(f"{url}: no {MANIFEST_NAME} here; make a data set with 'tidali shard SOURCE {url}'") from None
    return data, Manifest.from_json(data.decode("utf-8", "replace"), f"{url}/{MANIFEST_NAME}")
