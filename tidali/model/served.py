"""The network for serving: stored pixels in, probabilities out, with resizing and normalisation in the network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tidali.loading.bicubic import bicubic_taps, centre_crop, make_affine
from tidali.model.checkpoint import ModelCard


class ServedModel(nn.Module):
    """uint8 pixels (N, H, W, 3) RGB -> probabilities (N, classes) float32, equal to those of `Classifier` in float32.

    The resize is `tidali.loading.resample`'s, ``Y = A_y X A_x^T`` and the clamp of what the cubic overshoots, in whole
    matrices: constants that every runtime multiplies fast.
    """

    horizontal: Tensor
    vertical: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, card: ModelCard, size: tuple[int, int]) -> None:
        """
        Args:
            network: on the CPU; copied.
            size: height and width of its input, in pixels.
        """
        super().__init__()
        self.network = copy.deepcopy(network).to(memory_format=torch.contiguous_format).eval()
        self.resizes = size != (card.res, card.res) or card.crop_fraction != 1
        affine = make_affine(card.mean, card.std, None)
        self.register_buffer("scale", affine.scale[:, None, None])
        self.register_buffer("offset", affine.offset[:, None, None])
        if self.resizes:
            self.register_buffer("vertical", _matrix(size, card, 0))
            self.register_buffer("horizontal", _matrix(size, card, 1).T.contiguous())

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(torch.float32)
        if self.resizes:
            x = (self.vertical @ (x @ self.horizontal)).clamp(0, 255)
        return torch.softmax(self.network(x * self.scale + self.offset), dim=1)


def _matrix(size: tuple[int, int], card: ModelCard, axis: int) -> Tensor:
    """(res, size of the axis) float32: the whole matrix with which `Resample` multiplies an axis."""
    start, scale = centre_crop(size, card.res, axis, card.crop_fraction)
    taps = bicubic_taps(card.res, torch.tensor([start]), torch.tensor([scale]), max_scale=scale, kernel=card.kernel)
    columns = taps.first[0, :, None] + torch.arange(taps.weights.shape[2])
    columns = columns.clamp(0, size[axis] - 1)  # beyond the image, its border pixel is repeated
    return torch.zeros(card.res, size[axis]).scatter_add_(1, columns, taps.weights[0])
