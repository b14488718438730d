"""Settings that cannot be right: each refused in one line that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidali.config import CUDA_GRAPHS, TrainSettings
from tidali.errors import UsageError
from tidali.recipes import RECIPES, change, fit_to_images, make_recipe


@pytest.mark.parametrize(
    ("recipe", "text", "complaint"),
    [
        ("modern", "momentum=0", "nesterov is a kind of momentum: with momentum 0 set nesterov=false too"),
        ("seed", "momentum=1", "momentum 1: from 0 to below 1"),
        ("modern", "weight_decay=-1", "weight_decay -1: from 0"),
        ("modern", "warmup_epochs=-1", "warmup_epochs -1: from 0"),
        ("seed", "step_epochs=0", "step_epochs 0: at least 1"),
        ("seed", "step_gamma=-1", "step_gamma -1: from 0"),
        ("modern", "label_smoothing=2", "label_smoothing 2: from 0 to 1"),
        ("modern", "ema_decay=1", "ema_decay 1: from 0, which is none, to below 1"),
        ("modern", "grad_clip_norm=-1", "grad_clip_norm -1: from 0"),
        ("modern", "grad_clip_norm=NaN", "grad_clip_norm nan: from 0"),
        ("modern", "schedule=flat", "schedule 'flat' is not one of step, cosine"),
        ("modern", "augment.crop_ratio=null", "augment: crop_ratio None is no tuple[float, float]"),
        ("modern", 'augment.crop_scale=["a","b"]', "augment: crop_scale ('a', 'b') is no tuple[float, float] | None"),
        ("modern", "augment.flip=up", "augment: flip 'up' is not one of none, random, alternating"),
    ],
)
def test_a_change_that_cannot_be_right(recipe: str, text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as refused:
        change(make_recipe(recipe), [text])
    assert str(refused.value).startswith(complaint)


@pytest.mark.parametrize(
    "text", ["momentum=0.0", "augment.crop_scale=[0.08, 1]", "augment.crop_scale=null", "train_sizes=64,96"]
)
def test_a_change_that_can(text: str) -> None:
    assert change(make_recipe("seed"), [text, "grad_clip_norm=1"]).grad_clip_norm == 1


def test_the_learning_rate_follows_the_batch_unless_it_is_given() -> None:
    assert make_recipe("modern").lr == 0.05  # for batches of 128
    assert make_recipe("modern", batch_size=32).lr == pytest.approx(0.0125)
    assert make_recipe("seed", batch_size=300).lr == pytest.approx(0.003)  # its own: 1e-3 for 100
    assert make_recipe("modern", batch_size=32, lr=0.05).lr == 0.05
    assert change(make_recipe("modern", batch_size=32), ["batch_size=64"], lr_follows=True).lr == pytest.approx(0.025)
    assert change(make_recipe("modern"), ["batch_size=64", "lr=0.3"], lr_follows=True).lr == 0.3
    assert change(make_recipe("modern"), ["batch_size=64"]).lr == 0.05  # --config repeats a run: only what is set changes


@pytest.mark.parametrize(
    ("images", "stays", "expected"),
    [
        (100_000, "", (128, 20)),
        (3_000, "", (128, 20)),  # 23 x 20 steps
        (720, "", (32, 20)),  # 22 x 20
        (720, "batch", (128, 80)),  # 5 x 80
        (720, "epochs", (32, 20)),
        (720, "batch epochs", (128, 20)),
        (100, "", (32, 134)),  # 3 x 134 = 402
        (20, "", (16, 400)),  # a step an epoch
        (1, "", (2, 20)),  # refused later: batch norm needs two
    ],
)
def test_few_images_get_more_steps(images: int, stays: str, expected: tuple[int, int]) -> None:
    recipe = make_recipe("modern")
    found = fit_to_images(recipe, images, batch_stays="batch" in stays, epochs_stay="epochs" in stays)
    assert (found.batch_size, found.epochs) == expected
    assert found.lr == pytest.approx(0.05 * expected[0] / 128)
    assert fit_to_images(make_recipe("seed"), images, batch_stays=False, epochs_stay=False) == make_recipe("seed")


def test_the_fitted_batch_divides_among_the_ranks() -> None:
    assert fit_to_images(make_recipe("modern"), 720, 64, batch_stays=False, epochs_stay=True).batch_size == 64


def document(**changes: Any) -> dict[str, Any]:
    """Settings as a config.json brings them."""
    settings = TrainSettings(data="d", out="o", recipe=make_recipe("modern")).to_dict()
    return json.loads(json.dumps({**settings, **changes}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"recipe": "modern"}, "its recipe is not a table of fields"),
        ({"recipe": {**document()["recipe"], "augment": []}}, "its recipe is not a table of fields"),
        ({"recipe": {}}, "augment"),
        ({"recipe": {**document()["recipe"], "kernel": "lanczos"}}, "kernel 'lanczos' is not one of pil, opencv"),
        ({"stem": "smal"}, "stem 'smal' is not one of imagenet, small"),
        ({"amp": "x"}, "amp 'x' is not one of auto, bf16, fp16, off"),
        ({"amp": ["off"]}, "amp ['off'] is not one of"),
        ({"res": "64"}, "res '64' is no int"),
        ({"deterministic": 1}, "deterministic 1 is no bool"),
        ({"seed": -1}, "--seed -1: from 0"),
        ({"max_bad": -1}, "--max-bad -1: at least 0"),
        ({"checkpoint_minutes": 0}, "checkpoint_minutes 0: must be above 0"),
        ({"speed": 1}, "speed"),
    ],
)
def test_a_config_file_that_cannot_be_right(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as refused:
        TrainSettings.from_dict(document(**changes), "x/config.json")
    assert str(refused.value).startswith("x/config.json: ")
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_cuda_graphs_are_not_for_pieces_of_a_batch() -> None:
    recipe = make_recipe("modern", accumulate=2)
    TrainSettings(data="d", out="o", recipe=recipe, compile="on")
    for compile in CUDA_GRAPHS:
        with pytest.raises(UsageError, match=f"--compile {compile}: not with accumulate 2; use --compile on"):
            TrainSettings(data="d", out="o", recipe=recipe, compile=compile)


def test_settings_come_back_from_json() -> None:
    for recipe in RECIPES.values():
        settings = TrainSettings(data="d", out="o", recipe=change(recipe, ["train_sizes=64,96", "augment.crop_scale=[0.1, 1]"]))
        assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict())), "x") == settings
