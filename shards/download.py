"""Download Tiny-ImageNet: resumed after an interruption, checked by its MD5, and stored whole or not at all."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tidali.errors import TidaliError, UsageError
from tidali.files import file_digest, lock, resumable, sync

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

_ATTEMPTS_WITHOUT_PROGRESS = 5
_TIMEOUT_S = 30.0
_BLOCK_BYTES = 1 << 18

Progress = Callable[[int, int | None], None]
"""``progress(done_bytes, total_bytes)``; the total is None if the server does not state it."""


def download(
    dest: str | Path,
    *,
    url: str = TINY_IMAGENET_URL,
    md5: str = TINY_IMAGENET_MD5,
    progress: Progress | None = None,
    pause_s: float = 1.0,
) -> Path:
    """Download ``url`` to ``dest`` and return the file's path.

    ``dest`` is the folder for the file if such a folder exists, if it ends in a slash, or if its last part has no suffix; it is
    created if it does not exist. Otherwise it is the file.

    What has arrived is kept beside it as ``NAME.part``, also if the process is killed, and the next call requests the rest.
    An existing file with the right MD5 is left alone. ``pause_s`` is the first wait between two attempts; it doubles.

    Raises:
        UsageError: another file of this name exists, or the URL is not http or https.
        TidaliError: the place cannot be read or written, the server refused or went away for good, or the MD5 is wrong, in
            which case the download is removed.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url}: not an http or https URL")
    md5 = md5.lower()
    with resumable(dest):
        path = _target(dest, url)
        partial = path.with_name(path.name + ".part")
        if path.exists():
            if file_digest(path, "md5") == md5:
                return path
            raise UsageError(
                f"{path}: another file of this name exists (its MD5 is not {md5}); remove it, or choose another DEST"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not `replacing`: what has arrived is kept if the process is killed or the network fails.
        with open(partial, "ab") as file, lock(partial, wait=False):
            _fetch(url, file, progress, pause_s)
            there = file_digest(partial, "md5")
            if there != md5:
                partial.unlink()
                raise TidaliError(f"{url}: what arrived has MD5 {there}, not {md5}; removed it. Try again, or another --url")
            sync(partial)
            partial.replace(path)
    return path


def _target(dest: str | Path, url: str) -> Path:
    path = Path(dest)
    is_folder = path.is_dir() or str(dest).endswith("/") or not (path.suffix or path.exists())
    return path / (url.rpartition("/")[2] or "download") if is_folder else path


def _fetch(url: str, file: BinaryIO, progress: Progress | None, pause_s: float) -> None:
    """Append to ``file`` until the server has no more; after a broken connection the rest is requested."""
    failures = 0
    while True:
        start = file.tell()
        try:
            if _fetch_rest(url, file, progress):
                return
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code == 416 and start:  # there is nothing after what has arrived: it is complete, or its MD5 is wrong
                return
            if error.code < 500:
                raise TidaliError(f"{url}: the server answers {error.code} {error.reason}; is the URL right?") from None
            reason = f"the server answers {error.code}"
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "filename", None):
                raise  # the disk, not the network
            reason = str(getattr(error, "reason", "") or error)
        failures = 1 if file.tell() > start else failures + 1
        if failures >= _ATTEMPTS_WITHOUT_PROGRESS:
            raise TidaliError(f"{url}: {reason}, {failures} times in a row; run the same command again to resume")
        time.sleep(pause_s * 2 ** (failures - 1))


def _fetch_rest(url: str, file: BinaryIO, progress: Progress | None) -> bool:
    """Make one request. Returns whether everything that the server announced has arrived."""
    start = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        if start and response.status != 206:  # the server ignores ranges and sends everything again
            file.truncate(0)
            file.seek(0)
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        try:
            while block := response.read(_BLOCK_BYTES):
                file.write(block)
                if progress is not None:
                    progress(file.tell(), total)
        finally:
            file.flush()
    return total is None or file.tell() >= total
