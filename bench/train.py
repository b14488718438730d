"""Four rates per resolution: decoding alone, the loader alone, the step on synthetic data, and training end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import COPY, DECODE, GPU_COPY, UPLOAD, Ceiling, ceiling_cases, ceiling_rows, lowest_ceiling, sample_jpegs
from bench.diagnosis import diagnose
from bench.document import make_document, make_row
from bench.measure import Case, Rates, measure
from bench.profile import host_synchronisations, profile_step
from bench.routes import Decoded, batch_bytes, batch_settings, check_batch_size, counting, endless
from bench.step import step_cost
from bench.training_loops import make_state
from tidali.config import AmpChoice, CacheChoice, CompileChoice, DecoderChoice, DeviceChoice, Stem
from tidali.console import say
from tidali.dataset.contract import Dataset, Split
from tidali.errors import explain_out_of_memory
from tidali.hardware.device import DevicePlan, plan_device, set_numerics
from tidali.hardware.timing import WaitTimer
from tidali.loading.data import Data
from tidali.loading.route import Route
from tidali.training import engine
from tidali.training.metrics import Meter

DECODED, LOADER, STEP, END_TO_END = "decode only", "loader only", "step, synthetic", "end to end"
CASES = (DECODED, LOADER, STEP, END_TO_END)


def bench_train(
    dataset: Dataset,
    *,
    resolutions: Sequence[int],
    stem: Stem = "imagenet",
    batch_size: int | None = None,
    repeats: int = 5,
    device: DeviceChoice = "auto",
    amp: AmpChoice = "auto",
    compile: CompileChoice = "auto",
    cache: CacheChoice = "auto",
    decoder: DecoderChoice = "auto",
    profile: Path | None = None,
) -> dict[str, Any]:
    """Measure, and return the JSON document.

    Args:
        batch_size: images per step; by default 256 on CUDA and 32 on a CPU, where a step of 256 at 224 px takes ten seconds.
        profile: where traces of the end-to-end step are written; the resolution and the stem are appended to the name.

    Raises:
        UsageError: the batch is larger than the train split.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    plan = plan_device(device, amp, compile)
    set_numerics()
    if batch_size is None:
        batch_size = 256 if plan.device.type == "cuda" else 32
    check_batch_size(dataset, batch_size)
    data = Data(dataset, plan.device, cache=cache, decoder=decoder)
    limits = ceiling_cases(plan, jpegs=sample_jpegs(dataset))
    rows, ceilings, diagnoses = [], [], []
    for res in resolutions:
        with explain_out_of_memory(f"bench train: {batch_size} images of {res} px", "give a smaller --batch-size"):
            route = data.batches("train", **batch_settings(dataset, res, batch_size)).route
            say(f"pixels {route.describe()}")
            cases = train_cases(data, plan, res=res, stem=stem, batch_size=batch_size)
            rates = measure({**cases, **limits}, repeats=repeats, title=f"training at {res}")
            synchronisations = host_synchronisations(cases[STEP].step, plan.device)
        allowed = train_ceilings(rates, route, dataset.split("train"), plan, stem=stem, res=res)
        for case in CASES:
            shares = {"data_wait_share": rates[case].wait_share, "idle_share": rates[case].idle_share}
            shares = {name: share for name, share in shares.items() if share is not None}
            rows.append(make_row(case, rates[case], allowed[case], res=res, **shares))
        ceilings += ceiling_rows(rates, res=res)
        diagnosis = diagnose(
            res,
            loader=rates[LOADER],
            step=rates[STEP],
            end_to_end=rates[END_TO_END],
            loader_ceiling=allowed[LOADER],
            step_ceiling=allowed[STEP],
            step_on_host=plan.device.type == "cpu",
            synchronisations=synchronisations,
        )
        diagnoses.append(asdict(diagnosis))
        say(diagnosis.line)
        if profile is not None:
            path = profile.with_name(f"{profile.stem}-{res}-{stem}.json")
            for line in profile_step(cases[END_TO_END].step, plan.device, path):
                say(line)
    return make_document(
        "train",
        plan,
        dataset,
        cached=route.cached,
        **({} if decoder == "auto" else {"decoder": decoder}),
        stem=stem,
        batch_size=batch_size,
        repeats=repeats,
        rows=rows,
        ceilings=ceilings,
        diagnosis=diagnoses,
    )


def train_cases(data: Data, plan: DevicePlan, *, res: int, stem: Stem, batch_size: int) -> dict[str, Case]:
    """The four cases at one resolution. The two that train share one model; its weights do not matter here."""
    dataset = data.dataset
    classes, epoch_steps = len(dataset.manifest.classes), dataset.split("train").samples // batch_size
    settings = {**batch_settings(dataset, res, batch_size), "dtype": plan.images_dtype}
    alone, fed = counting(data.batches("train", **settings)), endless(data.batches("train", **settings))
    state = make_state(classes, plan, stem, averaged=True)
    images = torch.randn(batch_size, 3, res, res, device=plan.device)
    images = images.to(plan.images_dtype, memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch_size,), device=plan.device)
    meter, wait = Meter(plan.device), WaitTimer()

    def step_synthetic() -> int:
        engine.train_step(state, images, labels)
        return batch_size

    def step_end_to_end() -> int:
        with wait:
            real_images, real_labels = next(fed)
        meter.update(engine.train_step(state, real_images, real_labels), real_labels)
        return len(real_labels)

    return {
        DECODED: Case(step=counting(Decoded(data, settings)), device=plan.device),
        LOADER: Case(step=alone, device=plan.device, cycle_steps=epoch_steps),
        STEP: Case(step=step_synthetic, device=plan.device),
        END_TO_END: Case(step=step_end_to_end, device=plan.device, wait=wait),
    }


def train_ceilings(
    rates: dict[str, Rates], route: Route, split: Split, plan: DevicePlan, *, stem: Stem, res: int
) -> dict[str, Ceiling | None]:
    """The lowest ceiling of each case; for end to end, of all that the loader and the step do.

    A GPU may decode by itself. Certain is only that the files' bytes are copied to it, and that its memory is read and written.
    """
    on_gpu = plan.device.type == "cuda"
    decoding = {} if on_gpu else {DECODE: 1.0}
    loading = {GPU_COPY if on_gpu else COPY: batch_bytes(route, split.samples, res, plan.images_dtype)}
    if not route.cached:
        loading |= {UPLOAD: split.size_bytes / split.samples} if on_gpu else decoding
    step = step_cost(plan.amp_dtype, res=res, stem=stem)
    costs = {DECODED: decoding, LOADER: loading, STEP: step, END_TO_END: {**loading, **step}}
    return {case: lowest_ceiling(rates, cost) for case, cost in costs.items()}
