"""The two routes to batches, the choice between them, and damaged images left out of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tidali.loading.corrupt_images import find_corrupt

from shards.pack import pack
from shards.scan import FileSource
from tidali.dataset.contract import Dataset, Split, open_dataset, read_record
from tidali.errors import DatasetError, UsageError
from tidali.hardware import device as device_module
from tidali.loading import data as data_module
from tidali.loading.augment import Augment
from tidali.loading.data import Data, free_memory_bytes
from tidali.loading.route import choose_route
from tidali.loading.sizes import SizePlan

CPU = torch.device("cpu")
MIB = 2**20


def split_of(samples: int, *sizes: str) -> Split:
    return Split(
        name="train",
        labelled=True,
        samples=samples,
        class_counts=(samples,),
        image_sizes=dict.fromkeys(sizes, 1),
        extensions={"jpg": samples},
        shards=(),
    )


@pytest.mark.parametrize(
    ("wish", "free_mib", "cached", "words"),
    [
        ("auto", 24, True, "under half"),  # 1,024 images of 64 x 64 x 3 bytes are 12 MiB
        ("auto", 23, False, "over half"),
        ("device", 1, True, "12 MiB"),
        ("off", 1000, False, "--cache off"),
    ],
)
def test_auto_caches_what_takes_half_of_the_free_memory(wish, free_mib: int, cached: bool, words: str) -> None:
    route = choose_route(wish, [split_of(1024, "64x64")], max_res=224, free_bytes=free_mib * MIB)
    assert route.cached is cached
    assert words in route.reason
    assert route.square is None


def test_unequal_sizes_are_stored_at_the_largest_resolution_and_that_is_said() -> None:
    route = choose_route("auto", [split_of(1024, "64x64", "80x64")], max_res=128, free_bytes=1000 * MIB)
    assert route.square == 128
    assert "2 sizes" in route.reason
    assert "48 MiB" in route.reason


def test_without_dali_everything_is_cached_and_streaming_refused() -> None:
    assert choose_route("auto", [split_of(1024, "64x64")], max_res=64, free_bytes=1, has_dali=False).cached
    with pytest.raises(UsageError, match="--cache off"):
        choose_route("off", [split_of(1024, "64x64")], max_res=64, free_bytes=1, has_dali=False)


def test_free_memory_is_within_the_machines() -> None:
    assert MIB < free_memory_bytes(CPU) < 2**50


def test_ranks_share_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_free_ram_bytes", lambda: 100 * MIB)
    assert free_memory_bytes(CPU) == 100 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory_bytes(CPU) == 25 * MIB
    monkeypatch.setattr(device_module, "cpu_count", lambda: 6)
    assert device_module.rank_threads() == 1


def test_what_the_allocator_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (5 * MIB, 80 * MIB)), ("memory_reserved", 9 * MIB), ("memory_allocated", 2 * MIB)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert free_memory_bytes(torch.device("cuda", 0)) == 12 * MIB


RANK = """
import os, sys
from pathlib import Path
import torch
from tidali import make_loader
from tidali.loading import data as module
from tidali.dataset.contract import open_dataset
from tidali.hardware.ranks import joined_ranks

module.free_memory_bytes = lambda device: (2**40, 2**10)[int(os.environ["RANK"])]
with joined_ranks("cpu") as ranks:
    data = module.Data(open_dataset(Path(sys.argv[1])), ("val",), torch.device("cpu"), max_res=64, ranks=ranks)
    batches = make_loader(sys.argv[1], "val", batch_size=16, device="cpu")
    seen = sum(len(labels) for _, labels in batches)
    Path(sys.argv[2] + str(ranks.rank)).write_text(f"{data.route.cached} {type(batches).__name__} {seen}")
"""


@pytest.mark.slow
def test_the_rank_with_the_least_memory_decides_for_all(demo_data: Path, tmp_path: Path) -> None:
    """A rank that streams and one that has a cache would cut a split differently: images counted twice, or never."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "rank.py"), str(demo_data), str(tmp_path / "cached")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Of the 32 images of val each has its half.
    assert [(tmp_path / f"cached{rank}").read_text() for rank in range(2)] == ["False StreamBatches 16"] * 2


def batches_of(dataset: Dataset, cache: str, *, res: int, max_bad: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """All of val, pixels in grey levels."""
    data = Data(dataset, ("val",), CPU, cache=cache, max_res=res, max_bad=max_bad)  # type: ignore[arg-type]
    batches = data.batches("val", res=res, batch_size=10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    images, labels = zip(*batches, strict=True)
    scale = 255 * torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    return torch.cat(images) * scale, torch.cat(labels)


@pytest.mark.parametrize(("res", "tolerance"), [(64, 1e-4), (96, 1.0), (224, 1.0)])
def test_both_routes_give_the_same_batches(demo_data: Path, res: int, tolerance: float) -> None:
    """At the stored size up to float32 rounding; resized within the grey level that DALI's rounding to uint8 takes away."""
    dataset = open_dataset(demo_data)
    cached, streamed = batches_of(dataset, "device", res=res), batches_of(dataset, "off", res=res)
    assert len(cached[1]) == 32
    assert torch.equal(cached[1], streamed[1])
    assert (cached[0] - streamed[0]).abs().max() <= tolerance


def test_pil_fills_the_cache_with_the_same_pixels(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_dali = batches_of(open_dataset(demo_data), "device", res=64)
    monkeypatch.setattr(data_module, "dali_is_installed", lambda: False)
    by_pil = batches_of(open_dataset(demo_data), "auto", res=64)
    assert torch.equal(by_dali[0], by_pil[0])
    assert torch.equal(by_dali[1], by_pil[1])


def damage(folder: Path, split: str, positions: list[int], *, at: int) -> list[str]:
    """Overwrite 20 bytes of these samples' images; gives their keys."""
    shard = open_dataset(folder).split(split).shards[0]
    records = read_record(folder, shard)
    with (folder / shard.name).open("r+b") as file:
        for position in positions:
            file.seek(records[position].offset + at)
            file.write(bytes(20))
    return [records[position].key for position in positions]


@pytest.mark.parametrize("cache", ["device", "off"])
def test_damaged_images_are_named_and_left_out_of_either_route(demo_copy: Path, cache: str, capsys) -> None:
    keys = damage(demo_copy, "val", [0, 17, 31], at=0)
    dataset = open_dataset(demo_copy)
    images, labels = batches_of(dataset, cache, res=64, max_bad=3)
    assert len(images) == len(labels) == 29
    said = capsys.readouterr().err
    for key in keys:
        assert key in said
    whole = [record.label for record in read_record(demo_copy, dataset.split("val").shards[0]) if record.key not in keys]
    assert labels.tolist() == whole


def test_an_image_that_changed_and_still_decodes_is_found(demo_copy: Path) -> None:
    keys = damage(demo_copy, "train", [5], at=400)
    assert [image.key for image in find_corrupt(open_dataset(demo_copy), "train")] == keys


def test_a_changed_label_is_found(demo_copy: Path) -> None:
    shard = open_dataset(demo_copy).split("val").shards[0]
    index = (demo_copy / shard.index_name).read_text().splitlines()[3].split()
    with (demo_copy / shard.name).open("r+b") as file:
        file.seek(int(index[index.index("cls") + 1]))
        file.write(b"9")
    key = index[-1].rpartition(".")[0]
    assert [image.key for image in find_corrupt(open_dataset(demo_copy), "val")] == [key]


def test_more_than_max_bad_fails_in_one_line(demo_copy: Path) -> None:
    damage(demo_copy, "val", [0, 1], at=0)
    with pytest.raises(DatasetError, match=r"2 of the 32 images of 'val' are damaged.*--max-bad is 1"):
        Data(open_dataset(demo_copy), ("val",), CPU, max_res=64, max_bad=1)


def test_damage_between_images_fails_in_one_line(demo_copy: Path) -> None:
    shard = open_dataset(demo_copy).split("val").shards[0]
    with (demo_copy / shard.name).open("r+b") as file:
        file.seek(300)  # in the first header, behind its name
        file.write(b"x")
    with pytest.raises(DatasetError, match="damaged between its images"):
        find_corrupt(open_dataset(demo_copy), "val")


def test_streaming_refuses_what_it_does_not_have(demo_data: Path) -> None:
    data = Data(open_dataset(demo_data), ("train",), CPU, cache="off", max_res=64)
    common = {"res": 64, "batch_size": 32, "mean": (0, 0, 0), "std": (1, 1, 1), "train": True}
    for given in ({"augment": Augment(shift_px=2)}, {"dtype": torch.bfloat16}):
        with pytest.raises(UsageError, match="--cache device"):
            data.batches("train", **common, **given)


def test_a_stream_that_dali_resizes_has_its_kernel_and_one_size(write_photos, tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos", {"train/a": 4, "train/b": 4}, size=(64, 48))
    write_photos(tmp_path / "more", {"train/a": 4}, size=(48, 64))
    (tmp_path / "more" / "train" / "a").rename(source / "train" / "c")
    pack(FileSource(source), tmp_path / "packed")
    data = Data(open_dataset(tmp_path / "packed"), ("train",), CPU, cache="off", max_res=64)
    common = {"res": 64, "batch_size": 4, "mean": (0, 0, 0), "std": (1, 1, 1), "train": True}
    assert next(iter(data.batches("train", **common)))[0].shape == (4, 3, 64, 64)
    for given in ({"kernel": "opencv"}, {"sizes": SizePlan(sides=(32, 64))}):
        with pytest.raises(UsageError, match="--cache device"):
            data.batches("train", **common, **given)


@pytest.mark.parametrize("kernel", ["pil", "opencv"])
def test_both_routes_have_both_kernels_and_any_sizes(demo_data: Path, kernel: str) -> None:
    """In evaluation, whose order is the stored one on both."""
    sizes = SizePlan(sides=(32, 96), order="mixed", seed=5)
    found = {}
    for cache in ("device", "off"):
        data = Data(open_dataset(demo_data), ("val",), CPU, cache=cache, max_res=96)
        batches = data.batches("val", res=64, batch_size=4, mean=(0, 0, 0), std=(1, 1, 1), kernel=kernel, sizes=sizes)
        found[cache] = [images.clone() for images, _ in batches]
    assert [images.shape[2] for images in found["device"]] == [sizes.at(0, step) for step in range(8)]
    assert {images.shape[2] for images in found["device"]} == {32, 96}
    for cached, streamed in zip(found["device"], found["off"], strict=True):
        assert torch.equal(cached, streamed)


def test_indexes_of_its_own_are_gone_when_the_process_ends(demo_copy: Path, tmp_path: Path) -> None:
    damage(demo_copy, "train", [5], at=400)
    program = "import sys; from pathlib import Path; from tidali.loading.corrupt_images import drop_corrupt\n"
    program += "from tidali.dataset.contract import open_dataset\n"
    program += "kept = drop_corrupt(open_dataset(Path(sys.argv[1])), 'train', 1)\n"
    program += "print([index.exists() for index in kept.indexes.values()])"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", program, str(demo_copy)],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "[True]\n", ended.stderr
    assert list(temporary.iterdir()) == []
