"""Learning rates: every value by hand, and torch's own StepLR."""

from __future__ import annotations

import pytest
import torch

from tidali.recipes import make_recipe
from tidali.training.schedule import make_schedule, step_decay, warmup_cosine


def test_step_decay_value_by_value() -> None:
    schedule = step_decay(1.0, steps_per_epoch=2, step_epochs=3, gamma=0.1)
    expected = [1.0] * 6 + [0.1] * 6 + [0.01]  # three epochs of two steps at each rate
    assert [schedule(step) for step in range(13)] == pytest.approx(expected, rel=1e-12)  # 0.1 ** 2 is not 0.01 to the bit


def test_step_decay_is_torchs_step_lr() -> None:
    steps_per_epoch, epochs = 3, 15
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    torchs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    ours = step_decay(1e-3, steps_per_epoch, step_epochs=7, gamma=0.1)
    for epoch in range(epochs):
        for step in range(steps_per_epoch):
            assert ours(epoch * steps_per_epoch + step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        torchs.step()


def test_warmup_cosine_value_by_value() -> None:
    schedule = warmup_cosine(0.1, total_steps=8, warmup_steps=2)
    expected = [
        0.05,  # 1/2 of the warm-up
        0.1,  # 2/2
        0.1,  # (1 + cos 0) / 2
        0.0933012701892219,  # (1 + cos 30 degrees) / 2
        0.075,  # (1 + cos 60 degrees) / 2
        0.05,  # (1 + cos 90 degrees) / 2
        0.025,  # (1 + cos 120 degrees) / 2
        0.0066987298107781,  # (1 + cos 150 degrees) / 2; zero would be the step after
    ]
    assert [schedule(step) for step in range(8)] == pytest.approx(expected, rel=1e-12)  # float64 cosines


@pytest.mark.parametrize(
    ("total_steps", "warmup_steps", "expected"),
    [
        (4, 4, [0.5, 1.0, 1.0, 0.5]),  # a run as short as its warm-up warms up for half of it
        (1, 5, [1.0]),
        (2, 0, [1.0, 0.5]),
    ],
)
def test_warmup_leaves_room_for_the_cosine(total_steps: int, warmup_steps: int, expected: list[float]) -> None:
    schedule = warmup_cosine(1.0, total_steps, warmup_steps)
    assert [schedule(step) for step in range(total_steps)] == pytest.approx(expected, rel=1e-12)


def test_make_schedule_counts_epochs_in_steps() -> None:
    common = dict(lr=0.1, epochs=4, warmup_epochs=1.0, step_epochs=3, step_gamma=0.5)
    by_step, by_cosine = (make_schedule(make_recipe("seed", schedule=kind, **common), 2) for kind in ("step", "cosine"))
    assert [by_step(step) for step in (0, 5, 6, 7)] == pytest.approx([0.1, 0.1, 0.05, 0.05], rel=1e-12)
    reference = warmup_cosine(0.1, total_steps=8, warmup_steps=2)
    assert [by_cosine(step) for step in range(8)] == [reference(step) for step in range(8)]
