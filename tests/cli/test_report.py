"""``tidali plot`` and ``tidali report`` as a user runs them."""

from __future__ import annotations

import base64
import io
import json
import math
import re
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

    assert labels(read_runs([str(trained[0]), str(other_run)])) == ["x (lr 0.0125)", f"{NASTY} (lr 0.125)"]


def test_default_names(tidali, trained, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tidali("plot", trained[0]).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_report_is_well_formed_and_needs_nothing_else(one, read_page) -> None:
    page = read_page(one[0])
    assert page.unclosed == []
    assert [reference for reference in page.references if not reference.startswith(("data:image/", "#"))] == []
    assert page.svgs == 4 + 2 + 1  # training; classes and matrix; calibration


def table(page, corner: str) -> list[list[str]]:
    """The first table whose first cell has this text."""
    return next(rows for rows in page.tables if rows[0][0] == corner)


def error_percent(score: dict[str, Any]) -> float:
    """One standard error of a proportion."""
    share = score["top1_percent"] / 100
    return 100 * math.sqrt(share * (1 - share) / score["samples"])


def test_a_report_begins_with_a_summary_and_has_every_value(one, trained, read_page) -> None:
    page, summary = read_page(one[0]), json.loads((trained[0] / "summary.json").read_text())
    epochs = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    beginning = page.text.partition(" Training ")[0]
    best, last = ((summary[which]["top1_percent"], error_percent(summary[which])) for which in ("best", "last"))
    assert f"best top-1 {best[0]:.1f} ± {best[1]:.1f} % epoch {summary['best_epoch']} " in beginning
    assert f"last top-1 {last[0]:.1f} ± {last[1]:.1f} % chance 25.0 %" in beginning
    assert "data demo 32 of val, 4 classes" in beginning
    assert f"time {summary['minutes']:.1f} min 2 of 2 epochs" in beginning
    assert "chance, 25.0 %" in page.text  # the dotted line
    rows = table(page, "epoch")[1:]
    assert [row[1] for row in rows] == [f"{epoch['val_top1_percent']:.1f}" for epoch in epochs]
    assert [row[4] for row in rows] == [f"{epoch['train_loss']:.3f}" for epoch in epochs]
    tip = f"<title>x, epoch 2: {epochs[1]['val_top1_percent']:.4g}</title>"  # shown by the browser at the point
    assert tip in one[0].read_text()


def test_hard_samples_name_their_file_and_classes(one, demo_data: Path, tidali) -> None:
    """For a reader who cannot see the pictures, and to find the file."""
    from tidali.dataset.contract import iter_records, open_dataset

    dataset = open_dataset(demo_data)
    sources = {record.source: dataset.manifest.classes[record.label].name for _, record in iter_records(dataset, "val")}
    alts = re.findall(r'<img [^>]*alt="(.*?): true class (.*?); predicted (.*?), [0-9]+.%"', one[0].read_text())
    assert len(alts) >= 12
    assert all(sources[file] == true for file, true, _ in alts)
    assert alts[-1][0] in one[0].read_text().partition("Other hard samples")[2]


def test_axe_finds_nothing_serious(one, serious_findings) -> None:
    assert serious_findings(one[0].parent, [one[0]]) == []


def test_report_has_the_results_of_the_run(one, trained, read_page) -> None:
    page, summary = read_page(one[0]), json.loads((trained[0] / "summary.json").read_text())
    results = {row[0]: row[1] for row in table(page, "result")}
    assert results["last: top-1, %"] == f"{summary['last']['top1_percent']:.1f} ± {error_percent(summary['last']):.1f}"
    assert "last: top-5, %" not in results  # of four classes
    assert results["last: loss"] == f"{summary['last']['loss']:.3f}"
    assert results["best: top-1, %"].startswith(f"{summary['best']['top1_percent']:.1f} ± ")
    assert results["best: epoch"] == f"{summary['best_epoch']}"
    assert results["evaluated on"] == "val, 32 samples"
    rate = summary["images_per_s"]
    assert results["images/s in training"] == (f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}")
    assert results["minutes"] == f"{summary['minutes']:.1f}"
    assert summary["device"]["name"] in results["device"]
    settings = {row[0]: row[1] for row in next(rows for rows in page.tables if ["res", "32"] in rows)}
    assert (settings["res"], settings["recipe"], settings["augment.flip"]) == ("32", "modern", "random")
    right = round(summary["last"]["top1_percent"] * 32 / 100)
    assert f"{right} of 32 samples of val are predicted correctly at 32 px" in page.text


def test_report_says_how_sure_it_is_as_eval_does(one, tidali, trained, demo_data: Path, read_page) -> None:
    page = read_page(one[0])
    ended = tidali("eval", trained[0] / "last", "--data", demo_data, "--device", "cpu", "--json")
    [score] = json.loads(ended.stdout)["scores"]
    assert f"at 32 px: {score['top1_percent']:.1f} ± {score['top1_standard_error_percent']:.1f} %" in page.text
    assert f"Expected calibration error (ECE): {score['calibration_error_percent']:.1f} points" in page.text
    rows = {tuple(row) for table in page.tables for row in table}
    for one_class in score["classes"]:
        low, high = one_class["interval_percent"]
        assert (one_class["name"], f"{one_class['top1_percent']:.1f}", f"{low:.1f} to {high:.1f}", "8") in rows
    for bin_ in score["reliability"]:
        confidence = f"{bin_['low_percent']:.0f} to {bin_['high_percent']:.0f}"
        assert any(row[0] == confidence and row[-1] == str(bin_["samples"]) for row in rows)
    assert score["confident_mistakes"]
    for mistake in score["confident_mistakes"]:
        assert mistake["source"] in page.text


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
    results, differing = table(page, "result"), table(page, "setting")
    assert [cell.split(" ", 1)[1] for cell in results[0][1:]] == ["x (lr 0.0125)", f"{NASTY} (lr 0.125)"]
    assert [row[0].split(" ", 1)[-1] for row in table(page, "run")[1:]] == ["x (lr 0.0125)", f"{NASTY} (lr 0.125)"]
    assert differing[1:] == [["lr", "0.0125", "0.125"]]
    shared = next(rows for rows in page.tables if ["res", "32"] in rows)
    assert ["momentum", "0.9"] in shared
    assert "lr" not in {row[0] for row in shared}
    assert "Where the two differ" in page.text
    same = re.search(r"Of 32 samples both predict (\d+) correctly and neither (\d+);", page.text)
    assert int(same[1]) + int(same[2]) == 32  # these two have the same weights
    assert f"{NASTY} (lr 0.125): not finished, 1 of 2 epochs" in page.text
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
    (["report", "{run}", "--data", "nowhere"], 2, "nowhere: no dataset.json"),
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
