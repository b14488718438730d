"""The training step, the epoch around it, and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import ResNet

from tidali.config import Recipe
from tidali.errors import TidaliError
from tidali.hardware.cpu_convolution import speed_up_tiny_images
from tidali.hardware.cpu_optimizer import ChannelsLastSGD
from tidali.hardware.cpu_pooling import pool_before_relu
from tidali.hardware.device import DevicePlan
from tidali.hardware.ranks import Ranks
from tidali.hardware.timing import Stopwatch, WaitTimer
from tidali.model.parts import frozen_modules, lr_scales, set_training
from tidali.model.resnet import compute_logits
from tidali.training.averages import Ema
from tidali.training.metrics import Meter, Score
from tidali.training.schedule import Schedule

_MAX_SHAPES = 64
"""At most so many shapes are compiled; Dynamo's own limit is 8, and a recipe may list more sizes."""


@dataclass(kw_only=True)
class TrainState:
    """Mutable training state."""

    model: nn.Module
    """The module without compilation; its weights are saved."""
    forward: Callable[[Tensor], Tensor]
    """The same module for the forward pass: compiled and in DistributedDataParallel where the run has them."""
    ddp: DistributedDataParallel | None = None
    """The same module in DistributedDataParallel, where there are several ranks."""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    plan: DevicePlan
    recipe: Recipe
    """Label smoothing, gradient clipping and accumulation are read from it in each step."""
    ema: Ema | None = None
    frozen: tuple[str, ...] = ()
    """Names of the modules that keep their weights."""
    step: int = 0
    """Optimizer steps done."""
    compile_s: float = 0.0
    """Seconds spent on compiling, once for each shape of a batch."""
    compiled: set[torch.Size] = field(default_factory=set)
    scaler: torch.amp.GradScaler = field(init=False)

    @property
    def evaluated(self) -> nn.Module:
        """The module that is evaluated and saved as the result: the moving average where there is one."""
        return self.ema.model if self.ema is not None else self.model

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.plan.device.type, enabled=self.plan.needs_scaler)


def make_train_state(
    model: nn.Module,
    plan: DevicePlan,
    schedule: Schedule,
    recipe: Recipe,
    *,
    ranks: Ranks | None = None,
) -> TrainState:
    """Move the model to its device, channels-last, and make its optimizer: SGD, with weight decay only on tensors of two or
    more dimensions, which leaves out batch norm and biases. For a CPU the model also gets faster layers of the same values
    (`tidali.hardware.cpu_convolution`, `tidali.hardware.cpu_pooling`), unless it is compiled."""
    if plan.device.type == "cpu" and not plan.compile and type(model) is ResNet:  # any other may use its modules otherwise
        speed_up_tiny_images(model)
        pool_before_relu(model)
    frozen = frozen_modules(recipe.freeze)
    for name in frozen:
        # With no gradient below, autograd keeps nothing of these parts' forward pass.
        model.get_submodule(name).requires_grad_(False)
    model.to(plan.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = _parameter_groups(model, recipe)
    sgd = ChannelsLastSGD if plan.device.type == "cpu" else torch.optim.SGD
    optimizer = sgd(groups, lr=schedule(0), momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    if recipe.momentum:
        # The fused optimizer would allocate them uninitialised in its first step, and a step that overflowed leaves them so.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    wrapped = model if ranks is None else ranks.wrap(model)
    return TrainState(
        model=model,
        forward=compiled(wrapped, plan) if plan.compile else wrapped,
        ddp=wrapped if isinstance(wrapped, DistributedDataParallel) else None,
        optimizer=optimizer,
        schedule=schedule,
        plan=plan,
        recipe=recipe,
        ema=Ema(model, recipe.ema_decay, frozen) if recipe.ema_decay else None,
        frozen=frozen,
    )


def _parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The optimizer's groups of what is trained, by learning rate; in each the tensors that decay come before the others."""
    scales = lr_scales(recipe.head_lr_scale, recipe.stage_lr_decay)
    by_scale: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_scale.setdefault(scales.get(name.partition(".")[0], 1.0), []).append(parameter)
    return [
        {"params": [p for p in members if (p.ndim >= 2) is decays], "weight_decay": decay, "lr_scale": scale}
        for scale, members in by_scale.items()
        for decays, decay in ((True, recipe.weight_decay), (False, 0.0))
    ]


def compiled(model: nn.Module, plan: DevicePlan) -> Callable[[Tensor], Tensor]:
    """The compiled model: one graph, unless DistributedDataParallel cuts it into its buckets; compiled again for each shape of
    a batch, which is faster than one program for all shapes. Dynamo's and Inductor's settings stay changed in this process."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_SHAPES)
    if torch.are_deterministic_algorithms_enabled() and hasattr(torch._inductor.config, "deterministic"):
        # Otherwise Inductor times kernels and takes the fastest, which may be another one in the next run.
        torch._inductor.config.deterministic = True
    fullgraph = type(model) is ResNet  # a network of the user's own may have parts that Dynamo cannot trace
    forward: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=fullgraph, dynamic=False, mode=plan.compile_mode)
    return forward


def train_step(state: TrainState, images: Tensor, targets: Tensor) -> Tensor:
    """One optimizer step. Nothing in it makes the host wait for the device.

    Args:
        images: (N, 3, H, W) float, channels_last, normalised, on the device.
        targets: labels (N,) int64, or class probabilities (N, C) float32, on the device.

    Returns:
        The batch's logits (N, C), detached.
    """
    recipe = state.recipe
    for group in state.optimizer.param_groups:
        group["lr"] = state.schedule(state.step) * group["lr_scale"]
    logits = []
    parts = list(zip(images.tensor_split(recipe.accumulate), targets.tensor_split(recipe.accumulate), strict=True))
    for number, (part, labels) in enumerate(parts):
        # Ranks add up their gradients once, in the last piece's backward pass, which adds to what the others left.
        with nullcontext() if state.ddp is None or number == len(parts) - 1 else state.ddp.no_sync():
            with state.plan.autocast():
                output = state.forward(part)
                loss = functional.cross_entropy(output.float(), labels, label_smoothing=recipe.label_smoothing)
            state.scaler.scale(loss * (len(part) / len(images))).backward()
        # A copy: where CUDA graphs are replayed, the next piece is written over this one's output.
        logits.append(output.detach().clone() if len(parts) > 1 else output.detach())
    if recipe.grad_clip_norm:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), recipe.grad_clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if state.ema is not None:
        state.ema.update(state.step)
    return torch.cat(logits) if len(logits) > 1 else logits[0]


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """One pass over the training split."""

    score: Score
    images_per_s: float
    seconds: float
    data_wait_share: float
    """Fraction of the epoch that the loop spent waiting for the loader, 0..1, on the host's clock."""
    compile_s: float
    """Seconds spent on steps that compiled; the rate does not count these steps."""


def train_epoch(
    state: TrainState,
    batches: Iterable[tuple[Tensor, Tensor]],
    meter: Meter,
    *,
    ranks: Ranks | None = None,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    on_step: Callable[[float], None] | None = None,
) -> EpochResult:
    """Train on the remaining batches of an epoch.

    Args:
        meter: accumulates this epoch's counts; after a resume it holds those of the steps before.
        mix: turns images and labels into mixed images and class probabilities.
        on_step: called after each step with the seconds spent waiting for data so far, to show progress and to save.

    Returns:
        The epoch's result. Its loss is not finite where that of any step was not.
    """
    set_training(state.model, state.frozen)
    watch, wait = Stopwatch(state.plan.device), WaitTimer()
    before, compiled_before_s, not_counted = meter.read(ranks).samples, state.compile_s, 0
    iterator = iter(batches)
    while True:
        with wait:
            batch = next(iterator, None)
        if batch is None:
            break
        images, labels = batch
        images, targets = (images, labels) if mix is None else mix(images, labels)
        if state.plan.compile and images.shape not in state.compiled:
            # Timed apart: it compiles the forward and backward pass for this shape, which takes nearly all of its time.
            compiling = Stopwatch(state.plan.device)
            logits = train_step(state, images, targets)
            state.compile_s += compiling.elapsed_s()
            state.compiled.add(images.shape)
            not_counted += len(labels)
        else:
            logits = train_step(state, images, targets)
        meter.update(logits, labels)
        if on_step is not None:
            on_step(wait.total_s)
        del batch, images, targets  # so that the next batch reuses its memory: 147 MiB for 256 images of 224 px
    seconds = watch.elapsed_s()
    score = meter.read(ranks)
    compile_s = state.compile_s - compiled_before_s
    not_counted *= ranks.world_size if ranks is not None else 1
    return EpochResult(
        score=score,
        images_per_s=(score.samples - before - not_counted) / (seconds - compile_s),
        seconds=seconds,
        data_wait_share=wait.total_s / seconds,
        compile_s=compile_s,
    )


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Whether all weights and batch-norm statistics are finite. Waits for the device once."""
    floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in floats]).all())


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    plan: DevicePlan,
    *,
    expected_samples: int | Callable[[], int],
    flip: bool = False,
    ranks: Ranks | None = None,
    on_logits: Callable[[Tensor, Tensor], None] | None = None,
) -> Score:
    """Score every sample of a split exactly once.

    Args:
        model: on the plan's device; left in evaluation mode.
        expected_samples: the split's size, or a function that returns it after the last batch, when its corrupt samples are
            known.
        flip: flip TTA (test-time augmentation): average the logits of each image and of the image flipped horizontally.
        on_logits: called with the logits and the labels of each batch.

    Raises:
        TidaliError: the batches held another number of samples.
    """
    model.eval()
    meter = Meter(plan.device)
    for images, labels in batches:
        if labels.numel():
            logits = compute_logits(model, images, plan, flip=flip)
            meter.update(logits, labels)
            if on_logits is not None:
                on_logits(logits, labels)
    score = meter.read(ranks)
    expected = expected_samples if isinstance(expected_samples, int) else expected_samples()
    if score.samples != expected:
        raise TidaliError(f"evaluated {score.samples} samples, the split has {expected}")
    return score
