"""torchvision's ResNets with either stem, their logits and cost, and weights loaded into them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models import WeightsEnum

from tidali.config import Arch, Stem, StemInit
from tidali.errors import UsageError, explain_out_of_memory, some_of
from tidali.hardware.device import DevicePlan


@dataclass(frozen=True)
class Architecture:
    """One of torchvision's ResNets."""

    title: str
    build: Callable[..., nn.Module]
    weights: WeightsEnum
    """torchvision's ImageNet weights: their URL, and the normalisation of their images. The URL ends in the name of the file,
    which has the beginning of its SHA-256."""

    @property
    def weights_file(self) -> str:
        """Such as ``resnet18-f37072fd.pth``."""
        return str(self.weights.url).rsplit("/", 1)[-1]

    @property
    def weights_sha256(self) -> str:
        """How the SHA-256 of the file begins."""
        return self.weights_file.removesuffix(".pth").rpartition("-")[2]

    @property
    def normalisation(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation per RGB channel on a 0..1 scale, with which the weights were trained."""
        transforms = self.weights.transforms()
        return tuple(transforms.mean), tuple(transforms.std)


# The first version of each network's weights: torchvision trained all of these alike, as it did ResNet-18's only ones.
ARCHITECTURES: Mapping[Arch, Architecture] = {
    "resnet18": Architecture("ResNet-18", models.resnet18, models.ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": Architecture("ResNet-34", models.resnet34, models.ResNet34_Weights.IMAGENET1K_V1),
    "resnet50": Architecture("ResNet-50", models.resnet50, models.ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": Architecture("ResNet-101", models.resnet101, models.ResNet101_Weights.IMAGENET1K_V1),
    "resnet152": Architecture("ResNet-152", models.resnet152, models.ResNet152_Weights.IMAGENET1K_V1),
    "wide_resnet50_2": Architecture("Wide ResNet-50-2", models.wide_resnet50_2, models.Wide_ResNet50_2_Weights.IMAGENET1K_V1),
    "resnext50_32x4d": Architecture("ResNeXt-50 32x4d", models.resnext50_32x4d, models.ResNeXt50_32X4D_Weights.IMAGENET1K_V1),
}
WEIGHTS_LICENCE = "BSD-3-Clause, torchvision's; the terms of ImageNet, which they were trained on, may bind their use too"
"""Of all weights in `ARCHITECTURES`: torchvision names no other, and says so of the data that its weights were trained on."""


def title_of(arch: str) -> str:
    """What an architecture is called in a sentence."""
    if arch == "own":
        return "a network of your own"
    return next((one.title for name, one in ARCHITECTURES.items() if name == arch), arch)


def build_resnet(arch: Arch, num_classes: int, stem: Stem, *, stem_bias: bool = False) -> nn.Module:
    """A randomly initialised ResNet.

    Its input is images (N, 3, H, W) float, any memory layout, H and W at least 32; its output logits (N, num_classes).

    Args:
        stem: ``imagenet`` is torchvision's 7x7/2 convolution and 3x3/2 max-pool; ``small`` is a 3x3/1 convolution and no
            pooling: four times the side of every feature map for about 16 times the work (2.222 against 0.148 GMAC for
            ResNet-18 at 64 px).
        stem_bias: give the small stem's convolution a bias, as the original study's fifth row has.
    """
    model = ARCHITECTURES[arch].build(weights=None, num_classes=num_classes)
    if stem == "small":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=stem_bias)
        # As torchvision initialises the stock one.
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def build_resnet18(num_classes: int, stem: Stem, *, stem_bias: bool = False) -> nn.Module:
    """`build_resnet` of ResNet-18."""
    return build_resnet("resnet18", num_classes, stem, stem_bias=stem_bias)


@torch.inference_mode()
def compute_logits(model: nn.Module, images: Tensor, plan: DevicePlan, *, flip: bool = False) -> Tensor:
    """(N, C) float32 logits, computed in the plan's precision.

    Args:
        model: in evaluation mode, on the plan's device.
        images: on any device.
        flip: flip TTA (test-time augmentation): the mean of the logits of each image and of it flipped horizontally.

    Raises:
        TidaliError: the memory does not suffice.
    """
    with explain_out_of_memory(f"batches of {len(images)} images of {images.shape[-1]} px"), plan.autocast():
        images = images.to(plan.device)
        logits: Tensor = model(images)
        if flip:
            logits = (logits.float() + model(images.flip(3)).float()) / 2
    return logits.float()


def forward_gmacs(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> float:
    """10^9 multiply-accumulate operations of a forward pass, of convolutions and matrix products alone, as torch counts them.

    Args:
        model: on the CPU, or on the device ``meta``, where nothing is computed; left in evaluation mode.
        shape: of the input, one sample.
        dtype: of the input.
    """
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.zeros(shape, dtype=dtype, device=next(model.parameters()).device))
    return counter.get_total_flops() / 2e9


def resnet_gmacs(arch: Arch, num_classes: int, stem: Stem, res: int) -> float:
    """`forward_gmacs` of an image of ``res`` x ``res`` pixels."""
    with torch.device("meta"):
        model = build_resnet(arch, num_classes, stem)
    return forward_gmacs(model, (1, 3, res, res))


def training_activations(model: nn.Module, res: int) -> int:
    """Elements of feature maps that a training step keeps of an image of ``res`` x ``res`` pixels for the backward pass: what
    autograd saves, each memory once, without weights. Nothing is computed, and the model is not changed."""
    on_meta, count = copy.deepcopy(model).to("meta").train(), 2
    weights = {_memory(tensor) for tensor in (*on_meta.parameters(), *on_meta.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and _memory(tensor) not in weights:
            # The tensor stays alive, so that no other takes its memory.
            kept[_memory(tensor)] = tensor.untyped_storage().nbytes() // tensor.itemsize, tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        on_meta(torch.zeros(count, 3, res, res, device="meta"))
    return sum(elements for elements, _ in kept.values()) // count


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Which tensors were loaded into a model from another model's weights, and which were not."""

    loaded: tuple[str, ...]
    fresh: Mapping[str, str] = field(default_factory=dict)
    """Name of each tensor that keeps its random values -> the reason."""
    unused: tuple[str, ...] = ()
    """What else the source holds: tensors that this model does not have, and other entries."""
    resampled: tuple[str, ...] = ()
    """Those of `loaded` whose kernels were resampled to another size."""
    notes: tuple[str, ...] = ()
    """What else the user should know."""

    def lines(self) -> list[str]:
        """A readable report: counts, and every tensor that was not loaded."""
        out = [f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.fresh)} tensors", *self.notes]
        out += [f"resampled: {name}" for name in self.resampled]
        out += [f"not loaded: {name} ({reason})" for name, reason in self.fresh.items()]
        out += [f"unused: {ascii(name)[1:-1]}" for name in self.unused[:_MOST_LINES]]
        return out + ([f"unused: {len(self.unused) - _MOST_LINES} more"] if len(self.unused) > _MOST_LINES else [])


_MOST_LINES = 10  # of one kind
_NAMED = 3  # tensors in a message
_STEM, _STEM_BIAS = "conv1.weight", "conv1.bias"
_HEAD = "fc."
_BODY = re.compile(r"(conv|bn|layer|stage|block)\d")
"""How the names of the tensors of a network's body begin."""


def load_matching(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    where: str,
    *,
    arch: Arch = "resnet18",
    stem_init: StemInit = "fresh",
) -> LoadReport:
    """Copy weights into a ResNet. All of its body must be in them and nothing of another body, so that weights of another
    network are never taken for part of this one's. The head may be for other classes, the stem of the other kind.

    Args:
        weights: by torchvision's names.
        where: the weights' source, for the error messages.
        arch: the model's.
        stem_init: ``resample`` resamples the first convolution's kernels to the model's size where that is smaller.

    Raises:
        UsageError: these are not weights of such a ResNet, or not finite.
    """
    own, weights = model.state_dict(), dict(weights)
    resampled: tuple[str, ...] = ()
    stem, own_stem = weights.get(_STEM), own.get(_STEM)
    other_stem = False
    if stem is not None and own_stem is not None:
        side = own_stem.shape[-1]
        other_stem = stem.ndim == 4 and stem.shape[:2] == own_stem.shape[:2] and stem.shape[-1] != side
    if stem is not None and other_stem and stem_init == "resample" and side < stem.shape[-1]:
        weights[_STEM] = shrink_kernels(stem.float(), side)
        resampled = (_STEM,)
    for name in own:
        if name.endswith("num_batches_tracked"):  # files of torch before 0.4.1 lack it, and nothing here uses it
            weights.setdefault(name, torch.zeros((), dtype=torch.int64))
    reasons = {name: _misfit(weights.get(name), tensor) for name, tensor in own.items()}
    loaded = tuple(name for name, reason in reasons.items() if not reason)
    fresh = {name: reason for name, reason in reasons.items() if reason}
    wrong = [
        f"{name} is {reason}"
        for name, reason in fresh.items()
        if not name.startswith(_HEAD) and name != _STEM_BIAS and not (name == _STEM and other_stem)
    ]
    unused = tuple(name for name in weights if name not in own)
    title = title_of(arch)
    if (wrong or any(map(_BODY.match, unused))) and (other := _recognise(weights)) is not None and other != arch:
        raise UsageError(f"{where}: the weights are those of a {title_of(other)}; give --arch {other} for it")
    if wrong:
        raise UsageError(f"{where}: the weights do not fit the model, a {title}: {some_of(wrong, _NAMED)}")
    twice = [
        f"{known} is in it twice, also as {name}"
        for name in unused
        for known in own
        if known in weights and name.endswith(f".{known}") and not _BODY.match(name)
    ]
    if twice:
        raise UsageError(f"{where}: {some_of(twice, _NAMED)}; save one model alone")
    foreign = [name for name in unused if name != _STEM_BIAS and _of_a_body(name, weights[name])]
    if foreign:
        raise UsageError(f"{where}: the weights are of another network: a {title} has no {some_of(foreign, _NAMED)}")
    chosen = {name: weights[name] for name in loaded}
    refuse_not_finite(chosen, where)
    model.load_state_dict(chosen, strict=False)
    return LoadReport(loaded=loaded, fresh=fresh, unused=unused, resampled=resampled)


def refuse_not_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """
    Args:
        where: the weights' source, for the error message.

    Raises:
        UsageError: not all are finite, in float32.
    """
    broken = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.float().isfinite().all()]
    if broken:
        fix = "take an earlier checkpoint, or train it again with a lower learning rate"
        raise UsageError(f"{where}: weights that are not finite: {some_of(broken, _NAMED)}; {fix}")


def _recognise(weights: Mapping[str, Tensor]) -> Arch | None:
    """The architecture whose stages these are, whatever the stem and the head."""
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            own = build_resnet(arch, 1, "imagenet").state_dict()
        stages = {name: tensor for name, tensor in own.items() if _of_a_stage(name)}
        given = {name for name in weights if _of_a_stage(name)}
        if given == stages.keys() and not any(_misfit(weights[name], tensor) for name, tensor in stages.items()):
            return arch
    return None


def _of_a_stage(name: str) -> bool:
    return name.startswith("layer") and not name.endswith("num_batches_tracked")


def _misfit(given: Tensor | None, own: Tensor) -> str:
    """Why a tensor of a file cannot be this one of the model's; empty if it can."""
    if given is None:
        return "not in the file"
    if given.is_nested or given.is_meta or given.layout is not torch.strided:
        return "no dense tensor in the file"
    if given.shape != own.shape:
        return f"{tuple(given.shape)} in the file, {tuple(own.shape)} in this model"
    if own.is_floating_point() and not given.is_floating_point():  # a quantised network's integers mean other numbers
        return f"{given.dtype} in the file, {own.dtype} in this model"
    return ""


def _of_a_body(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is of a network's body and not of a head: by its name, or as it is a kernel of more than one pixel."""
    return _BODY.match(name) is not None or (tensor.ndim == 4 and max(tensor.shape[2:]) > 1)


def shrink_kernels(kernels: Tensor, side: int) -> Tensor:
    """Resample convolution kernels (O, I, K, K) to (O, I, side, side): ``B^T W B``, B the bilinear upsampling matrix, K x side.

    On any patch they give what the large kernels give on the same patch upsampled bilinearly to K x K, so a filter learnt on
    enlarged images finds the same in the small ones (Beyer et al. 2023, "FlexiViT", derive this for patch embeddings).
    """
    upsample = functional.interpolate(torch.eye(side)[None], size=kernels.shape[-1], mode="linear")[0].T  # (K, side)
    upsample = upsample.to(kernels)
    return upsample.T @ kernels @ upsample
