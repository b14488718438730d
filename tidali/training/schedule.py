"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from tidali.config import Recipe

Schedule = Callable[[int], float]
"""Optimizer step, counted from 0 over the whole run -> learning rate of that step."""


def step_decay(lr: float, steps_per_epoch: int, step_epochs: int, gamma: float) -> Schedule:
    """``torch.optim.lr_scheduler.StepLR(step_epochs, gamma)`` stepped once an epoch."""
    return lambda step: lr * gamma ** (step // steps_per_epoch // step_epochs)


def warmup_cosine(lr: float, total_steps: int, warmup_steps: int) -> Schedule:
    """Linear from ``lr / warmup_steps`` to ``lr``, then half a cosine that reaches zero one step after the last."""
    warmup_steps = min(warmup_steps, total_steps // 2)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return lr * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        return lr * 0.5 * (1.0 + math.cos(math.pi * progress))

    return schedule


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> Schedule:
    """The recipe's schedule."""
    if recipe.schedule == "step":
        return step_decay(recipe.lr, steps_per_epoch, recipe.step_epochs, recipe.step_gamma)
    return warmup_cosine(recipe.lr, recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch))
