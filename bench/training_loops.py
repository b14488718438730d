"""Training loops as cases: the original study's, torchvision's reference, timm's and tidali's.

Each is two cases, with a ResNet-18 with random weights: its step alone, on one batch that stays in memory, and end to end, fed
by the loader that it comes with. `bench.peers` measures all with the stock stem; `bench.step` measures the steps of the
original study and of tidali with either stem. Each case runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import datasets, models, transforms

from bench.case_worker import DataJob, Job, Stream
from bench.peer_loaders import torchvision_v1
from tidali.config import Augment, Preprocess, Stem
from tidali.dataset.contract import open_dataset
from tidali.hardware.cpu_memory import keep_freed_memory
from tidali.hardware.device import DevicePlan, plan_device, set_numerics
from tidali.hardware.timing import Stopwatch
from tidali.loading import batches as loading
from tidali.loading.data import Data
from tidali.model.resnet import build_resnet18
from tidali.recipes import make_recipe
from tidali.training import engine
from tidali.training.engine import TrainState, make_train_state
from tidali.training.metrics import Meter

TrainOn = Callable[[Tensor, Tensor], Any]
"""One optimizer step on images (N, 3, H, W) and labels (N,) int64. Returns the loss, as a tensor or a number."""


class Training:
    """The steps of a training loop, on the batches that `next_batch` returns."""

    cycle_steps = 1
    first_step_s = 0.0

    def __init__(self, train_on: TrainOn, next_batch: Callable[[], Any], device: torch.device) -> None:
        self.device, self._train_on, self._next_batch = device, train_on, next_batch

    def step(self) -> int:
        images, labels = self._next_batch()
        self._train_on(images, labels)
        return len(labels)

    def check(self, batches: int | None) -> dict[str, Any]:
        """The first step's loss, and the shape of its batch."""
        watch = Stopwatch(self.device)
        images, labels = self._next_batch()
        loss = float(self._train_on(images, labels))
        self.first_step_s = watch.elapsed_s()
        return {"loss": loss, "images": len(labels), "shape": list(images.shape[1:])}


def _in_memory(job: Job, device: torch.device, *, channels_last: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    """Returns the same batch each time, random and on the device."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(job.batch_size, 3, job.res, job.res, device=device).to(memory_format=memory_format)
    labels = torch.randint(job.classes, (job.batch_size,), device=device)
    return lambda: (images, labels)


def _step_and_loop(
    make_train_on: Callable[[Job, DevicePlan], TrainOn],
    make_loader: Callable[[DataJob, torch.device], Any],
    *,
    channels_last: bool,
) -> tuple[Callable[[Job], Training], Callable[[DataJob], Training]]:
    """The two cases of a training loop: its step alone, and the step with its loader."""

    def step(job: Job) -> Training:
        plan = plan_device(job.device, job.amp, job.compile)
        train_on = make_train_on(job, plan)
        return Training(train_on, _in_memory(job, plan.device, channels_last=channels_last), plan.device)

    def loop(job: DataJob) -> Training:
        plan = plan_device(job.device, job.amp, job.compile)
        return Training(make_train_on(job, plan), Stream(make_loader(job, plan.device), job).next, plan.device)

    return step, loop


# ---------------------------------------------------------------------------------------------------------- the original study


def _study_train_on(job: Job, plan: DevicePlan) -> TrainOn:
    """The original study's step: float32, NCHW, eager, torch's default optimizer implementation, with the running loss and
    accuracy that its loop reads after each step."""
    device = plan.device
    model = build_resnet18(job.classes, job.stem).to(device)
    model.train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    running = {"loss": 0.0, "correct": 0}

    def train_on(images: Tensor, labels: Tensor) -> float:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = model(images)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        loss_value = loss.item()
        running["loss"] += loss_value * len(labels)
        running["correct"] += int((outputs.argmax(1) == labels).sum().item())
        return loss_value

    return train_on


def _study_loader(job: DataJob, device: torch.device) -> Any:
    steps = [transforms.Resize(job.res, transforms.InterpolationMode.BICUBIC), transforms.RandomHorizontalFlip()]
    images = datasets.ImageFolder(job.folder, transforms.Compose([*steps, transforms.ToTensor()]))  # it does not normalise
    return torch.utils.data.DataLoader(images, batch_size=job.batch_size, shuffle=True, num_workers=job.cores, drop_last=True)


study_step, study_loop = _step_and_loop(_study_train_on, _study_loader, channels_last=False)

# ------------------------------------------------------------------------------------------------------ torchvision's reference


def _torchvision_train_on(job: Job, plan: DevicePlan) -> TrainOn:
    """references/classification/train.py with ``--amp``: SGD 0.1, momentum 0.9, decay 1e-4, NCHW; loss, top-1 and top-5 are
    read after each step. Its ``--amp`` is CUDA's autocast and scaler: on a CPU the step is float32."""
    device = plan.device
    model = models.resnet18(num_classes=job.classes).to(device).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    amp = device.type == "cuda"
    scaler = torch.amp.GradScaler("cuda", enabled=amp)

    def train_on(images: Tensor, labels: Tensor) -> float:
        images, labels = images.to(device), labels.to(device)
        with torch.amp.autocast("cuda", enabled=amp):
            output = model(images)
            loss = criterion(output, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.inference_mode():
            correct = output.topk(min(5, job.classes)).indices == labels[:, None]
            float(correct[:, 0].sum())
            float(correct.sum())
        return loss.item()

    return train_on


torchvision_step, torchvision_loop = _step_and_loop(
    _torchvision_train_on, lambda job, device: torchvision_v1(job), channels_last=False
)

# ------------------------------------------------------------------------------------------------------------------------ timm


def _timm_train_on(job: Job, plan: DevicePlan) -> TrainOn:
    """train.py with ``--amp --amp-dtype bfloat16 --channels-last``: timm's model, its SGD with Nesterov momentum 0.9 and decay
    2e-5, label smoothing 0.1. Without ``--amp`` if the device has to emulate bfloat16, and with float16 on an older GPU."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    device, dtype = plan.device, plan.amp_dtype
    model = timm.create_model("resnet18", num_classes=job.classes)
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=2e-5)
    criterion = LabelSmoothingCrossEntropy(0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def train_on(images: Tensor, labels: Tensor) -> Tensor:
        images, labels = images.to(device), labels.to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.amp.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = criterion(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return train_on


def _timm_loader(job: DataJob, device: torch.device) -> Any:
    """timm's loader, with its crop, colour jitter and interpolation set so that it returns the same images as the others."""
    from timm.data import ImageDataset, create_loader

    return create_loader(
        ImageDataset(job.folder),
        input_size=(3, job.res, job.res),
        batch_size=job.batch_size,
        is_training=True,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        hflip=0.5,
        color_jitter=None,
        interpolation="bicubic",
        mean=job.mean,
        std=job.std,
        num_workers=job.cores,
        device=device,
        use_prefetcher=device.type == "cuda",
    )


timm_step, timm_loop = _step_and_loop(_timm_train_on, _timm_loader, channels_last=True)

# ---------------------------------------------------------------------------------------------------------------------- tidali


def make_state(num_classes: int, plan: DevicePlan, stem: Stem, *, averaged: bool) -> TrainState:
    """A fresh model in training mode, with the modern recipe's optimizer.

    Args:
        averaged: also keep the recipe's averaged weights, as ``tidali train`` does. The original study's loop has none, so the
            case that it is compared with has none either.
    """
    recipe = make_recipe("modern") if averaged else make_recipe("modern", ema_decay=0.0)
    state = make_train_state(build_resnet18(num_classes, stem), plan, lambda step: 1e-3, recipe)
    if plan.device.type == "cpu":
        keep_freed_memory()  # as `tidali train` does
    state.model.train()
    return state


def _tidali_train_on(job: Job, plan: DevicePlan) -> TrainOn:
    """tidali's step on channels-last images, with the running loss and accuracy that ``tidali train`` keeps on the device.
    Returns the running mean loss, a scalar on the device."""
    set_numerics()
    state, meter = make_state(job.classes, plan, job.stem, averaged=job.averaged), Meter(plan.device)

    def train_on(images: Tensor, labels: Tensor) -> Tensor:
        meter.update(engine.train_step(state, images, labels), labels)
        return meter.sums[1] / meter.sums[0]

    return train_on


def _tidali_loader(job: DataJob, device: torch.device) -> Any:
    preprocess = Preprocess(res=job.res, mean=job.mean, std=job.std)
    training = loading.Training(augment=Augment(flip="random"))
    dtype = plan_device(job.device, job.amp, "off").images_dtype  # as `tidali train` has them made
    data = Data(open_dataset(Path(job.root)), device)
    return data.batches("train", preprocess, job.batch_size, training=training, dtype=dtype)


tidali_step, tidali_loop = _step_and_loop(_tidali_train_on, _tidali_loader, channels_last=True)
