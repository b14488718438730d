"""Download from a loopback server that misbehaves."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from shards.download import download
from tidali.errors import TidaliError, UsageError

BODY = np.random.default_rng(0).integers(0, 256, 1_000_000, dtype=np.uint8).tobytes()
MD5 = hashlib.md5(BODY).hexdigest()


class Server:
    """Serves BODY, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.drops: list[int] = []
        """For each of the first requests, after how many bytes the connection is dropped."""
        self.ranges = True
        self.errors: list[int] = []
        """Status codes of the first answers."""
        self.asked: list[str | None] = []
        self.url = ""


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            server.asked.append(wanted)
            if server.errors:
                self.send_error(server.errors.pop(0))
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
            body = BODY[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if server.drops:
                self.wfile.write(body[: server.drops.pop(0)])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/tiny-imagenet-200.zip"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as running:
        yield running


def fetch(server: Server, dest: str | Path, md5: str = MD5) -> Path:
    return download(dest, url=server.url, md5=md5, pause_s=0.01)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_file(server: Server, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    path = download(tmp_path, url=server.url, md5=MD5, progress=lambda done, total: told.append((done, total)))
    assert path == tmp_path / "tiny-imagenet-200.zip"
    assert path.read_bytes() == BODY
    assert names(tmp_path) == [path.name]
    assert told[-1] == (len(BODY), len(BODY))


@pytest.mark.parametrize("dest", ["data", "data/", "data.d/", "a/b/data"])
def test_a_folder_that_is_not_there_yet_is_made(server: Server, tmp_path: Path, dest: str) -> None:
    path = fetch(server, f"{tmp_path}/{dest}")
    assert path == tmp_path / dest / "tiny-imagenet-200.zip"
    assert path.read_bytes() == BODY


def test_a_file_without_suffix_that_is_there_is_the_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(BODY)
    assert fetch(server, tmp_path / "data") == tmp_path / "data"
    assert server.asked == []


def test_the_md5_may_be_in_capitals(server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path / "file.zip", MD5.upper()).read_bytes() == BODY
    assert fetch(server, tmp_path / "file.zip", MD5.upper()).read_bytes() == BODY


@pytest.mark.parametrize("dest", ["loop/file.zip", "folder.zip/", "a" * 300 + ".zip", "file/x.zip"])
def test_places_that_cannot_be(server: Server, tmp_path: Path, dest: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder.zip" / "tiny-imagenet-200.zip").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(TidaliError, match="; fix that and run the same command again"):
        fetch(server, f"{tmp_path}/{dest}")
    assert server.asked == []


def test_two_dropped_connections_are_taken_up_where_they_broke(server: Server, tmp_path: Path) -> None:
    server.drops = [300_000, 200_000]
    path = fetch(server, tmp_path / "file.zip")
    assert path.read_bytes() == BODY
    assert server.asked == [None, "bytes=300000-", "bytes=500000-"]
    assert names(tmp_path) == ["file.zip"]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.drops, server.ranges = [300_000], False
    assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY


def test_an_interrupted_download_goes_on_in_the_next_run(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(BODY[:123_456])
    assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY
    assert server.asked == ["bytes=123456-"]


def test_a_download_that_was_complete_is_only_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(BODY)
    server.errors = [416]  # what a server answers to a range behind the end
    assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY


def test_a_wrong_hash_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    with pytest.raises(TidaliError, match=f"what arrived has MD5 {MD5}, not 0000"):
        fetch(server, tmp_path / "file.zip", md5="0" * 32)
    assert names(tmp_path) == []


def test_a_damaged_part_is_found_by_the_hash(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(bytes(1000))
    with pytest.raises(TidaliError, match="what arrived has MD5"):
        fetch(server, tmp_path / "file.zip")
    assert names(tmp_path) == []
    assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY


def test_server_errors(server: Server, tmp_path: Path) -> None:
    server.errors = [503, 500]
    assert fetch(server, tmp_path / "a.zip").read_bytes() == BODY
    server.errors = [404]
    with pytest.raises(TidaliError, match="the server answers 404 Not Found; is the URL right"):
        fetch(server, tmp_path / "b.zip")
    server.errors = [503] * 9
    with pytest.raises(TidaliError, match=r"the server answers 503, 5 times .*; run the same command again"):
        fetch(server, tmp_path / "c.zip")


def test_no_server(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x.zip"
        with pytest.raises(TidaliError, match="Connection refused, 5 times"):
            download(tmp_path / "x.zip", url=url, md5=MD5, pause_s=0.01)


def test_what_is_there_already(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.zip"
    path.write_bytes(BODY)
    assert fetch(server, path) == path
    assert server.asked == []
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"MD5 is not .*choose another DEST"):
        fetch(server, path)
    assert path.read_bytes() == b"mine"


def test_other_schemes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an http or https URL"):
        download(tmp_path / "x", url="file:///etc/passwd")
