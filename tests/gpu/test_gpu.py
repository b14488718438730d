"""Loading, training and evaluation on CUDA. On a machine with a GPU run ``pytest tests/gpu``, or ``tidali doctor`` if there is
no checkout: both run all of the checks in `tidali.doctor.checks`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tidali.dataset.contract import Dataset, open_dataset
from tidali.doctor import checks

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
    pytest.mark.xdist_group("gpu"),  # one process at a time: the memory that is free decides what is cached
]

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def dataset(demo_data: Path) -> Dataset:
    return open_dataset(demo_data)


def test_gpu_batches_are_the_cpus(dataset: Dataset) -> None:
    checks.routes_agree(dataset, CUDA)


def test_training_batches_cover_an_epoch(dataset: Dataset) -> None:
    checks.epochs_are_complete(dataset, CUDA)


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_steps_in_each_precision_lower_the_loss(amp: str) -> None:
    if amp not in checks.precisions(CUDA, None):
        pytest.skip(f"this GPU has no {amp}")
    checks.steps_lower_the_loss(CUDA, amp)


def test_compiled_forward_is_eagers() -> None:
    checks.compiled_matches_eager(CUDA)


def test_compiled_steps_lower_the_loss() -> None:
    checks.steps_lower_the_loss(CUDA, "auto", compile=True)


def test_evaluation_counts_every_sample(dataset: Dataset) -> None:
    checks.evaluation_counts_once(dataset, CUDA)


@pytest.mark.parametrize("cache", ["off", "device"])
def test_train_then_eval_agree(dataset: Dataset, tmp_path: Path, cache: str) -> None:
    checks.eval_matches_training(dataset, CUDA, cache, tmp_path / "run")


def test_ranks_communicate() -> None:
    checks.ranks_communicate("cuda", torch.cuda.device_count())


def test_the_doctor_runs_them_all(tidali, demo_data: Path, tmp_path: Path) -> None:
    ended = tidali("doctor", "--device", "cuda", "--data", demo_data, "--out", tmp_path, "--json")
    assert ended.code == 0, ended.stdout + ended.stderr
    findings = {finding["name"]: finding for finding in json.loads(ended.stdout)["findings"]}
    assert {"pixels", "epochs", "training step", "evaluation", "training run", "several ranks"} <= findings.keys()
