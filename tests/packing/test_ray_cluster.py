"""Packing on a Ray cluster of two nodes: the bytes of the local executor, also when a node is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards import pack as pack_module
from shards.plan import PackSettings
from shards.scan import FileSource
from tidali.errors import TidaliError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The head node makes no shards."""
    pytest.importorskip("ray", reason="Ray is not installed; pip install 'tidali[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def test_a_node_lost_in_the_middle_changes_nothing(cluster: Any, make: Any, tmp_path: Path, contents: Any) -> None:
    source = make.zip(make.tiny_tree(train=30), tmp_path / "tiny.zip")
    make.pack(source, tmp_path / "local", shard_samples=8)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    lost: list[Any] = []

    def lose_one(done: int, total: int) -> None:
        if not lost and done < total:
            lost.append(nodes[0])
            cluster.remove_node(nodes[0], allow_graceful=False)

    settings = PackSettings(shard_samples=8)
    report = pack_module.pack(FileSource(source), tmp_path / "data", settings, executor="ray", progress=lose_one)
    assert lost
    assert report.written == 18
    assert contents(tmp_path / "data") == contents(tmp_path / "local")


def test_a_folder_that_the_machines_do_not_share(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the last shard's worker had its own: it wrote, and nothing is here."""
    source = make.zip(make.tiny_tree(), tmp_path / "tiny.zip")
    run_tasks = pack_module.run_tasks

    def elsewhere(job: Any, tasks: Any, **options: Any) -> Iterator[Any]:
        yield from run_tasks(job, tasks, **options)
        for path in (tmp_path / "data").glob("val*"):
            path.unlink()

    monkeypatch.setattr(pack_module, "run_tasks", elsewhere)
    with pytest.raises(TidaliError, match=r"val-000000\.\w+ and 2 more were written on other machines.* or a URL"):
        make.pack(source, tmp_path / "data", shard_samples=24)
    assert not (tmp_path / "data" / "dataset.json").exists()
