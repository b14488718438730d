"""Files that an earlier tidali wrote can still be read: a packed data set, a checkpoint, a run folder, a run's state.

They are in ``tests/data/old_formats``. Its ``make.py`` made them with the code of that time, and recorded that code's results.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tidali as library

HERE = Path(__file__).parents[1] / "data" / "old_formats"
EXPECTED = json.loads((HERE / "expected.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data set as ``packed``, the finished run as ``run`` and the stopped one as ``stopped``."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(HERE / "packed", folder / "packed")
    for archive, name in (("finished", "run"), ("stopped", "stopped")):
        with tarfile.open(HERE / f"{archive}.tar.xz") as tar:
            tar.extractall(folder / name, filter="data")
    return folder


def test_the_data_set_is_verified(tidali, folder: Path) -> None:
    ended = tidali("verify", folder / "packed")
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize("cache", ["device", "off"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_data_set_has_its_images_and_labels(folder: Path, split: str, cache: Any) -> None:
    if cache == "off":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    data = library.open_data(str(folder / "packed"))
    loader = library.make_loader(data, split, train=False, batch_size=5, cache=cache, device="cpu")
    batches = [(images.clone(), labels.clone()) for images, labels in loader]
    assert torch.cat([labels for _, labels in batches]).tolist() == EXPECTED["labels"][split]
    if split == "val":
        means = torch.cat([images for images, _ in batches]).mean((1, 2, 3))
        assert means.tolist() == pytest.approx(EXPECTED["image_means"], abs=0.01)


def test_the_checkpoint_predicts_the_same(folder: Path) -> None:
    with tarfile.open(folder / "packed" / "val-000000.tar") as tar:
        photos = [Image.open(tar.extractfile(name)).convert("RGB") for name in tar.getnames() if name.endswith(".jpg")]
    predictions = library.load_model(folder / "run", device="cpu", amp="off").predict(photos, top=3)
    assert len(predictions) == len(EXPECTED["predictions"]) == 15
    for scores, expected in zip(predictions, EXPECTED["predictions"], strict=True):
        assert {one.id: one.probability for one in scores} == pytest.approx(
            {one["id"]: one["probability"] for one in expected}, abs=1e-3
        )


def test_the_checkpoint_is_evaluated_to_the_same_figures(folder: Path) -> None:
    data = library.open_data(str(folder / "packed"))
    _, rows = library.evaluate_checkpoint(str(folder / "run"), data, device="cpu", amp="off", resolutions=[32, 64])
    for row, expected in zip(rows, EXPECTED["evaluation"], strict=True):
        assert {"res": row.res, **row.score.to_dict()} == pytest.approx(expected, rel=1e-3)


def test_the_run_folder_has_a_report(tidali, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # its config.json names the data set as seen from here
    page = tmp_path / "report.html"
    ended = tidali("report", "run", "--out", page)
    assert ended.code == 0, ended.stderr
    text = page.read_text(encoding="utf-8")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert f"{summary['best']['top1_percent']:.1f}" in text
    assert "striped triangle" in text


@pytest.mark.slow
def test_the_stopped_run_is_resumed_to_its_end(tidali, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stopped within its second epoch, after step 4 of 6."""
    monkeypatch.chdir(folder)
    run = folder / "stopped"
    first = json.loads((run / "metrics.jsonl").read_text())
    ended = tidali("train", "--resume", "stopped")
    assert ended.code == 0, ended.stderr
    assert "step 4" in ended.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == first
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    summary = json.loads((run / "summary.json").read_text())
    before = json.loads((folder / "run" / "summary.json").read_text())
    assert summary.keys() == before.keys()
    # The old code resumed from the same state, so its training loss is the same but for rounding: the same images and weights.
    old = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["train_loss"] == pytest.approx(old[1]["train_loss"], rel=1e-3)
    assert all(tensor.isfinite().all() for tensor in load_file(run / "last.safetensors").values() if tensor.is_floating_point())
