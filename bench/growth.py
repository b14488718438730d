"""How a loader's rate grows with the batch, the resolution, the threads, the samples and the ranks, one varied at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import Case, measure
from bench.ranks import rank_rates
from bench.routes import CACHED, STREAMING, batch_settings, counting
from tidali.console import progress_bar
from tidali.dataset.contract import Dataset
from tidali.hardware.device import cpu_count
from tidali.loading.cache import CachedBatches, PixelCache
from tidali.loading.data import Data, fill
from tidali.loading.stream import StreamBatches

BATCHES = (16, 64, 256, 1024)
RESOLUTIONS = (32, 64, 128, 224)
SAMPLES_SHARES = (1 / 16, 1 / 4, 1)


class Point(NamedTuple):
    route: str
    varied: str
    value: int
    step: Callable[[], int]


def bench_growth(dataset: Dataset, *, res: int, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the document: the streaming and the cached route at one resolution, on the CPU.

    The samples are those of the cached route alone: a stream is as long as its shards.
    """
    points = growth_points(dataset, res, batch_size)
    counts = powers_of_two(cpu_count())
    cases = [Case(name=f"{point.route}, {point.varied} {point.value}", step=point.step) for point in points]
    with progress_bar() as bar:
        task = bar.add_task("growth", total=(len(cases) + 2 * len(counts)) * repeats, note="")

        def on_done(name: str) -> None:
            bar.update(task, advance=1, note=name)

        rates = measure(cases, repeats=repeats, on_done=on_done)
        together = rank_rates(
            dataset.root,
            routes=(STREAMING, CACHED),
            ranks=counts,
            res=res,
            batch_size=batch_size,
            repeats=repeats,
            on_done=on_done,
        )
    found = [(point.route, point.varied, point.value, rates[case.name]) for point, case in zip(points, cases, strict=True)]
    found += [(route, "ranks", ranks, rate) for (route, ranks), rate in together.items()]
    return [
        {"res": res, "case": route, "varied": varied, varied: value, "images_per_s": rate.to_dict()}
        for route, varied, value, rate in found
    ]


def powers_of_two(cores: int) -> list[int]:
    """Up to the cores, which come last whatever their number."""
    return sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})


def growth_points(dataset: Dataset, res: int, batch_size: int) -> list[Point]:
    """What is measured, the batch first."""
    samples, device = dataset.split("train").samples, torch.device("cpu")
    square = Data(dataset, ("train",), device, cache="device", max_res=res).route.square
    cache = fill(dataset, "train", device, square)
    settings = batch_settings(dataset, res, batch_size)
    flips = settings.pop("augment")

    def streaming(threads: int | None = None, **changed: int) -> Iterable[tuple[Tensor, Tensor]]:
        return StreamBatches(dataset, "train", **{**settings, **changed}, flip=True, num_threads=threads)

    def cached(share: float = 1, **changed: int) -> Iterable[tuple[Tensor, Tensor]]:
        count = int(samples * share)
        part = PixelCache(pixels=cache.pixels[:count], labels=cache.labels[:count], identity=cache.identity)
        return CachedBatches(part, **{**settings, **changed}, augment=flips)

    points = []
    for batch in (batch for batch in BATCHES if batch <= samples):
        points.append(Point(STREAMING, "batch_size", batch, counting(streaming(batch_size=batch))))
        points.append(Point(CACHED, "batch_size", batch, counting(cached(batch_size=batch))))
    for side in RESOLUTIONS:
        points.append(Point(STREAMING, "res", side, counting(streaming(res=side))))
        points.append(Point(CACHED, "res", side, counting(cached(res=side))))
    for threads in powers_of_two(cpu_count()):
        points.append(Point(STREAMING, "threads", threads, on_threads(threads, counting(streaming(threads)))))
        points.append(Point(CACHED, "threads", threads, on_threads(threads, counting(cached()))))
    for share in SAMPLES_SHARES:
        if samples * share >= batch_size:
            points.append(Point(CACHED, "samples", int(samples * share), counting(cached(share))))
    return points


def on_threads(threads: int, step: Callable[[], int]) -> Callable[[], int]:
    """The step with torch's threads set for it, and set back after it: tidali's compiled loops use as many."""

    def limited() -> int:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return step()
        finally:
            torch.set_num_threads(before)

    return limited
