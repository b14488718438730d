"""What a saved state is good for, and what is never saved."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tidali.config import TrainSettings
from tidali.dataset.contract import Dataset, open_dataset
from tidali.errors import Diverged, TidaliError, UsageError
from tidali.hardware.device import plan_device
from tidali.hardware.ranks import Ranks
from tidali.loading import data as data_module
from tidali.model.checkpoint import load_checkpoint, read_metadata
from tidali.recipes import make_recipe
from tidali.training import resume, run_files
from tidali.training import run as run_module
from tidali.training.interrupt import StopRequest
from tidali.training.metrics import Meter, Score
from tidali.training.run import train
from tidali.training.run_index import list_runs


def settings_for(folder: Path, demo_data: Path, **changes: Any) -> TrainSettings:
    recipe = make_recipe("seed", **{"epochs": 1, "batch_size": 80, **changes.pop("recipe", {})})
    out = str(folder / "run")
    return TrainSettings(data=str(demo_data), out=out, res=32, recipe=recipe, device="cpu", amp="off", **changes)


@pytest.fixture(scope="module")
def dataset(demo_data: Path) -> Dataset:
    return open_dataset(demo_data)


@pytest.fixture(scope="module")
def finished(demo_data: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """A run of one epoch from the cache, to be gone on with: there is nothing left of it."""
    settings = settings_for(tmp_path_factory.mktemp("finished"), demo_data)
    train(settings, dataset)
    return settings


def test_a_run_keeps_its_route_where_there_is_less_memory_now(
    finished: TrainSettings, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert finished.cache == "auto"
    monkeypatch.setattr(data_module, "free_memory_bytes", lambda device: 1)
    assert train(finished, dataset, resume=True).last.samples == 32
    assert "resumed at step 2, after the last epoch: nothing is left to train\n" in capsys.readouterr().err


def test_a_device_that_needs_a_loss_scale_resumes_a_run_without_one(
    finished: TrainSettings, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older GPU does, where ``--amp auto`` is fp16, with the run of a CPU."""
    half = replace(plan_device("cpu", "off", "off"), amp_dtype=torch.float16)
    assert half.needs_scaler
    monkeypatch.setattr(run_module, "plan_device", lambda *_: half)
    assert train(finished, dataset, resume=True).last.samples == 32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"recipe": {"lr": 0.5}}, "recipe.lr"),
        ({"recipe": {"normalise": True}}, "recipe.normalise, mean, std"),
    ],
)
def test_other_settings_are_refused(
    finished: TrainSettings, dataset: Dataset, demo_data: Path, changes: dict[str, Any], named: str
) -> None:
    other = replace(settings_for(Path("x"), demo_data, **changes), out=finished.out)
    with pytest.raises(UsageError, match=rf"state.safetensors: saved with other settings \({named}\)"):
        train(other, dataset, resume=True)


def test_other_classes_are_refused(finished: TrainSettings, dataset: Dataset) -> None:
    """As many of them, so that every tensor fits."""
    classes = tuple(replace(one, id=f"other-{one.id}") for one in dataset.manifest.classes)
    with pytest.raises(UsageError, match=r"saved with other settings \(classes\)"):
        train(finished, replace(dataset, manifest=replace(dataset.manifest, classes=classes)), resume=True)


def changed_state(finished: TrainSettings, folder: Path, **changes: Any) -> TrainSettings:
    """The run with its state's document changed, in another folder, which a run may be moved to."""
    folder.mkdir()
    state = Path(finished.out) / resume.STATE_NAME
    document = {**json.loads(read_metadata(state)["tidali-state"]), **changes}
    save_file(load_file(state), folder / resume.STATE_NAME, {"tidali-state": json.dumps(document)})
    return replace(finished, out=str(folder))


def test_other_versions_are_warned_of(finished: TrainSettings, dataset: Dataset, tmp_path: Path, capsys) -> None:
    train(changed_state(finished, tmp_path / "same"), dataset, resume=True)
    assert "warning" not in capsys.readouterr().err
    run = json.loads(read_metadata(Path(finished.out) / resume.STATE_NAME)["tidali-state"])["run"]
    run["versions"]["torch"] = "1.0"
    train(changed_state(finished, tmp_path / "other", run=run), dataset, resume=True)
    assert "warning: resumed with other versions, " in (said := capsys.readouterr().err)
    assert "torch 1.0 then" in said


def test_a_state_of_another_version_or_of_nothing_is_refused(finished: TrainSettings, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a state of version 1, .*version 2"):
        train(changed_state(finished, tmp_path / "old", version=1), dataset, resume=True)
    with pytest.raises(UsageError, match="not the state of a run"):
        train(changed_state(finished, tmp_path / "none", loaders=[]), dataset, resume=True)


def test_a_loss_that_a_display_saw_too_late_names_the_state_before_it(
    demo_data: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose last steps are not waited for."""
    monkeypatch.setattr(Meter, "peek", lambda meter: Score(samples=0, loss_sum=0.0, correct1=0, correct5=0))
    with pytest.raises(TidaliError, match=r"the loss is not finite by step 2. Try --lr .*state.safetensors"):
        train(settings_for(tmp_path, demo_data, recipe={"lr": 1e30}), dataset)


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a ResNet: what is saved when does not depend on the network."""

    def build(arch: str, num_classes: int, stem: str, *, stem_bias: bool) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))

    monkeypatch.setattr("tidali.training.setup.build_resnet", build)


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(("seconds", "states"), [(0.0, [0, 2, 4, 6]), (1e9, [0, 6])])
def test_an_epochs_end_saves_when_some_time_has_passed(
    demo_data: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, states: list[int]
) -> None:
    """Weights before the state, in one go; the last epoch's always."""
    written: list[str | int] = []
    save_checkpoint, write_state = run_files.save_checkpoint, run_files.write_state

    def checkpoint(path: Path, weights: Any, card: Any) -> None:
        written.append(f"{path.stem} {card.metrics['epoch']}")
        save_checkpoint(path, weights, card)

    def state(path: Path, saved: resume.SavedState) -> None:
        written.append(json.loads(saved.document)["step"])
        write_state(path, saved)

    monkeypatch.setattr(run_files, "save_checkpoint", checkpoint)
    monkeypatch.setattr(run_files, "write_state", state)
    monkeypatch.setattr(run_module, "EPOCH_SAVE_S", seconds)
    settings = settings_for(tmp_path, demo_data, recipe={"epochs": 3})
    result = train(settings, dataset)
    assert [one for one in written if isinstance(one, int)] == states
    assert written[-1] == 6
    assert "last 3" in written
    assert f"best {result.best_epoch}" in written
    for name, epoch in (("last", 3), ("best", result.best_epoch)):
        assert load_checkpoint(tmp_path / "run" / f"{name}.safetensors")[0].metrics["epoch"] == epoch
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


@pytest.mark.usefixtures("small_network")
def test_a_save_beside_training_that_fails_ends_the_run(
    demo_data: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state, states = run_files.write_state, []

    def fail_at_the_second(path: Path, saved: resume.SavedState) -> None:
        states.append(path)
        if len(states) == 2:
            raise TidaliError(f"{path}: cannot be written (No space left on device)")
        write_state(path, saved)

    monkeypatch.setattr(run_files, "write_state", fail_at_the_second)
    monkeypatch.setattr(run_module, "EPOCH_SAVE_S", 0.0)
    with pytest.raises(TidaliError, match=r"state\.safetensors: cannot be written \(No space left"):
        train(settings_for(tmp_path, demo_data, recipe={"epochs": 2}), dataset)


def test_weights_that_are_not_finite_are_not_saved(demo_data: Path, dataset: Dataset, tmp_path: Path) -> None:
    """The loss of the step that broke them is finite: it was of the weights before."""
    settings = settings_for(tmp_path, demo_data, recipe={"lr": 1e40, "batch_size": 160}, checkpoint_minutes=1e-9)
    with pytest.raises(TidaliError, match=r"the weights are not finite by step 1. Try --lr .*state.safetensors"):
        train(settings, dataset)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / resume.STATE_NAME).values())


@dataclass(frozen=True, kw_only=True)
class ThreadRanks(Ranks):
    """Ranks that are threads of this process: what each waits for is there when all have called."""

    barrier: threading.Barrier
    told: dict[int, Any]

    def gather(self, value: Any) -> list[Any]:
        self.told[self.rank] = value
        self.barrier.wait(timeout=5)
        values = [self.told[rank] for rank in range(self.world_size)]
        self.barrier.wait(timeout=5)
        return values

    def all_reduce_max(self, values: Sequence[float], device: torch.device) -> list[float]:
        return [max(of_ranks) for of_ranks in zip(*self.gather(list(values)), strict=True)]

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))

    def broadcast_buffers(self, model: nn.Module) -> None:
        pass

    def wrap(self, model: nn.Module) -> nn.Module:
        return model


class Never(StopRequest):
    """Signals are the main thread's."""

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.usefixtures("small_network")
def test_what_one_rank_alone_finds_not_finite_is_recorded_by_the_main_one(
    demo_data: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier, told, peek = threading.Barrier(2), {}, Meter.peek
    local = threading.local()

    @contextmanager
    def joined(device_type: str) -> Iterator[Ranks]:
        yield ThreadRanks(rank=local.rank, world_size=2, barrier=barrier, told=told)

    def seen(meter: Meter) -> Score:
        return replace(peek(meter), loss_sum=math.nan) if local.rank else peek(meter)

    monkeypatch.setattr(run_module, "joined_ranks", joined)
    monkeypatch.setattr(Meter, "peek", seen)
    ended = {}

    def run(rank: int) -> None:
        local.rank = rank
        try:
            train(settings_for(tmp_path, demo_data), dataset, stop=Never())
        except Exception as error:
            ended[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(ended[rank]) for rank in range(2)] == [Diverged, Diverged], ended
    assert "the loss is not finite by step 1. " in str(ended[0])
    (entry,) = list_runs(tmp_path)
    assert entry.state == "diverged"
