"""From settings to the parts of a training run: the one place where each setting meets what it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tidali.config import RECIPES, CacheChoice, Preprocess, TrainSettings
from tidali.console import say
from tidali.dataset.contract import Dataset
from tidali.errors import UsageError
from tidali.hardware.device import DevicePlan, cpu_count
from tidali.hardware.ranks import Ranks
from tidali.hardware.versions import versions
from tidali.loading.batches import Batches, Training
from tidali.loading.data import Data
from tidali.loading.sizes import SizePlan
from tidali.model.checkpoint import EVAL_BATCH_SIZE, ModelCard
from tidali.model.pretrained import apply_init, choose_normalisation
from tidali.model.resnet import LoadReport, build_resnet18
from tidali.training.engine import TrainState, make_train_state
from tidali.training.schedule import make_schedule


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of."""

    state: TrainState
    train_batches: Batches
    eval_batches: Batches
    select_on: str
    """The split that each epoch is evaluated on."""
    card: ModelCard
    """Of the checkpoints to come, without metrics."""
    load_report: LoadReport | None
    data: Data


def wire(
    settings: TrainSettings, dataset: Dataset, plan: DevicePlan, ranks: Ranks, *, cache: CacheChoice | None = None
) -> Parts:
    """Make everything that can fail before anything is written.

    Args:
        cache: in the place of the settings', for a run whose route was decided before.

    Raises:
        TidaliError, UsageError, DatasetError: the settings, the data or the device do not allow the run.
    """
    recipe = settings.recipe
    select_on = selection_split(dataset)
    share = ranks.share(recipe.batch_size)
    if recipe.accumulate > max(share // 2, 1):
        raise UsageError(f"accumulate {recipe.accumulate}: a rank has {share} images a step, and needs two for each piece")
    sizes = SizePlan.of(settings.res, recipe.train_sizes, recipe.size_order, epochs=recipe.epochs, seed=settings.seed)
    torch.manual_seed(settings.seed)
    stem_bias = recipe.stem_bias and settings.stem == "small"
    model = build_resnet18(len(dataset.manifest.classes), settings.stem, stem_bias=stem_bias)
    load_report, of_init = apply_init(model, settings.init, settings.stem_init)
    mean, std = choose_normalisation(recipe.normalise, of_init, dataset)
    data = Data(
        dataset, plan.device, cache=cache or settings.cache, decoder=settings.decoder, max_bad=settings.max_bad, ranks=ranks
    )
    preprocess = Preprocess(res=settings.res, mean=mean, std=std, kernel=recipe.kernel, crop_fraction=recipe.crop_fraction)
    training = Training(augment=recipe.augment, seed=settings.seed, sizes=sizes)
    train_batches = data.batches("train", preprocess, share, training=training)
    eval_batches = data.batches(select_on, preprocess, EVAL_BATCH_SIZE)
    if cache not in (None, settings.cache):
        for batches in (train_batches, eval_batches):
            batches.route = replace(batches.route, reason="as the run began")
    schedule = make_schedule(
        recipe.schedule,
        lr=recipe.lr,
        epochs=recipe.epochs,
        steps_per_epoch=len(train_batches),
        warmup_epochs=recipe.warmup_epochs,
        step_epochs=recipe.step_epochs,
        step_gamma=recipe.step_gamma,
    )
    if settings.sync_bn:
        model = ranks.synchronise_batch_norm(model, plan.device)
    state = make_train_state(
        model,
        plan,
        schedule,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        label_smoothing=recipe.label_smoothing,
        grad_clip_norm=recipe.grad_clip_norm,
        accumulate=recipe.accumulate,
        ema_decay=recipe.ema_decay,
        ranks=ranks,
    )
    card = ModelCard(
        classes=dataset.manifest.classes,
        stem=settings.stem,
        stem_bias=stem_bias,
        res=settings.res,
        mean=mean,
        std=std,
        kernel=recipe.kernel,
        crop_fraction=recipe.crop_fraction,
        settings=settings.to_dict(),
        versions=versions(),
    )
    return Parts(
        state=state,
        train_batches=train_batches,
        eval_batches=eval_batches,
        select_on=select_on,
        card=card,
        load_report=load_report,
        data=data,
    )


def selection_split(dataset: Dataset) -> str:
    """The split that each epoch is evaluated on and the best epoch chosen by: a held-out part of train where there is one.

    Raises:
        UsageError: there is neither.
    """
    for name in ("heldout", "val"):
        if name in dataset.manifest.splits and dataset.manifest.splits[name].samples:
            return name
    raise UsageError(f"{dataset.root}: no val split to evaluate on; pack it again with --overwrite --val-fraction 0.1")


def announce(settings: TrainSettings, dataset: Dataset, plan: DevicePlan, ranks: Ranks, parts: Parts) -> None:
    """Say what is about to run and why the device's settings are what they are."""
    recipe = settings.recipe
    say(f"data    {dataset.root}: {dataset.split('train').samples} train images, {len(dataset.manifest.classes)} classes")
    say(f"model   ResNet-18, {settings.stem} stem, init {settings.init}, {settings.res} x {settings.res} px")
    for line in parts.load_report.lines() if parts.load_report else ():
        say(f"        {line}")
    steps = len(parts.train_batches)
    say(f"recipe  {recipe.name}: {recipe.epochs} epochs of {steps} steps, batch {recipe.batch_size}, lr {recipe.lr}")
    if recipe.train_sizes:
        say(f"        trained at {', '.join(map(str, recipe.train_sizes))} px, {recipe.size_order}")
    named = RECIPES.get(recipe.name)
    if named is not None and recipe.batch_size != named.batch_size and recipe.lr == named.lr:
        linear = recipe.lr * recipe.batch_size / named.batch_size
        say(f"        that lr is for a batch of {named.batch_size}; in proportion to the batch it would be --lr {linear:g}")
    of_ranks = f", {ranks.world_size} ranks of {ranks.share(recipe.batch_size)} images each" if ranks.world_size > 1 else ""
    say(f"device  {plan.device}: {plan.name}, {cpu_count()} cores{of_ranks}")
    for name, batches in (("train", parts.train_batches), (parts.select_on, parts.eval_batches)):
        say(f"pixels  {name}: {batches.route.describe()}")
    say(f"amp     {plan.dtype_name}: {plan.amp_reason}")
    say(f"compile {plan.compile_mode if plan.compile else 'off'}: {plan.compile_reason}")
    if plan.device.type == "cuda":
        say(f"cudnn   TF32 off, benchmark {'off: --deterministic' if settings.deterministic else 'on'}")
