"""How a loader's throughput scales with the batch size, the resolution, the threads, the samples and the ranks. One of them is
varied at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench.measure import Case, Measurable, measure
from bench.ranks import RankGroup
from bench.routes import CACHED, STREAMING, batch_settings, counting
from tidali.dataset.contract import Dataset
from tidali.hardware.device import cpu_count
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


def bench_growth(dataset: Dataset, *, res: int, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the document: the streaming and the cached route at one resolution, on the CPU."""
    cases = growth_cases(dataset, res, batch_size)
    return [
        {"res": res, "case": point.route, "varied": point.varied, point.varied: point.value, "images_per_s": rate.to_dict()}
        for point, rate in measure(cases, repeats=repeats, title="growth").items()
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
        settings = batch_settings(dataset, res, batch_size)
        source = data[STREAMING].streamed("train", settings["preprocess"], batch_size, num_threads=threads)
        return counting(Batches(source, **settings)) if threads else counting(batches(STREAMING, **changed))

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
