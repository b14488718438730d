"""torchvision's ResNet-18 with either stem, its logits, and weights loaded into it."""

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
from tidali.hardware.device import DevicePlan


def build_resnet18(num_classes: int, stem: Stem, *, stem_bias: bool = False) -> nn.Module:
    """A randomly initialised ResNet-18.

    Its input is images (N, 3, H, W) float, any memory layout, H and W at least 32; its output logits (N, num_classes).

    Args:
        stem: ``imagenet`` is torchvision's 7x7/2 convolution and 3x3/2 max-pool; ``small`` is a 3x3/1 convolution and no
            pooling: four times the side of every feature map for 15 times the work (2.222 against 0.148 GMAC at 64 px).
        stem_bias: give the small stem's convolution a bias, as the original study's fifth row has.
    """
    model = resnet18(weights=None, num_classes=num_classes)
    if stem == "small":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=stem_bias)
        # As torchvision initialises the stock one.
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


@torch.inference_mode()
def compute_logits(model: nn.Module, images: Tensor, plan: DevicePlan, *, flip: bool = False) -> Tensor:
    """(N, C) float32 logits, computed in the plan's precision.

    Args:
        model: in evaluation mode, on the plan's device like the images.
        flip: test-time augmentation: the mean of the logits of each image and of the same image flipped horizontally.
    """
    with plan.autocast():
        logits: Tensor = model(images)
        if flip:
            logits = (logits.float() + model(images.flip(3)).float()) / 2
    return logits.float()


def forward_gmacs(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> float:
    """10^9 multiply-accumulate operations of a forward pass, of convolutions and matrix products alone, as torch counts them.

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


def resnet18_activations(stem: Stem, res: int) -> int:
    """Elements of feature maps that a training step keeps of an image for the backward pass: each convolution's output, and
    that of each batch norm or ReLU after it."""
    stages = [(64, 4 * 2), (128, 5 * 2), (256, 5 * 2), (512, 5 * 2)]  # channels; convolutions, the shortcut's too, times two
    side = res // 4 if stem == "imagenet" else res
    kept = 2 * 64 * (res // 2) ** 2 + 64 * side**2 if stem == "imagenet" else 2 * 64 * side**2
    return kept + sum(maps * channels * (side >> stage) ** 2 for stage, (channels, maps) in enumerate(stages))


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Which tensors were loaded into a model from another model's weights, and which were not."""

    loaded: tuple[str, ...]
    fresh: Mapping[str, str] = field(default_factory=dict)
    """Name of each tensor that keeps its random values -> the reason."""
    unused: tuple[str, ...] = ()
    """Tensors of the source that this model does not have."""
    resampled: tuple[str, ...] = ()
    """Those of `loaded` whose kernels were resampled to another size."""

    def lines(self) -> list[str]:
        """A readable report: counts, and every tensor that was not loaded."""
        out = [f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.fresh)} tensors"]
        out += [f"resampled: {name}" for name in self.resampled]
        out += [f"not loaded: {name} ({reason})" for name, reason in self.fresh.items()]
        out += [f"unused: {name}" for name in self.unused]
        return out


_STEM = "conv1.weight"


def load_matching(model: nn.Module, weights: Mapping[str, Tensor], where: str, *, stem_init: StemInit = "fresh") -> LoadReport:
    """Copy every tensor whose name and shape match into the model, and report the rest.

    Args:
        where: the weights' source, for the error message.
        stem_init: ``resample`` resamples the first convolution's kernels to the model's size where that is smaller.

    Raises:
        UsageError: no convolution matches, so these are not weights of a ResNet-18.
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
    """Resample convolution kernels (O, I, K, K) to (O, I, side, side): ``B^T W B``, B the bilinear upsampling matrix, K x side.

    On any patch they give what the large kernels give on the same patch upsampled bilinearly to K x K, so a filter learnt on
    enlarged images finds the same in the small ones (Beyer et al. 2023, "FlexiViT", derive this for patch embeddings).
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
