"""Four rates a resolution: decoding alone, the loader alone, the step on synthetic data, and training end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.measure import Case, Rates, measure
from bench.report import environment
from tidali.augment import Augment
from tidali.config import AmpChoice, CacheChoice, DeviceChoice, Stem, make_recipe
from tidali.console import progress_bar, say
from tidali.contract import Dataset
from tidali.data import Data
from tidali.device import DevicePlan, cpu_count, plan_device
from tidali.engine import TrainState, make_train_state, train_step
from tidali.errors import UsageError
from tidali.loader import decoded_forever
from tidali.metrics import Meter
from tidali.models import build_resnet18

DECODE, LOADER, STEP, END_TO_END = "decode only", "loader only", "step, synthetic", "end to end"


def bench_stages(
    dataset: Dataset,
    *,
    resolutions: Sequence[int],
    stem: Stem = "imagenet",
    batch_size: int | None = None,
    repeats: int = 5,
    device: DeviceChoice = "auto",
    amp: AmpChoice = "auto",
    cache: CacheChoice = "auto",
) -> dict[str, Any]:
    """Measure, and return the JSON document.

    Args:
        batch_size: images a step; by default 256 on CUDA and 32 on a CPU, where a step of 256 at 224 px takes ten seconds.

    Raises:
        UsageError: a batch larger than the train split.
        TidaliError, DatasetError: the data or the device cannot be used.
    """
    plan = plan_device(device, amp, "auto")
    if batch_size is None:
        batch_size = 256 if plan.device.type == "cuda" else 32
    samples = dataset.split("train").samples
    if batch_size > samples:
        raise UsageError(f"--batch-size {batch_size}: the train split has {samples} samples; measure with at most that many")
    data = Data(dataset, ("train",), plan.device, cache=cache, max_res=max(resolutions))
    say(f"cache {'on' if data.route.cached else 'off'}: {data.route.reason}")
    names = (DECODE, LOADER, STEP, END_TO_END)
    rows = []
    with progress_bar() as bar:
        task = bar.add_task("bench", total=len(resolutions) * len(names) * repeats, note="")
        for res in resolutions:
            rates = measure(
                stage_cases(dataset, data, plan, res=res, stem=stem, batch_size=batch_size),
                repeats=repeats,
                on_done=lambda name: bar.update(task, advance=1, note=name),
            )
            rows += [{"res": res, "case": name, "images_per_s": rates[name].to_dict()} for name in names]
            say(f"{res} px: {diagnosis(rates)}")
    return {
        "benchmark": "stages",
        **environment(plan),
        "data": {"name": dataset.root.name, "train_samples": samples},
        "cached": data.route.cached,
        "stem": stem,
        "batch_size": batch_size,
        "repeats": repeats,
        "rows": rows,
    }


def stage_cases(dataset: Dataset, data: Data, plan: DevicePlan, *, res: int, stem: Stem, batch_size: int) -> list[Case]:
    """The four cases of one resolution; the two that train share one model, whose weights do not matter here."""
    manifest = dataset.manifest
    decoded = decoded_forever(dataset, "train", batch_size=batch_size, device=plan.device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        loader = data.batches(
            "train",
            res=res,
            batch_size=batch_size,
            mean=manifest.mean,
            std=manifest.std,
            train=True,
            augment=Augment(flip="random"),
        )
        while True:
            yield from loader

    alone, fed = batches(), batches()
    state = make_state(len(manifest.classes), plan, stem)
    images = torch.randn(batch_size, 3, res, res, device=plan.device).to(memory_format=torch.channels_last)
    labels = torch.randint(len(manifest.classes), (batch_size,), device=plan.device)
    meter = Meter(plan.device)

    def step_synthetic() -> int:
        train_step(state, images, labels)
        return batch_size

    def step_end_to_end() -> int:
        real_images, real_labels = next(fed)
        meter.update(train_step(state, real_images, real_labels), real_labels)
        return len(real_labels)

    return [
        Case(name=DECODE, step=lambda: len(next(decoded)[0]), device=plan.device),
        Case(name=LOADER, step=lambda: len(next(alone)[1]), device=plan.device),
        Case(name=STEP, step=step_synthetic, device=plan.device),
        Case(name=END_TO_END, step=step_end_to_end, device=plan.device),
    ]


def make_state(num_classes: int, plan: DevicePlan, stem: Stem) -> TrainState:
    """A fresh model under the modern recipe's optimizer."""
    recipe = make_recipe("modern")
    return make_train_state(
        build_resnet18(num_classes, stem),
        plan,
        lambda step: 1e-3,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        label_smoothing=recipe.label_smoothing,
    )


def diagnosis(rates: dict[str, Rates]) -> str:
    """One line: what holds training back."""
    step, loader, both = (rates[name].median for name in (STEP, LOADER, END_TO_END))
    bound = "the step" if step <= loader else "the loader"
    return (
        f"end to end runs at {100 * both / min(step, loader):.1f} % of its slower part, {bound}; "
        f"the loader alone is {loader / step:.1f} times as fast as the step ({cpu_count()} cores)"
    )
