"""Corrupt samples: missing from their batches, named once, counted; on both routes, on several ranks, whoever decodes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.images import Inspected
from tidali.config import Augment, CacheChoice, Preprocess
from tidali.dataset.contract import Dataset, open_dataset
from tidali.errors import DatasetError, TidaliError
from tidali.hardware.ranks import Ranks
from tidali.images.read import read_picture
from tidali.loading import dali as dali_module
from tidali.loading.batches import Batches, Training
from tidali.loading.corrupt import CorruptSamples
from tidali.loading.data import Data
from tidali.loading.order import epoch_order
from tidali.loading.samples import SampleTable
from tidali.loading.thread_decoder import ThreadDecoder

CPU = torch.device("cpu")
RES = 48
ROUTES = pytest.mark.parametrize("cache", ["device", "off"])
KINDS = pytest.mark.parametrize("kind", ["demo", "photographs"])


@pytest.fixture
def folder(kind: str, demo_data: Path, photographs: Dataset, tmp_path: Path) -> Path:
    """A copy to damage: images of one size, which threads decode, or of unequal size, which DALI decodes."""
    return Path(shutil.copytree(photographs.root if kind == "photographs" else demo_data, tmp_path / "copy"))


def open_data(folder: Path, cache: CacheChoice, max_bad: int | None = 4, *, rank: int = 0, world_size: int = 1) -> Data:
    return Data(open_dataset(folder), CPU, cache=cache, max_bad=max_bad, ranks=Ranks(rank=rank, world_size=world_size))


def batches_of(data: Data, split: str = "val", *, batch_size: int = 4, train: bool = False) -> Batches:
    return data.batches(split, Preprocess(res=RES), batch_size, training=Training(seed=3) if train else None)


def collect(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*[(images.clone(), labels) for images, labels in batches], strict=True)
    return torch.cat(images), torch.cat(labels)


def without(found: tuple[Tensor, Tensor], positions: set[int]) -> tuple[Tensor, Tensor]:
    kept = [n for n in range(len(found[1])) if n not in positions]
    return found[0][kept], found[1][kept]


def equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def named(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that name a sample."""
    return [line for line in capsys.readouterr().err.splitlines() if "corrupt" in line]


# -------------------------------------------------------------------------------------------------------------- how it is found


@ROUTES
@KINDS
def test_one_changed_byte_is_found_named_once_and_left_out(
    folder: Path, cache: CacheChoice, replace_bytes: Callable[..., str], capsys
) -> None:
    whole = collect(batches_of(open_data(folder, cache)))
    table = SampleTable(open_dataset(folder), "val")
    last = len(table) - 1
    keys = []
    for position in (0, 5, last):
        data = bytes(next(table.read(np.array([position]))) or b"")
        at = len(data) // 2  # amid the pixels: it still decodes
        keys.append(replace_bytes(folder, "val", position, at, bytes([data[at] ^ 1])))
    capsys.readouterr()
    data = open_data(folder, cache)
    batches = batches_of(data)
    for _ in range(3):
        assert equal(collect(batches), without(whole, {0, 5, last}))
    assert data.corrupt("val") == {0, 5, last}
    assert (batches.samples, batches.samples_given()) == (len(table), len(table) - 3)
    lines = named(capsys)
    assert len(lines) == 3
    for line, key in zip(lines, keys, strict=True):
        assert f"{key} " in line
        assert "val-0000" in line
        assert "offset" in line
        assert "CRC-32" in line


@ROUTES
@KINDS
def test_the_same_sample_is_left_out_of_every_training_epoch(
    folder: Path, cache: CacheChoice, replace_bytes: Callable[..., str], capsys
) -> None:
    whole = batches_of(open_data(folder, cache), "train", train=True)
    expected = [[(images.clone(), labels) for images, labels in whole] for _ in range(3)]
    replace_bytes(folder, "train", 7, 100, bytes(20))
    capsys.readouterr()
    data = open_data(folder, cache)
    batches = batches_of(data, "train", train=True)
    missing = 0
    for epoch in expected:
        got = list(batches)
        assert len(got) == len(epoch)  # steps are the same, so that ranks keep in step
        for (images, labels), (all_images, all_labels) in zip(got, epoch, strict=True):
            rows = {image.numpy().tobytes(): label for image, label in zip(all_images, all_labels.tolist(), strict=True)}
            assert [rows[image.numpy().tobytes()] for image in images] == labels.tolist()
            missing += len(all_labels) - len(labels)
    assert 2 <= missing <= 3  # in an epoch it may be among those that fill no batch
    assert len(named(capsys)) == 1
    assert data.corrupt("train") == {7}


@ROUTES
@KINDS
def test_a_sample_that_is_met_in_a_later_epoch(folder: Path, cache: CacheChoice, replace_bytes, capsys) -> None:
    """It broke while the run went on: a stream meets it then, a cache has its pixels already."""
    data = open_data(folder, cache)
    batches = batches_of(data)
    whole = collect(batches)
    replace_in_place(folder, "val", 6)
    expected = without(whole, {6}) if cache == "off" else whole
    for _ in range(2):
        assert equal(collect(batches), expected)
    assert len(named(capsys)) == (cache == "off")


def replace_in_place(folder: Path, split: str, position: int) -> None:
    """In the file that is mapped, not a new one of its name."""
    table = SampleTable(open_dataset(folder), split)
    place = table.places(np.array([position]))
    with (folder / table.shards[place.shards[0]].name).open("r+b") as file:
        file.seek((place.begins[0] + place.ends[0]) // 2)
        file.write(bytes(8))


@ROUTES
@KINDS
def test_a_truncated_tar_loses_its_last_samples_alone(folder: Path, cache: CacheChoice, capsys) -> None:
    """Cut after the data set was opened, which would have noticed."""
    dataset = open_dataset(folder)
    whole = collect(batches_of(open_data(folder, cache)))
    last = dataset.split("val").samples - 1
    table = SampleTable(dataset, "val")
    place = table.places(np.array([last]))
    data = open_data(folder, cache)
    with (folder / table.shards[place.shards[0]].name).open("r+b") as file:
        file.truncate(place.ends[0] - 10)
    assert equal(collect(batches_of(data)), without(whole, {last}))
    assert data.corrupt("val") == {last}
    assert len(named(capsys)) == 1


def test_a_tar_cut_off_under_its_reader_ends_the_process_with_a_line(demo_data: Path, tmp_path: Path) -> None:
    """Whole pages of it: to read them is no error but a signal."""
    folder = shutil.copytree(demo_data, tmp_path / "data")
    script = """if True:
        import os, sys
        from pathlib import Path
        import numpy as np
        from tidali.dataset.contract import open_dataset
        from tidali.loading.samples import SampleTable

        table = SampleTable(open_dataset(Path(sys.argv[1])), "train")
        (sample, *_) = table.read(np.array([len(table) - 1]))
        os.truncate(table.dataset.root / table.shards[-1].name, 4096)
        bytes(sample)
    """
    command = [sys.executable, "-c", script, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "tidali: a shard was cut off while it was read, or its disk failed; 'tidali verify DATA' names it\n"


@ROUTES
@KINDS
def test_bytes_that_are_as_packed_and_no_image_are_named_with_the_reason(
    folder: Path, cache: CacheChoice, replace_bytes: Callable[..., str], capsys
) -> None:
    whole = collect(batches_of(open_data(folder, cache)))
    key = replace_bytes(folder, "val", 5, 0, bytes(300), right_crc=True)
    capsys.readouterr()
    data = open_data(folder, cache)
    batches = batches_of(data)
    for _ in range(2):
        got = collect(batches)
        assert torch.equal(got[1], without(whole, {5})[1])
        # One grey level where the batch of DALI's was decoded anew by threads: CMYK.
        assert (got[0] - without(whole, {5})[0]).abs().max() <= 1 / 255 + 1e-6
    (line,) = named(capsys)
    assert f"{key} " in line
    assert "CRC" not in line
    assert data.corrupt("val") == {5}


def test_a_jpeg_that_dali_fails_on_is_found_by_threads(photographs: Dataset, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """DALI names one sample at best and loses the batch; the batches before and after it are its own."""
    whole = collect(batches_of(Data(photographs, CPU, cache="off")))
    read = SampleTable.read

    def broken(table: SampleTable, positions: NDArray[np.int64]) -> Iterator[memoryview | None]:
        for position, data in zip(positions.tolist(), read(table, positions), strict=True):
            broken_here = position in (1, 2, 17) and data is not None
            yield memoryview(bytes(data[:20]) + bytes(len(data) - 20)) if broken_here else data

    monkeypatch.setattr(SampleTable, "read", broken)
    by_threads: list[int] = []
    start = ThreadDecoder.start
    monkeypatch.setattr(ThreadDecoder, "start", lambda self, job: by_threads.append(len(job.positions)) or start(self, job))
    data = Data(photographs, CPU, cache="off", max_bad=3)
    batches = batches_of(data)
    for _ in range(2):
        got = collect(batches)
        assert torch.equal(got[1], without(whole, {1, 2, 17})[1])
        assert (got[0] - without(whole, {1, 2, 17})[0]).abs().max() <= 1 / 255 + 1e-6  # CMYK again
    assert len(named(capsys)) == 3
    assert data.corrupt("val") == {1, 2, 17}
    assert by_threads == [4, 4]  # two batches of the first epoch, none of the second


def test_dali_gets_no_bytes_of_a_wrong_crc(photographs: Dataset, tmp_path: Path, replace_bytes, monkeypatch) -> None:
    folder = Path(shutil.copytree(photographs.root, tmp_path / "copy"))
    replace_bytes(folder, "val", 5, 30, bytes(40))
    fed: list[int] = []
    feed = dali_module.DaliDecoder._feed

    def count(self: Any, encoded: Any, job: Any, sizes: Any) -> Any:
        fed.append(len(encoded))
        return feed(self, encoded, job, sizes)

    batches = batches_of(open_data(folder, "off"))
    monkeypatch.setattr(dali_module.DaliDecoder, "_feed", count)
    list(batches)
    assert sum(fed) == photographs.split("val").samples - 1


@KINDS
@pytest.mark.parametrize("damaged", [range(4, 8), range(0, 12)])
def test_a_batch_of_none_but_corrupt_samples_is_empty(
    folder: Path, kind: str, damaged: range, replace_bytes: Callable[..., str]
) -> None:
    whole = collect(batches_of(open_data(folder, "off")))
    for position in damaged:
        replace_bytes(folder, "val", position, 30, bytes(40))
    for cache in ("off", "device"):
        data = open_data(folder, cache, len(damaged))  # type: ignore[arg-type]
        batches = batches_of(data)
        for _ in range(2):
            got = [(images.clone(), labels) for images, labels in batches]
            assert [len(labels) == 0 for _, labels in got][:4] == [4 * n in damaged for n in range(4)]
            assert all(images.shape[1:] == (3, RES, RES) for images, _ in got)
            assert equal(tuple(map(torch.cat, zip(*got, strict=True))), without(whole, set(damaged)))  # type: ignore[arg-type]


@KINDS
@ROUTES
@pytest.mark.parametrize(("sound", "fails"), [(0, True), (1, True), (2, False)])
def test_training_on_a_batch_of_fewer_than_two_samples_is_one_line(
    folder: Path, cache: CacheChoice, sound: int, fails: bool, replace_bytes
) -> None:
    """Batch norm has no statistics of one sample."""
    dataset = open_dataset(folder)
    order = epoch_order(dataset.split("train").samples, 3, 0).tolist()
    for position in order[4 : 8 - sound]:  # of the second batch
        replace_bytes(folder, "train", position, 30, bytes(40))
    batches = batches_of(open_data(folder, cache), "train", train=True)
    if fails:
        with pytest.raises(TidaliError, match=rf"{sound} of a batch's 4 .*--batch-size") as refused:
            list(batches)
        assert "\n" not in str(refused.value)
    else:
        assert [len(labels) for _, labels in batches][:3] == [4, 2, 4]


# -------------------------------------------------------------------------------------------------------------------- the limit


@ROUTES
@KINDS
@pytest.mark.parametrize("max_bad", [0, 1, None])
def test_more_than_may_be_left_out_fails_in_one_line(
    folder: Path, cache: CacheChoice, max_bad: int | None, replace_bytes: Callable[..., str]
) -> None:
    for position in (1, 9):
        replace_bytes(folder, "val", position, 30, bytes(40))
    count = open_dataset(folder).split("val").samples
    limit = max_bad or 0  # 0.1 % of so few is none
    with pytest.raises(
        DatasetError, match=rf"{limit + 1} of the {count} samples of 'val'.*--max-bad is {limit}.*pack the source again"
    ) as refused:
        list(batches_of(open_data(folder, cache, max_bad)))
    assert "\n" not in str(refused.value)
    assert len(list(batches_of(open_data(folder, cache, 2)))) == -(-count // 4)


def test_a_stream_that_failed_can_be_read_again(photographs: Dataset, tmp_path: Path, replace_bytes) -> None:
    """What DALI has in hand when the limit is passed is taken, or the next batches would be of other samples."""
    folder = Path(shutil.copytree(photographs.root, tmp_path / "copy"))
    replace_bytes(folder, "val", 1, 30, bytes(40))
    batches = batches_of(open_data(folder, "off", 0))
    with pytest.raises(DatasetError):
        list(batches)
    batches.set_epoch(0)
    images = [images.clone() for images, _ in batches]  # by now it is known, and left out
    whole = collect(batches_of(Data(photographs, CPU, cache="off")))
    assert torch.equal(torch.cat(images), without(whole, {1})[0])


@pytest.mark.parametrize(("count", "max_bad", "limit"), [(5000, None, 5), (999, None, 0), (5000, 0, 0), (10, 10, 10)])
def test_the_limit_is_a_thousandth_or_what_was_asked_for(count: int, max_bad: int | None, limit: int, capsys) -> None:
    class Table:
        dataset = type("Dataset", (), {"root": Path("data"), "fix": "repair it"})
        split = "train"

        def __len__(self) -> int:
            return count

        def describe(self, position: int) -> str:
            return f"sample {position}"

    corrupt = CorruptSamples(Table(), max_bad)  # type: ignore[arg-type]
    for position in range(limit):
        corrupt.add(position, "why")
        corrupt.add(position, "again")  # no second time
    assert len(corrupt) == limit
    with pytest.raises(DatasetError, match=f"{limit + 1} of the {count}"):
        corrupt.add(limit, "one more")
    lines = named(capsys)
    assert len(lines) == limit + 1
    assert all(f"sample {number}" in line for number, line in enumerate(lines))


# ------------------------------------------------------------------------------------------------- what DALI alone fails on


@pytest.fixture
def dali_fails(pack_files: Callable[..., Dataset], encoded, smooth, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Photographs as an earlier version might have packed them: one, whole for PIL and libjpeg-turbo, has two zero bytes amid
    its header, where DALI's parser stops."""
    files = {f"{split}/{n % 2}/{n}.jpg": encoded(smooth(n, 60 + n, 70)) for split in ("train", "val") for n in range(6)}
    data = files["val/1/3.jpg"]
    at = data.index(b"\xff\xdb")
    files["val/1/3.jpg"] = data[:at] + bytes(2) + data[at:]

    def keep(data: bytes, **_: Any) -> Inspected:
        picture = read_picture(data, max_pixels=1 << 20)
        return Inspected(picture.rgb, "jpg", data, picture.flags, picture.size)

    with monkeypatch.context() as patch:
        patch.setattr("shards.write.inspect", keep)
        return pack_files(files)


def test_a_sample_that_dali_alone_fails_on_is_named_and_used(dali_fails: Dataset, capsys) -> None:
    data = Data(dali_fails, CPU, cache="off")
    batches = data.batches("val", Preprocess(res=RES), 6)
    capsys.readouterr()
    for _ in range(2):
        assert len(collect(batches)[1]) == 6
    assert not data.corrupt("val")
    lines = [line for line in capsys.readouterr().err.splitlines() if "_3 at offset" in line]
    assert len(lines) == 1
    assert "tidali verify --decode" in lines[0]


def test_verify_finds_what_dali_alone_fails_on_and_its_advice_works(dali_fails: Dataset, tidali) -> None:
    root = dali_fails.root
    done = tidali("verify", root, "--decode", "--workers", 1)
    assert done.code == 1
    (fault,) = [line for line in done.stdout.splitlines() if "sample" in line]
    assert fault.startswith("val-000000.tar: sample ")
    assert "_3 at byte" in fault
    assert "delete this file" in fault
    (root / "val-000000.tar").unlink()
    again = tidali("shard", root.parent / "source.zip", root, "--workers", 1)
    assert again.code == 0, again.stderr
    assert tidali("verify", root, "--decode", "--workers", 1).code == 0


# -------------------------------------------------------------------------------------------------------------------- two ranks


def answer(found: list[Any], *_: Any) -> list[Any]:
    """What `torch.distributed` would gather."""
    return found


@KINDS
def test_ranks_share_what_each_has_found(folder: Path, replace_bytes, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Two `Data` as two ranks."""
    whole = collect(batches_of(open_data(folder, "off")))
    for position in (0, 5, 9):
        replace_bytes(folder, "val", position, 30, bytes(40))
    ranks = [open_data(folder, "off", 3, rank=rank, world_size=2) for rank in range(2)]
    loaders = [batches_of(data, batch_size=2) for data in ranks]
    capsys.readouterr()

    def gathered() -> list[list[int]]:
        return [sorted(data.corrupt("val")) for data in ranks]

    for _ in range(2):
        parts = [[(images.clone(), labels) for images, labels in batches] for batches in loaders]
        steps = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
        assert equal(tuple(map(torch.cat, zip(*steps, strict=True))), without(whole, {0, 5, 9}))  # type: ignore[arg-type]
        found = gathered()
        assert sorted(position for positions in found for position in positions) in (
            [0, 5, 9],
            [0, 0, 5, 5, 9, 9],
        )  # each by one rank, then by both
        monkeypatch.setattr(Ranks, "gather", partial(answer, found))
        for data in ranks:
            data.share_corrupt()
        assert gathered() == [[0, 5, 9]] * 2
        left = [batches._left_out for batches in loaders]
        assert sum(left) == 3
        monkeypatch.setattr(Ranks, "gather", partial(answer, left))
        assert {batches.samples_given() for batches in loaders} == {len(whole[1]) - 3}
    assert len(named(capsys)) == 3


@pytest.mark.parametrize("kind", ["demo"])
def test_what_all_ranks_found_together_may_be_too_much(folder: Path, replace_bytes, monkeypatch) -> None:
    for position in (0, 5):
        replace_bytes(folder, "val", position, 30, bytes(40))
    ranks = [open_data(folder, "off", 1, rank=rank, world_size=2) for rank in range(2)]
    for data in ranks:
        list(batches_of(data, batch_size=4))  # each finds one, which may be left out
    found = [sorted(data.corrupt("val")) for data in ranks]
    assert sorted(found) == [[0], [5]]
    monkeypatch.setattr(Ranks, "gather", partial(answer, found))
    for data in ranks:
        with pytest.raises(DatasetError, match="2 of the 32"):
            data.share_corrupt()


@pytest.mark.parametrize("kind", ["demo"])
def test_two_ranks_with_caches_name_a_sample_once(folder: Path, replace_bytes, monkeypatch, capsys) -> None:
    replace_bytes(folder, "val", 5, 30, bytes(40))
    capsys.readouterr()
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        list(batches_of(open_data(folder, "device", rank=rank, world_size=2), batch_size=4))
    assert len(named(capsys)) == 1


# --------------------------------------------------------------------------------------------------------------------- position


@KINDS
def test_both_routes_and_a_resume_leave_out_the_same(folder: Path, replace_bytes) -> None:
    for position in (2, 11, 12):
        replace_bytes(folder, "train", position, 30, bytes(40))
    training = Training(augment=Augment(flip="random", hue=0.1), seed=4)

    def batches(cache: CacheChoice) -> Batches:
        return open_data(folder, cache).batches("train", Preprocess(res=RES), 4, training=training)

    cached, streamed = ([(images.clone(), labels) for images, labels in batches(cache)] for cache in ("device", "off"))  # type: ignore[arg-type]
    assert all(equal(*pair) for pair in zip(cached, streamed, strict=True))
    stopped = batches("off")
    for _, _ in zip(stopped, range(3), strict=False):
        pass
    resumed = batches("off")  # a new process: it knows of no corrupt sample yet
    resumed.load_state_dict({**stopped.state_dict(), "step": 3})
    rest = [(images.clone(), labels) for images, labels in resumed]
    assert all(equal(*pair) for pair in zip(rest, cached[3:], strict=True))
