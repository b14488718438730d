"""The training step: the original study's loop beside tidali's, on the same data that is already in memory, taking turns.

Each runs in a process of its own, as its user would run it: tidali makes its process keep freed memory
(`tidali.hardware.cpu_memory`), with which the other loop's step of 224 px ran at 15.4 images/s instead of 11.3.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import TaskID

from bench.case_process import CaseFailed, CaseProcess
from bench.ceilings import binding, ceiling_cases, ceiling_rows, products
from bench.fingerprint import environment
from bench.measure import Case, Rates, measure
from bench.peer_check import wrong_training
from bench.step_loops import StepJob
from tidali.config import AmpChoice, CompileChoice, DeviceChoice, Stem
from tidali.console import progress_bar, say
from tidali.errors import TidaliError
from tidali.hardware.device import plan_device
from tidali.model.resnet import resnet18_gmacs

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
        TidaliError: the device cannot be used, its memory does not hold the batch, or a loop failed otherwise.
    """
    plan = plan_device(device, amp, compile)
    limits = ceiling_cases(plan)
    stems: list[Stem] = ["imagenet", "small"]
    shapes = [(res, stem) for stem in stems for res in resolutions if stem == "imagenet" or res <= SMALL_STEM_MAX_PX]
    rows, ceilings = [], []
    with progress_bar() as bar, tempfile.TemporaryDirectory(prefix="tidali-step-", ignore_cleanup_errors=True) as scratch:
        for res, stem in shapes:
            settings: dict[str, Any] = dict(res=res, stem=stem, batch_size=batch_size, classes=CLASSES, scratch=scratch)
            settings |= dict(device=device, amp=amp, compile=compile)
            jobs = {
                ORIGINAL: StepJob(target="bench.step_loops:original", package="torch", **settings),
                TIDALI: StepJob(target="bench.step_loops:tidali", package="tidali", **settings),
            }
            task = bar.add_task(f"step at {res}, {stem} stem", total=(len(jobs) + len(limits)) * repeats, note="")

            def on_done(name: str, task: TaskID = task) -> None:
                bar.update(task, advance=1, note=name)

            trace = profile.with_name(f"{profile.stem}-{res}-{stem}.json") if profile is not None else None
            try:
                rates = _measured(jobs, limits, Path(scratch), repeats, on_done, trace)
            except CaseFailed as error:
                hint = "; give a smaller --batch-size" if "out of memory" in str(error) else ""
                raise TidaliError(f"bench step: {batch_size} images of {res} px: {error}{hint}") from None
            gmacs = resnet18_gmacs(CLASSES, stem, res)
            for case in jobs:
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
    return {
        "benchmark": "step",
        **environment(plan),
        "batch_size": batch_size,
        "repeats": repeats,
        "rows": rows,
        "ceilings": ceilings,
    }


def _measured(
    jobs: Mapping[str, StepJob],
    limits: Sequence[Case],
    scratch: Path,
    repeats: int,
    on_done: Callable[[str], None],
    profile: Path | None,
) -> dict[str, Rates]:
    """The loops of one shape, started and then measured in turn, and the ceilings with them."""
    found: dict[str, list[Rates]] = {name: [] for name in [*jobs, *(limit.name for limit in limits)]}
    with ExitStack() as stack:
        running = {}
        for name, job in jobs.items():
            log = scratch / f"{job.target.partition(':')[2]}.log"
            running[name] = stack.enter_context(CaseProcess(Path(sys.executable), job, log))
            wrong = wrong_training(running[name].check(1), job)
            if wrong is not None:
                raise CaseFailed(f"{name}: {wrong}")
        for _ in range(repeats):
            for name, process in running.items():
                found[name].append(process.measure())
                on_done(name)
            for name, rates in measure(limits, repeats=1, on_done=on_done).items():
                found[name].append(rates)
        if profile is not None:
            for line in running[TIDALI].profile(profile):
                say(line)
    return {name: Rates.together(parts) for name, parts in found.items()}


def step_costs(dtype: torch.dtype | None, *, res: int, stem: Stem) -> dict[str, float]:
    """What an image of a training step takes of the dtype's matrix products, for `bench.ceilings.binding`.

    As much as three forward passes: one forward, one for the gradient of each layer's input, one for that of its weights; less
    the first layer's input, which needs none.
    """
    side, kernel = (res // 2, 7) if stem == "imagenet" else (res, 3)
    first_gmacs = 64 * 3 * kernel**2 * side**2 / 1e9
    return {products(dtype): 2e9 * (3 * resnet18_gmacs(CLASSES, stem, res) - first_gmacs)}
