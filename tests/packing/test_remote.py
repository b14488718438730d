"""Packing to, checking and reading from an object store: a real S3 server on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.store import local_copy
from shards.verify import verify
from tidali.dataset.contract import MANIFEST_NAME
from tidali.dataset.remote import filesystem
from tidali.dataset.source import open_data, read_manifest
from tidali.errors import DatasetError, TidaliError, UsageError
from tidali.files import cache_folder

SERVER = "moto.server"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URL of an empty bucket. The server lives in this process; its address is in the environment, as for any S3 client."""
    pytest.importorskip("s3fs", reason="s3fs is not installed; pip install 'tidali[s3]'")
    server_module = pytest.importorskip("moto.server", reason="moto, the S3 server, is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        filesystem("s3://bucket")[0].mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="module")
def source(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """65 images, one of them damaged."""
    tree = make.tiny_tree()
    tree["train/n00009000/images/n00009000_7.JPEG"] = b"damaged"
    return make.zip(tree, tmp_path_factory.mktemp("source") / "tiny.zip")


@pytest.fixture(scope="module")
def local(make: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("local") / "data"
    make.pack(source, dest, shard_samples=24)
    return dest


@pytest.fixture
def packed(
    make: Any, s3: str, source: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A data set and a cache of their own for each test."""
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path / "cache"))
    url = f"{s3}/{request.node.name}/data"
    make.pack(source, url, shard_samples=24)
    return url


def objects(url: str) -> dict[str, bytes]:
    fs, root = filesystem(url)
    fs.invalidate_cache()
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def damage(url: str) -> None:
    fs, root = filesystem(url)
    data = bytearray(fs.cat_file(root))
    data[len(data) // 2] ^= 1
    fs.pipe_file(root, bytes(data))


def test_holds_the_bytes_of_a_local_pack(make: Any, packed: str, local: Path, source: Path, contents: Any) -> None:
    assert objects(packed) == contents(local)
    again = make.pack(source, packed, shard_samples=24)
    assert (again.written, len(again.kept), again.repaired) == (0, 4, ())


def test_command_line_with_workers(s3: str, source: Path, local: Path, contents: Any) -> None:
    url = f"{s3}/from-the-command"
    command = [sys.executable, "-m", "tidali", "shard", str(source), url, "--shard-samples", "24", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert objects(url) == contents(local)


def test_opens_by_way_of_the_cache(packed: str, local: Path, contents: Any) -> None:
    dataset = open_data(packed)
    assert dataset.root.parent == cache_folder()
    staged = contents(dataset.root)
    assert staged == {name: data for name, data in contents(local).items() if not name.startswith("quarantine/")}
    assert read_manifest(packed) == dataset.manifest
    before = {path: path.stat().st_mtime_ns for path in dataset.root.iterdir()}
    assert open_data(packed).root == dataset.root
    assert {path: path.stat().st_mtime_ns for path in dataset.root.iterdir()} == before, "staged once"


def test_trains_from_it(packed: str) -> None:
    """The loader's batches hold every train sample once."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    from nvidia.dali import fn, pipeline_def

    dataset = open_data(packed)

    @pipeline_def(batch_size=47, num_threads=1, device_id=None)
    def read() -> Any:
        jpg, cls = fn.readers.webdataset(
            paths=[str(path) for path in dataset.tar_paths("train")],
            index_paths=[str(path) for path in dataset.index_paths("train")],
            ext=["jpg", "cls"],
        )
        return fn.decoders.image(jpg, device="cpu"), cls

    pipe = read()
    pipe.build()
    images, labels = pipe.run()
    assert len(images) == 47
    assert sorted(chr(labels.at(n)[0]) for n in range(47)) == ["0"] * 11 + ["1"] * 12 + ["2"] * 12 + ["3"] * 12


def test_a_damaged_shard_is_caught_named_and_mended(make: Any, packed: str, source: Path, local: Path, contents: Any) -> None:
    damage(f"{packed}/train-000001.tar")
    with pytest.raises(DatasetError, match=r"data/train-000001.tar: damaged there or on the way .*; 'tidali verify s3://"):
        open_data(packed)
    with local_copy(packed) as folder:
        faults = [str(fault) for fault in verify(folder).faults]
    assert len(faults) == 1
    assert faults[0].startswith("train-000001.tar")
    assert make.pack(source, packed, shard_samples=24).repaired == ("train-000001.tar",)
    assert objects(packed) == contents(local)
    open_data(packed)


def test_verify_sees_all_of_it(packed: str) -> None:
    with local_copy(packed) as folder:
        report = verify(folder, decode=True)
    assert (report.faults, report.samples) == ((), 64)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["val-000000.tar", "val-000000.idx"])
def test_a_missing_object_is_named(packed: str, name: str) -> None:
    fs, root = filesystem(packed)
    fs.rm_file(f"{root}/{name}")
    with pytest.raises(DatasetError, match=f"{name}: missing"):
        open_data(packed)


def test_a_data_set_packed_anew_is_fetched_anew(make: Any, packed: str, source: Path) -> None:
    first = open_data(packed)
    make.pack(source, packed, shard_samples=24, seed=1, overwrite=True)
    second = open_data(packed)
    assert second.root != first.root
    assert second.manifest.settings["seed"] == 1


def test_other_plans_and_foreign_folders_are_refused(make: Any, packed: str, source: Path) -> None:
    with pytest.raises(UsageError, match="shard_samples is 24 there and 9 here"):
        make.pack(source, packed, shard_samples=9)
    fs, root = filesystem(packed)
    parent = root.rpartition("/")[0]
    fs.pipe_file(f"{parent}/mine/thesis.txt", b"mine")
    with pytest.raises(UsageError, match="not empty and no data set"):
        make.pack(source, f"s3://{parent}/mine", shard_samples=24)


def test_an_interrupted_pack_goes_on(make: Any, s3: str, source: Path, local: Path, contents: Any) -> None:
    from shards.pack import pack
    from shards.plan import PackSettings
    from shards.scan import FileSource

    def stop(done: int, total: int) -> None:
        if done >= 48:
            raise KeyboardInterrupt

    url = f"{s3}/interrupted"
    with pytest.raises(KeyboardInterrupt):
        pack(FileSource(source), url, PackSettings(shard_samples=24), workers=1, progress=stop)
    assert MANIFEST_NAME not in objects(url)
    with pytest.raises(DatasetError, match=r"no dataset\.json here"):
        open_data(url)
    report = make.pack(source, url, shard_samples=24)
    assert (len(report.kept), report.written) == (2, 2)
    assert objects(url) == contents(local)


def test_processes_that_start_together_share_one_copy(packed: str, tmp_path: Path) -> None:
    program = f"from tidali.dataset.source import open_data; print(open_data({packed!r}).root)"
    environment = {**os.environ, "TIDALI_CACHE": str(tmp_path / "shared")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    roots = {output.strip() for output, _ in ends}
    assert len(roots) == 1
    assert len(list(Path(roots.pop()).iterdir())) == 4 * 3 + 1
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_a_kind_of_url_that_needs_a_package(make: Any, source: Path) -> None:
    for url in ("gs://bucket/data", "nonsense://x/y"):
        with pytest.raises(TidaliError, match=url.partition(":")[0]):
            make.pack(source, url)


def test_no_bucket(s3: str) -> None:
    with pytest.raises(TidaliError, match=r"s3://nowhere/data"):
        open_data("s3://nowhere/data")
