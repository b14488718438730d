"""The gradient of 3x3 kernels on a CPU, where images have shrunk to a few pixels.

oneDNN 3.12 takes as long over 2x2 pixels as over 4x4 (57 ms; batch 100, 512 channels, float32, two cores with AVX2), and longer
still over single ones. A ResNet-18 of 64-pixel images ends in three such convolutions: with this module its step took 811 ms
instead of 997, and that of 32-pixel images 204 instead of 466, the two taking turns. oneDNN's bf16 kernels are slow there too,
11 ms for products of 4; what the step gains in bf16 was not measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_SIDE = 3
"""In pixels. At 3x3 the products below take half the time (21 ms against 42), at 4x4 two thirds, at 7x7 as long as oneDNN."""


def speed_up_tiny_images(model: nn.Module) -> None:
    """Give the model's 3x3 convolutions of stride 1 the gradient below, for batches whose images are tiny when they get there.

    Only training in channels-last memory on a CPU gains. What they compute, their parameters and their names stay as they are.
    """
    wanted = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "bias": None}
    for module in model.modules():
        if type(module) is nn.Conv2d and all(getattr(module, name) == value for name, value in wanted.items()):
            module.__class__ = _Conv3x3


class _Conv3x3(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training or max(input.shape[2:]) > MAX_SIDE:
            return super().forward(input)
        # What autocast does to the operands of a convolution; it does not look into functions of one's own.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        out: Tensor = _ByTaps.apply(input.to(dtype), self.weight.to(dtype))
        return out


class _ByTaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(images, kernels)
        return functional.conv2d(images, kernels, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        images, kernels = ctx.saved_tensors
        one, none, wanted = [1, 1], [0, 0], [True, False, False]
        of_images: Tensor = torch.ops.aten.convolution_backward(
            grads[0], images, kernels, None, one, one, one, False, none, 1, wanted
        )[0]
        return of_images, kernels_grad(images, grads[0])


def kernels_grad(images: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a 3x3 convolution's kernels: stride 1, padding 1, no bias.

    One matrix product for each of the nine taps, over the pixels at which the tap lies inside the image: at 2x2 pixels 16 pairs
    of pixels, where a convolution that is blind to its padding multiplies 36.

    Args:
        images: (N, I, H, W), channels_last.
        grad: of the convolution's output (N, O, H, W), channels_last, of the same dtype.

    Returns:
        (O, I, 3, 3), channels_last, of that dtype.
    """
    pixels, grads = images.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    found = grad.new_empty(grad.shape[1], 3, 3, images.shape[1])
    for row, (to_y, from_y) in enumerate(_overlaps(images.shape[2])):
        for column, (to_x, from_x) in enumerate(_overlaps(images.shape[3])):
            outputs, inputs = grads[:, to_y, to_x].flatten(0, 2), pixels[:, from_y, from_x].flatten(0, 2)
            found[:, row, column] = outputs.T @ inputs
    return found.permute(0, 3, 1, 2)


def _overlaps(side: int) -> list[tuple[slice, slice]]:
    """For the taps at -1, 0 and 1: the outputs along a side of the image for which it lies inside, and the inputs under it."""
    return [
        (slice(max(0, -offset), side - max(0, offset)), slice(max(0, offset), side - max(0, -offset))) for offset in (-1, 0, 1)
    ]
