"""A data set behind a URL that is larger than TIDALI_CACHE_LIMIT. The URL is fsspec's memory."""

from __future__ import annotations

import fcntl
import io
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tidali.config import Augment, Preprocess, TrainSettings
from tidali.dataset import fetch as fetch_module
from tidali.dataset import limited_copy as copy_module
from tidali.dataset.contract import Dataset, open_dataset
from tidali.dataset.fetch import Unreachable
from tidali.dataset.limited_copy import Needs
from tidali.dataset.remote import filesystem
from tidali.dataset.source import open_data
from tidali.errors import DataLost, DatasetError, TidaliError, UsageError
from tidali.files import cache_limit_bytes
from tidali.hardware.ranks import Ranks
from tidali.loading import window as window_module
from tidali.loading.batches import Batches, Training
from tidali.loading.data import Data
from tidali.recipes import make_recipe
from tidali.training.run import train

URL = "memory://limited/data"
SHARD_SAMPLES = 8


@pytest.fixture(scope="module")
def whole(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """160 train samples in 20 shards, in a folder and behind the URL."""
    folder = tmp_path_factory.mktemp("limited")
    source = make.zip(make.tiny_tree(train=40, val=2), folder / "tiny.zip")
    make.pack(source, folder / "data", shard_samples=SHARD_SAMPLES)
    make.pack(source, URL, shard_samples=SHARD_SAMPLES)
    dataset = open_dataset(folder / "data")
    assert len(dataset.split("train").shards) == 20
    return dataset


@pytest.fixture
def limit_bytes(whole: Dataset) -> int:
    """Half of what a copy of everything takes on a disk."""
    return taken_bytes(whole.root) // 2


@pytest.fixture
def limited(whole: Dataset, limit_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIDALI_CACHE_LIMIT", str(limit_bytes))
    dataset = open_data(URL)
    assert dataset.copy is not None
    return dataset


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was fetched."""
    counts: Counter[str] = Counter()
    fetch = fetch_module.fetch

    def counted(url: str, name: str, *rest: Any) -> None:
        fetch(url, name, *rest)
        counts[name] += 1

    monkeypatch.setattr(copy_module, "fetch", counted)
    return counts


def taken_bytes(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # dropped, or given its name, in between
            total += 512 * path.stat().st_blocks
    return total


def tars(dataset: Dataset) -> set[str]:
    return {path.name for path in dataset.root.glob("*.tar")}


# -------------------------------------------------------------------------------------------------------------------- the copy


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("20GB", 20 * 10**9), ("18.5 GiB", 37 * 2**29), ("123", 123), ("4k", 4000), ("1TiB", 2**40), ("", None)],
)
def test_a_limit_is_bytes(text: str, size_bytes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDALI_CACHE_LIMIT", text)
    assert cache_limit_bytes() == size_bytes


@pytest.mark.parametrize("text", ["much", "-3", "20 apples", "3i", "1e9", "GB"])
def test_a_limit_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDALI_CACHE_LIMIT", text)
    with pytest.raises(UsageError, match=r"TIDALI_CACHE_LIMIT=.*18\.6GiB"):
        cache_limit_bytes()


def test_what_fits_is_copied_whole(whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any) -> None:
    names = [name for split in whole.manifest.splits.values() for shard in split.shards for name, _, _ in shard.files]
    size_bytes = sum((whole.root / name).stat().st_size for name in names)
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path))
    monkeypatch.setenv("TIDALI_CACHE_LIMIT", str(size_bytes))
    fits = open_data(URL)
    assert fits.copy is None
    assert contents(fits.root) == {name: data for name, data in contents(whole.root).items() if "quarantine" not in name}
    monkeypatch.setenv("TIDALI_CACHE_LIMIT", str(size_bytes - 1))
    assert open_data(URL).copy is not None


def test_a_shard_in_use_stays_and_others_make_room(
    whole: Dataset, limited: Dataset, limit_bytes: int, fetched: Counter[str], contents: Any
) -> None:
    copy, (first, *rest) = limited.copy, limited.split("train").shards
    assert copy is not None
    held = copy.hold(first)
    for shard in rest:
        os.close(copy.hold(shard))
        assert taken_bytes(limited.root) <= limit_bytes
    assert first.name in tars(limited)
    assert 2 < len(tars(limited)) < 20
    assert set(fetched.values()) == {1}
    for name in tars(limited):
        assert (limited.root / name).read_bytes() == (whole.root / name).read_bytes()
    os.close(held)
    for shard in rest:
        os.close(copy.hold(shard))
    assert first.name not in tars(limited)


def test_what_is_needed_next_is_fetched_and_what_is_needed_last_is_dropped(
    limited: Dataset, fetched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_module, "PARALLEL_FETCHES", 1)  # of several, the last ones find room in any order
    copy, shards = limited.copy, limited.split("train").shards[::-1]
    assert copy is not None
    os.close(copy.hold(shards[1]))
    copy.expect("train", Needs(shards, first_needed=2, first_kept=1))
    while copy._fetching:
        for thread in threading.enumerate():
            if thread.name == "tidali-fetch":
                thread.join()
    order = [shard.name for shard in shards]
    here = sorted(fetched, key=order.index)
    assert here[:-1] == order[1 : len(here)]  # for the last one there may be room where a larger one before it has none
    assert len(here) > 5
    os.close(copy.hold(shards[-1]))  # has to be had at once: the last of those ahead make room
    left = tars(limited) - {order[-1]}
    assert len(tars(limited)) == len(left) + 1
    assert left == set(here[: len(left)])
    assert len(here) - 2 <= len(left) < len(here)
    assert set(fetched.values()) == {1}


def test_a_killed_process_leaves_what_the_next_one_clears(limited: Dataset) -> None:
    shard, other, *_ = limited.split("train").shards
    dead, alive = (limited.root / f".{one.name}.part" for one in (shard, other))
    (limited.root / ".train-000003.json.host.1.2.part").write_bytes(b"half")
    dead.write_bytes(b"half of it")
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process fetches this one
        again = open_data(URL)
        assert [path.name for path in again.root.glob(".*")] == [alive.name]
        assert again.copy is not None
        dead.write_bytes(b"killed since")
        os.close(again.copy.hold(shard))
    assert not dead.exists()
    os.close(again.copy.hold(other))
    assert not list(again.root.glob(".*"))


def broken(monkeypatch: pytest.MonkeyPatch, errors: Iterator[Exception | None]) -> list[float]:
    """Make the store raise these errors, one a request. Returns the pauses that were made instead of being waited for."""
    pauses: list[float] = []

    def failing(url: str) -> tuple[Any, str]:
        error = next(errors)
        if error is not None:
            raise error
        return filesystem(url)

    monkeypatch.setattr(fetch_module, "filesystem", failing)
    monkeypatch.setattr(fetch_module.time, "sleep", pauses.append)
    return pauses


def test_a_store_that_comes_back(limited: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert limited.copy is not None
    limited.copy.on_failure = said.append
    shard = limited.split("train").shards[0]
    pauses = broken(monkeypatch, iter([ConnectionError("refused"), TimeoutError("slow"), None]))
    os.close(limited.copy.hold(shard))
    assert pauses == [1, 2]
    assert said == [f"{URL}/{shard.name}: ConnectionError: refused; trying again for 120 s"]


def test_a_store_that_is_gone(limited: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def for_ever() -> Iterator[Exception]:
        while True:
            yield ConnectionError("refused\nby 10.0.0.1")

    pauses = broken(monkeypatch, for_ever())
    assert limited.copy is not None
    with pytest.raises(TidaliError, match=r"tar: ConnectionError: refused; tried 12 times in 120 s$"):
        limited.copy.hold(limited.split("train").shards[0])
    assert sum(pauses) == 120
    assert not list(limited.root.glob(".*"))


def test_what_another_attempt_would_not_change(limited: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = broken(monkeypatch, iter([PermissionError("Forbidden"), FileNotFoundError()]))
    assert limited.copy is not None
    shard = limited.split("train").shards[0]
    with pytest.raises(TidaliError, match="Forbidden"):
        limited.copy.hold(shard)
    with pytest.raises(DatasetError, match="missing; 'tidali verify memory://"):
        limited.copy.hold(shard)
    assert pauses == []


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        (404, DatasetError, r"x\.tar: missing; 'tidali verify "),
        (403, TidaliError, r"x\.tar: .*403"),
        (503, Unreachable, r"x\.tar: .*503"),
        (None, Unreachable, r"x\.tar: ClientConnectorError: "),
    ],
)
def test_what_an_http_server_answers(status: int | None, error: type[Exception], text: str) -> None:
    """fsspec has one exception for all of these. None: nobody listens."""
    pytest.importorskip("aiohttp", reason="aiohttp, with which fsspec speaks HTTP, is not installed")

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status or 500)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        url = f"http://127.0.0.1:{server.server_port}/set"
        if status is None:
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(error, match=text) as raised:
            fetch_module.fetch(url, "x.tar", "", io.BytesIO())
        assert type(raised.value) is error
        if status is not None:
            server.shutdown()


def test_a_damaged_shard_is_fetched_twice_and_named(limited: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, root = filesystem(URL)
    shard = limited.split("train").shards[0]
    good = fs.cat_file(f"{root}/{shard.name}")
    answers = [b"damaged", good, b"damaged", b"damaged"]
    monkeypatch.setattr(fetch_module, "_blocks", lambda url, name: iter([answers.pop(0)]))
    assert limited.copy is not None
    os.close(limited.copy.hold(shard))
    assert (limited.root / shard.name).read_bytes() == good
    (limited.root / shard.name).unlink()
    with pytest.raises(DatasetError, match=f"{shard.name}: damaged there or on the way"):
        limited.copy.hold(shard)
    assert shard.name not in tars(limited)


def test_a_full_disk_is_not_the_stores_fault(limited: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copy_module.os, "fsync", full)
    assert limited.copy is not None
    with pytest.raises(TidaliError, match=r"No space left on device; TIDALI_CACHE names another folder"):
        limited.copy.hold(limited.split("train").shards[0])


# ------------------------------------------------------------------------------------------------------------------ the batches


def loader(dataset: Dataset, batch_size: int, rank: int = 0, ranks: int = 1) -> Batches:
    return Data(dataset, torch.device("cpu"), cache="off", ranks=Ranks(rank=rank, world_size=ranks)).batches(
        "train",
        Preprocess(res=8, mean=(0.0,) * 3, std=(1.0,) * 3),
        batch_size,
        training=Training(augment=Augment(flip="random"), seed=3),
    )


def images(batches: Batches) -> list[torch.Tensor]:
    return [torch.cat([image.flatten(1), label[:, None]], 1) for image, label in batches]


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that half of the data set holds it."""
    monkeypatch.setattr(window_module, "WINDOW_SAMPLES", 1)
    monkeypatch.setattr(window_module, "WINDOW_SHARDS", 3)


def test_two_epochs_on_two_ranks_read_every_sample_once(
    limited: Dataset, limit_bytes: int, fetched: Counter[str], small_window: None
) -> None:
    """Which, is asked of the source's requests; the pixels and labels are compared below."""
    ranks = [loader(open_data(URL), 2, rank, 2) for rank in range(2)]  # each with locks of its own, as processes have
    assert ranks[0].shuffle is not None
    assert ranks[0].shuffle.window == 3
    for _ in range(2):
        for _ in zip(*ranks, strict=True):  # in step, as ranks are that add up their gradients
            assert taken_bytes(limited.root) <= limit_bytes
    counts = [count for name, count in fetched.items() if name.startswith("train") and name.endswith(".tar")]
    assert len(counts) == 20
    assert sum(counts) <= 2 * 20 + len(tars(limited))  # once an epoch, and ahead for the third one
    orders = [ranks[0]._epoch_order(epoch) for epoch in range(2)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(160))
    assert not torch.equal(*orders)


def test_batches_are_those_of_the_whole_data_set_in_the_same_order(
    whole: Dataset, limited: Dataset, small_window: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = loader(limited, 4)
    first = images(here)
    state = here.state_dict()
    assert state["order"]["window"] == 3
    monkeypatch.delenv("TIDALI_CACHE_LIMIT")
    there = loader(whole, 4)
    assert "window" not in there.state_dict()["order"]
    everything = torch.cat(images(there))
    assert len(everything) == 160
    torch.testing.assert_close(torch.cat(first).sum(0), everything.sum(0))  # the same images, added up in another order
    there.load_state_dict({**state, "epoch": 0, "step": 0})
    assert all(map(torch.equal, images(there), first))
    here.load_state_dict({**state, "epoch": 0, "step": 7})
    assert all(map(torch.equal, images(here), first[7:]))
    halves = [loader(limited, 2, rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict({**state, "epoch": 0, "step": 13})
    for pair, both in zip(zip(*map(images, halves), strict=True), first[13:], strict=True):
        assert torch.equal(torch.cat(pair), both)


def test_a_batch_that_is_abandoned_holds_nothing(limited: Dataset, small_window: None) -> None:
    batches = loader(limited, 4)
    next(iter(batches))
    del batches
    assert limited.copy is not None
    for shard in limited.split("train").shards * 2:
        os.close(limited.copy.hold(shard))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (None, "this run began with the whole data set on the disk; unset it"),
        (8, "this run began with a window of 8 shards; set it to {} bytes or more"),
    ],
)
def test_a_window_that_the_limit_does_not_hold_is_refused(
    limited: Dataset, small_window: None, saved: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = loader(limited, 4)
    state = batches.state_dict()
    state["order"]["window"] = saved
    assert batches.shuffle is not None
    assert batches.shuffle.room is not None
    needed = batches.shuffle.room.least_bytes(saved or 1)
    with pytest.raises(UsageError, match=message.format(needed)):
        batches.load_state_dict(state)
    if saved is not None:  # the advice works
        monkeypatch.setenv("TIDALI_CACHE_LIMIT", str(needed))
        larger = loader(open_data(URL), 4)
        larger.load_state_dict(state)
        assert larger.shuffle is not None
        assert larger.shuffle.window == saved


def test_a_limit_below_one_batch_says_what_is_needed(
    limited: Dataset, small_window: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDALI_CACHE_LIMIT", str(limited.copy.limit_bytes // 4))  # type: ignore[union-attr]
    with pytest.raises(
        UsageError, match=r"TIDALI_CACHE_LIMIT is \d+ bytes, and 'train' of memory://.* needs at least \d+;"
    ) as e:
        loader(open_data(URL), 4)
    needed = str(e.value).partition("at least ")[2].partition(";")[0]
    monkeypatch.setenv("TIDALI_CACHE_LIMIT", needed)
    least = loader(open_data(URL), 4)
    assert least.shuffle is not None
    assert least.shuffle.window == 1
    assert sum(len(batch) for batch in images(least)) == 160


# ----------------------------------------------------------------------------------------------------------------- training


def test_a_run_whose_store_is_gone_is_saved_and_goes_on_from_a_whole_copy(
    limit_bytes: int, small_window: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the weights, to the bit, of a run that was left alone."""

    def small(arch: str, num_classes: int, stem: str, *, stem_bias: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4))

    monkeypatch.setattr("tidali.training.setup.build_resnet", small)  # what a run reads does not depend on the network
    monkeypatch.setenv("TIDALI_CACHE_LIMIT", str(5 * limit_bytes // 4))
    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path / "cache"))
    settings = TrainSettings(
        data=URL,
        out=str(tmp_path / "alone"),
        res=32,
        recipe=make_recipe("modern", epochs=2, batch_size=8),
        device="cpu",
        cache="off",
        deterministic=True,
    )
    train(settings, open_data(URL))
    requests = count()

    def gone_after_a_while() -> Iterator[Exception | None]:
        while True:
            yield None if next(requests) < 40 else ConnectionError("refused")

    cut = replace(settings, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setenv("TIDALI_CACHE", str(tmp_path / "another cache"))
        dataset = open_data(URL)
        broken(patch, gone_after_a_while())
        with pytest.raises(
            DataLost, match=rf"ConnectionError: refused; .*step \d+; resume with 'tidali train --resume {cut.out}'"
        ):
            train(cut, dataset)
    monkeypatch.delenv("TIDALI_CACHE_LIMIT")
    whole = open_data(URL)
    assert whole.copy is None
    train(cut, whole, resume=True)
    alone, resumed = (load_file(tmp_path / name / "last.safetensors") for name in ("alone", "cut"))
    assert all(torch.equal(alone[name], resumed[name]) for name in alone)


def test_machines_with_different_limits_have_one_order(
    whole: Dataset, limited: Dataset, small_window: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has room for a window of two shards."""
    monkeypatch.setattr(Ranks, "gather", lambda ranks, value: [value, 2])
    loaders = [loader(dataset, 4) for dataset in (whole, limited)]
    assert [batches.shuffle.window for batches in loaders if batches.shuffle is not None] == [2, 2]
    assert torch.equal(*(batches._epoch_order(0) for batches in loaders))
