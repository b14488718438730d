"""The checks that `tidali doctor` and tests/gpu run pass on a CPU, and each one can fail."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tidali import console
from tidali.config import Preprocess, TrainSettings
from tidali.dataset.contract import Dataset, open_dataset
from tidali.doctor import checks, run_checks
from tidali.errors import TidaliError
from tidali.hardware.device import DevicePlan
from tidali.loading.batches import Batches
from tidali.loading.data import Data
from tidali.model.checkpoint import ModelCard
from tidali.training.metrics import Score
from tidali.training.run import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(demo_data: Path) -> Dataset:
    return open_dataset(demo_data)


def test_the_routes_agree(dataset: Dataset) -> None:
    # Where no resizing is needed the cache and the stream hold the same bytes, and 96 px are resized by the same code.
    assert checks.routes_agree(dataset, CPU).endswith("the cache on cpu 0.00")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (dict(mean=(0.1, 0.0, 0.0)), "grey levels from the CPU's pixels at most"),
        (dict(batch_size=21), "labels"),
        (dict(batch_size=10), "4 batches, the stream on the CPU has 2"),
    ],
)
def test_other_batches_are_noticed(monkeypatch: pytest.MonkeyPatch, dataset: Dataset, changed: dict, says: str) -> None:
    def stream(dataset: Dataset, res: int, device: torch.device) -> Batches:
        preprocess = Preprocess(res=res, mean=changed.get("mean", (0.0, 0.0, 0.0)))
        return Data(dataset, CPU, cache="off").batches("val", preprocess, changed.get("batch_size", 20))

    monkeypatch.setattr(checks, "_other_routes", lambda data, res, device: [("another", stream(data, res, device))])
    # 32 images make two batches of 21 too, of other lengths.
    with pytest.raises(TidaliError, match=r"another at 64 px: .*" + says):
        checks.routes_agree(dataset, CPU)


def test_epochs(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"160 training images .* stream and the cache", checks.epochs_are_complete(dataset, CPU))
    batches = checks._batches

    def first_three(*args: object, **settings: object) -> list:
        class Short(list):
            def set_epoch(self, epoch: int) -> None: ...

        return Short(list(batches(*args, **settings))[:-1])  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "_batches", first_three)
    with pytest.raises(TidaliError, match=r"the stream .* instead of \[40, 40, 40, 40\]"):
        checks.epochs_are_complete(dataset, CPU)


def test_a_step_that_does_not_learn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = set()  # a check's numerics are training's, and the program's are left as they were
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.add(torch.backends.cudnn.allow_tf32))
    assert "float32: the loss fell" in checks.steps_lower_the_loss(CPU, "off")
    handle.remove()
    assert (seen, torch.backends.cudnn.allow_tf32) == ({False}, True)
    step = checks.train_step
    monkeypatch.setattr(checks, "_STEPS", 3)
    monkeypatch.setattr(checks, "train_step", lambda state, images, labels: float("nan") * step(state, images, labels))
    with pytest.raises(TidaliError, match="float32: the loss went from nan"):
        checks.steps_lower_the_loss(CPU, "off")


def test_compiled_output(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamo traces as always, but its graph is run as it is, instead of being compiled by Inductor for a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert "differ from the eager model's by at most 0" in checks.compiled_matches_eager(CPU)
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda images: module(images) + 0.1)
    with pytest.raises(TidaliError, match=r"differs from the eager model's by 0\.1"):
        checks.compiled_matches_eager(CPU)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    with pytest.raises(TidaliError, match="nothing was compiled"):
        checks.compiled_matches_eager(CPU)


def test_evaluation(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.evaluation_counts_once(dataset, CPU).startswith("all 32 samples of val")
    evaluate = checks.evaluate

    def last_twice(model: torch.nn.Module, batches: list, plan: DevicePlan, *, expected_samples: int) -> object:
        batches = list(batches)
        return evaluate(model, batches + batches[-1:], plan, expected_samples=expected_samples)

    monkeypatch.setattr(checks, "evaluate", last_twice)
    with pytest.raises(TidaliError, match="the split has 32"):
        checks.evaluation_counts_once(dataset, CPU)


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a ResNet: what is checked of a run does not depend on the network."""

    def build(num_classes: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, num_classes))

    monkeypatch.setattr("tidali.training.setup.build_resnet", lambda arch, num_classes, stem, stem_bias: build(num_classes))
    monkeypatch.setattr(ModelCard, "build_model", lambda card: build(len(card.classes)))


@pytest.mark.usefixtures("small_network")
def test_what_is_made_of_a_run(
    dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation, prediction and the exported program, each of them wrong once."""
    assert "% top-1" in run_checks.eval_matches_training(dataset, CPU, "device", tmp_path / "run")
    assert capfd.readouterr().err == ""
    assert console._verbosity == "normal"
    assert "the exported program on cpu" in run_checks.exported_runs_on(dataset, CPU, tmp_path / "run")

    # The run is made; what follows looks at it again.
    last = JsonRun(tmp_path / "run").best
    monkeypatch.setattr(run_checks, "train", lambda settings, dataset: SimpleNamespace(best=last))
    assert "% top-1" in run_checks.eval_matches_training(dataset, CPU, "device", tmp_path / "run")
    other = replace(last, correct1=last.correct1 + 1)
    with monkeypatch.context() as patch:
        patch.setattr(run_checks, "train", lambda settings, dataset: SimpleNamespace(best=other))
        with pytest.raises(TidaliError, match="top-1, evaluation"):
            run_checks.eval_matches_training(dataset, CPU, "device", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(
            run_checks.Classifier, "logits", lambda model, pixels: torch.zeros(len(pixels), 5).index_fill_(1, FIFTH, 1)
        )
        with pytest.raises(TidaliError, match="images right, prediction 0"):
            run_checks.eval_matches_training(dataset, CPU, "device", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(
            run_checks, "open_pt2", lambda content, device: (lambda images: np.zeros((len(images), 4), np.float32), "")
        )
        with pytest.raises(TidaliError, match="probabilities on cpu differ"):
            run_checks.exported_runs_on(dataset, CPU, tmp_path / "run")


FIFTH = torch.tensor([4])


class JsonRun:
    """The best score of a finished run."""

    def __init__(self, folder: Path) -> None:
        best = json.loads((folder / "summary.json").read_text())["best"]
        samples = int(best["samples"])
        hits = [round(best[f"top{k}_percent"] * samples / 100) for k in (1, 5)]
        self.best = Score(samples=samples, loss_sum=best["loss"] * samples, correct1=hits[0], correct5=hits[1])


@pytest.mark.usefixtures("small_network")
def test_deterministic_runs(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in ("device", "off"):
        said = run_checks.runs_repeat(dataset, CPU, cache, tmp_path / cache)
        assert "one of them stopped and resumed" in said
        metrics = [json.loads(line) for line in (tmp_path / cache / "resumed" / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in metrics] == [1, 2]

    def train_otherwise(settings: TrainSettings, dataset: Dataset, **options: Any) -> object:
        return train(replace(settings, seed=int("resumed" in settings.out)), dataset, **options)

    monkeypatch.setattr(run_checks, "train", train_otherwise)
    with pytest.raises(TidaliError, match="the weights of two deterministic runs"):
        run_checks.runs_repeat(dataset, CPU, "device", tmp_path / "other")


def test_held_batches(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_checks.held_batches_stay(dataset, CPU, "cpu").startswith("50 streamed batches")
    one = torch.zeros(4, 3, 64, 64)

    def written_over(*_: object, **__: object) -> Any:
        return ((one.add_(1), torch.zeros(4)) for _ in range(60))

    monkeypatch.setattr(Data, "batches", written_over)
    with pytest.raises(TidaliError, match="49 of 50 streamed batches changed"):
        run_checks.held_batches_stay(dataset, CPU, "cpu")


def test_one_rank_and_two() -> None:
    assert checks.ranks_communicate("cpu", 1) == "gloo: all-reduce over 1 rank works"
    assert checks.ranks_communicate("cpu", 2) == "gloo: all-reduce over 2 ranks works"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a usable GPU")
def test_ranks_that_cannot_communicate() -> None:
    with pytest.raises(TidaliError, match="nccl: "):
        checks.ranks_communicate("cuda", 1)


def test_no_precision_is_emulated() -> None:
    assert checks.precisions(CPU, torch.bfloat16) == ("bf16",)
    assert checks.precisions(CPU, None) == ("off",)
