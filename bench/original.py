"""The original study's training loop, as a peer: float32, NCHW, eager, the optimizer as torch makes it by default."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tidali.config import Stem
from tidali.model.resnet import build_resnet18


def original_train_on(num_classes: int, stem: Stem, device: torch.device) -> Callable[[Tensor, Tensor], float]:
    """The step, with the running loss and accuracy that the study's loop reads after each.

    Returns:
        What trains on images (N, 3, H, W) float32, contiguous, and labels (N,) int64, and gives the batch's loss.
    """
    model = build_resnet18(num_classes, stem).to(device)
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
