"""tidali's routes from shards to batches, compared with the machine's ceilings, and how their throughput scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.ceilings import COPY, DECODE, ceiling_cases, ceiling_rows, lowest_ceiling, sample_jpegs
from bench.document import make_document, make_row
from bench.loader_growth import bench_loader_growth
from bench.measure import measure
from bench.memory import cache_memory
from bench.routes import (
    CACHED,
    CACHED_BF16,
    DECODED,
    ROUTES,
    STREAMING,
    batch_bytes,
    batch_settings,
    check_batch_size,
    route_cases,
)
from tidali.dataset.contract import Dataset
from tidali.hardware.cpu_memory import keep_freed_memory
from tidali.hardware.device import plan_device
from tidali.loading.data import Data


def bench_loader(dataset: Dataset, *, resolutions: Sequence[int], batch_size: int = 256, repeats: int = 5) -> dict[str, Any]:
    """Measure on the CPU, and return the JSON document. Every route shuffles, flips horizontally at random and normalises.

    Raises:
        UsageError: the batch is larger than the train split.
        TidaliError, DatasetError: the data cannot be used.
    """
    check_batch_size(dataset, batch_size)
    plan = plan_device("cpu", "off", "off")
    cached, streamed = Data(dataset, plan.device, cache="device"), Data(dataset, plan.device, cache="off")
    keep_freed_memory()  # as `tidali train` does
    limits = ceiling_cases(plan, jpegs=sample_jpegs(streamed.dataset))
    rows, ceilings = [], []
    for res in resolutions:
        cases = route_cases(streamed, cached, res, batch_size)
        rates = measure({**cases, **limits}, repeats=repeats, title=f"loader at {res}")
        route, samples = (
            cached.batches("train", **batch_settings(dataset, res, batch_size)).route,
            dataset.split("train").samples,
        )
        costs = {
            DECODED: {DECODE: 1.0},
            STREAMING: {DECODE: 1.0, COPY: batch_bytes(route, samples, res)},
            CACHED: {COPY: batch_bytes(route, samples, res)},
            CACHED_BF16: {COPY: batch_bytes(route, samples, res, torch.bfloat16)},
        }
        rows += [make_row(case, rates[case], lowest_ceiling(rates, costs[case]), res=res) for case in ROUTES]
        ceilings += ceiling_rows(rates, res=res)
    return make_document(
        "loader",
        plan,
        dataset,
        batch_size=batch_size,
        repeats=repeats,
        rows=rows,
        ceilings=ceilings,
        growth=bench_loader_growth(streamed.dataset, res=min(resolutions), batch_size=batch_size, repeats=repeats),
        memory=[cache_memory(dataset.root, res=res, batch_size=batch_size) for res in resolutions],
    )
