"""Training loops that are measured, each twice: its step alone, on one batch that stays in memory, and end to end, fed by the
loader that it comes with. ResNet-18 with the stock stem from random weights, on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import datasets, models, transforms

from bench.case_worker import DataJob, Job, Stream
from bench.original import original_train_on
from bench.ours import tidali_train_on
from bench.peer_loaders import torchvision_v1
from tidali.dataset.contract import open_dataset
from tidali.hardware.device import plan_device, set_numerics
from tidali.hardware.timing import Stopwatch
from tidali.loading.augment import Augment
from tidali.loading.data import Data

TrainOn = Callable[[Tensor, Tensor], Any]
"""One optimizer step on images and labels; gives the loss, as a tensor or a number."""


class Training:
    """A loop's steps on batches that `next_batch` gives."""

    cycle_steps = 1
    first_step_s = 0.0

    def __init__(self, train_on: TrainOn, next_batch: Callable[[], Any], device: torch.device) -> None:
        self.device, self._train_on, self._next_batch = device, train_on, next_batch

    def step(self) -> int:
        images, labels = self._next_batch()
        self._train_on(images, labels)
        return len(labels)

    def check(self, batches: int | None) -> dict[str, Any]:
        """Of the first step: its loss, and what went into it."""
        watch = Stopwatch(self.device)
        images, labels = self._next_batch()
        loss = float(self._train_on(images, labels))
        self.first_step_s = watch.elapsed_s()
        return {"loss": loss, "images": len(labels), "shape": list(images.shape[1:])}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def in_memory(job: Job, device: torch.device, *, channels_last: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    """Always the same batch, random and on the device."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(job.batch_size, 3, job.res, job.res, device=device).to(memory_format=memory_format)
    labels = torch.randint(job.classes, (job.batch_size,), device=device)
    return lambda: (images, labels)


# ---------------------------------------------------------------------------------------------------------- the original study


def study_step(job: DataJob) -> Training:
    device = _device()
    return Training(original_train_on(job.classes, "imagenet", device), in_memory(job, device, channels_last=False), device)


def study_loop(job: DataJob) -> Training:
    device = _device()
    steps = [transforms.Resize(job.res, transforms.InterpolationMode.BICUBIC), transforms.RandomHorizontalFlip()]
    images = datasets.ImageFolder(job.folder, transforms.Compose([*steps, transforms.ToTensor()]))  # it does not normalise
    loader = torch.utils.data.DataLoader(images, batch_size=job.batch_size, shuffle=True, num_workers=job.cores, drop_last=True)
    return Training(original_train_on(job.classes, "imagenet", device), Stream(loader, job).next, device)


# ------------------------------------------------------------------------------------------------------ torchvision's reference


def torchvision_step(job: DataJob) -> Training:
    device = _device()
    return Training(_torchvision(job, device), in_memory(job, device, channels_last=False), device)


def torchvision_loop(job: DataJob) -> Training:
    device = _device()
    return Training(_torchvision(job, device), Stream(torchvision_v1(job), job).next, device)


def _torchvision(job: DataJob, device: torch.device) -> TrainOn:
    """references/classification/train.py with ``--amp``: SGD 0.1, momentum 0.9, decay 1e-4, NCHW; loss, top-1 and top-5 are
    read after each step. Its ``--amp`` is CUDA's autocast and scaler: on a CPU the step is float32."""
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


# ------------------------------------------------------------------------------------------------------------------------ timm


def timm_step(job: DataJob) -> Training:
    device = _device()
    return Training(_timm(job, device), in_memory(job, device, channels_last=True), device)


def timm_loop(job: DataJob) -> Training:
    """timm's loader, its crop, colour jitter and interpolation set so that it gives the same images as the others."""
    from timm.data import ImageDataset, create_loader

    device = _device()
    loader = create_loader(
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
    return Training(_timm(job, device), Stream(loader, job).next, device)


def _timm(job: DataJob, device: torch.device) -> TrainOn:
    """train.py with ``--amp --amp-dtype bfloat16 --channels-last``: timm's model, its SGD with Nesterov momentum 0.9 and decay
    2e-5, label smoothing 0.1. Without ``--amp`` where the device has to emulate bfloat16, and with float16 on an older GPU."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    dtype = plan_device("auto", "auto", "auto").amp_dtype
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


# ---------------------------------------------------------------------------------------------------------------------- tidali


def tidali_step(job: DataJob) -> Training:
    device = plan_device("auto", "auto", "auto").device
    return Training(_tidali(job), in_memory(job, device, channels_last=True), device)


def tidali_loop(job: DataJob) -> Training:
    device = plan_device("auto", "auto", "auto").device
    data = Data(open_dataset(Path(job.root)), ("train",), device, max_res=job.res)
    settings: dict[str, Any] = dict(
        res=job.res, batch_size=job.batch_size, mean=job.mean, std=job.std, train=True, augment=Augment(flip="random")
    )
    return Training(_tidali(job), Stream(data.batches("train", **settings), job).next, device)


def _tidali(job: DataJob) -> TrainOn:
    """The default recipe's step, averaged weights included, as ``tidali train`` takes it."""
    set_numerics()
    return tidali_train_on(job.classes, plan_device("auto", "auto", "auto"), "imagenet", averaged=True)
