"""tidali's own routes from shards to batches, under the machine's ceilings, and how their rates grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import TaskID

from bench.ceilings import COPY, DECODE, binding, ceiling_cases, ceiling_rows, sample_jpegs
from bench.fingerprint import environment
from bench.growth import bench_growth
from bench.measure import measure
from bench.memory import cache_memory
from bench.routes import CACHED, CACHED_BF16, DECODED, ROUTES, STREAMING, batch_bytes, route_cases
from tidali.console import progress_bar
from tidali.dataset.contract import Dataset
from tidali.errors import UsageError
from tidali.hardware.device import plan_device
from tidali.loading.data import Data


def bench_loader(dataset: Dataset, *, resolutions: Sequence[int], batch_size: int = 256, repeats: int = 5) -> dict[str, Any]:
    """Measure on the CPU, and return the JSON document. Every route shuffles, mirrors at random and normalises.

    Raises:
        UsageError: a batch larger than the train split.
        TidaliError, DatasetError: the data cannot be used.
    """
    samples = dataset.split("train").samples
    if batch_size > samples:
        raise UsageError(f"--batch-size {batch_size}: the train split has {samples} samples; measure with at most that many")
    plan = plan_device("cpu", "off", "off")
    cached = Data(dataset, ("train",), plan.device, cache="device", max_res=max(resolutions))
    streamed = Data(dataset, ("train",), plan.device, cache="off", max_res=max(resolutions))
    limits = ceiling_cases(plan, jpegs=sample_jpegs(streamed.dataset))
    rows, ceilings = [], []
    with progress_bar() as bar:
        for res in resolutions:
            cases = route_cases(streamed, cached, res, batch_size)
            task = bar.add_task(f"loader at {res}", total=(len(cases) + len(limits)) * repeats, note="")

            def on_done(name: str, task: TaskID = task) -> None:
                bar.update(task, advance=1, note=name)

            rates = measure(cases + limits, repeats=repeats, on_done=on_done)
            costs = {
                DECODED: {DECODE: 1.0},
                STREAMING: {DECODE: 1.0, COPY: batch_bytes(streamed, res)},
                CACHED: {COPY: batch_bytes(cached, res)},
                CACHED_BF16: {COPY: batch_bytes(cached, res, torch.bfloat16)},
            }
            for route in ROUTES:
                bound = binding(rates, costs[route])
                rows.append(
                    {
                        "res": res,
                        "case": route,
                        "images_per_s": rates[route].to_dict(),
                        "measured": rates[route].measured(),
                        **(bound.fields(rates[route]) if bound else {}),
                    }
                )
            ceilings += ceiling_rows(rates, res=res)
    growth = bench_growth(streamed.dataset, res=min(resolutions), batch_size=batch_size, repeats=repeats)
    memory = [cache_memory(dataset.root, res=res, batch_size=batch_size) for res in resolutions]
    return {
        "benchmark": "loader",
        **environment(plan),
        "data": {"name": dataset.root.name, "train_samples": samples},
        "batch_size": batch_size,
        "repeats": repeats,
        "rows": rows,
        "ceilings": ceilings,
        "growth": growth,
        "memory": memory,
    }
