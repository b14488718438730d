"""The training step of tidali compared with that of the original study, on the same batch in memory, in turns.

Each runs in a process of its own, as its user would run it: tidali makes its process keep freed memory
(`tidali.hardware.cpu_memory`). With that, the study's step at 224 px ran at 15.4 images/s instead of 11.3.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import torch

from bench.case_process import CaseProcess
from bench.case_worker import Job
from bench.ceilings import ceiling_cases, ceiling_rows, lowest_ceiling, matrix_product
from bench.document import make_document, make_row
from bench.measure import CaseFailed, Measurable, Rates, measure
from bench.peer_check import why_wrong_training
from tidali.config import AmpChoice, CompileChoice, DeviceChoice, Stem
from tidali.console import say
from tidali.errors import TidaliError
from tidali.hardware.device import plan_device
from tidali.model.resnet import resnet_gmacs

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
    """Measure, and return the JSON document: the stock stem at every resolution, the small stem up to 64 px.

    Args:
        profile: where traces of tidali's step are written; the resolution and the stem are appended to the name.

    Raises:
        TidaliError: the device cannot be used, the batch does not fit its memory, or a loop failed otherwise.
    """
    plan = plan_device(device, amp, compile)
    limits, stems = ceiling_cases(plan), get_args(Stem)
    rows, ceilings = [], []
    for res, stem in ((res, stem) for stem in stems for res in resolutions if stem == "imagenet" or res <= SMALL_STEM_MAX_PX):
        shape: dict[str, Any] = dict(res=res, stem=stem, batch_size=batch_size, classes=CLASSES)
        trace = profile.with_name(f"{profile.stem}-{res}-{stem}.json") if profile is not None else None
        try:
            rates = _measure({**shape, "device": device, "amp": amp, "compile": compile}, limits, repeats, trace)
        except CaseFailed as error:
            hint = "; give a smaller --batch-size" if "out of memory" in str(error) else ""
            raise TidaliError(f"bench step: {batch_size} images of {res} px: {error}{hint}") from None
        gmacs = resnet_gmacs("resnet18", CLASSES, stem, res)
        for case, dtype in ((ORIGINAL, torch.float32), (TIDALI, plan.amp_dtype or torch.float32)):
            rows.append(
                make_row(
                    case,
                    rates[case],
                    lowest_ceiling(rates, step_cost(dtype, res=res, stem=stem)),
                    res=res,
                    stem=stem,
                    times_original=rates[case].median / rates[ORIGINAL].median,
                    gmacs=gmacs,
                    dtype=str(dtype).removeprefix("torch."),
                    idle_share=rates[case].idle_share,
                    # cuDNN's default, which the original loop does not change; `set_numerics` turns it off for tidali's.
                    **({"tf32": case == ORIGINAL} if plan.device.type == "cuda" else {}),
                )
            )
        ceilings += ceiling_rows(rates, res=res, stem=stem)
    return make_document("step", plan, batch_size=batch_size, repeats=repeats, rows=rows, ceilings=ceilings)


def _measure(
    settings: Mapping[str, Any], limits: Mapping[str, Measurable], repeats: int, trace: Path | None
) -> dict[str, Rates]:
    """Both loops at one resolution and stem, and the ceilings. Without averaged weights: the study's loop has none."""
    cases = {ORIGINAL: ("study_step", "torch"), TIDALI: ("tidali_step", "tidali")}
    processes: dict[str, CaseProcess] = {}
    with tempfile.TemporaryDirectory(prefix="tidali-step-", ignore_cleanup_errors=True) as scratch, ExitStack() as stack:
        for case, (function, package) in cases.items():
            target = f"bench.training_loops:{function}"
            job = Job(target=target, package=package, scratch=f"{scratch}/{package}", averaged=False, **settings)
            processes[case] = stack.enter_context(CaseProcess(Path(sys.executable), job))
            wrong = why_wrong_training(processes[case].check(1), job)
            if wrong is not None:
                raise CaseFailed(f"{case}: {wrong}")
        title = f"step at {settings['res']}, {settings['stem']} stem"
        rates = measure({**processes, **limits}, repeats=repeats, title=title)
        if trace is not None:
            for line in processes[TIDALI].profile(trace):
                say(line)
    return rates


def step_cost(dtype: torch.dtype | None, *, res: int, stem: Stem) -> dict[str, float]:
    """What a training step costs per image in matrix products of a dtype, for `bench.ceilings.lowest_ceiling`.

    Three forward passes' worth: the forward pass, the gradient of each layer's input, and that of its weights; minus the
    gradient of the first layer's input, which is not needed.
    """
    side, kernel = (res // 2, 7) if stem == "imagenet" else (res, 3)
    first_gmacs = 64 * 3 * kernel**2 * side**2 / 1e9
    return {matrix_product(dtype): 2e9 * (3 * resnet_gmacs("resnet18", CLASSES, stem, res) - first_gmacs)}
