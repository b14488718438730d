"""The named recipes, and which recipe fits the data and the user's wishes. Standard library only."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tidali.config import Augment, Recipe, recipe_from
from tidali.errors import UsageError

_LEAST_BATCH = 32
"""Of what `fit_to_images` chooses: batch norm's statistics over fewer images are noise."""

RECIPES = {
    # The original study: SGD 1e-3, momentum 0.9, StepLR(7, 0.1), batch 100, pixels in 0..1 without normalisation.
    "seed": Recipe(
        name="seed",
        epochs=15,
        batch_size=100,
        lr=1e-3,
        schedule="step",
        normalise=False,
        augment=Augment(flip="random"),
        stem_bias=True,
    ),
    # Nesterov SGD with decay on weights only, label smoothing, warm-up and cosine, averaged weights: the ResNet practice of the
    # last years. The learning rate is 0.1 for 256 images, scaled linearly (Goyal et al., 2017, arXiv 1706.02677). Measured on
    # 720 photographs of 12 classes at 64 px, after one epoch of 22 steps: with running averages of batch norm's statistics the
    # averaged weights had a loss of 190 on val, and the weights themselves one of 66; with statistics measured anew, 1.4 both.
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
        norm_images=256,
        min_steps=400,
        normalise=True,
        augment=Augment(flip="random"),
        eval_flip=True,
    ),
}


# For photographs of unequal size: the same, with random resized crops of a quarter to all of the image and mild changes of
# colour, evaluated on the centre of 0.875 of the shorter side (256 to 224 pixels, as torchvision's references have it).
RECIPES["photos"] = replace(
    RECIPES["modern"],
    name="photos",
    augment=Augment(flip="random", crop_scale=(0.25, 1.0), brightness=0.2, contrast=0.2, saturation=0.2),
    crop_fraction=0.875,
)


# From starting weights: fewer epochs, small steps for what is learnt already, and ten times larger ones for the head, which is
# random where it is for other classes.
RECIPES["finetune"] = replace(
    RECIPES["modern"], name="finetune", epochs=8, lr=0.005, head_lr_scale=10.0, weight_decay=1e-4, min_steps=200
)


def with_crops(recipe: Recipe) -> Recipe:
    """The recipe with the augmentation and the evaluation of ``photos``."""
    return replace(recipe, augment=RECIPES["photos"].augment, crop_fraction=RECIPES["photos"].crop_fraction)


def default_recipe(image_sizes: Mapping[str, int], res: int) -> str:
    """``photos`` where images are of unequal size and most are larger than the input, else ``modern``.

    Args:
        image_sizes: of the train split, 'HxW' -> samples.
        res: input side in pixels.
    """
    larger = sum(samples for size, samples in image_sizes.items() if min(map(int, size.split("x"))) > res)
    return "photos" if len(image_sizes) > 1 and 2 * larger > sum(image_sizes.values()) else "modern"


def make_recipe(name: str, **changes: Any) -> Recipe:
    """A named recipe with some fields changed; changes of None are ignored. The learning rate follows the batch size, in
    proportion, unless it is given.

    Raises:
        UsageError: no such recipe, or a wrong value.
    """
    if name not in RECIPES:
        raise UsageError(f"--recipe {name}: choose from {', '.join(RECIPES)}")
    given = {field: value for field, value in changes.items() if value is not None}
    recipe = replace(RECIPES[name], **given)
    return recipe if "lr" in given else with_batch(recipe, recipe.batch_size, of=RECIPES[name].batch_size)


def with_batch(recipe: Recipe, batch_size: int, *, of: int) -> Recipe:
    """The recipe with this batch size, and its learning rate, which is for batches ``of`` so many images, in proportion."""
    return replace(recipe, batch_size=batch_size, lr=recipe.lr * (batch_size / of))


def fit_to_images(recipe: Recipe, images: int, ranks: int = 1, *, batch_stays: bool, epochs_stay: bool) -> Recipe:
    """The recipe for a train split of so many images, with at least `Recipe.min_steps` steps: by halving the batch, again and
    again, and then by more epochs."""

    def steps_per_epoch(batch_size: int) -> int:
        return images // batch_size

    batch_size = recipe.batch_size
    while not batch_stays and recipe.epochs * steps_per_epoch(batch_size) < recipe.min_steps:
        small_enough = batch_size // 2 < (_LEAST_BATCH if batch_size <= images else 2)
        if small_enough or batch_size % (2 * ranks):
            break
        batch_size //= 2
    fitted = with_batch(recipe, batch_size, of=recipe.batch_size) if batch_size != recipe.batch_size else recipe
    if epochs_stay or not steps_per_epoch(batch_size):
        return fitted
    return replace(fitted, epochs=max(recipe.epochs, math.ceil(recipe.min_steps / steps_per_epoch(batch_size))))


def change(recipe: Recipe, changes: Sequence[str], *, lr_follows: bool = False) -> Recipe:
    """The recipe with ``field=value`` changes, such as ``lr=0.1`` or ``augment.shift_px=4``; values are in JSON, strings
    unquoted.

    Args:
        lr_follows: the learning rate follows a changed batch size, in proportion, unless it is changed itself.

    Raises:
        UsageError: no such field, or a wrong value.
    """
    document: dict[str, Any] = asdict(recipe)
    for text in changes:
        path, equals, value = text.partition("=")
        section, _, field = path.rpartition(".")
        place = document["augment"] if section == "augment" else document
        if not equals or section not in ("", "augment") or field not in place or isinstance(place[field], dict):
            names = [name for name in document if name != "augment"] + [f"augment.{name}" for name in document["augment"]]
            close = difflib.get_close_matches(path, names, n=1)
            hint = f"did you mean {close[0]}? Give" if close and close[0] != path else "give"
            raise UsageError(f"--set {text}: {hint} field=value, with one of {', '.join(names)}")
        if field == "train_sizes":
            value = f"[{value.strip('[]')}]"  # ``64,128`` as well as ``[64,128]``
        try:
            place[field] = value if isinstance(place[field], str) else json.loads(value)
        except ValueError:
            raise UsageError(f"--set {text}: {value!r} is not a JSON value; {path} is {place[field]!r}") from None
    changed = recipe_from(document)
    if lr_follows and not is_changed("lr", changes):
        return with_batch(changed, changed.batch_size, of=recipe.batch_size)
    return changed


def is_changed(field: str, changes: Sequence[str]) -> bool:
    """Whether a field is among ``field=value`` changes."""
    return any(text.partition("=")[0] == field for text in changes)
