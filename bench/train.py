"""Four rates a resolution: decoding alone, the loader alone, the step on synthetic data, and training end to end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import TaskID

from bench.ceilings import COPY, DECODE, UPLOAD, Bound, binding, ceiling_cases, ceiling_rows, sample_jpegs
from bench.diagnosis import diagnose
from bench.fingerprint import environment
from bench.host_sync import host_synchronisations
from bench.measure import Case, Rates, measure
from bench.ours import make_state
from bench.profile import profile_step
from bench.routes import batch_bytes, batch_settings, endless
from bench.step import step_costs
from tidali.config import AmpChoice, CacheChoice, CompileChoice, DeviceChoice, Stem
from tidali.console import progress_bar, say
from tidali.dataset.contract import Dataset
from tidali.errors import TidaliError, UsageError
from tidali.hardware.device import DevicePlan, plan_device, set_numerics
from tidali.hardware.timing import WaitTimer
from tidali.loading.data import Data
from tidali.loading.stream import decoded_forever
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
    profile: Path | None = None,
) -> dict[str, Any]:
    """Measure, and return the JSON document.

    Args:
        batch_size: images a step; by default 256 on CUDA and 32 on a CPU, where a step of 256 at 224 px takes ten seconds.
        profile: where a trace of the end-to-end step is written, one for each resolution.

    Raises:
        UsageError: a batch larger than the train split.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    plan = plan_device(device, amp, compile)
    set_numerics()
    if batch_size is None:
        batch_size = 256 if plan.device.type == "cuda" else 32
    samples = dataset.split("train").samples
    if batch_size > samples:
        raise UsageError(f"--batch-size {batch_size}: the train split has {samples} samples; measure with at most that many")
    data = Data(dataset, ("train",), plan.device, cache=cache, max_res=max(resolutions))
    say(f"cache {'on' if data.route.cached else 'off'}: {data.route.reason}")
    limits = ceiling_cases(plan, jpegs=sample_jpegs(data.dataset))
    rows, ceilings, diagnoses = [], [], []
    with progress_bar() as bar:
        for res in resolutions:
            task = bar.add_task(f"training at {res}", total=(len(CASES) + len(limits)) * repeats, note="")

            def on_done(name: str, task: TaskID = task) -> None:
                bar.update(task, advance=1, note=name)

            try:
                cases = train_cases(data, plan, res=res, stem=stem, batch_size=batch_size)
                rates = measure(cases + limits, repeats=repeats, on_done=on_done)
                synchronisations = host_synchronisations(cases[CASES.index(STEP)].step, plan.device)
            except torch.OutOfMemoryError:
                raise TidaliError(
                    f"bench train: {batch_size} images of {res} px do not fit the GPU; give a smaller --batch-size"
                ) from None
            bounds = train_bounds(rates, data, plan, stem=stem, res=res)
            rows += [row(case, rates[case], bounds[case], res) for case in CASES]
            ceilings += ceiling_rows(rates, res=res)
            found = diagnose(
                res,
                loader=rates[LOADER],
                step=rates[STEP],
                end_to_end=rates[END_TO_END],
                loader_bound=bounds[LOADER],
                step_bound=bounds[STEP],
                step_on_host=plan.device.type == "cpu",
                synchronisations=synchronisations,
            )
            diagnoses.append(found.to_dict())
            say(found.line)
            if profile is not None:
                path = profile.with_name(f"{profile.stem}-{res}-{stem}.json")
                for line in profile_step(cases[-1].step, plan.device, path):
                    say(line)
    return {
        "benchmark": "train",
        **environment(plan),
        "data": {"name": dataset.root.name, "train_samples": samples},
        "cached": data.route.cached,
        "stem": stem,
        "batch_size": batch_size,
        "repeats": repeats,
        "rows": rows,
        "ceilings": ceilings,
        "diagnosis": diagnoses,
    }


def row(case: str, rates: Rates, bound: Bound | None, res: int) -> dict[str, Any]:
    """One case for the document."""
    shares = {"data_wait_share": rates.wait_share, "idle_share": rates.idle_share}
    return {
        "res": res,
        "case": case,
        "images_per_s": rates.to_dict(),
        **{name: share for name, share in shares.items() if share is not None},
        "measured": rates.measured(),
        **(bound.fields(rates) if bound is not None else {}),
    }


def train_cases(data: Data, plan: DevicePlan, *, res: int, stem: Stem, batch_size: int) -> list[Case]:
    """The four cases of one resolution; the two that train share one model, whose weights do not matter here."""
    dataset = data.dataset
    classes, epoch_steps = len(dataset.manifest.classes), dataset.split("train").samples // batch_size
    decoded = decoded_forever(dataset, "train", batch_size=batch_size, device=plan.device)
    settings = batch_settings(dataset, res, batch_size)
    alone, fed = (endless(data.batches("train", **settings)) for _ in range(2))
    state = make_state(classes, plan, stem, averaged=True)
    images = torch.randn(batch_size, 3, res, res, device=plan.device).to(memory_format=torch.channels_last)
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

    return [
        Case(name=DECODED, step=lambda: len(next(decoded)[0]), device=plan.device),
        Case(name=LOADER, step=lambda: len(next(alone)[1]), device=plan.device, cycle_steps=epoch_steps),
        Case(name=STEP, step=step_synthetic, device=plan.device),
        Case(name=END_TO_END, step=step_end_to_end, device=plan.device, wait=wait),
    ]


def train_bounds(rates: dict[str, Rates], data: Data, plan: DevicePlan, *, stem: Stem, res: int) -> dict[str, Bound | None]:
    """What each case stands under; end to end under all that the loader and the step do.

    A GPU may decode by itself and copies in its own memory; what is sure of it is that the files' bytes come to it.
    """
    on_gpu, split = plan.device.type == "cuda", data.dataset.split("train")
    decoding = {} if on_gpu else {DECODE: 1.0}
    loading = {} if on_gpu else {COPY: batch_bytes(data, res)}
    if not data.route.cached:
        loading |= {UPLOAD: split.size_bytes / split.samples} if on_gpu else decoding
    step = step_costs(plan.amp_dtype, res=res, stem=stem)
    costs = {DECODED: decoding, LOADER: loading, STEP: step, END_TO_END: {**loading, **step}}
    return {case: binding(rates, cost) for case, cost in costs.items()}
