"""A user's mistakes end in the right exit code, with one line on standard error, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

WRONG_USE, FAILED = 2, 1
TRAIN = ["train", "--data", "{demo}", "--res", "32", "--batch-size", "32", "--device", "cpu", "--out", "new"]

# Arguments -> text that the line must contain. {demo}: a packed data set of 4 classes; {other}: one of 3; {run}: a run on
# {demo}; {damaged}: {demo} with a truncated shard; {full}: a folder with one file in it, {file}.
CASES = {
    WRONG_USE: [
        (["nonsense"], "nonsense"),
        (["train", "--nonsense"], "--nonsense"),
        (["train", "--res", "31"], "--res 31: at least 32"),
        (["train", "--res", "wide"], "--res"),
        (["train", "--epochs", "0"], "--epochs 0: at least 1"),
        (["train", "--batch-size", "1"], "--batch-size 1: at least 2"),
        (["train", "--lr", "0"], "--lr 0.0: must be above 0"),
        (["train", "--lr", "nan"], "--lr nan: must be above 0"),
        (["train", "--seed", "-1"], "--seed"),
        (["train", "--seed", "99999999999999999999"], "--seed"),
        (["train", "--recipe", "old"], "--recipe"),
        (["train", "--set", "lr=high"], "--set lr=high"),
        (["train", "--set", "lrr=1"], "--set lrr=1: did you mean lr? Give field=value"),
        (["train", "--set", "shift_px=1"], "did you mean augment.shift_px?"),
        (["train", "--data", "nowhere"], "nowhere: no dataset.json here; make a data set with"),
        (["eval", "{run}", "--data", "nowhere"], "nowhere: no dataset.json"),
        (["bench", "--data", "nowhere"], "nowhere: no dataset.json"),
        (["info", "nowhere"], "nowhere: no dataset.json"),
        (["info", "{demo}", "--sheet", "sheet.jpg"], "--sheet sheet.jpg: give a file that ends in .png"),
        (["train", "--resume", "nowhere"], "--resume: there is no file nowhere/config.json; 'tidali runs' lists the runs"),
        (["train", "--set", "accumulate=65"], "accumulate 65: at least 1, with two of 128 samples"),
        (["train", "--set", "train_sizes=64,16"], "train_sizes [64, 16]: at least 32 pixels"),
        (["train", "--set", "train_sizes=big"], "--set train_sizes=big"),
        (["train", "--set", "kernel=lanczos"], "kernel 'lanczos' is not one of pil, opencv"),
        (["train", "--set", "momentum=0"], "with momentum 0 set nesterov=false too"),
        (["train", "--recipe", "seed", "--set", "step_epochs=0"], "step_epochs 0: at least 1"),
        (["train", "--set", "augment.crop_ratio=null"], "augment: crop_ratio None"),
        ([*TRAIN, "--sync-bn"], "--sync-bn: torch synchronises batch norm on GPUs"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "--resume", "{run}", "--epochs", "3"], "--epochs"),
        (["train", "--config", "nowhere.json"], "nowhere.json"),
        ([*TRAIN, "--init", "nowhere"], "nowhere: no such checkpoint"),
        ([*TRAIN, "--init", "."], "no such checkpoint"),
        ([*TRAIN, "--init", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
        ([*TRAIN, "--init", "{file}"], "{file}"),
        ([*TRAIN, "--out", "{full}"], "--out {full}: not empty"),
        (["eval", "nowhere", "--data", "{demo}"], "nowhere: no such checkpoint"),
        (["eval", ".", "--data", "{demo}"], "no such checkpoint"),
        (["eval", "{file}", "--data", "{demo}"], "{file}: not a readable safetensors file"),
        (["eval", "{run}"], "--data"),
        (["eval", "{run}", "--data", "{other}"], "a head of 4 classes, {other} has 3"),
        (["eval", "{run}", "--data", "{demo}", "--res", "64,16"], "--res 16: at least 32"),
        (["eval", "{run}", "--data", "{demo}", "--res", "64;32"], "--res 64;32: give pixels"),
        (["bench", "--res", "64,x"], "--res 64,x: give pixels"),
        (["bench", "--repeats", "0"], "--repeats"),
        (["bench", "--data", "{demo}", "--batch-size", "0"], "--batch-size"),
        (["bench", "--data", "{demo}", "--batch-size", "161"], "--batch-size 161: the train split has 160 samples"),
        (["bench", "--data", "{demo}", "--json", "nowhere/out.json"], "--json nowhere/out.json: there is no folder nowhere"),
        (["demo", "new", "--classes", "1"], "--classes must be from 2"),
        (["demo", "new", "--per-class", "0"], "--per-class must be at least 1"),
        (["demo", "new", "--seed", "-1"], "--seed"),
        (["demo", "{full}"], "{full}: not empty"),
        (["shard", "nowhere", "new"], "nowhere: no such folder"),
        (["shard", "{full}", "new"], "{full}: no data set"),
        (["shard", "{file}", "new"], "{file}: neither a folder nor a readable zip"),
    ],
    FAILED: [
        (["train", "--data", "{damaged}"], "train-000000.tar: "),
        ([*TRAIN, "--out", "{file}"], "--out {file}: cannot be made (File exists)"),
        ([*TRAIN, "--device", "cuda"], "--device cuda: "),
        (["eval", "{run}", "--data", "{demo}", "--split", "test"], "no 'test' split"),
        (["bench", "--device", "cuda"], "--device cuda: "),
        (["train", "--device", "cuda"], "--device cuda: "),
    ],
}


@pytest.fixture(scope="module")
def places(demo_data: Path, trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The paths that `CASES` names."""
    from shards.demo import pack_demo

    root = tmp_path_factory.mktemp("places")
    pack_demo(root / "other", classes=3, per_class=2, workers=1)
    shutil.copytree(demo_data, root / "damaged")
    tar = root / "damaged" / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    (root / "full").mkdir()
    (root / "full" / "notes.txt").write_text("not an image")
    return {
        "demo": demo_data,
        "run": trained[0],
        "other": root / "other",
        "damaged": root / "damaged",
        "full": root / "full",
        "file": root / "full" / "notes.txt",
    }


def flattened() -> Iterator[pytest.param]:
    for code, cases in CASES.items():
        for argv, complaint in cases:
            no_gpu = [pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")] if "cuda" in argv else []
            yield pytest.param(argv, code, complaint, id=" ".join(argv), marks=no_gpu)


def snapshot(folders: list[Path]) -> dict[Path, int]:
    """Every file under the folders, with its modification time."""
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize(("argv", "code", "complaint"), list(flattened()))
def test_one_line_and_nothing_written(tidali, places, monkeypatch, tmp_path: Path, argv, code: int, complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    watched = [tmp_path, *(path for path in places.values() if path.is_dir())]
    before = snapshot(watched)
    ended = tidali(*(argument.format(**places) for argument in argv))
    assert ended.code == code
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("tidali: ")
    assert complaint.format(**places) in lines[0]
    assert snapshot(watched) == before
