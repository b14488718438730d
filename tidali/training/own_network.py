"""Whether a network that is not tidali's can be trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tidali.config import TrainSettings
from tidali.errors import UsageError, first_line
from tidali.hardware.device import DevicePlan
from tidali.hardware.ranks import Ranks
from tidali.model.resnet import refuse_not_finite


def check_own_network(model: nn.Module, num_classes: int, settings: TrainSettings, plan: DevicePlan, ranks: Ranks) -> None:
    """Run a copy of the user's network on two images of zeros, in evaluation and in training mode.

    Raises:
        UsageError: it fails, or does not return logits of the data's classes, or has nothing to train or weights that are not
            finite, or the settings are for a ResNet of tidali's.
    """
    recipe = settings.recipe
    if settings.init != "none" or settings.stem != "imagenet":
        raise UsageError("model: init and stem are for tidali's own networks; leave them out, and load weights into the model")
    if recipe.freeze != "none" or (recipe.head_lr_scale, recipe.stage_lr_decay) != (1, 1):
        raise UsageError(
            "model: freeze, head_lr_scale and stage_lr_decay are for tidali's own networks; set requires_grad of parameters"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("model: none of its parameters has requires_grad, so there is nothing to train")
    refuse_not_finite(model.state_dict(), "model")
    shape = (2, 3, settings.res, settings.res)
    images = torch.zeros(shape, dtype=plan.images_dtype, device=plan.device)
    try:
        copied = copy.deepcopy(model).to(plan.device)
        with plan.autocast():
            found = [copied.train(training)(images) for training in (False, True)]
        unused: list[str] = []
        if ranks.world_size > 1 and isinstance(found[1], Tensor):
            found[1].float().sum().backward()
            unused = [name for name, one in copied.named_parameters() if one.requires_grad and one.grad is None]
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"model: fails on images {shape}: {type(error).__name__}: {first_line(error)}") from None
    for logits in found:
        if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
            returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(
                f"model: returns {returned} for two images, and logits (2, {num_classes}) are needed for the data's classes"
            )
    if unused:
        raise UsageError(
            f"model: {unused[0]} has no part in its output, which ranks cannot share; set its requires_grad to False"
        )
