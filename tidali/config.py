"""Settings as frozen dataclasses, checked when they are made. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tidali.errors import UsageError

Arch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d"]
"""torchvision's names of its ResNets (`tidali.model.resnet.ARCHITECTURES`)."""
AnyArch = Literal[Arch, "own"]
"""``own`` is a network that `tidali.train_model` was given, which is in no checkpoint."""
Freeze = Literal["none", "stem", "layer1", "layer2", "layer3", "body"]
"""The parts of a ResNet that keep their weights: all up to this one; ``body`` is all but the head."""
Stem = Literal["imagenet", "small"]
AmpChoice = Literal["auto", "bf16", "fp16", "off"]
CompileChoice = Literal["auto", "on", "reduce-overhead", "max-autotune", "off"]
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""What torch.compile replays a CUDA graph of, in place of launching each kernel; it compiles otherwise as by ``on``."""
StemInit = Literal["fresh", "resample"]
Kernel = Literal["pil", "opencv"]
"""Bicubic: ``pil`` has a = -0.5 and ``opencv`` a = -0.75 (`tidali.loading.bicubic.CUBIC_A`)."""
SizeOrder = Literal["progressive", "mixed"]
Flip = Literal["none", "random", "alternating"]
CacheChoice = Literal["auto", "device", "off"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
DecoderChoice = Literal["auto", "cpu", "mixed"]
ExportFormat = Literal["onnx", "pt2"]

MIN_RES_PX = 32
"""Below 32 pixels the stock stem's last feature map, 1/32 of the input, is empty or a single border-dominated cell."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""The constants that torchvision's ImageNet weights were trained with, on a 0..1 scale."""


def _check_types(settings: Any, where: str = "") -> None:
    """
    Raises:
        UsageError: a field of a dataclass holds what its annotation does not allow, as a file or ``--set`` may bring it.
    """
    kinds = get_type_hints(type(settings))
    for field in fields(settings):
        value, kind = getattr(settings, field.name), kinds[field.name]
        if not _fits(value, kind):
            wanted = f"not one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else f"no {field.type}"
            raise UsageError(f"{where}{field.name} {value!r} is {wanted}")


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(each) and all(map(_fits, value, each))
    if kind is float:
        kind = (int, float)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How stored pixels become a network's input."""

    res: int
    """Input side in pixels."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Per RGB channel on a 0..1 scale; the defaults give pixels in 0..1."""
    kernel: Kernel = "pil"
    crop_fraction: float = 1.0
    """Fraction of the shorter side that the centre crop keeps: the shorter side is resized to ``res / crop_fraction``."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation of each training image, in this order."""

    flip: Flip = "none"
    """Horizontal flip: with probability 1/2, or ``alternating``: half of the images in the first epoch, the others in the
    next, and so on, so that any two epochs show each image both ways (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds")."""
    shift_px: int = 0
    """Largest shift in each direction, in stored pixels; the image is reflected at its border."""
    crop_scale: tuple[float, float] | None = None
    """Random resized crop: range of the crop's fraction of the image's area; None: no crop. torchvision's range is (0.08,
    1)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width to height."""
    brightness: float = 0.0
    """Colours are multiplied by a factor from 1 - brightness to 1 + brightness."""
    contrast: float = 0.0
    """Their difference from middle grey is multiplied by a factor from 1 - contrast to 1 + contrast."""
    saturation: float = 0.0
    """Their difference from their own grey is multiplied by a factor from 1 - saturation to 1 + saturation."""
    hue: float = 0.0
    """They are rotated about the grey axis by at most this fraction of a full turn, 0 to 0.5."""
    erase: float = 0.0
    """Probability that a rectangle is set to the mean colour."""
    mixup_alpha: float = 0.0
    """MixUp: blend pairs of images by a fraction from Beta(alpha, alpha). 0: never. With `cutmix_alpha`, each batch gets one of
    the two."""
    cutmix_alpha: float = 0.0
    """CutMix: paste a rectangle of one image into another, its area from Beta(alpha, alpha). 0: never."""

    def __post_init__(self) -> None:
        _check_types(self, "augment: ")
        if self.shift_px < 0:
            raise UsageError(f"augment: shift_px {self.shift_px} must not be negative")
        for name, bounds, most in (("crop_scale", self.crop_scale or (1, 1), 1.0), ("crop_ratio", self.crop_ratio, math.inf)):
            if not 0 < bounds[0] <= bounds[1] <= most:
                raise UsageError(f"augment: {name} {bounds} is no range above 0" + (" up to 1" if most == 1 else ""))
        if not 0 <= self.erase <= 1:
            raise UsageError(f"augment: erase {self.erase} is no probability")
        for name, most in (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5)):
            if not 0 <= (value := getattr(self, name)) <= most or value == math.inf:
                raise UsageError(f"augment: {name} {value} must be 0 or more" + (", 0.5 at most" if most == 0.5 else ""))
        for name, alpha in (("mixup_alpha", self.mixup_alpha), ("cutmix_alpha", self.cutmix_alpha)):
            if not 0 <= alpha < math.inf:
                raise UsageError(f"augment: {name} {alpha} must be 0 or more")

    @property
    def changes_colour(self) -> bool:
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    @property
    def mixes(self) -> bool:
        """Whether labels become probabilities of two classes."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: all that determines the weights besides the data, the model and the seed."""

    name: str
    epochs: int
    """Passes over the training split."""
    batch_size: int
    """Samples per step, over all ranks."""
    lr: float
    """Peak learning rate. Where another batch size is chosen than the recipe's own, and no learning rate, it changes in
    proportion (Goyal et al. 2017, arXiv 1706.02677)."""
    head_lr_scale: float = 1.0
    """The head's learning rate is `lr` times this."""
    stage_lr_decay: float = 1.0
    """The last stage's learning rate is `lr`, and that of each part before it, down to the stem, is that of the next one times
    this."""
    freeze: Freeze = "none"
    """Starting weights that are kept: those of the stem, of all up to a stage, or of the ``body``, which is all but the head.
    Their batch norm stays in evaluation mode, and no gradient is computed for them."""
    momentum: float = 0.9
    """SGD's, in torch's definition, without dampening."""
    nesterov: bool = False
    """Nesterov's momentum (Sutskever et al. 2013) instead of the plain one."""
    weight_decay: float = 0.0
    """Applied to the weights of convolutions and linear layers only, not to batch norm or biases."""
    label_smoothing: float = 0.0
    """Fraction of each label that is spread over all classes (Szegedy et al. 2016); in training only."""
    schedule: Literal["step", "cosine"]
    """``step`` decays by `step_gamma`; ``cosine`` follows a linear warm-up by half a cosine to zero."""
    warmup_epochs: float = 0.0
    """Linear warm-up from zero, before a cosine to zero."""
    step_epochs: int = 7
    """``step``: the learning rate is multiplied by `step_gamma` every so many epochs."""
    step_gamma: float = 0.1
    """``step``: the factor."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that is evaluated and saved; 0: no average. Ramps up as
    (1 + step) / (10 + step)."""
    norm_images: int = 0
    """Before each evaluation the batch-norm statistics of the evaluated weights are measured on so many images of the train
    split; 0: they are running averages over the steps, which lag behind weights that change fast."""
    min_steps: int = 0
    """``tidali train`` gives a run on few images at least so many steps, by smaller batches, down to 32, and then by more
    epochs; what is given by ``--batch-size`` or ``--epochs`` stays."""
    grad_clip_norm: float = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    accumulate: int = 1
    """Gradient accumulation: number of micro-batches, as equal as possible, that a batch is split into. Less memory for the
    same step, except that batch norm sees each micro-batch by itself."""
    normalise: bool
    """Subtract the mean and divide by the standard deviation; otherwise pixels are scaled to 0..1."""
    kernel: Kernel = "pil"
    """Bicubic kernel that resizes stored images to the input size, in training and in evaluation."""
    crop_fraction: float = 1.0
    """Share of the shorter side that the centre crop keeps, in evaluation and in training without random crops."""
    train_sizes: tuple[int, ...] = ()
    """Input sides in pixels that training uses instead of ``--res``; evaluation is at ``--res``."""
    size_order: SizeOrder = "progressive"
    """``progressive``: an equal number of epochs at each of `train_sizes`, in their order, usually the small and cheap ones
    first; ``mixed``: each step at one of them, drawn by seed, epoch and step, so that one set of weights serves all."""
    augment: Augment = Augment()
    stem_bias: bool = False
    """Give the small stem's convolution a bias, as the original study's fifth row has; batch norm takes it out again."""
    eval_flip: bool = False
    """Also evaluate the last weights with flip TTA (test-time augmentation): the mean of the logits of each image and of
    the image flipped horizontally. Reported beside the plain result, which alone decides the best epoch."""

    def __post_init__(self) -> None:
        _check_types(self)
        if self.epochs < 1:
            raise UsageError(f"--epochs {self.epochs}: at least 1")
        if self.batch_size < 2:
            raise UsageError(f"--batch-size {self.batch_size}: at least 2, batch norm needs more than one sample")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"--lr {self.lr}: must be above 0 and finite")
        if not 0 < self.head_lr_scale < math.inf:
            raise UsageError(f"head_lr_scale {self.head_lr_scale}: must be above 0 and finite")
        if not 0 < self.stage_lr_decay <= 1:
            raise UsageError(f"stage_lr_decay {self.stage_lr_decay}: above 0, up to 1")
        if not 1 <= self.accumulate <= self.batch_size // 2:
            raise UsageError(f"accumulate {self.accumulate}: at least 1, with two of {self.batch_size} samples per micro-batch")
        if self.step_epochs < 1:
            raise UsageError(f"step_epochs {self.step_epochs}: at least 1")
        for name, most in (("momentum", 1), ("weight_decay", math.inf), ("warmup_epochs", math.inf), ("step_gamma", math.inf)):
            if not 0 <= (value := getattr(self, name)) < most:
                raise UsageError(f"{name} {value}: from 0 to below {most}")
        if self.norm_images != 0 and self.norm_images < 2:
            raise UsageError(f"norm_images {self.norm_images}: 0, which is running averages, or at least 2")
        if self.min_steps < 0:
            raise UsageError(f"min_steps {self.min_steps}: at least 0")
        for name, most in (("ema_decay", 1), ("grad_clip_norm", math.inf)):
            if not 0 <= (value := getattr(self, name)) < most:
                raise UsageError(f"{name} {value}: from 0, which is none, to below {most}")
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(f"crop_fraction {self.crop_fraction}: above 0, up to 1")
        if not 0 <= self.label_smoothing <= 1:
            raise UsageError(f"label_smoothing {self.label_smoothing}: from 0 to 1")
        if self.nesterov and not self.momentum:
            raise UsageError("nesterov is a kind of momentum: with momentum 0 set nesterov=false too")
        for size in self.train_sizes:
            if size < MIN_RES_PX:
                raise UsageError(f"train_sizes {list(self.train_sizes)}: at least {MIN_RES_PX} pixels each")


def recipe_from(document: Mapping[str, Any]) -> Recipe:
    """The recipe of a JSON document, in which tuples are lists.

    Raises:
        TypeError, KeyError: not a recipe.
        UsageError: a wrong value.
    """
    if not isinstance(document, Mapping) or not isinstance(document["augment"], Mapping):
        raise TypeError("its recipe is not a table of fields")

    def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

    return Recipe(**{**tuples(document), "augment": Augment(**tuples(document["augment"]))})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run."""

    data: str
    """Folder of a packed data set."""
    out: str
    """Run folder; it is made, and must be empty if it exists."""
    res: int = 224
    """Input side in pixels."""
    arch: AnyArch = "resnet18"
    stem: Stem = "imagenet"
    """``imagenet``: 7x7/2 and max-pool; ``small``: 3x3/1 and none, for small images."""
    init: str = "none"
    """``none`` (random), ``imagenet`` (torchvision's weights), or the path of a checkpoint."""
    stem_init: StemInit = "fresh"
    """Where 7x7 kernels are loaded into the small stem: ``fresh`` keeps its random weights, ``resample`` resamples them to
    3x3."""
    recipe: Recipe
    seed: int = 0
    """Seed of the weights, the order and the augmentation."""
    device: DeviceChoice = "auto"
    amp: AmpChoice = "auto"
    compile: CompileChoice = "auto"
    cache: CacheChoice = "auto"
    """``device`` decodes once into the training device's memory, ``off`` streams; ``auto`` caches what takes less than half."""
    decoder: DecoderChoice = "auto"
    """Where a GPU's images are decoded: by libjpeg-turbo on the CPU, or ``mixed``, by DALI; ``auto`` decides by their size."""
    max_bad: int | None = None
    """Corrupt images of a split that are dropped before the run fails; None: 0.1 % of the split."""
    deterministic: bool = False
    """Two runs have the same weights, to the bit, on the same machine and number of ranks."""
    sync_bn: bool = False
    """Batch norm over the batches of all ranks, instead of each rank's own."""
    checkpoint_minutes: float = 10.0
    """How often the complete state is saved, in minutes, in addition to after each epoch and when the run is stopped."""
    tensorboard: bool = False
    """Also write what metrics.jsonl holds as TensorBoard events, under ``out``/tensorboard."""

    def __post_init__(self) -> None:
        _check_types(self)
        check_res(self.res)
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: from 0 to {2**32 - 1}")
        if self.max_bad is not None and self.max_bad < 0:
            raise UsageError(f"--max-bad {self.max_bad}: at least 0")
        if not 0 < self.checkpoint_minutes < math.inf:
            raise UsageError(f"checkpoint_minutes {self.checkpoint_minutes}: must be above 0 and finite")
        if self.recipe.freeze != "none" and self.init == "none":
            raise UsageError(f"freeze {self.recipe.freeze}: random weights would never be trained; give --init, or freeze none")
        if self.compile in CUDA_GRAPHS and self.recipe.accumulate > 1:
            # CUDA graphs overwrite a micro-batch's logits and gradients with the next one's (pytorch issues 169545, 96693).
            raise UsageError(f"--compile {self.compile}: not with accumulate {self.recipe.accumulate}; use --compile on")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(document: Mapping[str, Any], where: str) -> TrainSettings:
        """
        Raises:
            UsageError: not the settings of a run, or those of another version, or wrong values.
        """
        try:
            return TrainSettings(**{**document, "recipe": recipe_from(document["recipe"])})
        except (TypeError, KeyError) as error:
            raise UsageError(f"{where}: not the settings of a training run ({error})") from None
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None


def check_res(res: int) -> None:
    """
    Raises:
        UsageError: the resolution is below what the network can take.
    """
    if res < MIN_RES_PX:
        raise UsageError(f"--res {res}: at least {MIN_RES_PX} pixels, the stock network divides its input by 32")
