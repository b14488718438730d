"""The training step: the original study's loop beside tidali's, on the same data that is already in memory, taking turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import TaskID

from bench.ceilings import binding, ceiling_cases, ceiling_rows, products
from bench.fingerprint import environment
from bench.measure import Case, measure
from bench.original import original_step
from bench.ours import tidali_train_on
from bench.profile import profile_step
from tidali.config import AmpChoice, CompileChoice, DeviceChoice, Stem
from tidali.console import progress_bar, say
from tidali.device import DevicePlan, plan_device, set_numerics
from tidali.errors import TidaliError
from tidali.models import resnet18_gmacs

ORIGINAL, TIDALI = "original study's loop", "tidali"
CLASSES = 200
"""Tiny-ImageNet's."""
BATCH_SIZE = 100
"""The original study's."""
SMALL_STEM_MAX_PX = 64
"""The small stem is for small images: at 224 px it takes 27 GMAC an image."""


def bench_step(
    *,
    resolutions: Sequence[int],
    batch_size: int = BATCH_SIZE,
    repeats: int = 5,
    device: DeviceChoice = "auto",
    amp: AmpChoice = "auto",
    compile: CompileChoice = "auto",
    profile: Path | None = None,
) -> dict[str, Any]:
    """Measure, and return the JSON document. The stock stem at every resolution, the small one at those up to 64 px.

    Args:
        profile: where a trace of tidali's step is written, one for each shape.

    Raises:
        TidaliError: the device cannot be used, or its memory does not hold the batch.
    """
    plan = plan_device(device, amp, compile)
    set_numerics()
    limits = ceiling_cases(plan)
    stems: list[Stem] = ["imagenet", "small"]
    shapes = [(res, stem) for stem in stems for res in resolutions if stem == "imagenet" or res <= SMALL_STEM_MAX_PX]
    rows, ceilings = [], []
    with progress_bar() as bar:
        for res, stem in shapes:
            task = bar.add_task(f"step at {res}, {stem} stem", total=None, note="")

            def on_done(name: str, task: TaskID = task) -> None:
                bar.update(task, advance=1, note=name)

            try:
                cases = step_cases(plan, res=res, stem=stem, batch_size=batch_size)
                bar.update(task, total=(len(cases) + len(limits)) * repeats)
                rates = measure(cases + limits, repeats=repeats, on_done=on_done)
            except torch.OutOfMemoryError:
                raise TidaliError(
                    f"bench step: {batch_size} images of {res} px do not fit the GPU; give a smaller --batch-size"
                ) from None
            gmacs = resnet18_gmacs(CLASSES, stem, res)
            for case in (ORIGINAL, TIDALI):
                bound = binding(rates, step_costs(None if case == ORIGINAL else plan.amp_dtype, res=res, stem=stem))
                rows.append(
                    {
                        "res": res,
                        "stem": stem,
                        "case": case,
                        "images_per_s": rates[case].to_dict(),
                        "times_original": rates[case].median / rates[ORIGINAL].median,
                        "gmacs": gmacs,
                        "dtype": "float32" if case == ORIGINAL else plan.dtype_name,
                        "idle_share": rates[case].idle_share,
                        "measured": rates[case].measured(),
                        **(bound.fields(rates[case]) if bound else {}),
                    }
                )
            ceilings += ceiling_rows(rates, res=res, stem=stem)
            if profile is not None:
                path = profile.with_name(f"{profile.stem}-{res}-{stem}.json")
                for line in profile_step(cases[-1].step, plan.device, path):
                    say(line)
    return {
        "benchmark": "step",
        **environment(plan),
        "batch_size": batch_size,
        "repeats": repeats,
        "rows": rows,
        "ceilings": ceilings,
    }


def step_cases(plan: DevicePlan, *, res: int, stem: Stem, batch_size: int) -> list[Case]:
    """The two loops, each with a model and a batch of its own: the same values, laid out as each takes them."""
    values = torch.randn(batch_size, 3, res, res, device=plan.device)
    labels = torch.randint(CLASSES, (batch_size,), device=plan.device)
    channels_last = values.contiguous(memory_format=torch.channels_last)
    original = original_step(CLASSES, stem, plan.device, lambda: (values, labels))
    train_on = tidali_train_on(CLASSES, plan, stem, averaged=False)

    def step() -> int:
        train_on(channels_last, labels)
        return batch_size

    return [
        Case(name=ORIGINAL, step=original, device=plan.device),
        Case(name=TIDALI, step=step, device=plan.device),
    ]


def step_costs(dtype: torch.dtype | None, *, res: int, stem: Stem) -> dict[str, float]:
    """What an image of a training step takes of the dtype's matrix products, for `bench.ceilings.binding`.

    As much as three forward passes: one forward, one for the gradient of each layer's input, one for that of its weights; less
    the first layer's input, which needs none.
    """
    side, kernel = (res // 2, 7) if stem == "imagenet" else (res, 3)
    first_gmacs = 64 * 3 * kernel**2 * side**2 / 1e9
    return {products(dtype): 2e9 * (3 * resnet18_gmacs(CLASSES, stem, res) - first_gmacs)}
