"""The weights that are evaluated: a moving average of those that are trained, and the batch-norm statistics that fit them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tidali.config import Preprocess
from tidali.hardware.device import DevicePlan
from tidali.loading.batches import Batches
from tidali.loading.data import Data
from tidali.loading.stream import ShardSource
from tidali.model.parts import is_within, set_training

_READ_AT_ONCE = 32
"""Images: a stream decodes two more such batches than are asked for."""


class Ema:
    """A moving average of a model's weights and batch-norm statistics."""

    def __init__(self, model: nn.Module, decay: float, frozen: tuple[str, ...] = ()) -> None:
        """
        Args:
            frozen: modules that do not change.
        """
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._decay = decay
        self._averages, self._values = self._floats(self.model, frozen), self._floats(model, frozen)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after optimizer step number ``step``, counted from 1."""
        # The ramp keeps the random initial weights from lingering in short runs.
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._averages, self._values, step)

    @staticmethod
    def _floats(model: nn.Module, frozen: tuple[str, ...]) -> list[Tensor]:
        floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        # By their place in memory: a tensor that two modules share has two names, and is averaged once.
        return list({tensor.data_ptr(): tensor for name, tensor in floats.items() if not is_within(name, frozen)}.values())


@torch.no_grad()
def measure_statistics(model: nn.Module, images: Tensor, plan: DevicePlan, frozen: tuple[str, ...] = ()) -> None:
    """Set the batch-norm statistics of weights that will be evaluated to those that the images have in their network.

    The running averages that batch norm keeps while it trains are of the weights of some steps ago, and an average of them is
    of no weights at all, which shows as long as weights change fast; Izmailov et al. 2018 ("Averaging weights leads to wider
    optima") measure them anew for averaged weights.

    Args:
        model: on the plan's device; left in evaluation mode.
        images: (N, 3, H, W) float, channels_last, normalised, on the device.
        frozen: modules whose statistics stay.
    """
    norms = batch_norms(model, frozen)
    model.eval()
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the next batch's statistics replace the old ones
    with plan.autocast():
        model(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.eval()
        norm.momentum = momentum


def batch_norms(model: nn.Module, frozen: tuple[str, ...] = ()) -> list[_BatchNorm]:
    """The batch norms that take statistics while the model trains; it is left in training mode."""
    set_training(model, frozen)
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]


def first_images(data: Data, batches: Batches, preprocess: Preprocess, count: int, dtype: torch.dtype) -> Tensor | None:
    """The images of the train split that a run takes first, which are a random sample, as an evaluation sees them; the same
    ones on every rank.

    Args:
        batches: of training. Where they are made of images of one size in memory, so are these.
        count: at most.

    Returns:
        (N, 3, res, res), channels_last, of this dtype; None where there are fewer than two.

    Raises:
        DatasetError, TidaliError: the split cannot be read.
    """
    cached = batches.source.size is not None and not isinstance(batches.source, ShardSource)
    source = batches.source if cached else data.streamed("train", preprocess, _READ_AT_ONCE)
    plain = batches.without_augmentation(source, preprocess, _READ_AT_ONCE, dtype)
    found: list[Tensor] = []
    for images, _ in plain:
        found.append(images)
        if sum(map(len, found)) >= count:
            break
    if isinstance(source, ShardSource):
        source.close()
    images = torch.cat(found)[:count]
    return images if len(images) > 1 else None
