"""``tidali plot`` and ``tidali report`` as a user runs them."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from tidali import console

NASTY = '<b>&"$x^$'


@pytest.fixture(scope="module")
def other_run(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run under a name with HTML in it, with another learning rate, and stopped after one epoch."""
    folder = tmp_path_factory.mktemp("other") / NASTY
    shutil.copytree(trained[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["lr"] = 0.125
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    (folder / "summary.json").unlink()
    return folder


@pytest.fixture(scope="module")
def nasty_data(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of the runs, with such names for its classes; a checkpoint depends only on their ids."""
    folder = tmp_path_factory.mktemp("named") / "demo"
    shutil.copytree(demo_data, folder)
    manifest = json.loads((folder / "dataset.json").read_text())
    for place, one in enumerate(manifest["classes"]):
        one["name"] = f"{NASTY} {place}"
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def one(tidali: Callable[..., Any], trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("report") / "report.html"
    ended = tidali("report", trained[0], "-o", out)
    assert (ended.code, ended.stdout) == (0, ""), ended.stderr
    assert ended.stderr == f"{out}: report of x\n"
    return out, ended


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tidali, trained, other_run: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"curves.{suffix}"
    ended = tidali("plot", trained[0], other_run, "-o", out)
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", f"{out}: the curves of x, {NASTY}\n")
    if suffix == "svg":
        assert ElementTree.parse(out).getroot().tag.endswith("svg")
    else:
        with Image.open(out) as image:
            image.load()
            assert image.format == "PNG"


def test_plot_says_what_differs(trained, other_run: Path) -> None:
    from tidali.training.history import labels, read_runs

    assert labels(read_runs([str(trained[0]), str(other_run)])) == ["x (lr 0.05)", f"{NASTY} (lr 0.125)"]


def test_default_names(tidali, trained, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tidali("plot", trained[0]).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_report_is_well_formed_and_needs_nothing_else(one, read_page) -> None:
    page = read_page(one[0])
    assert page.unclosed == []
    assert [reference for reference in page.references if not reference.startswith(("data:image/", "#"))] == []
    assert page.svgs == 4 + 2  # training; classes and matrix


def test_report_has_the_results_of_the_run(one, trained, read_page) -> None:
    page, summary = read_page(one[0]), json.loads((trained[0] / "summary.json").read_text())
    results = {row[0]: row[1] for row in page.tables[0]}
    assert results["last: top-1, %"] == f"{summary['last']['top1_percent']:.2f}"
    assert results["last: top-5, %"] == "100.00"
    assert results["last: loss"] == f"{summary['last']['loss']:.4f}"
    assert results["best: top-1, %"] == f"{summary['best']['top1_percent']:.2f}"
    assert results["best: epoch"] == f"{summary['best_epoch']}"
    assert results["evaluated on"] == "val, 32 samples"
    assert results["images/s in training"] == f"{summary['images_per_s']:.0f}"
    assert results["minutes"] == f"{summary['minutes']:.1f}"
    assert summary["device"]["name"] in results["device"]
    settings = {row[0]: row[1] for row in page.tables[1]}
    assert (settings["res"], settings["recipe"], settings["augment.flip"]) == ("32", "modern", "random")
    right = round(summary["last"]["top1_percent"] * 32 / 100)
    assert f"{right} of 32 samples of val are predicted correctly at 32 px" in page.text


def test_report_shows_the_stored_pictures(one, demo_data: Path, read_page) -> None:
    from tidali.dataset.contract import iter_records, open_dataset

    dataset = open_dataset(demo_data)
    stored = set()
    for shard, record in iter_records(dataset, "val"):
        with open(demo_data / shard.name, "rb") as file:
            file.seek(record.offset)
            stored.add(file.read(record.size_bytes))
    images = [base64.b64decode(source.partition("base64,")[2]) for source in read_page(one[0]).images]
    assert len(images) >= 12  # the hardest samples, and those of confused pairs
    assert set(images) <= stored
    with Image.open(io.BytesIO(images[0])) as image:
        assert image.format == "JPEG"


def test_several_side_by_side(tidali, trained, other_run: Path, nasty_data: Path, read_page, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    ended = tidali("report", trained[0], other_run, "--data", nasty_data, "-o", out)
    assert ended.code == 0, ended.stderr
    page = read_page(out)
    assert page.unclosed == []
    results, differing, shared = page.tables
    assert [cell.split()[-1] for cell in results[0][1:]] == ["x", NASTY]
    assert differing[1:] == [["lr", "0.05", "0.125"]]
    assert ["momentum", "0.9"] in shared
    assert "lr" not in {row[0] for row in shared}
    assert f"{NASTY}: not finished, 1 of 2 epochs" in page.text
    minutes = next(row for row in results if row[0] == "minutes")
    assert minutes[2] == "-"
    assert page.text.count("Most confused") == 2
    assert f"{NASTY} 3" in page.text
    assert "<b>&" not in out.read_text()


def test_without_the_data_the_page_says_so(tidali, trained, tmp_path: Path, read_page) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "gone")}))
    ended = tidali("--quiet", "report", run, "-o", tmp_path / "report.html")  # which prints only warnings
    console.set_verbosity("normal")
    assert ended.code == 0
    assert "warning: run: no pictures" in ended.stderr
    page = read_page(tmp_path / "report.html")
    assert page.images == []
    assert page.svgs == 4
    assert "run: no pictures" in page.text
    assert "gone: no dataset.json" in page.text


WRONG = [
    (["plot", "{run}", "nowhere"], 2, "nowhere: no such run folder"),
    (["plot", "{data}"], 2, "{data}: not a run folder"),
    (["plot", "{begun}"], 2, "{begun}: no finished epoch yet"),
    (["plot", "{run}", "-o", "curves.pdf"], 2, "--out curves.pdf: give a file that ends in .png or .svg"),
    (["plot", "{run}", "-o", "nowhere/curves.png"], 2, "--out nowhere/curves.png: there is no folder nowhere"),
    (["plot"], 2, "RUN"),
    (["report", "nowhere"], 2, "nowhere: no such run folder"),
    (["report", "{begun}"], 2, "{begun}: no finished epoch yet"),
    (["report", "{run}", "-o", "nowhere/report.html"], 2, "--out nowhere/report.html: there is no folder nowhere"),
    (["report", "{run}", "-o", "."], 2, "--out .: is a folder"),
    (["report", "{run}", "--data", "nowhere"], 1, "nowhere: no dataset.json"),
]


@pytest.mark.parametrize(("argv", "code", "complaint"), WRONG, ids=[" ".join(argv) for argv, _, _ in WRONG])
def test_wrong_use_is_one_line(tidali, trained, demo_data: Path, tmp_path: Path, monkeypatch, argv, code, complaint) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(trained[0] / "config.json", begun)
    places = {"run": trained[0], "data": demo_data, "begun": begun}
    monkeypatch.chdir(tmp_path)
    ended = tidali(*(argument.format(**places) for argument in argv))
    assert (ended.code, ended.stdout) == (code, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tidali: ")
    assert complaint.format(**places) in line
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]
