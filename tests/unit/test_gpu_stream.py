"""What a GPU's stream does with DALI, torch's streams and memory, on fakes: no driver needed."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.unit.test_cache_on_cuda import cached_on
from tidali.config import CUDA_GRAPHS, Augment, Preprocess, TrainSettings
from tidali.dataset.contract import Dataset, open_dataset
from tidali.errors import TidaliError, UsageError
from tidali.hardware.device import DevicePlan
from tidali.loading import dali as dali_module
from tidali.loading import stream as stream_module
from tidali.loading import thread_decoder
from tidali.loading.batches import Batches, Training
from tidali.loading.dali import QUEUE_DEPTH, DaliDecoder
from tidali.loading.samples import SampleTable
from tidali.loading.stream import decoding_threads
from tidali.loading.thread_decoder import Job, ThreadDecoder
from tidali.recipes import make_recipe
from tidali.training import run as run_module
from tidali.training.run import train
from tidali.training.setup import refuse_graphs_beside_dali

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def dataset(demo_data: Path) -> Dataset:
    return open_dataset(demo_data)


# ------------------------------------------------------------------------------------------------------------------- streams


class FakeEvent:
    """An event on a stream whose work ends when the test says so."""

    made: ClassVar[list[FakeEvent]] = []

    def __init__(self) -> None:
        self.done, self.recorded_on = False, None
        FakeEvent.made.append(self)

    def record(self, stream: object) -> None:
        self.recorded_on = stream

    def query(self) -> bool:
        return self.done


class FakePixels:
    """DALI's list of tensors: a batch whose every value is its number."""

    def __init__(self, number: int, count: int) -> None:
        self.memory = torch.full((count, 4, 4, 3), number, dtype=torch.uint8)

    def as_tensor(self) -> torch.Tensor:
        return self.memory


class FakePipe:
    """Hands out batches in the order in which they were scheduled, and records the streams that it was given."""

    def __init__(self) -> None:
        self.fed: deque[int] = deque()
        self.streams: list[object] = []
        self.numbers = 0

    def build(self) -> None:
        pass

    def feed_input(self, name: str, values: list[Any]) -> None:
        if name == "encoded":
            self.fed.append(len(values))

    def schedule_run(self) -> None:
        pass

    def outputs(self, cuda_stream: object = None) -> tuple[FakePixels]:
        self.streams.append(cuda_stream)
        self.numbers += 1
        return (FakePixels(self.numbers, self.fed.popleft()),)


@pytest.fixture
def decoder(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> tuple[DaliDecoder, FakePipe, SampleTable]:
    pipe = FakePipe()
    FakeEvent.made.clear()
    monkeypatch.setattr(dali_module, "define_graph", lambda *_, **__: pipe)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"torch's on {device}")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "from_dlpack", lambda view: view)
    table = SampleTable(dataset, "train")
    return DaliDecoder(ThreadDecoder(table, "pil", 1), CUDA, batch_size=4, num_threads=1), pipe, table


def jobs(table: SampleTable, count: int) -> list[Job]:
    return [Job(np.arange(4 * number, 4 * number + 4), None, 64) for number in range(count)]


def test_dali_is_given_torchs_stream(decoder: tuple[DaliDecoder, FakePipe, SampleTable]) -> None:
    """Or the host would wait for the batch, and for those that are decoded ahead of it."""
    dali, pipe, table = decoder
    filled = len(pipe.streams)
    assert filled == QUEUE_DEPTH
    for job in jobs(table, 3):
        dali.finish(job, dali.start(job))
    assert pipe.streams[filled:] == ["torch's on cuda:0"] * 3


def test_dalis_pixels_live_until_their_copy_is_done(decoder: tuple[DaliDecoder, FakePipe, SampleTable]) -> None:
    dali, _, table = decoder
    views, copies = [], []
    for job in jobs(table, 4):
        queued = dali.start(job)
        dali._take_oldest()
        views.append(weakref.ref(queued.pixels))
        copies.append(dali.finish(job, queued)[0])
        del queued
    gc.collect()
    assert all(view() is not None for view in views)  # no copy is done yet
    assert {event.recorded_on for event in FakeEvent.made} == {"torch's on cuda:0"}
    assert len({copy.data_ptr() for copy in copies} & {view().memory.data_ptr() for view in views}) == 0
    FakeEvent.made[0].done = FakeEvent.made[1].done = True
    job = jobs(table, 5)[4]
    copies.append(dali.finish(job, dali.start(job))[0])
    gc.collect()
    assert [view() is not None for view in views] == [False, False, True, True]
    first = int(copies[0][0, 0, 0, 0])
    assert [copy.unique().tolist() for copy in copies] == [[first + number] for number in range(5)]  # nobody wrote over them


def test_a_filled_caches_decoder_returns_its_memory(
    decoder: tuple[DaliDecoder, FakePipe, SampleTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    dali, _, table = decoder
    released: list[bool] = []
    monkeypatch.setattr(dali_module.backend, "ReleaseUnusedMemory", lambda: released.append(dali._pipe is None))
    job = jobs(table, 1)[0]
    dali.finish(job, dali.start(job))
    dali.close()
    assert released == [True]  # after the pipeline, which uses it
    assert not dali._in_use


@pytest.mark.parametrize("pinned", [False, True])
def test_what_a_cpu_decodes_for_a_gpu_is_pinned(dataset: Dataset, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    empty = torch.empty

    def record(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            seen.append(pin_memory)
        return empty(*shape, **options)  # pinning asks for a driver

    table = SampleTable(dataset, "train")
    threads = ThreadDecoder(table, "pil", 1, pinned=pinned)
    monkeypatch.setattr(thread_decoder.torch, "empty", record)
    job = jobs(table, 1)[0]
    pixels, bad = threads.finish(job, threads.start(job))
    assert (pixels.shape, bad, seen) == ((4, 64, 64, 3), {}, [True] if pinned else [])


def test_a_core_is_left_to_the_thread_that_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, on_gpu in ((1, 1), (2, 1), (8, 7)):
        monkeypatch.setattr(stream_module, "rank_threads", lambda cores=cores: cores)
        assert decoding_threads(torch.device("cpu")) == cores
        assert decoding_threads(CUDA) == on_gpu


# -------------------------------------------------------------------------------------------------- refused, said, repaired


class Source:
    def __init__(self, decodes_on_gpu: bool) -> None:
        self.decodes_on_gpu = decodes_on_gpu


class Given:
    def __init__(self, decodes_on_gpu: bool) -> None:
        self.source = Source(decodes_on_gpu)


def plan_on_cuda(mode: Any) -> DevicePlan:
    return DevicePlan(
        device=CUDA,
        name="H100",
        amp_dtype=torch.bfloat16,
        amp_reason="",
        compile=True,
        compile_reason="",
        compile_mode=mode,
    )


@pytest.mark.parametrize("mode", CUDA_GRAPHS)
def test_cuda_graphs_beside_dali_are_refused(mode: str) -> None:
    streamed, cached = Given(True), Given(False)
    for given in ((streamed, cached), (cached, streamed)):
        with pytest.raises(UsageError, match=rf"--compile {mode} .*--compile on.*--decoder cpu.*--cache device"):
            refuse_graphs_beside_dali(plan_on_cuda(mode), *given)  # type: ignore[arg-type]
        refuse_graphs_beside_dali(plan_on_cuda("default"), *given)  # type: ignore[arg-type]
    refuse_graphs_beside_dali(plan_on_cuda(mode), cached, cached)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\n..."), "the GPU's memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "machine's"),
    ],
)
def test_memory_that_runs_out_in_training_names_batch_and_resolution(
    dataset: Dataset, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, where: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run_module, "train_epoch", fail)
    recipe = make_recipe("seed", epochs=1, batch_size=40, train_sizes=(32, 48))
    settings = TrainSettings(data=str(demo_data), out=str(tmp_path / "run"), res=32, recipe=recipe, device="cpu")
    with pytest.raises(TidaliError, match=f"--batch-size 40 and images of 48 px do not fit .*{where}.*accumulate") as raised:
        train(settings, dataset)
    assert "\n" not in str(raised.value)


def test_a_position_on_a_gpu_is_resumed_on_a_cpu() -> None:
    """Nothing in it is the device's: the order is tidali's own, DALI keeps no state."""
    states = []
    for device in (torch.device("cpu"), torch.device("meta")):  # as on a GPU, of which nothing is asked here
        training = Training(augment=Augment(flip="random"), seed=5)
        loader = Batches(cached_on(device, 100), Preprocess(res=64), 10, training=training)
        states.append(loader.state_dict())
    assert states[0] == states[1]
