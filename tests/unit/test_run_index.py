"""``tidali runs``: fifty run folders, finished, stopped, running, torn and of an earlier version."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tidali import console
from tidali.config import TrainSettings
from tidali.errors import UsageError
from tidali.files import lock
from tidali.recipes import change, make_recipe
from tidali.training.run_index import Entry, list_runs

LINE = {"val_samples": 1000, "val_loss": 1.5, "train_loss": 1.4, "train_top1_percent": 50.0, "images_per_s": 200.0}


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """``write_run("a", [30.0, 40.0], ["lr=0.1"])`` writes the folder of a run whose epochs had these accuracies."""
    begun_s = iter(range(1000, 9000))

    def write(
        name: str, top1_percent: list[float], changes: list[str] | None = None, *, done: bool = True, **more: Any
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        recipe = change(make_recipe("modern", epochs=4), changes or [])
        config = asdict(TrainSettings(data="data/pets", out=str(folder), recipe=recipe))
        (folder / "config.json").write_text(json.dumps(config))
        time_s = next(begun_s)
        os.utime(folder / "config.json", (time_s, time_s))
        lines = [{"epoch": number, **LINE, "val_top1_percent": top1} for number, top1 in enumerate(top1_percent, start=1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps({**line, "classes": 4, **more}) + "\n" for line in lines))
        if done:
            (folder / "summary.json").write_text(json.dumps({"images_per_s": 200.0}))
        return folder

    return write


def by_name(root: Path) -> dict[str, Entry]:
    return {entry.name: entry for entry in list_runs(root)}


def test_fifty_folders(write_run, tmp_path: Path, tidali) -> None:
    for number in range(40):
        write_run(f"run-{number:02}", [40.0, 50.0 + number, 45.0], ["lr=0.1"] if number == 7 else [])
    write_run("chance", [25.0, 26.0])
    write_run("stopped", [40.0, 50.0], done=False)
    write_run("study-x/runs/1-seed0", [70.0])
    # Of an earlier version, which logged less.
    old = write_run("old", [])
    (old / "metrics.jsonl").write_text('{"epoch": 1, "val_top1_percent": 33.0}\n')
    torn = write_run("torn", [40.0], done=False)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "val_top1_perc')
    (write_run("cut", [40.0]) / "config.json").write_text('{"data": "x", "rec')
    (write_run("begun", []) / "config.json").write_text("")
    (write_run("lost", [40.0]) / "config.json").unlink()
    odd = write_run("odd", [40.0], done=False)
    (odd / "metrics.jsonl").write_text('[1]\n7\nnull\n"val_top1_percent"\n{"epoch": 1, "val_top1_percent": null}\n\xff\n')
    (odd / "summary.json").write_text("[]")
    (odd / "steps.jsonl").write_text("7\nnull")
    none = write_run("none", [], done=False)
    (none / "metrics.jsonl").unlink()
    other = tmp_path / "runs" / "another program's"
    other.mkdir()
    (other / "config.json").write_text('{"name": "something"}')

    found = by_name(tmp_path / "runs")
    assert len(found) == 50
    assert {name: entry.state for name, entry in found.items() if not name.startswith("run-")} == {
        "chance": "finished",
        "stopped": "stopped",
        os.path.join("study-x", "runs", "1-seed0"): "finished",
        "old": "finished",
        "torn": "stopped",
        "cut": "unreadable",
        "begun": "unreadable",
        "lost": "unreadable",
        "odd": "stopped",
        "none": "stopped",
    }
    assert found["chance"].problems == ["at chance"]
    assert (found["run-03"].figure("best"), found["run-03"].figure("last")) == (53.0, 45.0)
    assert found["run-07"].differs == {"lr": "0.1"}
    assert found["run-08"].differs == {}
    assert (found["old"].figure("last"), found["old"].images_per_s) == (33.0, None)
    assert found["torn"].epochs_done == 1

    ended = tidali("runs", tmp_path / "runs", "--sort", "best")
    assert (ended.code, ended.stderr) == (0, "")
    rows = ended.stdout.splitlines()[3:]
    assert len(rows) == 50
    assert rows[0].split()[:6] == ["run-39", "89.0", "45.0", "200", "finished", "pets"]
    assert next(row for row in rows if row.startswith("chance ")).split()[4:7] == ["finished,", "at", "chance"]
    document = json.loads(tidali("runs", tmp_path / "runs", "--json").stdout)
    assert [one["name"] for one in document][:3] == ["run-00", "run-01", "run-02"]  # in the order in which they were begun
    assert {one["name"]: one["problem"] for one in document if one["problem"]} == {
        "cut": "config.json is damaged",
        "begun": "config.json is empty",
        "lost": "config.json is missing",
    }


def test_a_run_whose_loss_was_not_finite_diverged(write_run, tmp_path: Path, tidali) -> None:
    """Not one that was stopped, which a resume would bring to its end."""
    write_run("good", [60.0])
    for name, top1, step in (("early", [], 3), ("late", [60.0, 10.0], 25)):
        folder = write_run(name, top1, ["lr=4"], done=False)
        lines = [{"step": 1, "epoch": 0.1, "train_loss": 2.0}, {"step": step, "epoch": step / 10, "not_finite": "loss"}]
        (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    advice = "diverged: the loss is not finite by step 25. Try --lr 0.4, or --set grad_clip_norm=1."
    document = {one["name"]: one for one in json.loads(tidali("runs", tmp_path / "runs", "--json").stdout)}
    assert [document[name]["state"] for name in ("good", "early", "late")] == ["finished", "diverged", "diverged"]
    assert document["late"]["findings"] == [advice]
    shown = tidali("runs", tmp_path / "runs", "--html", tmp_path / "runs.html").stdout
    page = (tmp_path / "runs.html").read_text()
    for text in ("diverged in epoch 1 of 4", "diverged in epoch 3 of 4"):
        assert text in shown
        assert text in page
    assert "the loss is not finite by step 25" in page
    assert "no finished epoch; diverged: the loss" in tidali("report", tmp_path / "runs" / "early", "-o", "x.html").stderr
    # A resume removes the line with those of steps that are done again, and the run goes on.
    (tmp_path / "runs" / "late" / "steps.jsonl").write_text(json.dumps({"step": 20, "epoch": 2.0}) + "\n")
    assert by_name(tmp_path / "runs")["late"].state == "stopped"


def test_what_most_others_do_not_have_differs(write_run, tmp_path: Path) -> None:
    write_run("a", [40.0], ["lr=0.1"])
    write_run("b", [40.0], ["lr=0.2"])
    assert [entry.differs for entry in list_runs(tmp_path / "runs")] == [{"lr": "0.1"}, {"lr": "0.2"}]
    write_run("c", [40.0], ["lr=0.2"])
    assert [entry.differs for entry in list_runs(tmp_path / "runs")] == [{"lr": "0.1"}, {}, {}]


def test_a_run_that_goes_on_holds_its_folder(write_run, tmp_path: Path, tidali) -> None:
    folder = write_run("a", [40.0], done=False)
    (folder / "steps.jsonl").write_text('{"step": 130, "epoch": 1.3, "train_loss": 1.25, "images_per_s": 90.0}\n{"step": 1')
    with lock(folder, wait=False):
        assert by_name(tmp_path / "runs")["a"].state == "running"
        assert "running, epoch 2 of 4, 30 % of it done, train loss 1.250" in tidali("runs", tmp_path / "runs").stdout
    entry = by_name(tmp_path / "runs")["a"]
    assert (entry.state, entry.epochs_done) == ("stopped", 1.3)  # killed: the kernel releases what it held
    assert "stopped in epoch 2 of 4" in tidali("runs", folder).stdout


def test_the_page_links_reports_and_says_how_to_write_the_others(write_run, tmp_path: Path, tidali) -> None:
    folder = write_run("it's & <b>", [25.0])
    (folder / "report.html").write_text("a report")
    write_run("b", [60.0], ["lr=0.2", "momentum=0.5", "weight_decay=0.25", "ema_decay=0.5"])
    page = tmp_path / "index.html"
    assert tidali("runs", tmp_path / "runs", "--html", page).code == 0
    text = page.read_text()
    assert 'href="runs/it%27s%20%26%20%3Cb%3E/report.html"' in text
    assert "it&#39;s &amp; &lt;b&gt;</a>" in text
    words = re.sub(r"<[^>]+>", "", text).split()
    assert "lr 0.2, momentum 0.5, weight_decay 0.25, ema_decay 0.5" in text  # more than a terminal has room for
    assert f"tidali report {tmp_path}/runs/b -o {tmp_path}/runs/b/report.html" in " ".join(words)
    assert "at chance: top-1 of 25.0 % on 1,000 images of val" in text
    assert '<div class="scroll" role="region" aria-label="Runs" tabindex="0">' in text  # keys scroll what is too wide


def test_where_there_are_no_runs(tmp_path: Path, tidali) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        list_runs(tmp_path / "none")
    assert "no runs yet" in tidali("runs", tmp_path).stdout
    assert tidali("runs", tmp_path, "--json").stdout == "[]\n"
    assert tidali("runs", tmp_path, "--watch").code == 2


def test_watching_ends_with_ctrl_c(write_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from tidali.cli import runs as command

    for number in range(60):
        write_run(f"run-{number:02}", [40.0])
    screen = Console(force_terminal=True, width=80, height=24, record=True)
    monkeypatch.setattr(console, "results", screen)
    monkeypatch.setattr(command.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    command._watch(lambda: list_runs(tmp_path / "runs"))
    text = screen.export_text()
    last_frame = text.rpartition("more runs above")[2].splitlines()
    assert [line for line in last_frame if line.startswith("run-")][-1].startswith("run-59 ")
    assert 15 < len(last_frame) <= 24
