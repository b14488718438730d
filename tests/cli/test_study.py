"""``tidali study``: which rows are run, which runs are kept, and what the table says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torchvision.models import ResNet18_Weights

from tidali.dataset.contract import Dataset, open_dataset
from tidali.recipes import make_recipe
from tidali.study import rows as rows_module
from tidali.study import run as study_module
from tidali.study.rows import ROWS, Row, needed_by, scaled
from tidali.study.run import Study
from tidali.study.settings import StudySettings
from tidali.study.table import cells, describe, markdown


def row(name: str):
    return next(row for row in ROWS if row.name == name)


def test_the_rows_are_the_originals() -> None:
    """The published accuracies and the settings of the original notebooks."""
    assert [(row.name, row.published_top1_percent) for row in ROWS if row.published_top1_percent is not None] == [
        *(("1", 25.9), ("2", 56.9), ("3", 73.1), ("3@64", 15.3), ("4", 54.5), ("5", 72.3))
    ]
    for name, epochs, flip, kernel, res in (
        *(("1", 15, "random", "pil", 64), ("2", 15, "random", "pil", 64), ("3", 7, "none", "opencv", 224)),
        *(("4", 7, "none", "pil", 64), ("5", 7, "none", "pil", 64)),
    ):
        recipe = row(name).recipe
        assert recipe is not None
        assert (recipe.epochs, recipe.augment.flip, recipe.kernel, row(name).res) == (epochs, flip, kernel, res)
        assert (recipe.lr, recipe.momentum, recipe.weight_decay, recipe.batch_size) == (1e-3, 0.9, 0.0, 100)
        assert (recipe.schedule, recipe.step_epochs, recipe.step_gamma, recipe.normalise) == ("step", 7, 0.1, False)
    assert [row.stem for row in ROWS if row.name in "12345"] == ["imagenet"] * 4 + ["small"]


def test_the_rows_that_a_row_starts_from_are_added() -> None:
    assert [row.name for row in needed_by(("5",))] == ["3", "5"]
    assert [row.name for row in needed_by(("6", "1"))] == ["1", "3", "6"]
    assert needed_by(()) == ROWS


def test_scaling_keeps_at_least_an_epoch() -> None:
    recipe = make_recipe("modern", epochs=20)
    assert [scaled(recipe, scale).epochs for scale in (1, 0.5, 0.001)] == [20, 10, 1]
    assert scaled(recipe, 0.5).warmup_epochs == 0.5
    assert scaled(recipe, 3).warmup_epochs == recipe.warmup_epochs
    assert scaled(replace(recipe, step_epochs=7), 0.3).step_epochs == 2


def test_a_cell_has_mean_and_deviation_and_a_row_that_was_not_run_says_so() -> None:
    found = {**describe(row("1"), row("1").recipe), "gmacs": 0.1478, "images_per_s": 1234.5, "minutes": 0.5, "status": "done"}
    spread = {"last": {"mean": 25.0, "deviation": 0.5}, "best": {"mean": 26.0, "deviation": None}, "flip": None}
    assert cells({**found, "top1_percent": spread})[2:] == ("25.9", "25.0 ± 0.5", "26.0", "", "0.148", "1,234", "0.5")
    left_out = {**found, "status": "not run", "top1_percent": None, "images_per_s": None, "minutes": None}
    assert cells(left_out)[2:] == ("25.9", "not run", "", "", "0.148", "", "")


@pytest.fixture(scope="module")
def data(tidali, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 training images, one of `small_batches`, and 10 to measure on."""
    folder = tmp_path_factory.mktemp("study") / "two"
    assert tidali("demo", folder, "--classes", 2, "--per-class", 5, "--workers", 1).code == 0
    return folder


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 images: a step of row 3 on its 100 images of 224 px takes a quarter of a minute on two cores."""
    recipes = {row.name: row.recipe and replace(row.recipe, batch_size=10) for row in ROWS}
    monkeypatch.setattr(rows_module, "ROWS", tuple(replace(row, recipe=recipes[row.name]) for row in ROWS))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.mark.slow
def test_rows_are_run_in_order_kept_and_put_into_a_table(
    tidali, data: Path, weights: Path, tmp_path: Path, small_batches: None
) -> None:
    out = tmp_path / "study"
    command = ("study", "--data", data, "--rows", "3@64,4,6", "--epochs-scale", 0.01, "--device", "cpu", "--out", out)
    ended = tidali(*command, "--imagenet-weights", weights)
    assert ended.code == 0, ended.stderr

    study = json.loads((out / "study.json").read_text())
    assert [one["row"] for one in study["rows"]] == ["3", "3@64", "4", "6"]
    assert study["initial_weights"]["name"] == str(weights)
    third, at_64, fourth, served = study["rows"]
    assert (third["from"], fourth["from"], served["from"]) == ("ImageNet weights", "row 3", "row 3")
    assert [one["res"] for one in third["at_resolution"]] == [64, 96, 128, 160, 192, 224]
    # Row 3's last weights at 64 px are in the table twice: as a row, and as a point of row 3's curve.
    assert third["at_resolution"][0]["top1_percent"] == at_64["top1_percent"]["last"]["mean"]
    assert third["at_resolution"][-1]["top1_percent"] == third["top1_percent"]["last"]["mean"]
    # The original's figures: 1.814 and 0.148 GMAC at 1,000 and 200 classes; a head of two has 0.0005 fewer.
    assert (third["gmacs"], fourth["gmacs"]) == (pytest.approx(1.814, abs=0.001), pytest.approx(0.148, abs=0.001))
    # The resize of three channels by two matrices: 224 x 64 x 64 and 224 x 64 x 224 products.
    assert served["gmacs"] - third["gmacs"] == pytest.approx(3 * (224 * 64 * 64 + 224 * 64 * 224) / 1e9, rel=1e-3)
    [compared] = study["comparisons"]
    assert (compared["row"], compared["against"], compared["samples"]) == ("4", "3", 10)
    accuracies = [row["top1_percent"]["last"]["mean"] for row in (fourth, third)]
    assert compared["top1_difference_percent"] == pytest.approx(accuracies[0] - accuracies[1])
    config = json.loads((out / fourth["runs"][0]["folder"] / "config.json").read_text())
    assert config["init"] == str(out / "runs" / "3-seed0" / "best.safetensors")
    assert json.loads((out / "runs" / "3-seed0" / "config.json").read_text())["recipe"]["kernel"] == "opencv"
    assert markdown(study) == (out / "study.md").read_text()
    assert "| 4 | " in (out / "study.md").read_text()
    assert "<html" in (out / "study.html").read_text()

    untouched = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = tidali(*command, "--imagenet-weights", weights)
    assert again.code == 0, again.stderr
    assert again.stderr.count("kept, finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == untouched
    assert again.stdout == ended.stdout

    other = tidali(*command[:-6], "--epochs-scale", 0.3, "--device", "cpu", "--out", out, "--imagenet-weights", weights)
    assert other.code == 2
    assert "made with other settings (recipe)" in other.stderr

    # Other weights in a file of the same name: row 3 and all rows that start from it would be stale.
    torch.manual_seed(1)
    inputs = out / "runs" / "inputs.json"
    original = weights.read_bytes()
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    stale = tidali(*command, "--imagenet-weights", weights)
    weights.write_bytes(original)
    assert stale.code == 2
    assert f"3-seed0: made from other starting weights, see {inputs}" in stale.stderr

    # If row 3 was trained again, row 4 would start from other weights in a file of the same name.
    recorded = json.loads(inputs.read_text())
    recorded["4-seed0"]["val images"] = "other"
    inputs.write_text(json.dumps(recorded))
    best = out / "runs" / "3-seed0" / "best.safetensors"
    best.write_bytes((out / "runs" / "4-seed0" / "best.safetensors").read_bytes())
    stale = tidali(*command, "--imagenet-weights", weights)
    assert stale.code == 2
    assert "4-seed0: made from other starting weights and val images" in stale.stderr


def test_an_evaluation_is_kept_for_its_weights_its_images_and_its_precision(data: Path, tmp_path: Path, monkeypatch) -> None:
    scores = iter(range(9))

    def score(given: str, dataset: Dataset, **options: object) -> tuple[None, list[SimpleNamespace]]:
        return None, [SimpleNamespace(score=SimpleNamespace(top1_percent=next(scores)))]

    monkeypatch.setattr(study_module, "evaluate_checkpoint", score)
    checkpoint = tmp_path / "best.safetensors"
    checkpoint.write_bytes(b"weights")
    settings = StudySettings(data=str(data), out=str(tmp_path), rows=("1",), device="cpu", amp="off")
    dataset = open_dataset(data)
    study = Study(settings, dataset)
    assert [study.measured(checkpoint, 64) for _ in range(2)] == [0, 0]
    assert Study(replace(settings, amp="bf16"), dataset).measured(checkpoint, 64) == 1
    fewer = replace(dataset.split("val"), samples=9, shards=())
    manifest = replace(dataset.manifest, splits={**dataset.manifest.splits, "val": fewer})
    assert Study(settings, replace(dataset, manifest=manifest)).measured(checkpoint, 64) == 2
    assert Study(settings, dataset).measured(checkpoint, 64) == 0


def test_a_served_rows_input_is_what_is_stored() -> None:
    assert describe(row("6"), None, stored_px=96)["input_px"] == 96
    assert describe(row("6"), None)["input_px"] is None
    assert describe(row("4"), row("4").recipe, stored_px=96)["input_px"] == 64


@pytest.mark.slow
def test_without_imagenet_weights_the_rows_that_need_them_are_shown_as_not_run(
    tidali, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", "http://127.0.0.1:9/resnet18-01234567.pth")
    out = tmp_path / "study"
    ended = tidali("study", "--data", data, "--rows", "1,5", "--epochs-scale", 0.05, "--device", "cpu", "--out", out)
    assert ended.code == 0, ended.stderr
    first, third, fifth = json.loads((out / "study.json").read_text())["rows"]
    assert (first["status"], first["epochs"]) == ("done", 1)
    assert (third["status"], fifth["status"]) == ("not run", "not run")
    assert third["reason"].startswith("it needs ImageNet's weights: cannot download")
    assert third["reason"].endswith("or give --imagenet-weights PATH")  # the command that was given has no --init
    assert fifth["reason"] == "starts from row 3, which was not run"
    assert ended.stdout.count("not run") == 2
    assert not (out / "runs" / "3-seed0").exists()


@pytest.mark.slow
def test_a_row_that_diverges_is_recorded_and_the_others_are_run(
    tidali, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    first = rows_module.ROWS[0]
    assert first.recipe is not None
    wild = replace(first, recipe=replace(first.recipe, lr=1e30))
    again = Row(name="1@64", title="row 1's weights, which there are not", start="1")
    monkeypatch.setattr(rows_module, "ROWS", (wild, again, replace(first, name="mild")))
    out = tmp_path / "study"
    ended = tidali("study", "--data", data, "--epochs-scale", 0.2, "--device", "cpu", "--out", out)
    assert ended.code == 1
    assert "1 row of the study diverged: 1" in ended.stderr
    diverged, evaluated, mild = json.loads((out / "study.json").read_text())["rows"]
    assert (diverged["status"], evaluated["status"], mild["status"]) == ("diverged", "not run", "done")
    assert "not finite by step" in diverged["reason"]
    assert evaluated["reason"] == "starts from row 1, which diverged"
    assert mild["top1_percent"]["last"]["mean"] >= 0
    assert "Row 1 diverged: the " in (out / "study.md").read_text()
    assert "diverged: the " in (out / "study.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rows", "9"), "--rows 9: choose from 1, 2, 3, 3@64"),
        (("--epochs-scale", "0"), "--epochs-scale 0.0: must be above 0"),
        (("--epochs-scale", "inf"), "--epochs-scale inf"),
        (("--seeds", "0"), "--seeds"),
        (("--rows", "2", "--imagenet-weights", "nowhere.pth"), "--imagenet-weights nowhere.pth: no such "),
    ],
)
def test_wrong_use(tidali, data: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    ended = tidali("study", "--data", data, "--out", tmp_path / "study", *arguments)
    assert ended.code == 2
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "study").exists()


def test_several_ranks_are_refused(tidali, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = tidali("study", "--data", data, "--out", tmp_path / "study")
    assert ended.code == 2
    assert "tidali train --config" in ended.stderr
