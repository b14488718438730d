"""tidali's training loop as a case beside the others: see `bench.original` for the study's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tidali.config import Stem, make_recipe
from tidali.hardware.device import DevicePlan
from tidali.model.resnet import build_resnet18
from tidali.training import engine
from tidali.training.engine import TrainState, make_train_state
from tidali.training.metrics import Meter


def make_state(num_classes: int, plan: DevicePlan, stem: Stem, *, averaged: bool) -> TrainState:
    """A fresh model in training mode under the modern recipe's optimizer.

    Args:
        averaged: keep the recipe's averaged weights too, as ``tidali train`` does. The original study's loop has none, so what
            stands beside that has none either.
    """
    recipe = make_recipe("modern")
    state = make_train_state(
        build_resnet18(num_classes, stem),
        plan,
        lambda step: 1e-3,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        label_smoothing=recipe.label_smoothing,
        grad_clip_norm=recipe.grad_clip_norm,
        ema_decay=recipe.ema_decay if averaged else 0.0,
    )
    state.model.train()
    return state


def tidali_train_on(num_classes: int, plan: DevicePlan, stem: Stem, *, averaged: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The step, with the running loss and accuracy that ``tidali train`` keeps on the device.

    Returns:
        What trains on images (N, 3, H, W), channels-last, and labels (N,) int64, both on the device, and gives the running mean
        loss, a scalar on the device.
    """
    state, meter = make_state(num_classes, plan, stem, averaged=averaged), Meter(plan.device)

    def train_on(images: Tensor, labels: Tensor) -> Tensor:
        meter.update(engine.train_step(state, images, labels), labels)
        return meter.sums[1] / meter.sums[0]

    return train_on
