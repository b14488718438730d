"""What is wrong with a run's result, and what to try: said beside the figures by every command that prints them.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tidali.errors import counted

Kind = Literal[
    "diverged", "one class", "at chance", "diverging", "overfitting", "high loss", "statistics", "left out", "few images"
]

MANY_TIMES = 3.0
"""A loss of so many times that of guessing is of a network that is wrong and sure of it."""
ROSE_BY, ROSE_BY_NATS = 1.2, 0.1
"""A loss that ends so much above its lowest value has risen: more than an epoch's noise."""
FEW_STEPS = 100
FEW_IMAGES = 100
"""With fewer, the standard error of an accuracy can be more than 5 points: sqrt(0.5 * 0.5 / 100)."""
LEFT_OUT_SHARE = 0.1
RUNNING_AVERAGES_STEPS = 60
"""After so many, 0.9 ** 60 = 0.2 % of batch norm's first statistics is left in the running ones."""
LAG_TIMES = 2.0
"""A loss of so many times that of training, after few steps, is more than few steps can overfit."""
SETTLED_STEPS = 500
"""After so many, averaged weights are close to those of training, by the ramp of their decay (`tidali.training.engine.Ema`)."""


class Finding(NamedTuple):
    kind: Kind
    text: str
    """What is seen."""
    advice: str
    """What to try, by options of ``tidali train`` and ``tidali shard``, in whole sentences."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}. {self.advice}"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A result: of a run after its last epoch, or of an evaluation, which has none of the fields of training."""

    split: str
    samples: int
    """Evaluated images."""
    classes: int
    top1_percent: float
    loss: float
    """Mean cross entropy in nats."""
    largest_class_percent: float | None = None
    """Share of the split's largest class, which an answer that is always the same can score; None: as if all were equal."""
    losses: Sequence[float] = ()
    """By epoch, on the split."""
    train_losses: Sequence[float] = ()
    """By epoch, as counted while training."""
    train_top1_percent: float = math.nan
    train_samples: int = 0
    """Images trained on in an epoch."""
    train_left_out: int = 0
    """Images of an epoch that fill no batch."""
    batch_size: int = 0
    lr: float = math.nan
    ema_decay: float = 0.0
    """Above 0: averaged weights are evaluated."""
    norm_images: int = 0
    """0: batch norm is evaluated with its running averages."""
    steps: int = 0
    """Of training, so far; 0 for an evaluation."""

    @property
    def guessing_loss(self) -> float:
        """Cross entropy of equal probabilities."""
        return math.log(self.classes)

    @property
    def chance_percent(self) -> float:
        equal = 100 / self.classes
        return equal if self.largest_class_percent is None else max(equal, self.largest_class_percent)

    @property
    def train_loss_rose(self) -> bool:
        return _rose(self.train_losses)

    @property
    def averages_lag(self) -> bool:
        """Training did far better than the averaged weights that are evaluated, which have had few steps to settle."""
        few = self.ema_decay > 0 and 0 < self.steps < SETTLED_STEPS
        if not few or not self.train_losses or self.train_loss_rose or self.train_losses[-1] > 2 * self.guessing_loss:
            return False
        return self.loss > 1.5 * max(self.train_losses[-1], self.guessing_loss)


def judge(figures: Figures) -> list[Finding]:
    """What is wrong, the most important first; nothing where the result can be taken as it is."""
    if figures.classes == 1:
        advice = "Pack a source with a folder for each of several classes."
        return [Finding("one class", "every answer is right, so the accuracy says nothing", advice), *_few_images(figures)]
    return [finding for rule in _RULES for finding in rule(figures)]


def diverged(what: str, step: int, lr: float) -> Finding:
    """
    Args:
        what: is not finite: 'loss' or 'weights'.
        step: at which it was seen.
        lr: of the recipe.
    """
    text = f"the {what} {'are' if what == 'weights' else 'is'} not finite by step {step:,}"
    return Finding("diverged", text, _lower_lr(lr))


def shows_top5(classes: int | None) -> bool:
    """Of five classes or fewer, every image's own is among the top five. None: it is not known how many there are."""
    return classes is None or classes > 5


def at_chance(figures: Figures) -> bool:
    """Whether guessing would score as much, but for luck: two standard errors, which it exceeds once in 44 times."""
    chance = figures.chance_percent / 100
    luck = 2 * math.sqrt(chance * (1 - chance) / max(figures.samples, 1))
    return figures.classes > 1 and figures.top1_percent <= 100 * (chance + luck)


def _at_chance(figures: Figures) -> list[Finding]:
    if not at_chance(figures):
        return []
    images = f"{counted(figures.samples, 'image')} of {figures.split}"
    text = f"top-1 of {figures.top1_percent:.1f} % on {images} is no better than guessing among {figures.classes:,} classes"
    if figures.chance_percent > 101 / figures.classes:
        text += f", of which the largest has {figures.chance_percent:.1f} % of the images"
    if not figures.steps:
        hint = "If it was trained on such images at this size, its training failed: 'tidali report' shows the curves of a run"
    elif figures.averages_lag:
        hint = (
            f"The averaged weights (ema_decay {figures.ema_decay:g}) need some hundred steps to follow training, and this run "
        )
        hint += f"made {figures.steps:,}: give more --epochs, or --set ema_decay=0"
    elif figures.train_loss_rose:
        hint = f"Training diverged: try --lr {figures.lr / 10:g}"
    elif max(figures.train_losses, default=0.0) > 2 * figures.guessing_loss:
        reached, guessing = loss_text(max(figures.train_losses)), f"{figures.guessing_loss:.2f}"
        hint = f"The loss on train reached {reached}, far above the {guessing} of guessing: try --lr {figures.lr / 10:g}"
    elif figures.steps < FEW_STEPS:
        hint = f"The run made only {counted(figures.steps, 'step')}: give more --epochs, or a smaller --batch-size"
    elif figures.train_top1_percent > 2 * figures.chance_percent:
        hint = f"Training images are learned, {figures.split} is not: compare the two with 'tidali info DATA --sheet sheet.png "
        hint += f"--split {figures.split}'"
    else:
        hint = f"Try another --lr (it was {figures.lr:g}), more --epochs or --init imagenet, and look at the labels with "
        hint += "'tidali info DATA --sheet sheet.png'"
    return [Finding("at chance", text, f"{hint}.")]


def _diverging(figures: Figures) -> list[Finding]:
    if not figures.train_loss_rose:
        return []
    text = f"the loss on train rose from {_lowest(figures.train_losses)} to {loss_text(figures.train_losses[-1])}"
    return [Finding("diverging", text, _lower_lr(figures.lr))]


def _overfitting(figures: Figures) -> list[Finding]:
    # Averaged weights can score best by luck while they are still close to the random ones.
    if figures.train_loss_rose or figures.averages_lag or len(figures.losses) < 3 or not _rose(figures.losses):
        return []
    text = f"the loss on {figures.split} rose from {_lowest(figures.losses)} to {loss_text(figures.losses[-1])}, "
    text += "and that on train did not"
    hint = "Try fewer --epochs, more augmentation (--set augment.mixup_alpha=0.2), --init imagenet, or more images"
    return [Finding("overfitting", text, f"{hint}.")]


def _high_loss(figures: Figures) -> list[Finding]:
    times = figures.loss / figures.guessing_loss
    if not times >= MANY_TIMES:  # not a number where none was logged
        return []
    text = f"the loss on {figures.split}, {loss_text(figures.loss)}, is {_times(times)} times the "
    text += f"{figures.guessing_loss:.2f} of equal probabilities (ln {figures.classes})"
    if figures.averages_lag:
        hint = f"The averaged weights have had only {counted(figures.steps, 'step')} to settle; training itself ended at "
        hint += loss_text(figures.train_losses[-1])
    elif figures.steps:
        hint = f"The network is wrong and sure of it: try --lr {figures.lr / 10:g}, or --set label_smoothing=0.1"
    else:
        hint = "The network is wrong and sure of it: check that it was trained on images of this kind and size"
    return [Finding("high loss", text, f"{hint}.")]


def _statistics(figures: Figures) -> list[Finding]:
    # Row 1 of the study on 408 photographs, after 36 steps: 20 % of val with running averages, 78 % with measured statistics.
    if figures.norm_images or not 0 < figures.steps < RUNNING_AVERAGES_STEPS or not figures.train_losses:
        return []
    if not figures.loss > LAG_TIMES * figures.train_losses[-1]:
        return []
    text = f"the loss on {figures.split} is {loss_text(figures.loss)}, in training it was {loss_text(figures.train_losses[-1])}"
    text += f": after {counted(figures.steps, 'step')} batch norm's running averages, which move by a tenth a step, may lag "
    text += "behind the weights"
    return [Finding("statistics", text, "Try --set norm_images=256, which measures them, or more --epochs.")]


def _left_out(figures: Figures) -> list[Finding]:
    total = figures.train_samples + figures.train_left_out
    if not total or figures.train_left_out < LEFT_OUT_SHARE * total:
        return []
    steps = -(-total // max(figures.batch_size, 1))
    fitting = total // steps
    text = (
        f"each epoch trains on {figures.train_samples:,} of {counted(total, 'image')}, others each time, as the rest fills no "
    )
    text += f"batch of {figures.batch_size}"
    return [Finding("left out", text, f"--batch-size {fitting} leaves out {total - steps * fitting or 'none'}.")]


def _few_images(figures: Figures) -> list[Finding]:
    if figures.samples >= FEW_IMAGES:
        return []
    error_percent = 100 * math.sqrt(0.25 / max(figures.samples, 1))
    text = f"{counted(figures.samples, 'image')} of {figures.split} give an accuracy to ± {error_percent:.0f} points "
    text += "near 50 % (one standard error)"
    return [Finding("few images", text, "Hold out more, with a larger --val-fraction of 'tidali shard'.")]


_RULES: tuple[Callable[[Figures], list[Finding]], ...] = (
    _at_chance,
    _diverging,
    _high_loss,
    _overfitting,
    _statistics,
    _left_out,
    _few_images,
)


def _lower_lr(lr: float) -> str:
    return f"Try --lr {lr / 10:g}, or --set grad_clip_norm=1."


def _rose(losses: Sequence[float]) -> bool:
    known = [loss for loss in losses if math.isfinite(loss)]
    return len(known) > 1 and known[-1] > max(ROSE_BY * min(known), min(known) + ROSE_BY_NATS)


def loss_text(loss: float) -> str:
    """Three decimals; of a run that diverged a power of ten."""
    return f"{loss:.3f}" if abs(loss) < 1000 else f"{loss:.1e}"


def _times(times: float) -> str:
    return f"{times:,.0f}" if times < 1e6 else f"{times:.0e}"


def _lowest(losses: Sequence[float]) -> str:
    place = min((place for place, loss in enumerate(losses) if math.isfinite(loss)), key=lambda place: losses[place])
    return f"{loss_text(losses[place])} in epoch {place + 1}"
