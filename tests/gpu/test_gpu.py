"""Loading, training and evaluation on CUDA. On a machine with a GPU run ``pytest tests/gpu``, or ``tidali doctor`` if there is
no checkout: both run all of the checks in `tidali.doctor.checks` and `tidali.doctor.run_checks`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.profile import host_synchronisations
from tests.cli.test_kills import check_same_run, run, write_configs
from tidali.config import CUDA_GRAPHS, Augment, CacheChoice, DecoderChoice, Freeze, Preprocess
from tidali.dataset.contract import Dataset, open_dataset
from tidali.doctor import checks, run_checks
from tidali.hardware.device import compile_fault, plan_device
from tidali.loading.batches import Training
from tidali.loading.data import Data
from tidali.loading.resample import Resample
from tidali.model.parts import set_training
from tidali.model.resnet import build_resnet18
from tidali.recipes import make_recipe
from tidali.training.engine import make_train_state, train_step
from tidali.training.metrics import Meter

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
    pytest.mark.xdist_group("gpu"),  # one process at a time: the memory that is free decides what is cached
]

CUDA = torch.device("cuda", 0)
ROUTES: tuple[CacheChoice, ...] = ("off", "device")
EVERYTHING = Augment(
    flip="alternating", shift_px=4, crop_scale=(0.25, 1.0), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, erase=0.25
)


@pytest.fixture(scope="module")
def dataset(demo_data: Path) -> Dataset:
    return open_dataset(demo_data)


# ------------------------------------------------------------------------------------------------------------------- batches


def test_gpu_batches_are_the_cpus(dataset: Dataset) -> None:
    """Those of half precision too."""
    checks.routes_agree(dataset, CUDA)


def test_training_batches_cover_an_epoch(dataset: Dataset) -> None:
    checks.epochs_are_complete(dataset, CUDA)


@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
def test_batches_that_are_held_stay_as_they_are(dataset: Dataset, decoder: DecoderChoice) -> None:
    checks_of = run_checks.held_batches_stay(dataset, CUDA, decoder)
    assert "50 streamed batches" in checks_of


@pytest.mark.parametrize("cache", ROUTES)
@pytest.mark.parametrize(
    ("dtype", "levels"),
    [(torch.float32, 0.05), (torch.float16, 0.5), (torch.bfloat16, 1.0)],  # see tests/unit/test_launches.py; TF32 is off
)
def test_augmented_images_are_the_cpus(dataset: Dataset, cache: CacheChoice, dtype: torch.dtype, levels: float) -> None:
    """Every change at once, of pixels that the CPU decoded."""

    def made_on(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        data = Data(dataset, device, cache=cache, decoder="cpu")
        training = Training(augment=EVERYTHING, seed=3)
        return list(data.batches("train", Preprocess(res=96), 32, training=training, dtype=dtype))

    for (images, labels), (expected, expected_labels) in zip(
        made_on(CUDA, dtype), made_on(torch.device("cpu"), torch.float32), strict=True
    ):
        assert torch.equal(labels.cpu(), expected_labels)
        difference = 255 * (images.float().cpu() - expected).abs()
        # A draw of exp or sqrt may round to another whole pixel on another device, which moves one image's box.
        moved = (difference.flatten(1).amax(1) > levels).sum()
        assert moved <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_public_resampler_is_the_cpus(dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (4, 50, 71, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    expected = Resample((50, 71), Preprocess(res=64, **settings))(pixels)
    images = Resample((50, 71), Preprocess(res=64, **settings), dtype=dtype, device=CUDA)(pixels.to(CUDA))
    assert (images.float().cpu() - expected).abs().max() <= {torch.float32: 0.05, torch.float16: 0.5, torch.bfloat16: 1.0}[
        dtype
    ]


# ------------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_steps_in_each_precision_lower_the_loss(amp: str) -> None:
    if amp not in checks.precisions(CUDA, None):
        pytest.skip(f"this GPU has no {amp}")
    checks.steps_lower_the_loss(CUDA, amp)


def test_nothing_here_keeps_torch_from_compiling() -> None:
    assert compile_fault("cuda") is None


def test_compiled_forward_is_eagers() -> None:
    checks.compiled_matches_eager(CUDA)


@pytest.mark.parametrize("compile", ["on", *CUDA_GRAPHS])
def test_compiled_steps_lower_the_loss(compile: Any) -> None:
    checks.steps_lower_the_loss(CUDA, "auto", compile)


def test_evaluation_counts_every_sample(dataset: Dataset) -> None:
    checks.evaluation_counts_once(dataset, CUDA)


@pytest.mark.parametrize(("cache", "freeze"), [("off", "none"), ("device", "layer2")])
def test_no_step_waits_for_the_device(dataset: Dataset, cache: CacheChoice, freeze: Freeze) -> None:
    """Loading, training with averaged weights, clipping and learning rates by part, the meter and the display of progress,
    compiled as by default. The stream copies what the CPU decoded, or DALI decodes on the GPU and hands over its stream."""
    plan = plan_device("cuda", "auto", "auto")
    data = Data(dataset, CUDA, cache=cache)
    training = Training(augment=EVERYTHING)
    fed = iter(data.batches("train", Preprocess(res=64), 8, training=training, dtype=plan.images_dtype))
    recipe = make_recipe("modern", grad_clip_norm=5.0, freeze=freeze, stage_lr_decay=0.5)
    state = make_train_state(build_resnet18(4, "imagenet"), plan, lambda step: 0.01, recipe)
    set_training(state.model, state.frozen)
    meter = Meter(CUDA)

    def step() -> None:
        images, labels = next(fed)
        meter.update(train_step(state, images, labels), labels)
        meter.peek()

    for _ in range(3):
        step()
    assert host_synchronisations(step, CUDA) == 0


@pytest.mark.parametrize("compile", ["auto", "off"])
@pytest.mark.parametrize("cache", ROUTES)
def test_train_then_eval_and_predict_agree(dataset: Dataset, tmp_path: Path, cache: CacheChoice, compile: str) -> None:
    """Mixed sizes, pieces of a batch and every augmentation; then the same weights exported."""
    run_checks.eval_matches_training(dataset, CUDA, cache, tmp_path / "run", compile)  # type: ignore[arg-type]
    run_checks.exported_runs_on(dataset, CUDA, tmp_path / "run")


@pytest.mark.parametrize("cache", ROUTES)
def test_deterministic_runs_end_with_the_same_weights(dataset: Dataset, tmp_path: Path, cache: CacheChoice) -> None:
    run_checks.runs_repeat(dataset, CUDA, cache, tmp_path)


@pytest.mark.parametrize("cache", ROUTES)
def test_killed_and_resumed(demo_data: Path, tmp_path: Path, cache: CacheChoice) -> None:
    """By SIGKILL after a step; compiled, as by default."""
    undisturbed, killed = write_configs(tmp_path, demo_data, cache, "cuda")
    whole, broken, step = tmp_path / "whole", tmp_path / "broken", 6
    for words, code in (
        (("-m", "tidali", "train", "--config", undisturbed, "--out", whole), 0),
        ((tmp_path / "dies.py", step, "train", "--config", killed, "--out", broken), -signal.SIGKILL),
        (("-m", "tidali", "train", "--resume", broken), 0),
    ):
        ended = run(1, *words, on_gpu=True)
        assert ended.returncode == code, ended.stderr
    assert f"resumed at step {step - 1}" in ended.stderr
    check_same_run(whole, broken, step)


# ------------------------------------------------------------------------------------------------------------- several GPUs


def test_ranks_communicate() -> None:
    checks.ranks_communicate("cuda", torch.cuda.device_count())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [[], ["--sync-bn"], ["--set", "accumulate=2"]])
def test_all_gpus_train_together(demo_data: Path, tmp_path: Path, options: list[str]) -> None:
    gpus = torch.cuda.device_count()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m", "tidali"]
    settings = [
        "--res",
        "32",
        "--epochs",
        "2",
        "--batch-size",
        str(16 * gpus),
        "--device",
        "cuda",
        "--out",
        str(tmp_path / "run"),
    ]
    command = [*launcher, "train", "--data", str(demo_data), *settings, *options]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last"]["samples"] == 32


def test_the_doctor_runs_them_all(tidali: Callable[..., Any], demo_data: Path, tmp_path: Path) -> None:
    ended = tidali("doctor", "--device", "cuda", "--data", demo_data, "--out", tmp_path, "--json")
    assert ended.code == 0, ended.stdout + ended.stderr
    findings = {finding["name"]: finding for finding in json.loads(ended.stdout)["findings"]}
    expected = {"pixels", "epochs", "training step", "evaluation", "training run", "several ranks"}
    assert expected | {"export", "repeated run", "held batches"} <= findings.keys()
