"""The study as data: its rows, what each starts from, and how each is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tidali.config import Augment, Recipe, Stem, StemInit, make_recipe

IMAGENET = "imagenet"
"""A row that starts from ImageNet weights, torchvision's or the file given in their place."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table. A row without a recipe only evaluates the weights it starts from."""

    name: str
    title: str
    start: str = "none"
    """``none`` (random weights), `IMAGENET`, or the name of a row, of which it takes the best weights, as the original does."""
    stem: Stem = "imagenet"
    stem_init: StemInit = "fresh"
    res: int = 64
    """Side of what the network sees, in pixels."""
    recipe: Recipe | None = None
    served: bool = False
    """Measured as it would be served: stored pixels in, the resize a part of the network (`tidali.model.served`)."""
    published_top1_percent: float | None = None
    eval_sizes: tuple[int, ...] = ()
    """Sides in pixels that the last weights are also measured at."""

    @property
    def kind(self) -> Literal["train", "evaluate"]:
        return "train" if self.recipe is not None else "evaluate"


def _seed(epochs: int, *, flip: bool = False, enlarged: bool = False) -> Recipe:
    """The original's recipe, which mirrors in its first two rows alone and enlarges with OpenCV's cubic kernel."""
    return replace(
        make_recipe("seed", epochs=epochs),
        augment=Augment(flip="random" if flip else "none"),
        kernel="opencv" if enlarged else "pil",
    )


SIZES = (64, 96, 128, 160, 192, 224)
"""Of row 8's training and of the curves of accuracy against resolution: whole multiples of 32, which the network divides by."""

# For 64-pixel images; 4 of 64 pixels is the share that the usual 4 of CIFAR's 32 is twice of.
_MODERN = Augment(flip="alternating", shift_px=4)

ROWS = (
    Row(
        name="1",
        title="stock stem from random weights",
        recipe=_seed(15, flip=True),
        published_top1_percent=25.9,
    ),
    Row(
        name="2",
        title="stock stem from ImageNet",
        start=IMAGENET,
        recipe=_seed(15, flip=True),
        published_top1_percent=56.9,
    ),
    Row(
        name="3",
        title="stock stem from ImageNet, enlarged images",
        start=IMAGENET,
        res=224,
        recipe=_seed(7, enlarged=True),
        published_top1_percent=73.1,
        eval_sizes=SIZES,
    ),
    Row(
        name="3@64",
        title="row 3's weights on the images as they are",
        start="3",
        published_top1_percent=15.3,
    ),
    Row(
        name="4",
        title="stock stem from row 3",
        start="3",
        recipe=_seed(7),
        published_top1_percent=54.5,
    ),
    Row(
        name="5",
        title="3x3 stem without pooling from row 3",
        start="3",
        stem="small",
        recipe=_seed(7),
        published_top1_percent=72.3,
    ),
    Row(
        name="6",
        title="row 3's weights with the resize inside",
        start="3",
        res=224,
        served=True,
    ),
    Row(
        name="7",
        title="3x3 stem from random weights, modern",
        stem="small",
        recipe=replace(make_recipe("modern"), augment=_MODERN),
    ),
    Row(
        name="8",
        title="stock stem from ImageNet, modern, one set of weights for 64 to 224",
        start=IMAGENET,
        res=224,
        recipe=replace(
            make_recipe("modern"), lr=0.02, train_sizes=SIZES, size_order="mixed", augment=Augment(flip="random", shift_px=4)
        ),
        eval_sizes=SIZES,
    ),
)


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """The recipe with its epochs, the epochs of a learning rate and the warm-up scaled; at least one epoch, and never longer a
    warm-up."""
    return replace(
        recipe,
        epochs=max(round(recipe.epochs * scale), 1),
        step_epochs=max(round(recipe.step_epochs * scale), 1),
        warmup_epochs=recipe.warmup_epochs * min(scale, 1.0),
    )


def needed_by(names: tuple[str, ...]) -> tuple[Row, ...]:
    """The chosen rows and those that they start from, in the table's order.

    Args:
        names: of rows; none for all of them.
    """
    rows = {row.name: row for row in ROWS}
    wanted = set(names or rows)
    for row in reversed(ROWS):  # a row starts from an earlier one
        if row.name in wanted and row.start in rows:
            wanted.add(row.start)
    return tuple(row for row in ROWS if row.name in wanted)
