"""The training step: the original study's loop beside tidali's, on the same data that is already in memory, taking turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import TaskID

from bench.ceilings import Bound, binding, ceiling_cases, ceiling_rows, products
from bench.fingerprint import environment
from bench.measure import Case, Rates, measure
from bench.original import original_step
from bench.profile import profile_step
from tidali.config import AmpChoice, CompileChoice, DeviceChoice, Stem, make_recipe
from tidali.console import progress_bar, say
from tidali.device import DevicePlan, plan_device
from tidali.engine import TrainState, make_train_state, train_step
from tidali.errors import TidaliError
from tidali.models import build_resnet18, resnet18_gmacs
from tidali.train import set_numerics

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
    set_numerics(deterministic=False)
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
                bar.update(task, total=(len(cases) + len(ceiling_cases(plan))) * repeats)
                rates = measure(cases + ceiling_cases(plan), repeats=repeats, on_done=on_done)
            except torch.OutOfMemoryError:
                raise TidaliError(
                    f"bench step: {batch_size} images of {res} px do not fit the GPU; give a smaller --batch-size"
                ) from None
            gmacs = resnet18_gmacs(CLASSES, stem, res)
            for case in (ORIGINAL, TIDALI):
                bound = step_bound(rates, None if case == ORIGINAL else plan.amp_dtype, gmacs)
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
    state = make_state(CLASSES, plan, stem)
    state.model.train()

    def step() -> int:
        train_step(state, channels_last, labels)
        return batch_size

    return [
        Case(name=ORIGINAL, step=original, device=plan.device),
        Case(name=TIDALI, step=step, device=plan.device),
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


def step_bound(rates: dict[str, Rates], dtype: torch.dtype | None, gmacs: float) -> Bound | None:
    """The matrix products of the dtype. A training step takes three forward passes' worth: one forward, one for the gradient of
    each layer's input, and one for that of its weights."""
    return binding(rates, {products(dtype): 3 * 2e9 * gmacs})
