"""The page of a made-up study of nine rows, whose run folders all have the weights of one real run."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tidali.dataset.contract import Dataset, open_dataset
from tidali.errors import UsageError
from tidali.study.page import write_study_page

# Row, title, setting, stem, from, input px, network px, GMACs, published, first and last top-1, epochs.
_ROWS: list[tuple[Any, ...]] = [
    ("1", "stock stem from random weights", "seed, flips", "imagenet", "random", 64, 64, 0.148, 25.9, 9.0, 30.2, 5),
    ("2", "stock stem from ImageNet", "seed, flips", "imagenet", "ImageNet", 64, 64, 0.148, 56.9, 31.0, 58.1, 5),
    ("3", "upsampled to 224", "seed, bicubic", "imagenet", "ImageNet", 224, 224, 1.814, 73.1, 61.0, 74.0, 3),
    ("3@64", "row 3's weights at 64 px", "evaluated only", "imagenet", "row 3", 64, 64, 0.148, 15.3, None, 17.4, None),
    ("4", "row 3 fine-tuned at 64 px", "seed", "imagenet", "row 3", 64, 64, 0.148, 54.5, 40.2, 57.3, 3),
    ("5", "3x3 stem, fresh", "seed", "small", "row 3", 64, 64, 2.222, 72.3, 35.9, 73.6, 3),
    ("6", "row 3 with the resize inside", "evaluated only", "imagenet", "row 3", 64, 224, 1.814, None, None, 74.0, None),
    ("7", "modern, from scratch", "3x3 stem", "small", "random", 64, 64, 2.222, None, 20.0, 66.5, 12),
    ("8", "modern, 64 to 224 px", "one set of weights", "imagenet", "ImageNet", 64, 64, 0.148, None, 55.0, 79.2, 12),
]
_SIDES = {64: 0.148, 96: 0.333, 128: 0.592, 160: 0.926, 224: 1.814}


def write_example(folder: Path, dataset: Dataset, run: Path, *, name: str = "photos") -> dict[str, Any]:
    """Write the run folders, and return the content of study.json. Row 8 is the best, and its weights are the run's."""
    config = json.loads((run / "config.json").read_text())
    template = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    rows = []
    for row, title, setting, stem, start, input_px, network_px, gmacs, published, first, last, epochs in _ROWS:
        runs = []
        if epochs is not None:
            place = folder / "runs" / f"{row}-seed0"
            place.mkdir(parents=True)
            (place / "config.json").write_text(json.dumps({**config, "stem": stem, "res": network_px}))
            shutil.copy(run / "last.safetensors", place)
            with open(place / "metrics.jsonl", "w") as file:
                for epoch in range(1, epochs + 1):
                    top1 = last - (last - first) * (1 - (epoch - 1) / max(epochs - 1, 1)) ** 2
                    file.write(
                        json.dumps({**template, "epoch": epoch, "val_top1_percent": top1, "train_top1_percent": top1 + 6})
                    )
                    file.write("\n")
            runs = [
                {
                    "seed": 0,
                    "folder": f"runs/{row}-seed0",
                    "last_top1_percent": last,
                    "best_top1_percent": last + 0.3,
                    "best_epoch": epochs,
                }
            ]
        at = [{"res": res, "gmacs": of, "top1_percent": last - 0.003 * (224 - res) ** 1.5 / 10} for res, of in _SIDES.items()]
        if row == "3":
            at = [{**one, "top1_percent": 17.4 + (last - 17.4) * (one["res"] - 64) / 160} for one in at]
        rows.append(
            {
                "row": row,
                "title": title,
                "setting": setting,
                "stem": stem,
                "from": start,
                "input_px": input_px,
                "network_px": network_px,
                "gmacs": gmacs,
                "published_top1_percent": published,
                "status": "done",
                "reason": None,
                "top1_percent": {
                    "last": {"mean": last, "deviation": None},
                    "best": {"mean": last + 0.3, "deviation": 0.2},
                    "flip": {"mean": last + 0.8, "deviation": None} if row in "78" else None,
                },
                "images_per_s": 1321.4 if runs else None,
                "minutes": 1.2,
                "epochs": epochs,
                "at_resolution": at if row in "38" else [],
                "runs": runs,
            }
        )
    return {
        "version": 1,
        "command": f"tidali study --data {name} --epochs-scale 0.3",
        "date": "2026-11-24",
        "data": {
            "name": name,
            "classes": len(dataset.manifest.classes),
            "train_samples": dataset.split("train").samples,
            "evaluated_on": "val",
            "eval_samples": dataset.split("val").samples,
        },
        "epochs_scale": 0.3,
        "seeds": [0],
        "initial_weights": {"name": "runs/pretrained/last.safetensors", "sha256": "0123456789abcdef" * 4},
        "device": {"type": "cpu", "name": "a CPU", "cores": 2, "dtype": "float32"},
        "versions": {"tidali": "0.1.0", "torch": "2.9.0"},
        "rows": rows,
    }


def without_weights(study: dict[str, Any]) -> dict[str, Any]:
    """The same study without ImageNet weights: the rows that need them were not run."""
    reason = "needs ImageNet weights: give --imagenet-weights PATH"
    blank = {"status": "not run", "reason": reason, "top1_percent": None, "images_per_s": None, "minutes": None}
    rows = [
        row if row["row"] in ("1", "7") else {**row, **blank, "epochs": None, "at_resolution": [], "runs": []}
        for row in study["rows"]
    ]
    return {**study, "initial_weights": None, "rows": rows}


@pytest.fixture(scope="module")
def study(trained, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Dataset]:
    folder = tmp_path_factory.mktemp("study")
    dataset = open_dataset(demo_data)
    return write_example(folder, dataset, trained[0], name='<b>&"photos'), folder, dataset


@pytest.fixture(scope="module")
def page(study, read_page):
    write_study_page(*study)
    return read_page(study[1] / "study.html")


def test_well_formed_and_needs_nothing_else(page) -> None:
    assert page.unclosed == []
    assert page.references
    assert [one for one in page.references if not one.startswith(("data:image/", "#"))] == []


def test_the_table(page, study) -> None:
    header, *rows = page.tables[0]
    assert len(header) == 10
    assert [cells[0].split()[-1] for cells in rows] == [row["row"] for row in study[0]["rows"]]
    for cells, row in zip(rows, study[0]["rows"], strict=True):
        assert cells[1] == f"{row['title']} {row['setting']}"
        assert cells[2] == ("-" if row["published_top1_percent"] is None else f"{row['published_top1_percent']:.1f}")
        assert cells[3] == f"{row['top1_percent']['last']['mean']:.1f}"
        assert cells[4] == f"{row['top1_percent']['best']['mean']:.1f} ± 0.2"
        assert cells[5] == (f"{row['top1_percent']['flip']['mean']:.1f}" if row["top1_percent"]["flip"] else "-")
        assert cells[6] == f"{row['gmacs']:.3f}"
        assert cells[8] == ("1,321" if row["runs"] else "-")


def test_figures(page, study) -> None:
    text = page.text
    for row in study[0]["rows"]:
        assert (f"Row {row['row']} {row['title']}" in text) == bool(row["runs"])  # a small figure for each run
    assert "What row 8 gets right and wrong" in text
    # Compute, resolution, seven rows' curves, classes, matrix, calibration.
    assert page.svgs == 2 + 7 + 3


def test_notes(page) -> None:
    assert "“ImageNet” is not ImageNet here: runs/pretrained/last.safetensors (SHA-256 0123456789abcdef…)" in page.text
    assert "0.3 times the study's epochs" in page.text
    assert "compare “last”" in page.text
    assert "compare the order of the rows" in page.text
    assert "one seed" in page.text


def test_counts_and_pictures_are_those_of_the_weights(page, study, tidali, demo_data: Path) -> None:
    _, folder, _ = study
    ended = tidali("eval", folder / "runs" / "8-seed0" / "last", "--data", demo_data, "--res", 64, "--json")
    top1_percent = json.loads(ended.stdout)["scores"][0]["top1_percent"]
    assert f"{32 * top1_percent / 100:.0f} of 32 samples of val are predicted correctly at 64 px" in page.text
    assert len(page.images) > 12
    for source in page.images:
        with Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) as image:
            image.load()
            assert (image.format, image.size) == ("JPEG", (64, 64))


def test_names_are_escaped(page, study) -> None:
    assert '<b>&"photos: 4 classes' in page.text
    assert "<b>&" not in (study[1] / "study.html").read_text()


def test_rows_that_were_not_run_say_why(study, read_page) -> None:
    document, folder, dataset = study
    write_study_page(without_weights(document), folder, dataset)
    page = read_page(folder / "study.html")
    assert page.unclosed == []
    rows = {cells[0].split()[-1]: cells for cells in page.tables[0][1:]}
    assert rows["3"][3] == "not run: needs ImageNet weights: give --imagenet-weights PATH"
    assert rows["7"][3] == "66.5"
    assert "Accuracy against resolution" not in page.text
    assert "What row 7 gets right and wrong" in page.text


def test_seeds_and_the_real_weights(study, read_page) -> None:
    document, folder, dataset = study
    name = "torchvision IMAGENET1K_V1"
    more = {"epochs_scale": 1, "seeds": [0, 1], "initial_weights": {"name": name, "sha256": "ab" * 32}}
    rows = [{**row, "runs": row["runs"] * 2} for row in document["rows"]]
    rows[0]["runs"] = [{"seed": 0, "folder": "runs/gone"}]
    write_study_page({**document, **more, "rows": rows}, folder, dataset)
    page = read_page(folder / "study.html")
    assert f"“ImageNet” is {name}" in page.text
    assert "means over 2 seeds" in page.text
    assert "one seed" not in page.text
    assert "a quick look" not in page.text
    assert "Row 1 stock stem" not in page.text  # its curves are gone, its results are not


@pytest.mark.parametrize(("sha256", "rows", "says"), [("f37072fd" + "0" * 56, 9, "If the classes are among"), (None, 1, "")])
def test_where_the_weights_came_from(study, sha256: str | None, rows: int, says: str) -> None:
    from tidali.study.table import notes

    document = study[0]
    weights = {"name": "copies/resnet18.pth", "sha256": sha256} if sha256 is not None else None
    text = " ".join(notes({**document, "initial_weights": weights, "rows": document["rows"][:rows]}))
    assert says in text
    assert "is not ImageNet" not in text


def test_a_study_without_a_run(study) -> None:
    document, folder, dataset = study
    rows = [{**row, "status": "not run", "reason": "stopped", "runs": []} for row in document["rows"]]
    with pytest.raises(UsageError, match="no row of the study was run"):
        write_study_page({**document, "rows": rows}, folder, dataset)
