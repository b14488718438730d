"""3x3 convolutions on a CPU for feature maps of a few pixels, as matrix products that leave out the padding.

A ResNet-18 on 64-pixel images ends in three convolutions of 512 channels at 2x2 pixels. On batches of 100, float32, two cores
with AVX2, oneDNN 3.12 takes 57 ms for the gradient of such kernels, as long as at 4x4 pixels; one matrix product for each tap
takes 8. oneDNN takes 12.5 ms each for the output and for the gradient of the input; one matrix product over whole images takes
9 and 7. A whole step, measured alternately with torch's own convolutions: 572 ms instead of 746 at 64 pixels, 174 instead of
336 at 32, 1334 instead of 1390 at 96. In bf16, two cores of a Zen 4, a step at 64 pixels takes 270 ms instead of 303.

This can go when oneDNN's gradient of 3x3 kernels at 2x2 pixels takes clearly less time than at 4x4, which is four times the
work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_SIDE = 3
"""Largest side in pixels. At 3x3 the kernels' gradient takes half of oneDNN's time (21 ms against 42), at 4x4 two thirds, at
7x7 all of it."""


def speed_up_tiny_images(model: nn.Module) -> None:
    """Make the model's 3x3 convolutions of stride 1 use the matrix products below whenever their input is at most `MAX_SIDE`
    high and wide.

    Only training in channels-last memory on a CPU becomes faster. What the convolutions compute, their parameters and their
    names stay the same; the order of their sums changes.
    """
    wanted = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    wanted |= {"bias": None, "padding_mode": "zeros"}
    for module in model.modules():
        if type(module) is nn.Conv2d and all(getattr(module, name) == value for name, value in wanted.items()):
            module.__class__ = _Conv3x3


class _Conv3x3(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training or max(input.shape[2:]) > MAX_SIDE:
            return super().forward(input)
        # Autocast converts the operands of a convolution, but not those of a custom autograd function.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        out: Tensor = _TinyConvolution.apply(input.to(dtype), self.weight)
        return out


class _TinyConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.weight_dtype, kernels = weight.dtype, weight.to(images.dtype)
        if max(images.shape[2:]) > 2:
            ctx.save_for_backward(images, kernels)
            return functional.conv2d(images, kernels, padding=1)
        matrix = as_matrix(kernels, images.shape[2], images.shape[3])
        ctx.save_for_backward(images, matrix)
        return _multiply(images, matrix.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (images, kernels) = grads, ctx.saved_tensors
        if kernels.ndim == 2:
            return _multiply(grad, kernels), kernels_grad(images, grad, ctx.weight_dtype)
        one, none, wanted = [1, 1], [0, 0], [True, False, False]
        of_images: Tensor = torch.ops.aten.convolution_backward(
            grad, images, kernels, None, one, one, one, False, none, 1, wanted
        )[0]
        return of_images, kernels_grad(images, grad, ctx.weight_dtype)


def as_matrix(kernels: Tensor, height: int, width: int) -> Tensor:
    """The matrix of a 3x3 convolution, stride 1, padding 1, on an image of 1 or 2 pixels a side: every input meets every
    output.

    Args:
        kernels: (O, I, 3, 3).

    Returns:
        (height * width * O, height * width * I): outputs by inputs, both in the order of channels_last.
    """
    taps = kernels.permute(0, 2, 3, 1)
    rows = [taps[:, 1 - y : 1 - y + height, 1 - x : 1 - x + width] for y in range(height) for x in range(width)]
    return torch.stack(rows).flatten(2).flatten(0, 1)


def _multiply(images: Tensor, matrix: Tensor) -> Tensor:
    """Each image, flattened in channels_last order, times the matrix, as an image of the same height and width."""
    count, _, height, width = images.shape
    product = images.permute(0, 2, 3, 1).reshape(count, -1) @ matrix
    return product.view(count, height, width, -1).permute(0, 3, 1, 2)


def kernels_grad(images: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a 3x3 convolution's kernels: stride 1, padding 1, no bias.

    One matrix product for each of the nine taps, over the pixels at which the tap lies inside the image: at 2x2 pixels these
    are 16 pairs of pixels, where a convolution that also multiplies the padding has 36.

    Args:
        images: (N, I, H, W), channels_last.
        grad: of the convolution's output (N, O, H, W), channels_last, of the same dtype.
        dtype: of the result: that of the kernels.

    Returns:
        (O, I, 3, 3), channels_last.
    """
    pixels, grads = images.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    found = grad.new_empty(3, 3, grad.shape[1], images.shape[1])
    for row, (to_y, from_y) in enumerate(_overlaps(images.shape[2])):
        for column, (to_x, from_x) in enumerate(_overlaps(images.shape[3])):
            outputs, inputs = grads[:, to_y, to_x].flatten(0, 2), pixels[:, from_y, from_x].flatten(0, 2)
            torch.mm(outputs.T, inputs, out=found[row, column])
    return found.permute(2, 3, 0, 1).to(dtype, memory_format=torch.channels_last)


def _overlaps(side: int) -> list[tuple[slice, slice]]:
    """For the taps at -1, 0 and 1: the output pixels along a side for which the tap is inside the image, and its input
    pixels."""
    return [
        (slice(max(0, -offset), side - max(0, offset)), slice(max(0, offset), side - max(0, -offset))) for offset in (-1, 0, 1)
    ]
