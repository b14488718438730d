"""Settings as frozen dataclasses. They stop at the wiring: `tidali.train` and the command line.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tidali.errors import UsageError

Stem = Literal["imagenet", "small"]
AmpChoice = Literal["auto", "bf16", "fp16", "off"]
CompileChoice = Literal["auto", "on", "off"]
CacheChoice = Literal["auto", "device", "off"]
DeviceChoice = Literal["auto", "cpu", "cuda"]

MIN_RES_PX = 32
"""Below 32 pixels the stock stem's last feature map, 1/32 of the input, is empty or a single border-dominated cell."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""The constants that torchvision's ImageNet weights were trained with, on a 0..1 scale."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: everything that decides the weights besides the data, the model and the seed."""

    name: str
    epochs: int
    """Passes over the training split."""
    batch_size: int
    """Samples a step, over all ranks."""
    lr: float
    """Peak learning rate."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    """Applied to convolution and linear weights alone, never to batch norm or biases."""
    label_smoothing: float = 0.0
    schedule: Literal["step", "cosine"]
    warmup_epochs: float = 0.0
    """Linear warm-up from zero, before a cosine to zero."""
    step_epochs: int = 7
    """``step``: the learning rate is multiplied by `step_gamma` after each this many epochs."""
    step_gamma: float = 0.1
    ema_decay: float = 0.0
    """Of the moving average of the weights that is evaluated and saved; 0 for none. Ramps up as (1 + step) / (10 + step)."""
    grad_clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    normalise: bool
    """Subtract the mean and divide by the standard deviation; otherwise pixels are scaled to 0..1."""
    flip: bool
    """Mirror each training image with probability 1/2."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UsageError(f"--epochs {self.epochs}: at least 1")
        if self.batch_size < 2:
            raise UsageError(f"--batch-size {self.batch_size}: at least 2, batch norm needs more than one sample")
        if not self.lr > 0:
            raise UsageError(f"--lr {self.lr}: must be above 0")


RECIPES = {
    # The original study: SGD 1e-3, momentum 0.9, StepLR(7, 0.1), batch 100, pixels in 0..1 without normalisation.
    "seed": Recipe(name="seed", epochs=15, batch_size=100, lr=1e-3, schedule="step", normalise=False, flip=True),
    # Nesterov SGD with decay on weights only, label smoothing, warm-up and cosine, averaged weights: the ResNet practice of the
    # last years. The learning rate is 0.1 for 256 images, scaled linearly (Goyal et al., 2017, arXiv 1706.02677).
    "modern": Recipe(
        name="modern",
        epochs=20,
        batch_size=128,
        lr=0.05,
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.1,
        schedule="cosine",
        warmup_epochs=1.0,
        ema_decay=0.999,
        normalise=True,
        flip=True,
    ),
}


def make_recipe(name: str, **changes: Any) -> Recipe:
    """A named recipe with some fields changed; changes of None are left out.

    Raises:
        UsageError: no such recipe, or a value that cannot be right.
    """
    if name not in RECIPES:
        raise UsageError(f"--recipe {name}: choose from {', '.join(RECIPES)}")
    return replace(RECIPES[name], **{field: value for field, value in changes.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run."""

    data: str
    """Folder of a packed data set."""
    out: str
    """Run folder; made, and refused where it holds anything."""
    res: int = 224
    """Input side in pixels."""
    stem: Stem = "imagenet"
    """``imagenet``: 7x7/2 and max-pool; ``small``: 3x3/1 and none, for small images."""
    init: str = "none"
    """``none`` (random), ``imagenet`` (torchvision's weights), or the path of a checkpoint."""
    recipe: Recipe
    seed: int = 0
    """Of the weights, the order and the augmentation."""
    device: DeviceChoice = "auto"
    amp: AmpChoice = "auto"
    compile: CompileChoice = "auto"
    cache: CacheChoice = "auto"
    """``device`` decodes once into the training device's memory, ``off`` streams; ``auto`` caches what takes less than half."""
    deterministic: bool = False
    """Two runs give the same weights, to the bit, on the same machine and number of ranks."""
    checkpoint_minutes: float = 10.0
    """The complete state is saved this often, besides after each epoch and when the run is stopped."""

    def __post_init__(self) -> None:
        check_res(self.res)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(document: Mapping[str, Any], where: str) -> TrainSettings:
        """
        Raises:
            UsageError: not the settings of a run, or of another version's.
        """
        try:
            return TrainSettings(**{**document, "recipe": Recipe(**document["recipe"])})
        except (TypeError, KeyError) as error:
            raise UsageError(f"{where}: not the settings of a training run ({error})") from None


def check_res(res: int) -> None:
    """
    Raises:
        UsageError: the resolution is below what the network can take.
    """
    if res < MIN_RES_PX:
        raise UsageError(f"--res {res}: at least {MIN_RES_PX} pixels, the stock ResNet-18 divides its input by 32")
