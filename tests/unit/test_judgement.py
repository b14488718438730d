"""What is said of a result that is not what it seems. Thresholds are worked out by hand here."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tidali.training.judgement import Figures, at_chance, judge

GOOD: dict[str, Any] = dict(
    split="val",
    samples=1000,
    classes=10,
    top1_percent=62.0,
    loss=1.1,
    losses=[1.9, 1.3, 1.1],
    train_losses=[2.1, 1.4, 0.9],
    train_top1_percent=70.0,
    train_samples=9984,
    train_left_out=16,
    batch_size=128,
    lr=0.05,
    ema_decay=0.999,
    steps=2340,
)


def found(**changes: Any) -> dict[str, str]:
    """The line of each finding, by its kind."""
    return {finding.kind: str(finding) for finding in judge(Figures(**{**GOOD, **changes}))}


def test_of_a_good_result_nothing_is_said() -> None:
    assert found() == {}


@pytest.mark.parametrize(
    ("samples", "top1_percent", "chance"),
    [
        # 10 classes: 10 % and two standard errors of sqrt(0.1 * 0.9 / n), 1.90 points of 1,000 images and 6 of 100.
        (1000, 10.0, True),
        (1000, 11.8, True),
        (1000, 12.0, False),
        (100, 15.9, True),
        (100, 16.1, False),
        (1000, 3.0, True),  # worse than guessing
    ],
)
def test_at_chance(samples: int, top1_percent: float, chance: bool) -> None:
    assert at_chance(Figures(**{**GOOD, "samples": samples, "top1_percent": top1_percent})) == chance
    assert ("at chance" in found(samples=samples, top1_percent=top1_percent)) == chance


@pytest.mark.parametrize(
    ("changes", "lags"),
    [
        ({}, True),
        ({"norm_images": 256}, False),
        ({"steps": 60}, False),
        ({"steps": 0}, False),
        ({"loss": 1.2}, False),
        ({"train_losses": []}, False),
    ],
)
def test_running_averages_that_lag_behind(changes: dict[str, Any], lags: bool) -> None:
    """Row 5 of the study on 408 photographs, seed 0: 28 steps, 89 % in training and 12 % of val."""
    fifth = dict(classes=12, top1_percent=12.1, loss=2.783, losses=[3.577, 3.295, 2.783], train_losses=[2.39, 0.69, 0.586])
    text = found(**{**fifth, "steps": 28, "ema_decay": 0.0, **changes}).get("statistics", "")
    assert ("2.783, in training it was 0.586: after 28 steps" in text and "--set norm_images=256" in text) == lags


def test_averaged_weights_do_not_lag_behind_a_training_that_diverged() -> None:
    """More epochs would not help it: a run at --lr 40 said so."""
    texts = found(top1_percent=10.0, loss=3.6e14, losses=[2e6, 3.6e14], train_losses=[3.2e4, 7.5e12], steps=10, lr=40.0)
    assert not [text for text in texts.values() if "averaged" in text]
    assert "Training diverged: try --lr 4." in texts["at chance"]
    assert "3.6e+14, is 2e+14 times the 2.30" in texts["high loss"]
    assert "averaged" in found(top1_percent=10.0, loss=9.0, train_losses=[2.2, 1.9], steps=10)["at chance"]


def test_the_largest_class_is_what_guessing_can_score() -> None:
    """80 of 100 images are of one class, and an answer that is always that one is right for 80 %."""
    text = found(classes=2, top1_percent=81.0, largest_class_percent=80.0)["at chance"]
    assert "the largest has 80.0 % of the images" in text
    assert "at chance" not in found(classes=2, top1_percent=90.0, largest_class_percent=80.0)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (dict(steps=8), "only 8 steps: give more --epochs"),
        (dict(train_losses=[2.3, 2.4, 9.0]), "Training diverged: try --lr 0.005"),
        (dict(train_losses=[6.9, 2.9, 2.4]), "reached 6.900, far above the 2.30 of guessing: try --lr 0.005"),
        (dict(train_top1_percent=80.0), "--split val"),
        (dict(train_top1_percent=10.0), "another --lr (it was 0.05)"),
        (dict(steps=8, loss=21.0, train_losses=[2.5, 2.2]), "averaged weights (ema_decay 0.999)"),
        (dict(steps=0, train_losses=[], losses=[]), "its training failed"),
    ],
)
def test_what_to_try_where_nothing_was_learned(changes: dict[str, Any], advice: str) -> None:
    assert advice in found(top1_percent=10.0, **changes)["at chance"]


def test_a_training_loss_that_rises_diverges() -> None:
    text = found(train_losses=[2.3, 1.8, 4.5])["diverging"]
    assert "from 1.800 in epoch 2 to 4.500" in text
    assert "--lr 0.005" in text
    assert "from 1.800 in epoch 2" in found(train_losses=[math.nan, 1.8, 4.5])["diverging"]
    assert "diverging" not in found(train_losses=[2.3, 1.0, 1.09])  # by a tenth: noise
    assert "diverging" not in found(train_losses=[0.10, 0.01, 0.05])  # by hundredths of a nat


def test_a_loss_that_rises_on_the_split_alone_overfits() -> None:
    text = found(losses=[1.5, 1.1, 1.6])["overfitting"]
    assert "on val rose from 1.100 in epoch 2 to 1.600" in text
    assert "overfitting" not in found(losses=[1.5, 1.1, 1.6], train_losses=[1.0, 2.0, 3.0])  # it diverges
    assert "overfitting" not in found(losses=[1.1, 1.6])  # of two epochs one may be luck


def test_a_loss_of_many_times_that_of_guessing() -> None:
    assert "high loss" not in found(loss=2.9 * math.log(10))
    text = found(loss=10 * math.log(10))["high loss"]
    assert "23.026" in text
    assert "10 times the 2.30 of equal probabilities (ln 10)" in text
    assert "high loss" not in found(loss=math.nan)  # of a file without it
    assert "1e+14 times" in found(loss=2.3e14)["high loss"]
    assert "had only 12 steps to settle; training itself ended at 0.900" in found(loss=21.0, steps=12)["high loss"]


def test_images_that_fill_no_batch() -> None:
    text = found(train_samples=128, train_left_out=32, batch_size=128)["left out"]
    assert "128 of 160 images" in text
    assert "--batch-size 80 leaves out none" in text
    assert "left out" not in found(train_samples=384, train_left_out=22, batch_size=32)  # 5 %
    assert "left out" not in found(train_samples=0, train_left_out=0)


@pytest.mark.parametrize(("total", "batch_size"), [(160, 128), (167, 160), (100, 64), (33, 32), (5, 3)])
def test_the_batch_size_that_is_proposed_leaves_out_what_is_said(total: int, batch_size: int) -> None:
    kept = total // batch_size * batch_size
    text = found(train_samples=kept, train_left_out=total - kept, batch_size=batch_size).get("left out", "")
    if text:
        proposed = int(text.split("--batch-size ")[1].split()[0])
        said = text.rstrip(".").rpartition("leaves out ")[2]
        assert proposed >= 2
        assert total % proposed == (0 if said == "none" else int(said))
        assert total % proposed < total - kept


def test_one_class_is_said_instead_of_what_follows_from_it() -> None:
    assert found(classes=1, top1_percent=100.0, loss=0.0).keys() == {"one class"}


def test_a_small_split() -> None:
    assert "± 9 points" in found(samples=30)["few images"]
    assert "few images" not in found(samples=100)
