"""``tidali train``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from tidali.cli.options import (
    AmpOption,
    ArchOption,
    CacheOption,
    CompileOption,
    DecoderOption,
    DeviceOption,
    MaxBadOption,
    RecipeName,
    data_option,
    is_given,
    machine_option,
    model_option,
    recipe_option,
    run_option,
)
from tidali.cli.packing import demo_data
from tidali.config import Recipe, Stem, StemInit, TrainSettings, check_res
from tidali.errors import UsageError, counted
from tidali.recipes import change, default_recipe, fit_to_images, is_changed, make_recipe, with_crops
from tidali.training.judgement import loss_text, shows_top5


def train(
    context: typer.Context,
    data: Annotated[
        str | None,
        data_option(
            metavar="DATA",
            help="A packed data set, as 'tidali shard', 'adopt' or 'demo' make it: a folder or a URL.",
            show_default="built-in demo data, made in data/demo on first use",
        ),
    ] = None,
    res: Annotated[
        int | None,
        data_option(
            metavar="PX", help="Input side in pixels.", show_default="the images' own side if all have the same, else 224"
        ),
    ] = None,
    arch: ArchOption = "resnet18",
    stem: Annotated[
        Stem, model_option(help="imagenet: 7x7/2 convolution and max-pool; small: 3x3/1 without pooling, for small images.")
    ] = "imagenet",
    init: Annotated[
        str,
        model_option(
            metavar="none | imagenet | FILE",
            help="Initial weights: random, torchvision's of ImageNet, or a checkpoint (.safetensors, .pth or runs/NAME/best).",
        ),
    ] = "none",
    stem_init: Annotated[
        StemInit,
        model_option(
            help="7x7 weights for the small stem: fresh leaves its 3x3 kernels random, resample shrinks the weights to 3x3."
        ),
    ] = "fresh",
    linear_probe: Annotated[
        bool,
        recipe_option(
            "--linear-probe", help="Train the head alone, on the frozen weights of --init; the same as --set freeze=body."
        ),
    ] = False,
    recipe: Annotated[
        RecipeName | None,
        recipe_option(
            help="seed: as in the original study; modern: normalised, label smoothing, Nesterov, warm-up and cosine schedule; "
            "photos: modern with random crops and mild colour changes; finetune: modern with fewer epochs and smaller steps, "
            "for weights given by --init.",
            show_default="finetune with --init; photos if images are of unequal size, larger than the input; else modern",
        ),
    ] = None,
    epochs: Annotated[
        int | None, recipe_option(help="Training epochs.", show_default="the recipe's, or more where there are few images")
    ] = None,
    batch_size: Annotated[
        int | None,
        recipe_option(help="Images per step, over all GPUs.", show_default="the recipe's, or fewer where there are few images"),
    ] = None,
    lr: Annotated[
        float | None, recipe_option(help="Peak learning rate.", show_default="the recipe's, in proportion to the batch size")
    ] = None,
    set_: Annotated[
        list[str] | None,
        recipe_option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change a field of the recipe, such as augment.shift_px=4; repeatable. '--set help' lists the fields.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        run_option(
            metavar="FILE", help="Repeat another run from its config.json; only --set and --out may be given beside it."
        ),
    ] = None,
    seed: Annotated[
        int, recipe_option(min=0, max=2**32 - 1, help="Random seed of weights, sample order and augmentation.")
    ] = 0,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    compile: CompileOption = "auto",
    cache: CacheOption = "auto",
    decoder: DecoderOption = "auto",
    max_bad: MaxBadOption = None,
    deterministic: Annotated[
        bool, machine_option("--deterministic", help="Two runs give the same weights, bit for bit.")
    ] = False,
    sync_bn: Annotated[
        bool, machine_option("--sync-bn", help="Batch norm over the batches of all GPUs instead of each GPU's own.")
    ] = False,
    tensorboard: Annotated[
        bool,
        run_option("--tensorboard", help="Also write TensorBoard events to the run folder (needs the extra 'tensorboard')."),
    ] = False,
    out: Annotated[
        str | None, run_option(metavar="FOLDER", help="Run folder.", show_default="runs/DATA-RES-RECIPE-TIME")
    ] = None,
    resume: Annotated[
        str | None,
        run_option(metavar="RUN", help="Resume a stopped or killed run, with its own settings; no other option may be given."),
    ] = None,
) -> None:
    """Train a ResNet and evaluate it after each epoch.

    Writes a run folder: the settings (config.json), the results of each epoch (metrics.jsonl) and within epochs (steps.jsonl),
    the weights of the best and the last epoch with the class names inside (best.safetensors, last.safetensors), the state that
    --resume continues from, and summary.json. 'tidali report' makes a page of it.
    """
    if resume is not None:
        _refuse_other_options(context, "resume")
        settings = _saved_settings(Path(resume) / "config.json", "resume")
        _run(settings, out=resume, resume=True)
        return
    if config is not None:
        _refuse_other_options(context, "config", "set_", "out")
        settings = _saved_settings(Path(config), "config")
        _run(replace(settings, recipe=change(settings.recipe, set_ or ())), out=out)
        return

    def made(name: RecipeName, *, crops: bool = False) -> Recipe:
        recipe = make_recipe(name, epochs=epochs, batch_size=batch_size, lr=lr, freeze="body" if linear_probe else None)
        return change(with_crops(recipe) if crops else recipe, set_ or (), lr_follows=lr is None)

    usual: RecipeName = "modern" if init == "none" else "finetune"
    chosen = made(recipe or usual)  # refused before the data is opened
    if linear_probe and init == "none":
        raise UsageError("--linear-probe: a head on random weights learns little; give --init")
    if res is not None:
        check_res(res)
    if data is None:
        from tidali.hardware.device import plan_device

        plan_device(device, amp, compile)  # refused before the demo data are written
    folder = data if data is not None else str(demo_data())

    from tidali.dataset.source import open_data

    notes: list[str] = []
    dataset = open_data(folder)
    res = res or dataset.default_res
    if recipe is None and default_recipe(dataset.split("train").image_sizes, res) == "photos":
        chosen = made(usual, crops=True) if usual == "finetune" else made("photos")
        notes.append(
            f"recipe {chosen.name} with random crops: images of unequal size, larger than {res} px; "
            f"--recipe modern takes their centres, uncropped"
        )
    if recipe is None and usual == "finetune":
        notes.append("recipe finetune, as there are starting weights; --recipe modern trains longer, with larger steps")
    given = set_ or ()
    images = dataset.split("train").samples
    fitted = fit_to_images(
        chosen,
        images,
        int(os.environ.get("WORLD_SIZE", "1")),
        batch_stays=batch_size is not None or lr is not None or is_changed("batch_size", given) or is_changed("lr", given),
        epochs_stay=epochs is not None or is_changed("epochs", given),
    )
    if fitted != chosen:
        steps, few = (one.epochs * (images // one.batch_size) for one in (fitted, chosen))
        notes.append(
            f"recipe {chosen.name} on {counted(images, 'image')}: {counted(fitted.epochs, 'epoch')} of batches of "
            f"{fitted.batch_size}, {steps:,} steps instead of {few:,}; --epochs and --batch-size set others"
        )
    settings = TrainSettings(
        data=folder,
        out=out or "",
        res=res,
        arch=arch,
        stem=stem,
        init=init,
        stem_init=stem_init,
        recipe=fitted,
        seed=seed,
        device=device,
        amp=amp,
        compile=compile,
        cache=cache,
        decoder=decoder,
        max_bad=max_bad,
        deterministic=deterministic,
        sync_bn=sync_bn,
        tensorboard=tensorboard,
    )
    _run(settings, out=out, notes=notes)


def _run(settings: TrainSettings, *, out: str | None, resume: bool = False, notes: Sequence[str] = ()) -> None:
    """Train in the folder, or in a new one of a name of its own, and print the results."""
    from tidali.console import is_main_rank, print_table, say, show, suggest
    from tidali.dataset.source import open_data
    from tidali.training.history import read_runs
    from tidali.training.run import train
    from tidali.training.run_folder import new_run_folder

    name = f"runs/{Path(settings.data).name}-{settings.res}-{settings.recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    with new_run_folder(name) if out is None and is_main_rank() else nullcontext(name if out is None else out) as folder:
        result = train(replace(settings, out=folder), open_data(settings.data), resume=resume, notes=notes)
    if not is_main_rank():
        return
    (run,) = read_runs([str(result.out)])
    named = [("best", result.best_epoch, result.best), ("last", settings.recipe.epochs, result.last)]
    if result.last_flip is not None:
        named.append(("last, with flip TTA", settings.recipe.epochs, result.last_flip))
    top5 = shows_top5(run.classes)
    columns = ("", "epoch", "top-1 %", *(["top-5 %"] if top5 else []), "loss")
    print_table(f"{result.out}", columns, [(name, epoch, *_score_cells(score, top5)) for name, epoch, score in named])
    for finding in run.findings:
        show(str(finding))
    say(f"{result.images_per_s:,.0f} images/s in training, {result.minutes:.1f} min in total")
    page = result.out / "report.html"
    suggest("a page with curves, confusions and the hardest images", "tidali", "report", result.out, "-o", page)


def _saved_settings(path: Path, option: str) -> TrainSettings:
    """
    Raises:
        UsageError: the file cannot be read, or does not hold the settings of a run.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = "'tidali runs' lists the runs" if option == "resume" else "each run folder has a config.json"
        raise UsageError(f"--{option}: there is no file {path}; {known}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--{option}: {path} cannot be read as the settings of a run ({error})") from None
    return TrainSettings.from_dict(document, str(path))


def _refuse_other_options(context: typer.Context, option: str, *allowed: str) -> None:
    """
    Raises:
        UsageError: an option was given beside one that brings all settings with it.
    """
    for name in context.params:
        if name not in (option, *allowed) and is_given(context, name):
            raise UsageError(f"--{name.replace('_', '-')}: not together with --{option}, which takes that run's settings")


def _score_cells(score: Any, top5: bool) -> tuple[str, ...]:
    return f"{score.top1_percent:.1f}", *([f"{score.top5_percent:.1f}"] if top5 else []), loss_text(score.loss)
