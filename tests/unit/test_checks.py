"""The checks that `tidali doctor` and tests/gpu run pass on a CPU, and each one can fail."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from tidali import console
from tidali.config import Preprocess
from tidali.dataset.contract import Dataset, open_dataset
from tidali.doctor import checks
from tidali.errors import TidaliError
from tidali.hardware.device import DevicePlan
from tidali.loading.batches import Batches
from tidali.loading.data import Data

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
    assert "float32: the loss fell" in checks.steps_lower_the_loss(CPU, "off")
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


def test_eval_matches_training(dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "% top-1" in checks.eval_matches_training(dataset, CPU, "device", tmp_path / "run")
    assert capfd.readouterr().err == ""
    assert console._verbosity == "normal"


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
