"""The parts of a ResNet: which keep their weights, and how fast each learns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tidali.config import Freeze

PARTS: tuple[tuple[str, ...], ...] = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",), ("fc",))
"""The modules of a ResNet in the order of its forward pass: the stem, four stages and the head."""
_FROZEN_PARTS: Mapping[Freeze, int] = {"none": 0, "stem": 1, "layer1": 2, "layer2": 3, "layer3": 4, "body": 5}


def frozen_modules(freeze: Freeze) -> tuple[str, ...]:
    """The names of the modules that keep their weights."""
    return tuple(name for part in PARTS[: _FROZEN_PARTS[freeze]] for name in part)


def set_training(model: nn.Module, frozen: tuple[str, ...]) -> None:
    """Put a model in training mode, but for the modules that are frozen."""
    model.train()
    for name in frozen:
        model.get_submodule(name).eval()


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a module or a tensor is one of the modules, or in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def lr_scales(head_lr_scale: float, stage_lr_decay: float) -> dict[str, float]:
    """Name of a module -> its learning rate as a multiple of the last stage's."""
    depths = {name: depth for depth, part in enumerate(reversed(PARTS[:-1])) for name in part}
    return {**{name: stage_lr_decay**depth for name, depth in depths.items()}, PARTS[-1][0]: head_lr_scale}
