"""One training run, wired together: settings in, a run folder out."""

from __future__ import annotations

import math
import os
import signal
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidali.augment import draw_mix, mix_batch
from tidali.checkpoint import SUFFIX, ModelCard, save_checkpoint
from tidali.config import TrainSettings
from tidali.console import progress_bar, say
from tidali.contract import Dataset
from tidali.data import Data
from tidali.device import DevicePlan, cpu_count, plan_device
from tidali.distributed import Ranks, joined_ranks
from tidali.engine import EpochReport, evaluate, make_train_state, train_epoch
from tidali.environment import versions
from tidali.errors import TidaliError, UsageError
from tidali.interrupt import Interrupted, StopRequest
from tidali.metrics import JsonlLog, Meter, Score
from tidali.models import build_resnet18
from tidali.pretrained import apply_init, choose_normalisation
from tidali.resume import STATE_NAME, Progress, load_state, save_state
from tidali.run_folder import RunResult, epoch_fields, make_run_folder, summary, write_json
from tidali.schedule import make_schedule
from tidali.timing import Stopwatch

EVAL_BATCH_SIZE = 256
"""One value for training runs and ``tidali eval``, so that both do the same arithmetic and print the same figure."""


def train(settings: TrainSettings, dataset: Dataset, *, resume: bool = False) -> RunResult:
    """Run it. Writes config.json, metrics.jsonl, the best, last and complete state, and summary.json into ``settings.out``.

    Args:
        resume: go on from the state in ``settings.out``, which was saved by a run of the same settings.

    Raises:
        TidaliError, UsageError: with nothing written where the settings, the data or the device do not allow the run.
        Interrupted: it was asked to stop, and has saved its state.
    """
    plan = plan_device(settings.device, settings.amp, settings.compile)
    set_numerics(settings.deterministic)
    with joined_ranks(plan.device.type) as ranks, StopRequest() as stop:
        run = Run(settings, dataset, plan, ranks, stop)
        run.open_folder(resume)
        while run.progress.epoch < settings.recipe.epochs:
            run.epoch()
        return run.finish()


class Run:
    """A training run in progress: what `train` goes through, epoch by epoch."""

    def __init__(self, settings: TrainSettings, dataset: Dataset, plan: DevicePlan, ranks: Ranks, stop: StopRequest) -> None:
        """Make everything that can fail before anything is written."""
        self.settings, self.dataset, self.plan, self.ranks, self.stop = settings, dataset, plan, ranks, stop
        self.out = Path(settings.out)
        self.watch = Stopwatch()
        self.select_on = selection_split(dataset)
        recipe = settings.recipe
        torch.manual_seed(settings.seed)
        self.stem_bias = recipe.name == "seed" and settings.stem == "small"  # the study's row 5 has one
        model = build_resnet18(len(dataset.manifest.classes), settings.stem, stem_bias=self.stem_bias)
        self.load_report, of_init = apply_init(model, settings.init)
        self.mean, self.std = choose_normalisation(recipe.normalise, of_init, dataset)
        self.data = Data(
            dataset,
            ("train", self.select_on),
            plan.device,
            cache=settings.cache,
            max_res=settings.res,
            max_bad=settings.max_bad,
        )
        common: dict[str, Any] = dict(
            res=settings.res, mean=self.mean, std=self.std, rank=ranks.rank, world_size=ranks.world_size
        )
        self.train_batches = self.data.batches(
            "train",
            batch_size=ranks.share(recipe.batch_size),
            train=True,
            augment=recipe.augment,
            seed=settings.seed,
            **common,
        )
        self.eval_batches = self.data.batches(self.select_on, batch_size=EVAL_BATCH_SIZE, **common)
        schedule = make_schedule(
            recipe.schedule,
            lr=recipe.lr,
            epochs=recipe.epochs,
            steps_per_epoch=len(self.train_batches),
            warmup_epochs=recipe.warmup_epochs,
            step_epochs=recipe.step_epochs,
            step_gamma=recipe.step_gamma,
        )
        self.state = make_train_state(
            model,
            plan,
            schedule,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            label_smoothing=recipe.label_smoothing,
            grad_clip_norm=recipe.grad_clip_norm,
            ema_decay=recipe.ema_decay,
            ranks=ranks,
        )
        self.progress = Progress(images_per_s=[])
        self.meter = Meter(plan.device)

    def open_folder(self, resume: bool) -> None:
        """Make the run folder, or go on from the state in it."""
        if resume:
            self.progress, loader = load_state(self.out / STATE_NAME, self.state, self.meter, self.ranks.rank)
            self.train_batches.load_state_dict(loader)
        elif self.ranks.is_main:
            make_run_folder(self.out)
            write_json(self.out / "config.json", self.settings.to_dict())
        self.log = JsonlLog(self.out / "metrics.jsonl")
        if self.ranks.is_main:
            self.announce(resume)
        if not resume:
            self.save_state()

    def epoch(self) -> None:
        """Train one epoch, or what is left of it; evaluate; save; say how it went."""
        recipe, progress = self.settings.recipe, self.progress
        number = progress.epoch + 1
        self.train_batches.set_epoch(progress.epoch)
        with progress_bar(show=self.ranks.is_main) as bar:
            task = bar.add_task(f"epoch {number}/{recipe.epochs}", total=len(self.train_batches), note="")
            watch, save_due = Stopwatch(), Stopwatch()

            def on_step() -> None:
                nonlocal save_due
                score = self.meter.peek()
                if not math.isfinite(score.loss_sum):
                    self.refuse_loss()
                if not bar.disable and score.samples:
                    done = self.state.step - progress.epoch * len(self.train_batches)
                    rate = score.samples * self.ranks.world_size / watch.peek_s()
                    note = f"loss {score.loss:.3f}  top-1 {score.top1_percent:.1f} %  {rate:.0f} images/s"
                    bar.update(task, completed=done, note=note)
                if self.should_stop():
                    self.save_state()
                    raise Interrupted(
                        f"stopped at step {self.state.step}; go on with 'tidali train --resume {self.out}'",
                        self.stop.signal_number or signal.SIGTERM,
                    )
                if save_due.peek_s() > 60 * self.settings.checkpoint_minutes and self.ranks.world_size == 1:
                    self.save_state()
                    save_due = Stopwatch()

            trained = train_epoch(
                self.state, self.train_batches, self.meter, ranks=self.ranks, mix=self.mixer(), on_step=on_step
            )

        self.ranks.share_buffers(self.state.evaluated)
        score = evaluate(
            self.state.evaluated,
            self.eval_batches,
            self.plan,
            expected_samples=self.eval_batches.samples,
            ranks=self.ranks,
        )
        is_best = progress.best is None or score.correct1 > progress.best.correct1
        if is_best:
            progress.best, progress.best_epoch = score, number
        progress.last, progress.epoch = score, number
        if trained.images_per_s:  # none where a stop came after an epoch's last step
            progress.images_per_s.append(trained.images_per_s)
        self.meter = Meter(self.plan.device)
        self.report_epoch(trained, score, is_best)
        self.save_state()

    def mixer(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """What MixUp or CutMix makes of a batch, where the recipe has them."""
        augment, progress = self.settings.recipe.augment, self.progress
        if not augment.mixes:
            return None

        def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            drawn = draw_mix(
                augment.mixup_alpha,
                augment.cutmix_alpha,
                seed=self.settings.seed,
                epoch=progress.epoch,
                step=self.state.step,
            )
            return mix_batch(images, labels, drawn, len(self.dataset.manifest.classes))

        return mix

    def should_stop(self) -> bool:
        """Ranks agree every 20 steps: asking costs them a wait for the device."""
        if self.ranks.world_size == 1:
            return self.stop.requested
        return self.state.step % 20 == 0 and self.ranks.any(self.stop.requested, self.plan.device)

    def refuse_loss(self) -> None:
        saved = self.out / STATE_NAME
        raise TidaliError(f"the loss is not finite at step {self.state.step}; the state before it is {saved}; try a lower --lr")

    def report_epoch(self, trained: EpochReport, score: Score, is_best: bool) -> None:
        """Weights, one line of metrics.jsonl, one line for people."""
        if not self.ranks.is_main:
            return
        number, recipe = self.progress.epoch, self.settings.recipe
        metrics = {"epoch": number, **{f"{self.select_on}_{k}": v for k, v in score.to_dict().items()}}
        card = ModelCard(
            classes=self.dataset.manifest.classes,
            stem=self.settings.stem,
            stem_bias=self.stem_bias,
            res=self.settings.res,
            mean=self.mean,
            std=self.std,
            metrics=metrics,
            settings=self.settings.to_dict(),
            versions=versions(),
        )
        for name in ("last", "best") if is_best else ("last",):
            save_checkpoint(self.out / f"{name}{SUFFIX}", self.state.evaluated, card)
        self.log.write(
            epoch=number,
            step=self.state.step,
            lr=self.state.schedule(self.state.step - 1),
            **epoch_fields(trained, score, self.select_on),
        )
        say(
            f"epoch {number}/{recipe.epochs}  train loss {trained.score.loss:.3f} top-1 {trained.score.top1_percent:.1f} %  "
            f"{self.select_on} loss {score.loss:.3f} top-1 {score.top1_percent:.2f} %  {trained.images_per_s:.0f} images/s  "
            f"waiting for data {100 * trained.data_wait_share:.1f} %"
        )

    def save_state(self) -> None:
        """Everything that `resume` needs, from rank 0, with every rank's place in the data."""
        loaders = self.ranks.gather(self.train_batches.state_dict())
        if self.ranks.is_main:
            progress = replace(self.progress, seconds=self.progress.seconds + self.watch.elapsed_s())
            path = self.out / STATE_NAME
            save_state(path, self.state, progress, self.meter, loaders, self.settings.to_dict(), versions())

    def finish(self) -> RunResult:
        """Write summary.json."""
        progress = self.progress
        assert progress.best is not None
        assert progress.last is not None
        result = RunResult(
            out=self.out,
            best=progress.best,
            best_epoch=progress.best_epoch,
            last=progress.last,
            images_per_s=statistics.median(progress.images_per_s or [0.0]),
            minutes=(progress.seconds + self.watch.elapsed_s()) / 60,
        )
        if self.ranks.is_main:
            write_json(self.out / "summary.json", summary(result, self.plan, self.select_on))
        return result

    def announce(self, resume: bool) -> None:
        """Say what is about to run and why the device's settings are what they are."""
        settings, recipe, plan, dataset = self.settings, self.settings.recipe, self.plan, self.dataset
        ranks = f", {self.ranks.world_size} ranks" if self.ranks.world_size > 1 else ""
        say(f"data    {dataset.root}: {dataset.split('train').samples} train images, {len(dataset.manifest.classes)} classes")
        say(f"model   ResNet-18, {settings.stem} stem, init {settings.init}, {settings.res} x {settings.res} px")
        for line in self.load_report.lines() if self.load_report else ():
            say(f"        {line}")
        steps = len(self.train_batches)
        say(f"recipe  {recipe.name}: {recipe.epochs} epochs of {steps} steps, batch {recipe.batch_size}, lr {recipe.lr}")
        say(f"device  {plan.device}: {plan.name}, {cpu_count()} cores{ranks}")
        say(f"cache   {'on' if self.data.route.cached else 'off'}: {self.data.route.reason}")
        say(f"amp     {plan.dtype_name}: {plan.amp_reason}")
        say(f"compile {'on' if plan.compile else 'off'}: {plan.compile_reason}")
        if resume:
            say(f"resumed at step {self.state.step}")


def set_numerics(deterministic: bool) -> None:
    """Process-wide switches. float32 products keep full precision unless autocast says otherwise (no TF32, torch's default for
    matrix products; cuDNN's own default would allow it in convolutions)."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # Without it cuBLAS refuses to run: torch's notes on reproducibility.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def selection_split(dataset: Dataset) -> str:
    """The split that each epoch is evaluated on and the best epoch chosen by: a held-out part of train where there is one.

    Raises:
        UsageError: there is neither.
    """
    for name in ("heldout", "val"):
        if name in dataset.manifest.splits and dataset.manifest.splits[name].samples:
            return name
    raise UsageError(f"{dataset.root}: no val split to evaluate on; pack it again with --val-fraction 0.1")
