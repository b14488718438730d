"""One training run, epoch by epoch: settings in, a run folder out."""

from __future__ import annotations

import importlib.util
import math
import shutil
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tidali.config import CacheChoice, TrainSettings
from tidali.console import progress_bar, say
from tidali.dataset.contract import Dataset
from tidali.errors import DataLost, Diverged, Interrupted, TidaliError, UsageError, explain_out_of_memory
from tidali.hardware.cpu_memory import keep_freed_memory
from tidali.hardware.device import DevicePlan, numerics, plan_device
from tidali.hardware.ranks import Ranks, joined_ranks
from tidali.hardware.timing import Stopwatch
from tidali.loading.augment import draw_mix, mix_batch
from tidali.training.agreement import Agreement
from tidali.training.averages import batch_norms, first_images, measure_statistics
from tidali.training.engine import EpochResult, all_finite, evaluate, train_epoch
from tidali.training.interrupt import StopRequest
from tidali.training.judgement import diverged, loss_text
from tidali.training.metrics import JsonlLog, Meter, Score
from tidali.training.resume import STATE_NAME, Progress, copy_state, load_state, saved_route
from tidali.training.run_files import RunFiles
from tidali.training.run_folder import RunResult, epoch_fields, make_run_folder, summary, write_json
from tidali.training.setup import announce, set_up
from tidali.training.step_log import StepLog
from tidali.training.tensorboard import TensorBoardLog

EPOCH_SAVE_S = 30.0
"""An epoch's end saves if so many seconds have passed since the last save, or ``checkpoint_minutes`` if that is less: a state
of 134 MB after each epoch of a second or two would take as long as the epoch. A kill loses at most what was done since."""


def train(
    settings: TrainSettings,
    dataset: Dataset,
    *,
    resume: bool = False,
    stop: StopRequest | None = None,
    model: nn.Module | None = None,
    notes: Sequence[str] = (),
) -> RunResult:
    """Train a model. Writes config.json, metrics.jsonl, the best and last weights, the complete state and summary.json into
    ``settings.out``. On a CPU, the process keeps freed memory from then on (`tidali.hardware.cpu_memory`).

    Args:
        resume: resume from the state in ``settings.out``, which was saved by a run of the same settings.
        stop: asks the run to stop after a step; SIGTERM and Ctrl-C by default.
        model: a network of the caller's own, from images (N, 3, H, W) to logits (N, classes), which is trained in place; by
            default the settings' ResNet.
        notes: lines that are printed after the announcement of a run that can begin.

    Raises:
        TidaliError, UsageError: the settings, the data or the device do not allow the run; nothing is written then.
        Interrupted: the run was asked to stop, and its state is saved.
    """
    plan = plan_device(settings.device, settings.amp, settings.compile)
    recipe = settings.recipe
    sides = max((settings.res, *recipe.train_sizes))
    memory = explain_out_of_memory(
        f"--batch-size {recipe.batch_size} and images of {sides} px",
        "give a smaller --batch-size, or micro-batches of it with --set accumulate=2",
    )
    with numerics(settings.deterministic), joined_ranks(plan.device.type) as ranks, memory, stop or StopRequest() as stop:
        cache = saved_route(Path(settings.out) / STATE_NAME) if resume else settings.cache
        run = Run(settings, dataset, plan, ranks, stop, cache, model)
        with run.files:
            run.open_folder(resume, notes)
            while run.progress.epoch < recipe.epochs:
                run.epoch()
            return run.finish()


class Run:
    """A training run in progress."""

    def __init__(
        self,
        settings: TrainSettings,
        dataset: Dataset,
        plan: DevicePlan,
        ranks: Ranks,
        stop: StopRequest,
        cache: CacheChoice,
        model: nn.Module | None = None,
    ) -> None:
        """Make everything that can fail, before anything is written."""
        self.settings, self.dataset, self.plan, self.ranks, self.stop = settings, dataset, plan, ranks, stop
        self.out = Path(settings.out)
        self.watch = Stopwatch()
        if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError("--tensorboard needs the package tensorboard: pip install 'tidali[tensorboard]'")
        self.setup = set_up(settings, dataset, plan, ranks, cache=cache, model=model)
        self.state, self.train_batches, self.select_on = self.setup.state, self.setup.train_batches, self.setup.select_on
        if plan.device.type == "cpu":
            keep_freed_memory()
        self.progress = Progress(images_per_s=[])
        self.meter = Meter(plan.device)
        self.files = RunFiles(self.out)
        self.since_save = Stopwatch()

    def open_folder(self, resume: bool, notes: Sequence[str]) -> None:
        """Make the run folder, or resume from the state in it."""
        if resume:
            self.progress, loader = load_state(self.out / STATE_NAME, self.state, self.meter, self.setup.card, self.ranks.rank)
            self.train_batches.load_state_dict(loader)
        self.norm_images = self.images_for_batch_norm()  # in the order that a resumed run has from its state
        if not resume and self.ranks.is_main:
            make_run_folder(self.out)
            write_json(self.out / "config.json", self.settings.to_dict())
        self.log = JsonlLog(self.out / "metrics.jsonl")
        self.events: TensorBoardLog | None = None
        self.steps: StepLog | None = None
        if self.ranks.is_main:
            self.files.hold()
            self.log.keep_through(self.progress.epoch)
            if self.settings.tensorboard:
                self.events = TensorBoardLog(self.out / "tensorboard", first_epoch=self.progress.epoch + 1)
            self.steps = StepLog(
                self.out,
                epoch_steps=len(self.train_batches),
                batch_size=self.settings.recipe.batch_size,
                step=self.state.step,
                tensorboard=self.settings.tensorboard,
            )
            announce(self.settings, self.dataset, self.plan, self.ranks, self.setup)
            for note in notes:
                say(note)
            if resume:
                over = (
                    ", after the last epoch: nothing is left to train"
                    if self.progress.epoch == self.settings.recipe.epochs
                    else ""
                )
                say(f"resumed at step {self.state.step:,}{over}")
        if not resume:
            try:
                self.save_state()
            except TidaliError:
                if self.ranks.is_main:
                    shutil.rmtree(self.out, ignore_errors=True)  # it was made above: a run that cannot be saved leaves nothing
                raise
        self.agreement = Agreement(self.ranks, self.plan.device, self.state.step)

    def epoch(self) -> None:
        """Train one epoch, or the rest of it; evaluate; save; print the results."""
        recipe, progress = self.settings.recipe, self.progress
        number = progress.epoch + 1
        self.train_batches.set_epoch(progress.epoch)
        with progress_bar(show=self.ranks.is_main) as bar:
            task = bar.add_task(f"epoch {number}/{recipe.epochs}", total=len(self.train_batches))
            watch = Stopwatch()
            if self.steps is not None:
                self.steps.begin_epoch(self.state.step, self.meter.read())

            def on_step(waited_s: float) -> None:
                score = self.meter.peek()
                finite = math.isfinite(score.loss_sum)
                due = self.since_save.peek_s() > 60 * self.settings.checkpoint_minutes
                stop, save, not_finite = self.agreement.any_rank(self.state.step, self.stop.requested, due, not finite)
                self.require(not not_finite, "loss")
                if self.steps is not None and finite:
                    self.steps.update(self.state.step, self.state.schedule(self.state.step - 1), score)
                if not bar.disable and score.samples:
                    done = self.state.step - progress.epoch * len(self.train_batches)
                    rate = score.samples * self.ranks.world_size / watch.peek_s()
                    notes = (
                        f"loss {loss_text(score.loss)}",
                        f"top-1 {score.top1_percent:.1f} %",
                        f"{rate:,.0f} images/s",
                        f"waiting for data {100 * waited_s / watch.peek_s():.1f} %",
                    )
                    bar.update(task, completed=done, notes=notes)
                if stop:
                    self.save_state()
                    raise Interrupted(self.how_to_resume(), self.stop.signal_number or signal.SIGTERM)
                if save:
                    self.save_state()

            batches = self.train_batches if self.dataset.copy is None else self.fetched_batches()
            trained = train_epoch(self.state, batches, self.meter, ranks=self.ranks, mix=self.mixer(), on_step=on_step)
        # On a GPU, on_step may not have seen the last steps' loss.
        self.require(math.isfinite(trained.score.loss_sum), "loss")

        self.setup.data.share_corrupt()
        if self.norm_images is not None:
            measure_statistics(self.state.evaluated, self.norm_images, self.plan, self.state.frozen)
        self.ranks.broadcast_buffers(self.state.evaluated)
        score = self.evaluate()
        self.require(math.isfinite(score.loss_sum), "loss")
        is_best = progress.best is None or score.is_better(progress.best)
        if is_best:
            progress.best, progress.best_epoch = score, number
        progress.last, progress.epoch = score, number
        if trained.images_per_s:  # 0 where the run was stopped after an epoch's last step and resumed
            progress.images_per_s.append(trained.images_per_s)
        self.meter = Meter(self.plan.device)
        self.report_epoch(trained, score, is_best)
        due = self.since_save.peek_s() > min(EPOCH_SAVE_S, 60 * self.settings.checkpoint_minutes)
        if progress.epoch == recipe.epochs:
            self.save_state()
        elif self.ranks.all_reduce_max([due], self.plan.device)[0]:
            self.save_state(beside_training=True)

    def images_for_batch_norm(self) -> Tensor | None:
        """Those on which the statistics of the evaluated weights are measured; None: they are running averages."""
        setup, count = self.setup, self.settings.recipe.norm_images
        if not count or not batch_norms(self.state.model, self.state.frozen):
            return None
        return first_images(setup.data, self.train_batches, setup.card.preprocess(), count, self.plan.images_dtype)

    def evaluate(self, *, flip: bool = False) -> Score:
        batches = self.setup.eval_batches
        try:
            return evaluate(
                self.state.evaluated, batches, self.plan, expected_samples=batches.samples_given, flip=flip, ranks=self.ranks
            )
        except TidaliError as error:
            if self.dataset.copy is None:
                raise
            raise TidaliError(f"{error}; {self.how_to_resume()}") from None

    def fetched_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of an epoch, where shards are fetched meanwhile. When a rank cannot get its batch all of them save and stop
        before that step: none waits for its gradients. The state is also saved before the evaluation, which fetches shards too.
        That ranks ask each other before each step makes a GPU's host wait for it (not measured)."""
        batches = iter(self.train_batches)
        while True:
            position, batch, error = self.train_batches.state_dict(), None, ""
            try:
                batch = next(batches, None)
            except TidaliError as caught:
                error = str(caught)
            if self.ranks.all_reduce_max([bool(error)], self.plan.device)[0]:
                self.save_state(position)
                error = next(filter(None, self.ranks.gather(error)))
                raise DataLost(f"{error}; {self.how_to_resume()}")
            if batch is None:
                self.save_state(position)
                return
            yield batch
            del batch

    def how_to_resume(self) -> str:
        return f"stopped at step {self.state.step}; resume with 'tidali train --resume {self.out}'"

    def mixer(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """A function that applies MixUp or CutMix to a batch, where the recipe has them."""
        augment, progress = self.settings.recipe.augment, self.progress
        if not augment.mixes:
            return None

        def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            mixing = draw_mix(
                augment.mixup_alpha,
                augment.cutmix_alpha,
                seed=self.settings.seed,
                epoch=progress.epoch,
                step=self.state.step,
            )
            return mix_batch(images, labels, mixing, len(self.dataset.manifest.classes))

        return mix

    def require(self, finite: bool, what: str) -> None:
        """End a run that diverged. Every rank calls this with the same ``finite``, so that the main one can record it."""
        if finite:
            return
        step = self.state.step
        if self.steps is not None:
            self.steps.diverged(step, self.state.schedule(max(step - 1, 0)), what)
        self.ranks.gather(None)  # torchrun ends all ranks as soon as one has exited: none does before that is written
        found = diverged(what, step, self.settings.recipe.lr)
        raise Diverged(f"{found.text}. {found.advice} The last state that was finite is {self.out / STATE_NAME}")

    def report_epoch(self, trained: EpochResult, score: Score, is_best: bool) -> None:
        """Keep the weights for the next save, append to metrics.jsonl, and print a line."""
        if not self.ranks.is_main:
            return
        number, recipe = self.progress.epoch, self.settings.recipe
        metrics = {"epoch": number, **{f"{self.select_on}_{k}": v for k, v in score.to_dict().items()}}
        card = replace(self.setup.card, metrics=metrics)
        self.files.keep(self.state.evaluated, card, is_best=is_best)
        fields: dict[str, Any] = {
            "epoch": number,
            "step": self.state.step,
            "lr": self.state.schedule(self.state.step - 1),
            **epoch_fields(trained, score, self.select_on),
        }
        self.log.write(**fields, **self.setup.facts())
        if self.events is not None:
            self.events.write(**fields)
        compiling = f"  compiling took {trained.compile_s:.1f} s" if trained.compile_s else ""
        say(
            f"epoch {number}/{recipe.epochs}  train {_in_words(trained.score)}  {self.select_on} {_in_words(score)}  "
            f"{trained.images_per_s:,.0f} images/s  waiting for data {100 * trained.data_wait_share:.1f} %{compiling}"
        )

    def save_state(self, position: Mapping[str, Any] | None = None, *, beside_training: bool = False) -> None:
        """Save the weights of the epochs since the last save, and everything that a resume needs, on rank 0, with every rank's
        position in the data. Fails where the weights or the loss are not finite; both are checked, as a step's loss is that of
        the weights before it.

        Args:
            position: this rank's in the data; by default that of its next batch.
            beside_training: write while training goes on.
        """
        checks = [math.isfinite(self.meter.read().loss_sum), all_finite(self.state.model)]
        failed = self.ranks.all_reduce_max([not passed for passed in checks], self.plan.device)
        for not_finite, what in zip(failed, ("loss", "weights"), strict=True):
            self.require(not not_finite, what)
        loaders = self.ranks.gather(position or self.train_batches.state_dict())
        if self.ranks.is_main:
            progress = replace(self.progress, seconds=self.progress.seconds + self.watch.elapsed_s())
            state = copy_state(self.state, progress, self.meter, loaders, self.setup.card)
            self.files.save(state, beside_training=beside_training)
        self.since_save = Stopwatch()

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
            last_flip=self.evaluate(flip=True) if self.settings.recipe.eval_flip else None,
            images_per_s=statistics.median(progress.images_per_s or [0.0]),
            minutes=(progress.seconds + self.watch.elapsed_s()) / 60,
        )
        if self.ranks.is_main:
            write_json(self.out / "summary.json", summary(result, self.plan, self.select_on))
        return result


def _in_words(score: Score) -> str:
    return f"loss {loss_text(score.loss)} top-1 {score.top1_percent:.1f} %"
