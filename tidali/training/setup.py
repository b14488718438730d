"""Makes the model, the loaders and the optimizer of a training run from its settings. Each setting is used here alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from tidali.config import CUDA_GRAPHS, CacheChoice, Preprocess, TrainSettings
from tidali.console import say
from tidali.dataset.contract import Dataset
from tidali.errors import UsageError, counted
from tidali.hardware.device import DevicePlan
from tidali.hardware.limits import cpu_count
from tidali.hardware.ranks import Ranks
from tidali.hardware.versions import versions
from tidali.loading.batches import Batches, Training
from tidali.loading.data import Data
from tidali.loading.sizes import SizePlan
from tidali.model.checkpoint import EVAL_BATCH_SIZE, ModelCard
from tidali.model.parts import frozen_modules, is_within
from tidali.model.pretrained import Normalisation, apply_init, choose_normalisation
from tidali.model.resnet import LoadReport, build_resnet, title_of, training_activations
from tidali.recipes import RECIPES
from tidali.training.engine import TrainState, make_train_state
from tidali.training.own_network import check_own_network
from tidali.training.schedule import make_schedule

_FIXED_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The objects that a training run works with."""

    state: TrainState
    train_batches: Batches
    eval_batches: Batches
    select_on: str
    """The split that each epoch is evaluated on."""
    card: ModelCard
    """For the checkpoints that the run will save; without metrics."""
    load_report: LoadReport | None
    data: Data

    def facts(self) -> dict[str, float]:
        """What a reader of metrics.jsonl needs to judge its figures (`tidali.training.judgement`), the same for every epoch."""
        manifest = self.data.dataset.manifest
        evaluated, recipe = manifest.splits[self.select_on], self.state.recipe
        trained = min(len(self.train_batches) * recipe.batch_size, self.train_batches.samples)
        return {
            "classes": len(manifest.classes),
            "largest_class_percent": evaluated.largest_class_percent,
            "train_samples": trained,
            "train_left_out": self.train_batches.samples - trained,
        }


def set_up(
    settings: TrainSettings,
    dataset: Dataset,
    plan: DevicePlan,
    ranks: Ranks,
    *,
    cache: CacheChoice | None = None,
    model: nn.Module | None = None,
) -> Setup:
    """Make them all, before anything is written, since each may fail.

    Args:
        cache: replaces the settings' value where a resumed run continues on the route that it began with.
        model: a network of the user's own, instead of the settings' ResNet.

    Raises:
        TidaliError, UsageError, DatasetError: the settings, the data or the device do not allow the run.
    """
    recipe = settings.recipe
    select_on = selection_split(dataset)
    check_batch_size(settings, dataset.labelled_split("train").samples, ranks.world_size)
    batch_size = ranks.local_batch_size(recipe.batch_size)
    sizes = SizePlan.of(settings.res, recipe.train_sizes, recipe.size_order, epochs=recipe.epochs, seed=settings.seed)
    torch.manual_seed(settings.seed)
    network, load_report, init_normalisation = make_network(settings, dataset, plan, ranks, model)
    mean, std = choose_normalisation(recipe.normalise, init_normalisation, dataset)
    data = Data(
        dataset,
        plan.device,
        cache=cache or settings.cache,
        decoder=settings.decoder,
        max_bad=settings.max_bad,
        ranks=ranks,
        training_bytes=training_bytes(plan, network, max(sizes.sides), -(-batch_size // recipe.accumulate)),
    )
    preprocess = Preprocess(res=settings.res, mean=mean, std=std, kernel=recipe.kernel, crop_fraction=recipe.crop_fraction)
    training = Training(augment=recipe.augment, seed=settings.seed, sizes=sizes)
    train_batches = data.batches("train", preprocess, batch_size, training=training, dtype=plan.images_dtype)
    eval_batches = data.batches(select_on, preprocess, EVAL_BATCH_SIZE, dtype=plan.images_dtype)
    if cache not in (None, settings.cache):
        for batches in (train_batches, eval_batches):
            batches.route = replace(batches.route, reason="as when the run began")
    refuse_graphs_beside_dali(plan, train_batches, eval_batches)
    if settings.sync_bn:
        if plan.device.type != "cuda":
            raise UsageError("--sync-bn: torch synchronises batch norm on GPUs only; leave the flag out on a CPU")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    state = make_train_state(network, plan, make_schedule(recipe, len(train_batches)), recipe, ranks=ranks)
    card = ModelCard(
        classes=dataset.manifest.classes,
        arch=settings.arch,
        stem=settings.stem,
        stem_bias=_stem_bias(settings),
        res=settings.res,
        mean=mean,
        std=std,
        kernel=recipe.kernel,
        crop_fraction=recipe.crop_fraction,
        settings=settings.to_dict(),
        versions=versions(),
    )
    return Setup(
        state=state,
        train_batches=train_batches,
        eval_batches=eval_batches,
        select_on=select_on,
        card=card,
        load_report=load_report,
        data=data,
    )


def make_network(
    settings: TrainSettings, dataset: Dataset, plan: DevicePlan, ranks: Ranks, model: nn.Module | None
) -> tuple[nn.Module, LoadReport | None, Normalisation | None]:
    """The network with its starting weights, what was loaded into it, and the normalisation of those weights, if known.

    Args:
        model: one of the user's own.

    Raises:
        UsageError, TidaliError: the starting weights cannot be had, or what is frozen would stay random; or the user's network
            cannot be trained, or the settings are not for one.
    """
    classes, recipe = dataset.manifest.classes, settings.recipe
    if settings.arch == "own":
        if model is None:
            fix = "give it to tidali.train_model(settings, model=...), with resume=True to resume"
            raise UsageError(f"{settings.out or 'arch own'}: the settings are of a network of your own; {fix}")
        check_own_network(model, len(classes), settings, plan, ranks)
        return model, None, None
    network = build_resnet(settings.arch, len(classes), settings.stem, stem_bias=_stem_bias(settings))
    report, normalisation = apply_init(network, settings.init, settings.stem_init, classes, arch=settings.arch)
    random = [name for name in (report.fresh if report else ()) if is_within(name, frozen_modules(recipe.freeze))]
    if random:
        fix = "--stem-init resample makes a small stem of them, and --set freeze=none trains it"
        raise UsageError(f"freeze {recipe.freeze}: {random[0]} is not in the starting weights, and would stay random; {fix}")
    return network, report, normalisation


def _stem_bias(settings: TrainSettings) -> bool:
    return settings.recipe.stem_bias and settings.stem == "small"


def training_bytes(plan: DevicePlan, model: nn.Module, res: int, batch_size: int) -> int:
    """The memory that training takes besides the pixels, by an estimate (not measured on a GPU): the activations of a batch,
    and weights, gradients, momentum, averages and the libraries' work space.

    Args:
        res: the largest input side in pixels.
        batch_size: of one forward pass on one rank.
    """
    try:
        activations = training_activations(model, res)
    except Exception:  # a network of the user's own may do what cannot be done without values
        activations = 0
    return batch_size * activations * plan.images_dtype.itemsize + _FIXED_BYTES


def refuse_graphs_beside_dali(plan: DevicePlan, *given: Batches) -> None:
    """
    Raises:
        UsageError: CUDA graphs would be captured while DALI decodes on the GPU.
    """
    if plan.compile_mode in CUDA_GRAPHS and any(batches.source.decodes_on_gpu for batches in given):
        raise UsageError(
            f"--compile {plan.compile_mode} captures CUDA graphs, and DALI, which decodes this stream on the GPU, frees memory "
            "meanwhile, which ends a capture; give --compile on, --decoder cpu, or --cache device"
        )


def check_batch_size(settings: TrainSettings, samples: int, world_size: int) -> None:
    """Batch norm needs two images: the last feature maps of an input of 32 px have one pixel.

    Args:
        samples: of the train split.

    Raises:
        UsageError: the batch does not give two images to each micro-batch of each rank, cannot be divided among the ranks, or
            is larger than the split. Names a batch size that would do, where there is one.
    """
    batch_size, parts = settings.recipe.batch_size, settings.recipe.accumulate
    least, most = 2 * parts * world_size, samples // world_size * world_size
    if settings.sync_bn:  # batch norm sees the micro-batches of all ranks together
        least = max(world_size, 2) * parts
    needs = f"{world_size} ranks need" if world_size > 1 else "batch norm needs"
    needs += f" at least {least} images a step" + (f" for {parts} micro-batches" if parts > 1 else "")
    if most < least:
        fewer = " or use fewer ranks or micro-batches" if world_size * parts > 1 else ""
        raise UsageError(f"the 'train' split has {counted(samples, 'image')}, and {needs}; add images{fewer}")
    nearest = min(max(batch_size - batch_size % world_size, least), most)
    if batch_size < least:
        raise UsageError(f"--batch-size {batch_size}: {needs}; use at least --batch-size {nearest}")
    if batch_size > most:
        where = counted(samples, "image") + (f" for {world_size} ranks" if world_size > 1 else "")
        raise UsageError(f"--batch-size {batch_size}: the 'train' split has {where}; use at most --batch-size {nearest}")
    if batch_size != nearest:
        raise UsageError(f"--batch-size {batch_size}: not a multiple of the {world_size} ranks; use --batch-size {nearest}")


def selection_split(dataset: Dataset) -> str:
    """The split that each epoch is evaluated on, by which the best epoch is chosen: ``heldout`` where there is one, else
    ``val``.

    Raises:
        UsageError: there is neither.
    """
    for name in ("heldout", "val"):
        if name in dataset.manifest.splits and dataset.manifest.splits[name].samples:
            return name
    again = "adopt it again with" if dataset.manifest.adopted else "pack it again with --overwrite"
    raise UsageError(f"{dataset.root}: no val split to evaluate on; {again} --val-fraction 0.1")


def announce(settings: TrainSettings, dataset: Dataset, plan: DevicePlan, ranks: Ranks, setup: Setup) -> None:
    """Print what is about to run, and why the cache, the precision and compilation were chosen."""
    recipe = settings.recipe

    def fact(name: str, text: str) -> None:
        say(f"{name:<8}{text}", hang=8)

    train_images = counted(dataset.split("train").samples, "train image")
    fact("data", f"{dataset.root}: {train_images}, {counted(len(dataset.manifest.classes), 'class')}")
    stem = f", {settings.stem} stem, init {settings.init}" if settings.arch != "own" else ""
    fact("model", f"{title_of(settings.arch)}{stem}, {settings.res} x {settings.res} px")
    if settings.arch == "own":
        fact("", "its checkpoints hold weights alone: predict with tidali.load_model(PATH, model=...); stems do not apply")
    if setup.state.frozen:
        fact("", f"frozen: {', '.join(setup.state.frozen)}")
    for line in setup.load_report.lines() if setup.load_report else ():
        fact("", line)
    epochs = f"{counted(recipe.epochs, 'epoch')} of {counted(len(setup.train_batches), 'step')}"
    fact("recipe", f"{recipe.name}: {epochs}, batch {recipe.batch_size}, lr {recipe.lr:g}")
    if recipe.head_lr_scale != 1:
        fact("", f"the head's lr is {recipe.head_lr_scale:g} times this one")
    if recipe.stage_lr_decay != 1:
        fact("", f"the last stage has this lr, and each part before it {recipe.stage_lr_decay:g} times that of the next one")
    if recipe.train_sizes:
        fact("", f"trained at {', '.join(map(str, recipe.train_sizes))} px, {recipe.size_order}")
    original = RECIPES.get(recipe.name, recipe)
    if recipe.batch_size != original.batch_size and math.isclose(
        recipe.lr, original.lr * recipe.batch_size / original.batch_size
    ):
        fact("", f"this lr is the recipe's {original.lr:g} for {original.batch_size} images, in proportion")
    local_batch_size = ranks.local_batch_size(recipe.batch_size)
    in_ranks = f", {ranks.world_size} ranks of {local_batch_size} images each" if ranks.world_size > 1 else ""
    fact("device", f"{plan.device}: {plan.name}, {counted(cpu_count(), 'core')}{in_ranks}")
    for name, batches in (("train", setup.train_batches), (setup.select_on, setup.eval_batches)):
        fact("pixels", f"{name}: {batches.route.describe()}")
    if dataset.copy is not None and setup.train_batches.shuffle is not None:
        fact("order", f"{setup.train_batches.shuffle.describe()}, as {dataset.copy.url} is larger than TIDALI_CACHE_LIMIT")
    fact("amp", f"{plan.dtype_name}: {plan.amp_reason}")
    fact("compile", f"{plan.compile_mode if plan.compile else 'off'}: {plan.compile_reason}")
    if plan.device.type == "cuda":
        fact("cudnn", f"TF32 off, benchmark {'off: --deterministic' if settings.deterministic else 'on'}")
