"""Counting against plain numpy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tidali.errors import TidaliError
from tidali.training.metrics import JsonlLog, Meter, Score


@pytest.mark.parametrize("classes", [2, 3, 5, 11])
def test_meter_is_what_numpy_counts(classes: int) -> None:
    rng = np.random.default_rng(classes)
    batches = [(rng.normal(size=(size, classes)).astype(np.float32), rng.integers(0, classes, size)) for size in (7, 64, 1)]
    meter = Meter(torch.device("cpu"))
    for logits, labels in batches:
        meter.update(torch.from_numpy(logits), torch.from_numpy(labels))
    score = meter.read()

    logits, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    logits = logits.astype(np.float64)
    true = logits[np.arange(len(labels)), labels]
    rank = (logits > true[:, None]).sum(axis=1)  # how many classes beat the right one
    loss = np.log(np.exp(logits).sum(axis=1)) - true
    assert score.samples == len(labels) == 72
    assert score.correct1 == (rank == 0).sum()
    assert score.correct5 == (rank < 5).sum()
    # 72 float32 losses of a few nats: each within 1e-6 of its float64 value.
    assert score.loss == pytest.approx(loss.mean(), rel=1e-5)
    assert score.top1_percent == pytest.approx(100 * (rank == 0).mean())
    assert score.top5_percent == pytest.approx(100 * (rank < 5).mean())
    assert meter.peek() == score  # a CPU has nothing to wait for


def test_fewer_than_five_classes_are_all_in_the_top_five() -> None:
    meter = Meter(torch.device("cpu"))
    meter.update(torch.randn(9, 3), torch.arange(9) % 3)
    assert meter.read().correct5 == 9


def test_half_precision_logits_are_counted_in_float32() -> None:
    meter, logits = Meter(torch.device("cpu")), torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    meter.update(logits.bfloat16(), torch.tensor([0, 0]))
    score = meter.read()
    # log(1 + e^-4) and 4 more; bfloat16's own arithmetic would be off by 1e-2.
    assert score.loss_sum == pytest.approx(4 + 2 * np.log1p(np.exp(-4)), rel=1e-6)
    assert score.correct1 == 1


def test_nothing_counted_is_zero_and_not_a_division_by_zero() -> None:
    score = Meter(torch.device("cpu")).read()
    assert score == Score(samples=0, loss_sum=0.0, correct1=0, correct5=0)
    assert score.to_dict() == {"samples": 0, "loss": 0.0, "top1_percent": 0.0, "top5_percent": 0.0}


def test_of_equal_accuracies_the_lower_loss_is_better() -> None:
    score = Score(samples=10, loss_sum=12.0, correct1=5, correct5=9)
    assert replace(score, correct1=6, loss_sum=99.0).is_better(score)
    assert replace(score, loss_sum=11.9).is_better(score)
    assert not score.is_better(score)
    assert not replace(score, correct5=10).is_better(score)


def test_log_is_one_object_a_line(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl")
    entries = [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 1 / 3}]
    for entry in entries:
        log.write(**entry)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == entries


def test_a_log_goes_on_behind_what_a_power_cut_damaged(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n\xff\n[2]\n{"step": 2}\n{"step": 3}\n{"step": 2')
    JsonlLog(path).keep_through(2, "step")
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TidaliError, match=r"none/metrics\.jsonl: cannot be written \(No such file"):
        JsonlLog(tmp_path / "none" / "metrics.jsonl").write(epoch=1)
