"""``tidali train`` and ``tidali eval`` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tidali.dataset.contract import open_dataset
from tidali.errors import TidaliError
from tidali.hardware.device import plan_device

FOLDER = {"config.json", "metrics.jsonl", "steps.jsonl", "summary.json"}
FOLDER |= {"best.safetensors", "last.safetensors", "state.safetensors"}


def test_ranks_share_the_demo_data_that_one_of_them_makes(tmp_path: Path) -> None:
    """torchrun starts them together, in one folder."""
    program = "from shards import demo; from tidali.cli.packing import demo_data; import functools\n"
    program += "demo.pack_demo = functools.partial(demo.pack_demo, classes=3, per_class=40, workers=1)\n"
    program += "print(demo_data())"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    ends = [rank.communicate(timeout=60) for rank in ranks]
    assert [(rank.returncode, out) for rank, (out, _) in zip(ranks, ends, strict=True)] == [(0, "data/demo\n")] * 3, ends
    assert sum("demo data set into data/demo" in err for _, err in ends) == 1
    assert open_dataset(tmp_path / "data" / "demo").split("train").samples == 120


def test_demo_data_where_no_folder_can_be_made(tidali, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("mine")
    ended = tidali("train", "--device", "cpu")
    assert ended.code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tidali: data/demo: ")
    assert "(File exists)" in line
    assert "--data" in line


def test_a_run_that_cannot_be_saved_leaves_nothing(
    tidali, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise TidaliError("state.safetensors: cannot be written (No space left on device)")

    monkeypatch.setattr("tidali.training.run.copy_state", full)
    ended = tidali("train", "--data", demo_data, "--res", "32", "--device", "cpu", "--out", tmp_path / "run")
    assert (ended.code, ended.stderr.splitlines()[-1]) == (
        1,
        "tidali: state.safetensors: cannot be written (No space left on device)",
    )
    assert not (tmp_path / "run").exists()


def test_run_folder(trained, demo_data: Path) -> None:
    out, _ = trained
    assert {path.name for path in out.iterdir()} == FOLDER

    config = json.loads((out / "config.json").read_text())
    assert (config["res"], config["stem"], config["seed"], config["data"]) == (32, "imagenet", 0, str(demo_data))
    assert (config["recipe"]["name"], config["recipe"]["epochs"], config["recipe"]["batch_size"]) == ("modern", 2, 32)

    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(epoch["epoch"], epoch["step"], epoch["val_samples"]) for epoch in epochs] == [(1, 5, 32), (2, 10, 32)]
    for epoch in epochs:
        assert epoch["images_per_s"] > 0
        assert 0 <= epoch["data_wait_share"] <= 1
        assert 0 <= epoch["val_top1_percent"] <= epoch["val_top5_percent"] == 100  # of four classes

    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in steps] == [(step, step / 5) for step in range(1, 11)]
    for number, epoch in enumerate(epochs):
        of_epoch = steps[5 * number : 5 * number + 5]
        # Batches of equal size: the epoch's mean is the mean of the steps' means.
        assert sum(line["train_loss"] for line in of_epoch) / 5 == pytest.approx(epoch["train_loss"])
        assert all(line["images_per_s"] > 0 for line in of_epoch)
        assert (epoch["classes"], epoch["train_samples"], epoch["train_left_out"]) == (4, 160, 0)

    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluated_on"] == "val"
    assert summary["best"]["top1_percent"] == max(epoch["val_top1_percent"] for epoch in epochs)
    assert summary["last"]["loss"] == epochs[-1]["val_loss"]
    assert epochs[summary["best_epoch"] - 1]["val_loss"] == summary["best"]["loss"]
    assert summary["last_flip"]["samples"] == 32  # the modern recipe's
    assert summary["device"]["type"] == "cpu"
    assert {"tidali", "torch", "nvidia-dali-cuda120"} <= summary["versions"].keys()


def test_checkpoint_carries_its_classes(trained, demo_data: Path) -> None:
    out, _ = trained
    with safe_open(out / "best.safetensors", framework="np") as file:
        card = json.loads(file.metadata()["tidali"])
    manifest = open_dataset(demo_data).manifest
    assert card["classes"] == [{"id": one.id, "name": one.name} for one in manifest.classes]
    assert (card["mean"], card["std"], card["res"]) == (list(manifest.mean), list(manifest.std), 32)


def test_what_train_prints(trained) -> None:
    out, ended = trained
    summary = json.loads((out / "summary.json").read_text())
    assert f"{summary['best']['top1_percent']:.1f}" in ended.stdout
    assert "top-5" not in ended.stdout  # of four classes
    assert "few images: 32 images of val" in ended.stdout
    assert (
        f"next: a page with curves, confusions and the hardest images\n  tidali report {out} -o {out}/report.html"
        in ended.stderr
    )
    amp = f"amp     {plan_device('cpu', 'auto', 'off').dtype_name}"
    for told in ("160 train images, 4 classes", amp, "compile off: ", "epoch 2/2  train loss "):
        assert told in ended.stderr


@pytest.mark.parametrize("given", ["best", "best.safetensors", ""])
def test_eval_prints_the_runs_own_figure(tidali, trained, demo_data: Path, given: str) -> None:
    out, _ = trained
    best = json.loads((out / "summary.json").read_text())["best"]
    table = tidali("eval", out / given, "--data", demo_data, "--device", "cpu")
    assert (table.code, table.stderr) == (0, "")
    assert "few images: 32 images of val" in table.stdout
    row = next(line for line in table.stdout.splitlines() if line.startswith("32 "))
    res, top1, _, _, loss, _, samples = row.split()
    assert [res, top1, loss, samples] == ["32", f"{best['top1_percent']:.1f}", f"{best['loss']:.3f}", "32"]  # of four classes


def test_eval_json_at_several_resolutions(tidali, trained, demo_data: Path) -> None:
    out, _ = trained
    ended = tidali("eval", out, "--data", demo_data, "--res", "64,32", "--split", "train", "--device", "cpu", "--json")
    assert ended.code == 0
    document = json.loads(ended.stdout)
    assert (document["checkpoint"], document["data"], document["split"]) == (str(out), str(demo_data), "train")
    assert [(score["res"], score["samples"]) for score in document["scores"]] == [(64, 160), (32, 160)]
    assert document["scores"][0]["loss"] != document["scores"][1]["loss"]


def test_eval_with_mirrored_images_is_the_runs_own_figure(tidali, trained, demo_data: Path) -> None:
    out, _ = trained
    summary = json.loads((out / "summary.json").read_text())
    ended = tidali("eval", out / "last", "--data", demo_data, "--device", "cpu", "--flip", "--json")
    document = json.loads(ended.stdout)
    assert document["flip"] is True
    assert {name: document["scores"][0][name] for name in summary["last_flip"]} == summary["last_flip"]
    assert document["scores"][0]["loss"] != summary["last"]["loss"]


@pytest.mark.slow
def test_mixed_sizes_pieces_and_tensorboard(tidali, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few, out = tmp_path / "few", tmp_path / "mixed"
    assert tidali("demo", few, "--classes", 4, "--per-class", 10, "--workers", 1).code == 0
    ended = tidali(
        *("train", "--data", few, "--res", 64, "--epochs", 2, "--batch-size", 40, "--device", "cpu", "--out", out),
        *("--set", "train_sizes=32,64", "--set", "size_order=mixed", "--set", "accumulate=2", "--set", "kernel=opencv"),
        "--tensorboard",
    )
    assert ended.code == 0, ended.stderr
    assert "trained at 32, 64 px, mixed" in ended.stderr
    assert "batch 40, lr 0.015625" in ended.stderr
    assert "this lr is the recipe's 0.05 for 128 images, in proportion" in ended.stderr
    with safe_open(out / "last.safetensors", framework="np") as file:
        assert json.loads(file.metadata()["tidali"])["kernel"] == "opencv"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("val_top1_percent", "train_loss", "images_per_s", "lr"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        # TensorBoard keeps float32.
        assert logged == [(line["epoch"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    again = tidali("eval", out, "--data", few, "--device", "cpu", "--json")
    assert json.loads(again.stdout)["scores"][0]["loss"] == json.loads((out / "summary.json").read_text())["best"]["loss"]


def test_init_lists_what_was_loaded_and_what_not(tidali, trained, tmp_path: Path) -> None:
    out, _ = trained
    assert tidali("demo", tmp_path / "few", "--classes", 4, "--per-class", 2, "--workers", 1).code == 0
    ended = tidali(
        *("train", "--data", tmp_path / "few", "--res", 32, "--epochs", 1, "--batch-size", 8, "--device", "cpu"),
        *("--recipe", "seed", "--stem", "small", "--init", out / "best", "--out", tmp_path / "small"),
    )
    assert ended.code == 0, ended.stderr
    told = [line.strip() for line in ended.stderr.splitlines()]
    assert "loaded 121 of 123 tensors" in told
    assert "not loaded: conv1.weight ((64, 3, 7, 7) in the file, (64, 3, 3, 3) in this model)" in told
    assert "not loaded: conv1.bias (not in the file)" in told  # the seed recipe's small stem has one
    with safe_open(tmp_path / "small" / "last.safetensors", framework="np") as file:
        assert file.get_tensor("conv1.bias").shape == (64,)
        assert json.loads(file.metadata()["tidali"])["mean"] == [0, 0, 0]  # that recipe does not normalise


@pytest.mark.slow
def test_demo_then_default_resolution_and_folder(tidali, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert tidali("demo", "data/own", "--classes", 2, "--per-class", 8).code == 0
    ended = tidali("train", "--data", "data/own", "--epochs", 1, "--batch-size", 8, "--device", "cpu")
    assert ended.code == 0, ended.stderr
    runs = list((tmp_path / "runs").iterdir())
    assert [run.name.rsplit("-", 2)[0] for run in runs] == ["own-64-modern"]  # the images' own size
    assert {path.name for path in runs[0].iterdir()} == FOLDER


@pytest.mark.slow
def test_another_architecture_is_in_its_checkpoint(tidali, demo_data: Path, tmp_path: Path) -> None:
    """Trained, evaluated, predicted and served without a word about it; ResNet-18's weights are not taken for it."""
    common = ["--data", demo_data, "--device", "cpu"]
    options = ["--arch", "resnet50", "--res", 32, "--epochs", 1, "--batch-size", 160, "--set", "eval_flip=false"]
    ended = tidali("train", *common, *options, "--out", tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert "ResNet-50, imagenet stem" in ended.stderr
    ended = tidali("eval", tmp_path / "run" / "last", *common, "--json")
    assert ended.code == 0, ended.stderr
    (score,) = json.loads(ended.stdout)["scores"]
    last = json.loads((tmp_path / "run" / "summary.json").read_text())["last"]
    assert score["top1_percent"] == last["top1_percent"]
    assert score["loss"] == pytest.approx(last["loss"], rel=1e-5)
    ended = tidali("train", *common, "--init", tmp_path / "run", "--res", 32, "--out", tmp_path / "other")
    assert ended.code == 2
    assert "the weights are those of a ResNet-50; give --arch resnet50" in ended.stderr


def test_a_linear_probe_trains_the_head_alone(tidali, trained, demo_data: Path, tmp_path: Path) -> None:
    out, _ = trained
    ended = tidali(
        *("train", "--data", demo_data, "--res", 32, "--epochs", 1, "--batch-size", 80, "--device", "cpu"),
        *("--init", out / "best", "--linear-probe", "--out", tmp_path / "probe"),
    )
    assert ended.code == 0, ended.stderr
    assert "recipe finetune, as there are starting weights" in ended.stderr
    assert "frozen: conv1, bn1, layer1, layer2, layer3, layer4" in ended.stderr
    before, after = load_file(out / "best.safetensors"), load_file(tmp_path / "probe" / "last.safetensors")
    assert {name for name in after if not after[name].equal(before[name])} == {"fc.weight", "fc.bias"}
    refused = tidali("train", "--data", demo_data, "--linear-probe")
    assert (refused.code, "give --init" in refused.stderr) == (2, True)
