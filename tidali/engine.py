"""The training step, the epoch around it, and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidali.device import DevicePlan
from tidali.errors import TidaliError
from tidali.metrics import Meter, Score
from tidali.schedule import Schedule
from tidali.timing import Stopwatch, WaitTimer


@dataclass(kw_only=True)
class TrainState:
    """What a step changes."""

    model: nn.Module
    """The uncompiled module, the one that is saved."""
    forward: Callable[[Tensor], Tensor]
    """The same module, compiled where that pays."""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    plan: DevicePlan
    label_smoothing: float = 0.0
    step: int = 0
    """Optimizer steps done."""
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.plan.device.type, enabled=self.plan.needs_scaler)


def make_train_state(
    model: nn.Module,
    plan: DevicePlan,
    schedule: Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    label_smoothing: float,
) -> TrainState:
    """Put the model on its device, channels-last, and make its optimizer: SGD, with decay on weights of two or more dimensions
    only (batch norm's and biases are vectors)."""
    model.to(plan.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=schedule(0), momentum=momentum, nesterov=nesterov, fused=True)
    return TrainState(
        model=model,
        forward=torch.compile(model, fullgraph=True) if plan.compile else model,
        optimizer=optimizer,
        schedule=schedule,
        plan=plan,
        label_smoothing=label_smoothing,
    )


def train_step(state: TrainState, images: Tensor, labels: Tensor) -> Tensor:
    """One optimizer step. Nothing in it makes the host wait for the device.

    Args:
        images: (N, 3, H, W) float32, channels_last, normalised, on the device.
        labels: (N,) int64, on the device.

    Returns:
        The batch's logits (N, C), detached.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = state.schedule(state.step)
    with state.plan.autocast():
        logits = state.forward(images)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=state.label_smoothing)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return logits.detach()


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One pass over the training split."""

    score: Score
    images_per_s: float
    seconds: float
    data_wait_share: float
    """Part of the epoch that the loop spent waiting for the loader, 0..1, on the host's clock."""


def train_epoch(
    state: TrainState,
    batches: Iterable[tuple[Tensor, Tensor]],
    on_step: Callable[[int, Meter], None] | None = None,
) -> EpochReport:
    """Train over all batches.

    Args:
        on_step: called after each step with the steps done in this epoch and the running counts, to show progress.

    Raises:
        TidaliError: the loss is not finite at the end of the epoch.
    """
    state.model.train()
    meter, watch, wait = Meter(state.plan.device), Stopwatch(state.plan.device), WaitTimer()
    iterator = iter(batches)
    steps = 0
    while True:
        with wait:
            batch = next(iterator, None)
        if batch is None:
            break
        images, labels = batch
        logits = train_step(state, images, labels)
        meter.update(logits, labels)
        steps += 1
        if on_step is not None:
            on_step(steps, meter)
    seconds = watch.elapsed_s()
    score = meter.read()
    if not score.loss_sum - score.loss_sum == 0.0:
        raise TidaliError(f"the loss is no longer finite by step {state.step}; try a lower --lr")
    return EpochReport(
        score=score,
        images_per_s=score.samples / seconds,
        seconds=seconds,
        data_wait_share=wait.total_s / seconds,
    )


@torch.inference_mode()
def evaluate(
    forward: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    plan: DevicePlan,
    *,
    expected_samples: int,
) -> Score:
    """Score every sample of a split exactly once.

    Args:
        forward: on the plan's device; left in evaluation mode.
        expected_samples: the split's size.

    Raises:
        TidaliError: the batches held another number of samples.
    """
    forward.eval()
    meter = Meter(plan.device)
    for images, labels in batches:
        if labels.numel():
            with plan.autocast():
                logits = forward(images)
            meter.update(logits, labels)
    score = meter.read()
    if score.samples != expected_samples:
        raise TidaliError(f"evaluated {score.samples} samples, the split has {expected_samples}")
    return score
