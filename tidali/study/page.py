"""The study's own page: the table, the figures, and the best row's mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from tidali.dataset.contract import Dataset
from tidali.errors import TidaliError, UsageError
from tidali.files import write_atomically
from tidali.model.checkpoint import SUFFIX
from tidali.model.pretrained import IMAGENET_NAME
from tidali.report.drawing import legend_entries
from tidali.report.figures import Point, ResolutionLine, accuracy_against_gmacs, accuracy_against_resolution, one_among
from tidali.report.insight import Insight, inspect_checkpoint
from tidali.report.page import BEST_FLATTERS, drawn, insight_part, render
from tidali.training.history import Run, read_runs

PAGE_NAME = "study.html"
_TORCHVISIONS_SHA256 = "f37072fd"
"""How the hash of ResNet18_Weights.IMAGENET1K_V1 begins: torchvision has it in the file's name, resnet18-f37072fd.pth."""


def write_study_page(study: Mapping[str, Any], folder: Path, dataset: Dataset) -> None:
    """Predict the evaluated split by the best row's last weights, and write study.html; it appears whole or not at all.

    Args:
        study: the content of study.json; its paths are relative to the folder. At least one row is done and has a run.
        folder: the study's.
        dataset: that it was run on.

    Raises:
        TidaliError, UsageError: no row is done, a checkpoint cannot be read, or the page cannot be written.
    """
    legend = legend_entries([f"Row {row['row']}: {row['title']}" for row in study["rows"]])
    rows = [{**row, **entry, "series": place} for place, (row, entry) in enumerate(zip(study["rows"], legend, strict=True))]
    done = [row for row in rows if row["status"] == "done"]
    best = _best_row(done)
    lines = [_resolution_line(row) for row in done if len(row["at_resolution"]) > 1]
    weights = folder / best["runs"][0]["folder"] / f"last{SUFFIX}"
    split, device = study["data"]["evaluated_on"], study["device"]["type"]
    insight = inspect_checkpoint(str(weights), dataset, split=split, res=best["network_px"], device=device)
    page = render(
        "study.html",
        study=study,
        title=f"The transfer-learning study on {study['data']['name']}",
        made=_made(study),
        notes=_notes(study, insight),
        rows=rows,
        gmacs=drawn(accuracy_against_gmacs(_points(done), lines), "top-1 against multiply-adds"),
        resolution=drawn(accuracy_against_resolution(lines), "top-1 against resolution") if lines else None,
        resolution_legend=[legend[line.series] for line in lines],
        curves=_curves(done, folder),
        best=best,
        insight=insight_part(insight),
        versions=", ".join(f"{name} {version}" for name, version in study["versions"].items()),
    )
    write_atomically(folder / PAGE_NAME, page)


def _best_row(done: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """That with the highest last accuracy among those that trained; a row that only evaluates has no checkpoint of its own."""
    trained = [row for row in done if row["runs"]]
    if not trained:
        raise UsageError("no row of the study was run, so there is nothing to show")
    return max(trained, key=lambda row: float(row["top1_percent"]["last"]["mean"]))


def _points(done: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The rows' accuracy at their cost. Rows of the same cost and, to a tenth, accuracy share a label as they share a place."""
    shared: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for row in done:
        place = (round(row["gmacs"], 3), round(row["top1_percent"]["last"]["mean"], 1))
        shared.setdefault(place, []).append(row)
    points = []
    for same in shared.values():
        label = ", ".join(row["row"] for row in same)
        of = same[0]
        points.append(
            Point(label=label, gmacs=of["gmacs"], top1_percent=of["top1_percent"]["last"]["mean"], series=of["series"])
        )
    return points


def _resolution_line(row: Mapping[str, Any]) -> ResolutionLine:
    at = row["at_resolution"]
    return ResolutionLine(
        label=row["row"],
        series=row["series"],
        res=[one["res"] for one in at],
        gmacs=[one["gmacs"] for one in at],
        top1_percent=[one["top1_percent"] for one in at],
    )


def _curves(done: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """One small figure for each row that trained, its seeds in colour before every other row's run."""
    of_row: list[tuple[Mapping[str, Any], list[Run]]] = []
    for row in done:
        try:
            runs = read_runs([str(folder / run["folder"]) for run in row["runs"]])
        except TidaliError:  # its folder was cleared away since: the table still has its figures
            continue
        if runs:
            of_row.append((row, runs))
    every = [run for _, runs in of_row for run in runs]
    out, first = [], 0
    for row, runs in of_row:
        chosen = range(first, first + len(runs))
        first += len(runs)
        svg = drawn(one_among(every, chosen, row["series"]), f"top-1 of row {row['row']} by epoch")
        out.append({"svg": svg, "title": f"Row {row['row']}", "note": row["title"]})
    return out


def _made(study: Mapping[str, Any]) -> str:
    data, device, seeds = study["data"], study["device"], study["seeds"]
    return (
        f"{study['date']} · {data['name']}: {data['classes']} classes, {data['train_samples']:,} train samples, "
        f"{data['eval_samples']:,} of {data['evaluated_on']} evaluated · {device['name']}, {device['cores']} cores, "
        f"{device['dtype']} · {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(str(seed) for seed in seeds)}"
    )


def _notes(study: Mapping[str, Any], insight: Insight) -> list[str]:
    """What a reader must know to read the table right."""
    data, weights = study["data"], study["initial_weights"]
    share = insight.top1_percent / 100
    error_percent = 100 * sqrt(share * (1 - share) / len(insight.labels))
    notes = []
    if weights is None and any(row["status"] != "done" for row in study["rows"]):
        notes.append("There were no ImageNet weights, so the rows that start from them were not run.")
    elif weights is not None and (weights["name"] == IMAGENET_NAME or weights["sha256"].startswith(_TORCHVISIONS_SHA256)):
        notes.append(
            f"“ImageNet” is {weights['name']} (SHA-256 {weights['sha256'][:16]}…). If the classes are among ImageNet's, as "
            f"Tiny-ImageNet's are, the accuracy says little about other data."
        )
    elif weights is not None:
        notes.append(
            f"“ImageNet” is not ImageNet here: {weights['name']} (SHA-256 {weights['sha256'][:16]}…) stood in for its weights."
        )
    if data["evaluated_on"] == "val":
        notes.append(BEST_FLATTERS)
    if study["epochs_scale"] != 1:
        notes.append(f"Each row had {study['epochs_scale']:g} times the study's epochs: a quick look.")
    if data["classes"] != 200:
        notes.append("The published figures are Tiny-ImageNet's: compare the order of the rows with them, not the values.")
    notes.append(
        f"{len(insight.labels):,} samples give the best row's accuracy to ± {error_percent:.1f} points (one standard error)"
        + (", and each row ran with one seed: differences below twice that may be chance." if len(study["seeds"]) == 1 else ".")
    )
    return notes
