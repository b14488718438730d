"""torchvision's ResNet-18 with either stem, and what is loaded into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from tidali.config import Stem, StemInit
from tidali.errors import UsageError


def build_resnet18(num_classes: int, stem: Stem, *, stem_bias: bool = False) -> nn.Module:
    """A randomly initialised ResNet-18.

    Takes images (N, 3, H, W) float, any memory layout, H and W at least 32, and gives logits (N, num_classes).

    Args:
        stem: ``imagenet`` is torchvision's 7x7/2 convolution and 3x3/2 max-pool; ``small`` is a 3x3/1 convolution and no
            pooling: four times the side of every feature map for 15 times the work (2.222 against 0.148 GMAC at 64 px).
        stem_bias: give the small stem's convolution a bias, as the original study's fifth row has.
    """
    model = resnet18(weights=None, num_classes=num_classes)
    if stem == "small":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=stem_bias)
        nn.init.kaiming_normal_(
            model.conv1.weight, mode="fan_out", nonlinearity="relu"
        )  # as torchvision initialises the stock one
        model.maxpool = nn.Identity()
    return model


def pool_before_relu(model: nn.Module) -> None:
    """Have torchvision's ResNet apply its stem's ReLU to what the max-pool leaves, a quarter of the pixels.

    Values and gradients stay the same to the bit: ReLU keeps the order of what is above zero, and the rest has no gradient
    either way. Parameters and their names stay too.
    """
    pool, relu = getattr(model, "maxpool", None), getattr(model, "relu", None)
    if isinstance(pool, nn.MaxPool2d) and isinstance(relu, nn.ReLU):
        model.maxpool, model.relu = nn.Sequential(pool, relu), nn.Identity()


def forward_gmacs(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> float:
    """Multiply-accumulate operations of a forward pass in 10^9, convolutions and matrix products alone, as torch counts them.

    Args:
        model: on the CPU; left in evaluation mode.
        shape: of the input, one sample.
        dtype: of the input.
    """
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.zeros(shape, dtype=dtype))
    return counter.get_total_flops() / 2e9


def resnet18_gmacs(num_classes: int, stem: Stem, res: int) -> float:
    """`forward_gmacs` of an image of ``res`` x ``res`` pixels."""
    return forward_gmacs(build_resnet18(num_classes, stem), (1, 3, res, res))


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of each tensor when weights of one model were put into another."""

    loaded: tuple[str, ...]
    fresh: Mapping[str, str] = field(default_factory=dict)
    """Tensors that keep their random values -> why."""
    unused: tuple[str, ...] = ()
    """Tensors of the source that this model has no place for."""
    resampled: tuple[str, ...] = ()
    """Those of `loaded` whose kernels were brought to another size."""

    def lines(self) -> list[str]:
        """For people: counts, and every tensor that was not loaded."""
        out = [f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.fresh)} tensors"]
        out += [f"resampled: {name}" for name in self.resampled]
        out += [f"not loaded: {name} ({reason})" for name, reason in self.fresh.items()]
        out += [f"unused: {name}" for name in self.unused]
        return out


_STEM = "conv1.weight"


def load_matching(model: nn.Module, weights: Mapping[str, Tensor], where: str, *, stem_init: StemInit = "fresh") -> LoadReport:
    """Copy every tensor whose name and shape match into the model, and say what happened to the rest.

    Args:
        stem_init: ``resample`` brings the first convolution's kernels to the model's size where that is smaller.

    Raises:
        UsageError: nothing matches, so the file holds no ResNet-18.
    """
    own = model.state_dict()
    resampled: tuple[str, ...] = ()
    if stem_init == "resample" and _STEM in weights and weights[_STEM].ndim == 4:
        size, smaller = weights[_STEM].shape[-1], own[_STEM].shape[-1]
        if smaller < size and weights[_STEM].shape[:2] == own[_STEM].shape[:2]:
            weights = {**weights, _STEM: shrink_kernels(weights[_STEM], smaller)}
            resampled = (_STEM,)
    loaded, fresh = [], {}
    for name, tensor in own.items():
        if name not in weights:
            fresh[name] = "not in the file"
        elif weights[name].shape != tensor.shape:
            fresh[name] = f"{tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in this model"
        else:
            loaded.append(name)
    if not any(own[name].ndim == 4 for name in loaded):
        raise UsageError(f"{where}: no convolution in it fits a ResNet-18; give a tidali or torchvision resnet18 checkpoint")
    model.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    unused = tuple(name for name in weights if name not in own)
    return LoadReport(loaded=tuple(loaded), fresh=fresh, unused=unused, resampled=resampled)


def shrink_kernels(kernels: Tensor, side: int) -> Tensor:
    """Convolution kernels (O, I, K, K) as (O, I, side, side) ones that answer a patch as the large ones answer the same patch
    upsampled bilinearly to K x K: ``B^T W B`` with B the upsampling matrix, K x side. A filter learnt on enlarged images then
    sees in the small image what it saw in the large one (Beyer et al. 2023, "FlexiViT", derive this for patch embeddings).
    """
    upsample = functional.interpolate(torch.eye(side)[None], size=kernels.shape[-1], mode="linear")[0].T  # (K, side)
    upsample = upsample.to(kernels)
    return upsample.T @ kernels @ upsample


def weights_only(state: object, where: str) -> dict[str, Tensor]:
    """The tensors of a plain state dict, or of one under the usual ``state_dict`` or ``model`` key.

    Raises:
        UsageError: it is neither.
    """
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{where}: not a state dict of tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}
