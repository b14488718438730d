"""A run that is killed, stopped, starved or disturbed: the next one ends with the bytes of an unbroken run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.record import seal, unseal
from shards.store import LocalStore, local_copy, open_store
from shards.verify import verify
from tidali.dataset.contract import MANIFEST_NAME
from tidali.errors import TidaliError, UsageError

SHARDS = 26
KILLS = int(os.environ.get("TIDALI_KILLS", "20"))  # 100 by hand

# Waits for a line before it packs, so that the moments of the kills fall into the packing, not into imports.
PACKER = """
import sys
from pathlib import Path
from shards.pack import pack
from shards.plan import PackSettings
from shards.scan import FileSource

if __name__ == "__main__":
    source, dest, workers = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    pack(FileSource(Path(source)), Path(dest), PackSettings(shard_samples=8), workers=int(workers))
    print("done", flush=True)
"""


class Packer:
    """A packer in a process of its own."""

    def __init__(self, script: Path, source: Path, dest: Path, workers: int, tag: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(source), str(dest), str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TIDALI_TEST_TAG": tag},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> str:
        """Wait; what it wrote to standard error."""
        _, errors = self.process.communicate(timeout=60)
        return errors


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "packer.py"
    path.write_text(PACKER)
    return path


@pytest.fixture(scope="module")
def source(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """205 images, one of them damaged: 26 shards of 8."""
    tree = make.tiny_tree(classes=4, train=40, val=10, test=5)
    tree["train/n00009000/images/n00009000_7.JPEG"] = b"damaged"
    return make.zip(tree, tmp_path_factory.mktemp("source") / "tiny.zip")


@pytest.fixture(scope="module")
def unbroken_folder(make: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("unbroken") / "data"
    make.pack(source, dest, shard_samples=8)
    return dest


@pytest.fixture(scope="module")
def unbroken(unbroken_folder: Path, contents: Any) -> dict[str, bytes]:
    return contents(unbroken_folder)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(
    make: Any, script: Path, source: Path, unbroken: dict[str, bytes], tmp_path: Path, contents: Any, workers: int
) -> None:
    rng = random.Random(workers)
    probe = Packer(script, source, tmp_path / "probe", workers)
    begun = time.perf_counter()
    probe.go()
    assert probe.end() == ""
    packing_s = time.perf_counter() - begun
    finished, dest = 0, tmp_path / "data"
    for kill in range(KILLS // 2):
        if rng.random() < 0.5:  # half of the kills hit a folder that an earlier one left
            dest = tmp_path / f"data{kill}"
        packer = Packer(script, source, dest, workers)
        packer.go()
        time.sleep(rng.random() * packing_s)
        packer.process.kill()
        packer.end()
        if (dest / MANIFEST_NAME).exists():
            finished += 1
        elif dest.exists() and os.listdir(dest):
            assert {p.suffix for p in dest.iterdir()} <= {".tar", ".idx", ".json", ".part", ""}
        if rng.random() < 0.3:
            continue  # killed again before anyone repairs it
        make.pack(source, dest, shard_samples=8)
        assert contents(dest) == unbroken
    make.pack(source, dest, shard_samples=8)
    assert contents(dest) == unbroken
    assert finished < KILLS // 2, "no kill came before the end: the moments are badly chosen"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_packer(script: Path, source: Path, tmp_path: Path, how: signal.Signals) -> None:
    """No orphan goes on writing, or waits for work for ever."""
    tag = uuid.uuid4().hex
    packer = Packer(script, source, tmp_path / "data", 2, tag)
    packer.go()
    assert wait_for(lambda: len(tagged(tag)) >= 3), "the packer's workers did not start"
    packer.process.send_signal(how)
    packer.end()
    assert wait_for(lambda: not tagged(tag)), f"left running: {tagged(tag)}"


def tagged(tag: str) -> list[int]:
    """Processes that inherited the tag, without those that ended and wait for their parent."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if tag.encode() in readable(path)]


def readable(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def wait_for(condition: Callable[[], bool], limit_s: float = 20) -> bool:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_ctrl_c_leaves_what_a_kill_leaves(
    make: Any, source: Path, unbroken: dict[str, bytes], tmp_path: Path, contents: Any
) -> None:
    class Stopped(KeyboardInterrupt):
        pass

    from shards.pack import pack
    from shards.plan import PackSettings
    from shards.scan import FileSource

    def stop(done: int, total: int) -> None:
        if done > 50:
            raise Stopped

    for workers in (1, 2):
        dest = tmp_path / f"data{workers}"
        with pytest.raises(Stopped):
            pack(FileSource(source), dest, PackSettings(shard_samples=8), workers=workers, progress=stop)
        assert not (dest / MANIFEST_NAME).exists()
        report = make.pack(source, dest, shard_samples=8)
        assert len(report.kept) >= 7
        assert report.written > 0
        assert report.repaired == ()
        assert contents(dest) == unbroken


@pytest.fixture
def packed(unbroken_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(unbroken_folder, tmp_path / "data"))


def test_a_second_run_writes_nothing(make: Any, source: Path, packed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in packed.rglob("*") if path.is_file()}
    report = make.pack(source, packed, shard_samples=8)
    assert (report.written, len(report.kept), report.repaired, report.removed) == (0, SHARDS, (), ())
    assert {path: path.stat().st_mtime_ns for path in packed.rglob("*") if path.is_file()} == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(one: Path, two: Path) -> None:
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


# damage -> (how it is done, which shards are written anew)
DAMAGES: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "flipped bit in a tar": (lambda d: flip(d / "train-000003.tar"), {"train-000003.tar"}),
    "truncated tar": (lambda d: os.truncate(d / "val-000001.tar", 700), {"val-000001.tar"}),
    "missing tar": (lambda d: (d / "train-000000.tar").unlink(), {"train-000000.tar"}),
    "flipped bit in an index": (lambda d: flip(d / "train-000002.idx"), {"train-000002.tar"}),
    "missing index": (lambda d: (d / "train-000002.idx").unlink(), {"train-000002.tar"}),
    "empty index": (lambda d: (d / "train-000002.idx").write_bytes(b""), {"train-000002.tar"}),
    "flipped bit in a record": (lambda d: flip(d / "train-000001.json"), {"train-000001.tar"}),
    "space in a record": (lambda d: append(d / "train-000001.json", b" "), {"train-000001.tar"}),
    "two shards swapped": (
        lambda d: [swap(d / f"train-000004.{e}", d / f"train-000005.{e}") for e in ("tar", "idx", "json")],
        {"train-000004.tar", "train-000005.tar"},
    ),
    "quarantined file gone": (lambda d: next((d / "quarantine").iterdir()).unlink(), {"train-000005.tar"}),
    "edited manifest": (lambda d: edit_manifest(d), set()),
}


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def edit_manifest(root: Path) -> None:
    path = root / MANIFEST_NAME
    document = json.loads(path.read_text())
    document["mean"][0] = 0.5
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("name", DAMAGES)
def test_repairs(make: Any, source: Path, packed: Path, unbroken: dict[str, bytes], contents: Any, name: str) -> None:
    damage, redone = DAMAGES[name]
    damage(packed)
    assert contents(packed) != unbroken
    report = make.pack(source, packed, shard_samples=8)
    assert contents(packed) == unbroken
    assert report.written == 0
    assert set(report.repaired) == redone
    assert len(report.kept) == SHARDS - len(report.repaired)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("outside", ["{folder}/mine.txt", "../mine.txt", "quarantine/../../mine.txt"])
def test_a_record_that_names_a_file_outside(
    make: Any,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Any,
    unbroken: Any,
    outside: str,
    local: bool,
) -> None:
    """A record comes from the store, which others may write to: what it names is neither read nor removed outside."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    dest = tmp_path / "data" if local else f"memory://{tmp_path.name}/data"
    make.pack(source, dest, shard_samples=8)
    store, name = open_store(dest), "train-000005.json"
    record = unseal(store.read(name) or b"")
    del record["checksum"]
    record["quarantined"][0] |= {
        "file": outside.format(folder=tmp_path),
        "sha256": hashlib.sha256(mine.read_bytes()).hexdigest(),
    }
    store.publish(name, seal(record))
    report = make.pack(source, dest, shard_samples=8)
    assert mine.read_text() == "mine"
    assert report.repaired == ("train-000005.tar",)
    with local_copy(str(dest)) as folder:
        assert contents(folder) == unbroken


def test_verify_reads_no_file_that_a_record_names_outside(packed: Path) -> None:
    (packed.parent / "mine.txt").write_text("mine")
    path = packed / "train-000005.json"
    record = unseal(path.read_bytes())
    del record["checksum"]
    record["quarantined"][0]["file"] = "../mine.txt"
    path.write_bytes(seal(record))
    faults = {fault.file: str(fault) for fault in verify(packed).faults}
    assert "../mine.txt" not in faults
    assert path.name in faults


def test_shards_without_manifest_or_plan_are_not_ours(make: Any, source: Path, packed: Path, contents: Any) -> None:
    (packed / MANIFEST_NAME).unlink()
    before = contents(packed)
    with pytest.raises(UsageError, match="not empty and no data set"):
        make.pack(source, packed, shard_samples=8)
    assert contents(packed) == before


def test_left_over_shards_are_removed_and_named(make: Any, source: Path, packed: Path, unbroken: Any, contents: Any) -> None:
    (packed / "train-000099.tar").write_bytes(b"x")
    (packed / "train-000001.tar.4711.part").write_bytes(b"x")
    (packed / ".train-000001.tar.another-machine.12.4711.part").write_bytes(b"x")
    (packed / "..tidali-plan.json.another-machine.12.4711.part").write_bytes(b"x")
    (packed / "quarantine" / "train-x.bin").write_bytes(b"x")
    (packed / "notes.txt").write_bytes(b"mine")
    report = make.pack(source, packed, shard_samples=8)
    assert report.removed == ("train-000099.tar",)
    assert contents(packed) == {**unbroken, "notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1, "shard_samples": 8}, "other settings: seed is 0 there and 1 here"),
        ({"shard_samples": 9}, "other settings: shard_samples is 8 there and 9 here"),
        ({"shard_samples": 8, "size_px": 32}, "other settings: size_px is null there and 32 here"),
    ],
)
def test_other_settings_are_refused_and_named(
    make: Any, source: Path, packed: Path, contents: Any, unbroken: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"{message}.*--overwrite"):
        make.pack(source, packed, **settings)
    assert contents(packed) == unbroken


def test_another_source_is_refused_and_overwrite_replaces(
    make: Any, source: Path, packed: Path, tmp_path: Path, contents: Any, unbroken: Any
) -> None:
    (tmp_path / "other").mkdir()
    other = make.zip(make.tiny_tree(classes=2, train=5, val=1, test=0), tmp_path / "other" / "tiny.zip")
    with pytest.raises(UsageError, match="another source: images is 205 there and 12 here"):
        make.pack(other, packed, shard_samples=8)
    assert contents(packed) == unbroken
    report = make.pack(other, packed, shard_samples=8, overwrite=True)
    assert (report.written, report.kept, report.repaired) == (len(list(packed.glob("*.tar"))), (), ())
    make.pack(other, tmp_path / "fresh", shard_samples=8)
    assert contents(packed) == contents(tmp_path / "fresh")


def test_an_unfinished_run_of_another_plan_is_refused(make: Any, source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "data"
    with pytest.raises(RuntimeError):
        stop_after_first(source, dest)
    with pytest.raises(UsageError, match="other settings: seed is 0 there and 5 here"):
        make.pack(source, dest, shard_samples=8, seed=5)
    assert len(make.pack(source, dest, shard_samples=8).kept) == 1


def test_overwrite_stopped_half_way_mixes_nothing(make: Any, source: Path, packed: Path, tmp_path: Path, contents: Any) -> None:
    """Keys and labels of the two packs are the same, their bytes are not: shards of the old one must not be kept."""
    with pytest.raises(RuntimeError):
        stop_after_first(source, packed, size_px=24, overwrite=True)
    assert not (packed / MANIFEST_NAME).exists()
    report = make.pack(source, packed, shard_samples=8, size_px=24)
    assert len(report.kept) == 1
    make.pack(source, tmp_path / "fresh", shard_samples=8, size_px=24)
    assert contents(packed) == contents(tmp_path / "fresh")


def stop_after_first(source: Path, dest: Path, *, size_px: int | None = None, overwrite: bool = False) -> None:
    from shards.pack import pack
    from shards.plan import PackSettings
    from shards.scan import FileSource

    def stop(done: int, total: int) -> None:
        if done:
            raise RuntimeError("stopped by the test")

    settings = PackSettings(shard_samples=8, size_px=size_px)
    pack(FileSource(source), dest, settings, workers=1, progress=stop, overwrite=overwrite)


def test_a_damaged_manifest_is_refused_without_overwrite(
    make: Any, source: Path, packed: Path, unbroken: Any, contents: Any
) -> None:
    (packed / MANIFEST_NAME).write_text("{")
    with pytest.raises(UsageError, match=r"dataset\.json is damaged"):
        make.pack(source, packed, shard_samples=8)
    report = make.pack(source, packed, shard_samples=8, overwrite=True)
    assert len(report.kept) == SHARDS
    assert contents(packed) == unbroken


def test_two_packers_on_one_dest(make: Any, source: Path, tmp_path: Path) -> None:
    with LocalStore(tmp_path / "data").locked(), pytest.raises(TidaliError, match=rf"{tmp_path}/data: another tidali"):
        make.pack(source, tmp_path / "data")
    make.pack(source, tmp_path / "data")


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(script: Path, make: Any, source: Path, tmp_path: Path, unbroken: Any, contents: Any, workers: int) -> None:
    """A limit on file sizes stands for it: writing fails in the middle of a shard."""
    limit = (20_000, 20_000)  # bytes; a shard of eight takes 28,000
    limited = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += f"resource.setrlimit(resource.RLIMIT_FSIZE, {limit})\n"
    script = script.with_name("limited.py")
    script.write_text(limited + PACKER)
    packer = Packer(script, source, tmp_path / "data", workers)
    packer.go()
    last_line = packer.end().strip().splitlines()[-1]
    assert "TidaliError" in last_line
    assert "File too large; fix that and run the same command again" in last_line
    assert not (tmp_path / "data" / MANIFEST_NAME).exists()
    assert not list((tmp_path / "data").glob("*.part"))
    make.pack(source, tmp_path / "data", shard_samples=8)
    assert contents(tmp_path / "data") == unbroken


def test_a_killed_worker_fails_the_run_in_one_line(script: Path, make: Any, source: Path, tmp_path: Path) -> None:
    tag = uuid.uuid4().hex
    packer = Packer(script, source, tmp_path / "data", 2, tag)
    packer.go()
    assert wait_for(lambda: len(tagged(tag)) >= 4), "the packer's workers did not start"
    os.kill(max(tagged(tag)), signal.SIGKILL)
    last_line = packer.end().strip().splitlines()[-1]
    assert "a worker process died (killed, or out of memory); run the same command again" in last_line
    assert len(make.pack(source, tmp_path / "data", shard_samples=8).manifest.splits) == 3


@pytest.fixture(autouse=True)
def _no_zombies() -> Iterator[None]:
    yield
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                return
        except ChildProcessError:
            return
