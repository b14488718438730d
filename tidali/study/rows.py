"""The rows of the study: which weights each starts from, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tidali.config import Augment, Recipe, Stem, StemInit
from tidali.recipes import make_recipe

IMAGENET = "imagenet"
"""Start of a row that starts from ImageNet weights: torchvision's, or a file given instead."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table. A row without a recipe only evaluates the weights that it starts from."""

    name: str
    title: str
    start: str = "none"
    """``none`` (random weights), `IMAGENET`, or the name of a row whose best weights it takes, as the original study does."""
    stem: Stem = "imagenet"
    stem_init: StemInit = "fresh"
    res: int = 64
    """Input side of the network, in pixels."""
    recipe: Recipe | None = None
    served: bool = False
    """Evaluated as it would be served: its input is the stored pixels, and the network resizes them (`tidali.model.served`)."""
    published_top1_percent: float | None = None
    eval_sizes: tuple[int, ...] = ()
    """Input sides in pixels at which the last weights are evaluated too."""


def _seed(epochs: int, *, flip: bool = False, enlarged: bool = False) -> Recipe:
    """The original study's recipe. It flips images only in its first two rows, and enlarges them with OpenCV's cubic kernel."""
    return replace(
        make_recipe("seed", epochs=epochs),
        augment=Augment(flip="random" if flip else "none"),
        kernel="opencv" if enlarged else "pil",
    )


SIZES = (64, 96, 128, 160, 192, 224)
"""Input sides of row 8's training and of the curves of accuracy against resolution: multiples of 32, by which the network
divides its input."""

# A shift of 4 of 64 pixels is, relative to the side, half of the 4 of 32 pixels that are usual on CIFAR.
ROWS = (
    Row(name="1", title="stock stem from random weights", recipe=_seed(15, flip=True), published_top1_percent=25.9),
    Row(name="2", title="stock stem from ImageNet", start=IMAGENET, recipe=_seed(15, flip=True), published_top1_percent=56.9),
    Row(
        name="3",
        title="stock stem from ImageNet, enlarged images",
        start=IMAGENET,
        res=224,
        recipe=_seed(7, enlarged=True),
        published_top1_percent=73.1,
        eval_sizes=SIZES,
    ),
    Row(name="3@64", title="row 3's weights on the images as they are", start="3", published_top1_percent=15.3),
    Row(name="4", title="stock stem from row 3", start="3", recipe=_seed(7), published_top1_percent=54.5),
    Row(
        name="5",
        title="3x3 stem without pooling from row 3",
        start="3",
        stem="small",
        recipe=_seed(7),
        published_top1_percent=72.3,
    ),
    Row(name="6", title="row 3's weights with the resize inside", start="3", res=224, served=True),
    Row(
        name="7",
        title="3x3 stem from random weights, modern",
        stem="small",
        recipe=replace(make_recipe("modern"), augment=Augment(flip="alternating", shift_px=4)),
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
    """The recipe with its epochs, the epochs between learning rate steps and the warm-up scaled. It keeps at least one epoch,
    and its warm-up never becomes longer."""
    return replace(
        recipe,
        epochs=max(round(recipe.epochs * scale), 1),
        step_epochs=max(round(recipe.step_epochs * scale), 1),
        warmup_epochs=recipe.warmup_epochs * min(scale, 1.0),
    )


def needed_by(names: tuple[str, ...]) -> tuple[Row, ...]:
    """The chosen rows and the rows that they start from, in the order of the table.

    Args:
        names: of the chosen rows; empty for all.
    """
    rows = {row.name: row for row in ROWS}
    wanted = set(names or rows)
    for row in reversed(ROWS):  # a row starts from an earlier one
        if row.name in wanted and row.start in rows:
            wanted.add(row.start)
    return tuple(row for row in ROWS if row.name in wanted)
