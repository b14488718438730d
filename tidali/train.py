"""One training run, wired together: settings in, a run folder out."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tidali import __version__
from tidali.checkpoint import SUFFIX, ModelCard, save_checkpoint, write_atomically
from tidali.config import IMAGENET_MEAN, IMAGENET_STD, TrainSettings, check_res
from tidali.console import progress_bar, say
from tidali.contract import Dataset
from tidali.device import DevicePlan, cpu_count, plan_device
from tidali.engine import EpochReport, TrainState, evaluate, make_train_state, train_epoch
from tidali.errors import TidaliError, UsageError
from tidali.loader import StreamBatches
from tidali.metrics import JsonlLog, Meter, Score
from tidali.models import LoadReport, build_resnet18, load_matching
from tidali.pretrained import Normalisation, file_weights, imagenet_weights
from tidali.schedule import make_schedule
from tidali.timing import Stopwatch

EVAL_BATCH_SIZE = 256
"""One value for training runs and ``tidali eval``, so that both do the same arithmetic and print the same figure."""

NO_NORMALISATION: Normalisation = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to."""

    out: Path
    best: Score
    best_epoch: int
    last: Score
    images_per_s: float
    """Median over the epochs, evaluation not counted."""
    minutes: float


def train(settings: TrainSettings, dataset: Dataset) -> RunResult:
    """Run it. Writes config.json, metrics.jsonl, last and best checkpoints and summary.json into ``settings.out``.

    Raises:
        TidaliError, UsageError: with nothing written where the settings, the data or the device do not allow the run.
    """
    recipe = settings.recipe
    watch = Stopwatch()
    plan = plan_device(settings.device, settings.amp, settings.compile)
    select_on = selection_split(dataset)
    torch.manual_seed(settings.seed)
    stem_bias = recipe.name == "seed" and settings.stem == "small"  # the study's row 5 has one
    model = build_resnet18(len(dataset.manifest.classes), settings.stem, stem_bias=stem_bias)
    report, init_normalisation = apply_init(model, settings.init)
    mean, std = choose_normalisation(recipe.normalise, init_normalisation, dataset)

    common: dict[str, Any] = dict(res=settings.res, mean=mean, std=std, device=plan.device)
    train_batches = StreamBatches(
        dataset, "train", batch_size=recipe.batch_size, train=True, flip=recipe.flip, seed=settings.seed, **common
    )
    eval_batches = StreamBatches(dataset, select_on, batch_size=EVAL_BATCH_SIZE, **common)
    schedule = make_schedule(
        recipe.schedule,
        lr=recipe.lr,
        epochs=recipe.epochs,
        steps_per_epoch=len(train_batches),
        warmup_epochs=recipe.warmup_epochs,
        step_epochs=recipe.step_epochs,
        step_gamma=recipe.step_gamma,
    )
    state = make_train_state(
        model,
        plan,
        schedule,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        label_smoothing=recipe.label_smoothing,
    )

    out = make_run_folder(Path(settings.out))
    write_json(out / "config.json", settings.to_dict())
    log = JsonlLog(out / "metrics.jsonl")
    announce(settings, dataset, plan, report, steps_per_epoch=len(train_batches))

    best: Score | None = None
    best_epoch, rates = 0, []
    score = Score(samples=0, loss_sum=0.0, correct1=0, correct5=0)
    for epoch in range(1, recipe.epochs + 1):
        trained = train_with_progress(state, train_batches, f"epoch {epoch}/{recipe.epochs}")
        score = evaluate(model, eval_batches, plan, expected_samples=dataset.split(select_on).samples)
        rates.append(trained.images_per_s)
        card = ModelCard(
            classes=dataset.manifest.classes,
            stem=settings.stem,
            stem_bias=stem_bias,
            res=settings.res,
            mean=mean,
            std=std,
            metrics={"epoch": epoch, **{f"{select_on}_{k}": v for k, v in score.to_dict().items()}},
            settings=settings.to_dict(),
            versions=versions(),
        )
        save_checkpoint(out / f"last{SUFFIX}", model, card)
        if best is None or score.correct1 > best.correct1:
            best, best_epoch = score, epoch
            save_checkpoint(out / f"best{SUFFIX}", model, card)
        log.write(epoch=epoch, step=state.step, lr=schedule(state.step - 1), **epoch_fields(trained, score, select_on))
        say(
            f"epoch {epoch}/{recipe.epochs}  train loss {trained.score.loss:.3f} top-1 {trained.score.top1_percent:.1f} %  "
            f"{select_on} loss {score.loss:.3f} top-1 {score.top1_percent:.2f} %  {trained.images_per_s:.0f} images/s  "
            f"waiting for data {100 * trained.data_wait_share:.1f} %"
        )
    assert best is not None
    result = RunResult(
        out=out,
        best=best,
        best_epoch=best_epoch,
        last=score,
        images_per_s=sorted(rates)[len(rates) // 2],
        minutes=watch.elapsed_s() / 60,
    )
    write_json(out / "summary.json", summary(result, plan, select_on))
    return result


def selection_split(dataset: Dataset) -> str:
    """The split that each epoch is evaluated on and the best epoch chosen by: a held-out part of train where there is one.

    Raises:
        UsageError: there is neither.
    """
    for name in ("heldout", "val"):
        if name in dataset.manifest.splits and dataset.manifest.splits[name].samples:
            return name
    raise UsageError(f"{dataset.root}: no val split to evaluate on; pack it again with --val-fraction 0.1")


def apply_init(model: nn.Module, init: str) -> tuple[LoadReport | None, Normalisation | None]:
    """Load the starting weights into the model.

    Returns:
        What was loaded, and the normalisation that those weights were trained with, where known.
    """
    if init == "none":
        return None, None
    if init == "imagenet":
        return load_matching(model, imagenet_weights(), "ImageNet weights"), (IMAGENET_MEAN, IMAGENET_STD)
    weights, normalisation, where = file_weights(init)
    return load_matching(model, weights, where), normalisation


def choose_normalisation(normalise: bool, of_init: Normalisation | None, dataset: Dataset) -> Normalisation:
    """None where the recipe has none; else that of the starting weights, whose filters expect it; else the data set's own."""
    if not normalise:
        return NO_NORMALISATION
    if of_init is not None:
        return of_init
    return dataset.manifest.mean, dataset.manifest.std


def default_res(dataset: Dataset) -> int:
    """The images' own size where they all agree and it is large enough, else 224."""
    sizes = set(dataset.split("train").image_sizes)
    height, _, width = next(iter(sizes)).partition("x")
    if len(sizes) == 1 and height == width:
        res = int(height)
        try:
            check_res(res)
            return res
        except UsageError:
            pass
    return 224


def make_run_folder(out: Path) -> Path:
    """
    Raises:
        UsageError: it exists and holds something.
        TidaliError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UsageError(f"--out {out}: not empty; give a new folder")
    except OSError as error:
        raise TidaliError(f"--out {out}: cannot be made ({error.strerror})") from None
    return out


def train_with_progress(state: TrainState, batches: StreamBatches, title: str) -> EpochReport:
    """`train_epoch` under a progress bar."""
    watch = Stopwatch()
    with progress_bar() as bar:
        task = bar.add_task(title, total=len(batches), note="")

        def on_step(steps: int, meter: Meter) -> None:
            if not bar.disable:
                score = meter.peek()
                rate = score.samples / watch.elapsed_s()
                note = f"loss {score.loss:.3f}  top-1 {score.top1_percent:.1f} %  {rate:.0f} images/s" if score.samples else ""
                bar.update(task, completed=steps, note=note)

        return train_epoch(state, batches, on_step)


def announce(
    settings: TrainSettings, dataset: Dataset, plan: DevicePlan, report: LoadReport | None, *, steps_per_epoch: int
) -> None:
    """Say what is about to run and why the device's settings are what they are."""
    recipe = settings.recipe
    say(f"data    {dataset.root}: {dataset.split('train').samples} train images, {len(dataset.manifest.classes)} classes")
    say(f"model   ResNet-18, {settings.stem} stem, init {settings.init}, {settings.res} x {settings.res} px")
    for line in report.lines() if report else ():
        say(f"        {line}")
    say(f"recipe  {recipe.name}: {recipe.epochs} epochs of {steps_per_epoch} steps, batch {recipe.batch_size}, lr {recipe.lr}")
    say(f"device  {plan.device}: {plan.name}, {cpu_count()} cores")
    say(f"amp     {plan.dtype_name}: {plan.amp_reason}")
    say(f"compile {'on' if plan.compile else 'off'}: {plan.compile_reason}")


def epoch_fields(trained: EpochReport, score: Score, split: str) -> dict[str, float]:
    """One line of metrics.jsonl, units in the names."""
    return {
        "train_loss": trained.score.loss,
        "train_top1_percent": trained.score.top1_percent,
        "images_per_s": trained.images_per_s,
        "epoch_s": trained.seconds,
        "data_wait_share": trained.data_wait_share,
        **{f"{split}_{name}": value for name, value in score.to_dict().items()},
    }


def summary(result: RunResult, plan: DevicePlan, split: str) -> dict[str, Any]:
    """The content of summary.json."""
    return {
        "evaluated_on": split,
        "best_epoch": result.best_epoch,
        "best": result.best.to_dict(),
        "last": result.last.to_dict(),
        "images_per_s": result.images_per_s,
        "minutes": result.minutes,
        "device": {"type": plan.device.type, "name": plan.name, "cores": cpu_count(), "dtype": plan.dtype_name},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what decides the result."""
    found = {"tidali": __version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "nvidia-dali-cuda120", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
