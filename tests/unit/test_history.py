"""Run folders read back: finished, stopped, killed in the middle of a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tidali.config import TrainSettings
from tidali.errors import UsageError
from tidali.recipes import change, make_recipe
from tidali.training.history import differing_settings, labels, read_runs


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., str]:
    """``write_run("a", ["lr=0.1"], stem="small")`` writes a run folder of three epochs and returns its path."""

    def write(name: str, changes: list[str] | None = None, **settings: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        recipe = change(make_recipe("modern"), changes or [])
        config = asdict(TrainSettings(data="data/x", out=str(folder), recipe=recipe, **settings))
        (folder / "config.json").write_text(json.dumps(config))
        lines = [{"epoch": epoch, "val_top1_percent": [40.0, 60.0, 60.0][epoch - 1], "val_loss": 1.0} for epoch in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return write


def test_a_run(write_run) -> None:
    (run,) = read_runs([write_run("a", res=64)])
    assert (run.name, run.split, run.summary) == ("a", "val", None)
    assert run.column("val_top1_percent") == [40, 60, 60]
    assert all(math.isnan(value) for value in run.column("images_per_s"))
    assert run.best_epoch["epoch"] == 2  # the first of equals, as training keeps it
    assert run.settings["recipe"] == "modern"
    assert run.settings["augment.flip"] == "random"
    assert (run.settings["res"], run.settings["lr"], run.settings["augment.crop_scale"]) == ("64", "0.05", "none")


def set_lines(folder: str, *lines: dict[str, Any]) -> None:
    text = "".join(json.dumps({"epoch": number, **line}) + "\n" for number, line in enumerate(lines, start=1))
    Path(folder, "metrics.jsonl").write_text(text)


def test_of_equal_accuracies_the_best_epoch_is_that_with_the_lower_loss(write_run) -> None:
    folder = write_run("a")
    losses = (1.5, 1.2, 1.2, 1.4)
    set_lines(
        folder, *({"val_top1_percent": 60.0, "val_loss": loss} for loss in losses), {"val_top1_percent": 9, "val_loss": 0.1}
    )
    assert read_runs([folder])[0].best_epoch["epoch"] == 2
    # An earlier version took the first of them, and its weights are in best.safetensors.
    Path(folder, "summary.json").write_text(json.dumps({"best_epoch": 1}))
    assert read_runs([folder])[0].best_epoch["epoch"] == 1


def test_a_run_is_judged_by_what_it_logged(write_run) -> None:
    folder = write_run("a", ["batch_size=64"])
    line = {"val_top1_percent": 25.0, "val_loss": 1.4, "val_samples": 400, "step": 40, "classes": 4, "train_samples": 64}
    set_lines(folder, {**line, "train_left_out": 36, "largest_class_percent": 25.0})
    kinds = [finding.kind for finding in read_runs([folder])[0].findings]
    assert kinds == ["at chance", "left out"]


def test_a_run_of_an_earlier_version_is_judged_by_its_weights_classes(write_run) -> None:
    """It did not log the number of classes; the header of a safetensors file has them."""
    folder = write_run("a")
    set_lines(folder, {"val_top1_percent": 25.0, "val_loss": 1.4, "val_samples": 400, "step": 4000})
    assert read_runs([folder])[0].findings == []
    card = json.dumps({"classes": [{"id": name, "name": name} for name in "abcd"]})
    save_file({"w": np.zeros(1)}, Path(folder, "last.safetensors"), metadata={"tidali": card})
    assert [finding.kind for finding in read_runs([folder])[0].findings] == ["at chance"]
    set_lines(folder, {"val_top1_percent": 25.0, "val_loss": 1.4})  # nor on how many images
    assert read_runs([folder])[0].findings == []
    Path(folder, "last.safetensors").write_bytes(b"\xff" * 7)
    assert read_runs([folder])[0].findings == []


def test_held_out_comes_before_val(write_run) -> None:
    folder = write_run("a")
    Path(folder, "metrics.jsonl").write_text('{"epoch": 1, "heldout_top1_percent": 5, "val_top1_percent": 6}\n')
    assert read_runs([folder])[0].split == "heldout"


def test_an_epoch_written_twice_counts_once_and_a_torn_line_not_at_all(write_run) -> None:
    folder = write_run("a")
    with open(Path(folder, "metrics.jsonl"), "a") as file:
        file.write('{"epoch": 3, "val_top1_percent": 61.0, "val_loss": 1.0}\n{"epoch": 4, "val_to')
    assert read_runs([folder])[0].column("val_top1_percent") == [40, 60, 61]


def test_labels_say_what_differs(write_run) -> None:
    runs = read_runs([write_run("a"), write_run("b", ["lr=0.1", "augment.crop_scale=[0.25, 1.0]"])])
    assert differing_settings(runs) == {"lr": ["0.05", "0.1"], "augment.crop_scale": ["none", "0.25, 1"]}
    assert labels(runs) == ["a (lr 0.05, augment.crop_scale none)", "b (lr 0.1, augment.crop_scale 0.25, 1)"]
    assert labels(runs[:1]) == ["a"]


def test_long_lists_of_differences_are_cut(write_run) -> None:
    runs = read_runs([write_run("a"), write_run("b", ["lr=0.1", "nesterov=false"], stem="small", seed=3, res=64)])
    assert labels(runs)[1] == "b (res 64, stem small, lr 0.1, …)"


def test_folders_of_the_same_name_are_distinguished(write_run) -> None:
    one, other = write_run("x/a"), write_run("y/a")
    assert [run.name for run in read_runs([one, other])] == [one, other]


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [(None, "no such run folder"), ("config.json", "config.json"), ("metrics.jsonl", "no finished epoch yet")],
)
def test_what_is_no_run_is_refused(write_run, missing: str | None, complaint: str) -> None:
    folder = write_run("a")
    if missing is not None:
        Path(folder, missing).unlink()
    with pytest.raises(UsageError, match=complaint):
        read_runs([folder if missing is not None else f"{folder}-not"])
