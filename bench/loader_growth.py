"""How a loader's throughput scales with the batch size, the resolution, the threads, the samples and the ranks of a distributed
run. One of them is varied at a time."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any, NamedTuple

import torch

from bench import measure
from bench.case_process import CaseProcess
from bench.case_worker import Job
from bench.measure import Case, CaseFailed, Measurable, Rates
from bench.routes import CACHED, STREAMING, batch_settings, counting
from tidali.dataset.contract import Dataset, open_dataset
from tidali.errors import TidaliError
from tidali.hardware.limits import cpu_count
from tidali.hardware.ranks import Ranks
from tidali.loading.batches import Batches
from tidali.loading.cache import PixelCache
from tidali.loading.data import Data

BATCHES = (16, 64, 256, 1024)
RESOLUTIONS = (32, 64, 128, 224)
SAMPLES_SHARES = (1 / 16, 1 / 4, 1)


class Point(NamedTuple):
    route: str
    varied: str
    """The name of the field in the document that has the value."""
    value: int

    def __str__(self) -> str:
        return f"{self.route}, {self.varied} {self.value}"


def bench_loader_growth(dataset: Dataset, *, res: int, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the document: the streaming and the cached route at one resolution, on the CPU."""
    cases = growth_cases(dataset, res, batch_size)
    return [
        {"res": res, "case": point.route, "varied": point.varied, point.varied: point.value, "images_per_s": rate.to_dict()}
        for point, rate in measure.measure(cases, repeats=repeats, title="growth").items()
    ]


def powers_of_two(cores: int) -> list[int]:
    """Up to the number of cores, which is included even if it is none."""
    return sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})


def growth_cases(dataset: Dataset, res: int, batch_size: int) -> dict[Point, Measurable]:
    """What is measured. The number of samples is varied for the cached route only: a stream reads all of its shards."""
    samples, device = dataset.split("train").samples, torch.device("cpu")
    data = {CACHED: Data(dataset, device, cache="device"), STREAMING: Data(dataset, device, cache="off")}

    def batches(route: str, *, res: int = res, batch_size: int = batch_size) -> Batches:
        return data[route].batches("train", **batch_settings(dataset, res, batch_size))

    def streaming(threads: int | None = None, **changed: int) -> Callable[[], int]:
        if threads is None:
            return counting(batches(STREAMING, **changed))
        settings = batch_settings(dataset, res, batch_size)
        source = data[STREAMING].streamed("train", settings["preprocess"], batch_size, num_threads=threads)
        return counting(Batches(source, **settings))

    def cached(share: float = 1, **changed: int) -> Callable[[], int]:
        whole = batches(CACHED, **changed)
        if share == 1:
            return counting(whole)
        cache, count = whole.source, int(samples * share)
        assert isinstance(cache, PixelCache)
        pixels = {side: stored[:count] for side, stored in cache.pixels.items()}
        part = replace(cache, pixels=pixels, labels=cache.labels[:count])
        return counting(Batches(part, **batch_settings(dataset, res, batch_size)))

    steps: dict[Point, Callable[[], int]] = {}
    for varied, values in (("batch_size", [batch for batch in BATCHES if batch <= samples]), ("res", RESOLUTIONS)):
        for value in values:
            steps[Point(STREAMING, varied, value)] = streaming(**{varied: value})
            steps[Point(CACHED, varied, value)] = cached(**{varied: value})
    for threads in powers_of_two(cpu_count()):
        steps[Point(STREAMING, "threads", threads)] = on_threads(threads, streaming(threads))
        steps[Point(CACHED, "threads", threads)] = on_threads(threads, cached())
    for share in SAMPLES_SHARES:
        if samples * share >= batch_size:
            steps[Point(CACHED, "samples", int(samples * share))] = cached(share)
    cases: dict[Point, Measurable] = {point: Case(step=step) for point, step in steps.items()}
    for ranks in powers_of_two(cpu_count()):
        for route in (STREAMING, CACHED):
            cases[Point(route, "ranks", ranks)] = RankGroup(dataset.root, route, ranks, res=res, batch_size=batch_size)
    return cases


def on_threads(threads: int, step: Callable[[], int]) -> Callable[[], int]:
    """The step, run with this number of torch threads, which tidali's compiled loops use too."""

    def limited() -> int:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return step()
        finally:
            torch.set_num_threads(before)

    return limited


# ----------------------------------------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True, kw_only=True)
class RankJob(Job):
    """One rank's loader. The batch size is the rank's own."""

    root: str
    route: str
    rank: int
    world_size: int


class RankGroup:
    """All ranks of one loader, measured at the same time: a process per rank, each with its share of the cores and of the
    samples.

    The processes run only while they are measured: with the cached route each keeps the whole split decoded.
    """

    def __init__(self, root: Path, route: str, world_size: int, *, res: int, batch_size: int) -> None:
        """
        Args:
            batch_size: of all ranks together.
        """
        self._settings: dict[str, Any] = dict(
            target="bench.loader_growth:rank_loader",
            package="tidali",
            classes=0,
            res=res,
            batch_size=max(batch_size // world_size, 1),
            root=str(root.resolve()),
            route=route,
            world_size=world_size,
            threads=max(cpu_count() // world_size, 1),
        )

    def measure(self) -> Rates:
        """Images/s of all ranks together.

        Raises:
            TidaliError: a rank failed.
        """
        world_size = self._settings["world_size"]
        barrier = Barrier(world_size)

        def run(job: RankJob) -> float:
            try:
                with CaseProcess(Path(sys.executable), job) as process:
                    barrier.wait()
                    images_per_s = process.measure(measure.MIN_SECONDS).median
                    barrier.wait()  # ending a process takes the cores' time, too
                    return images_per_s
            except BrokenBarrierError:  # another rank failed, and raises
                return 0.0
            except CaseFailed as error:
                barrier.abort()
                raise TidaliError(f"bench loader: a rank failed: {error}") from None

        with tempfile.TemporaryDirectory(prefix="tidali-ranks-") as scratch, ThreadPoolExecutor(world_size) as pool:
            jobs = [RankJob(rank=rank, scratch=f"{scratch}/{rank}", **self._settings) for rank in range(world_size)]
            return Rates(per_s=(sum(pool.map(run, jobs)),))


def rank_loader(job: RankJob) -> Case:
    dataset = open_dataset(Path(job.root))
    ranks = Ranks(rank=job.rank, world_size=job.world_size)
    data = Data(dataset, torch.device("cpu"), cache="device" if job.route == CACHED else "off", ranks=ranks)
    settings = batch_settings(dataset, job.res, job.batch_size)
    if job.route == CACHED:
        return Case(step=counting(data.batches("train", **settings)))
    source = data.streamed("train", settings["preprocess"], job.batch_size, num_threads=job.threads)
    return Case(step=counting(Batches(source, **settings, ranks=ranks)))
