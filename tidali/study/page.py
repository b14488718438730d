"""The page of a study: the table, figures, and what the best row gets wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tidali.dataset.contract import Dataset
from tidali.errors import TidaliError, UsageError
from tidali.files import write_atomically
from tidali.model.checkpoint import SUFFIX
from tidali.report.certainty import certainty_part
from tidali.report.drawing import legend_entries
from tidali.report.figures import Evaluated, accuracy_against_gmacs, accuracy_against_resolution, runs_among_others
from tidali.report.insight import Insight, inspect_checkpoint
from tidali.report.page import drawn, insight_part, render
from tidali.study.explain import explain
from tidali.study.table import findings, measured_on, notes
from tidali.training.evaluation import EvalOptions
from tidali.training.history import Run, read_runs
from tidali.training.uncertainty import standard_error_percent

PAGE_NAME = "study.html"


def write_study_page(study: Mapping[str, Any], folder: Path, dataset: Dataset) -> None:
    """Predict the evaluated split with the best row's last weights, and write study.html. It appears whole or not at all.

    Args:
        study: the content of study.json; its paths are relative to the folder. At least one row is done and has a run.
        folder: of the study.
        dataset: the one that the study was run on.

    Raises:
        TidaliError, UsageError: no row is done, a checkpoint cannot be read, or the page cannot be written.
    """
    legend = legend_entries([f"Row {row['row']}: {row['title']}" for row in study["rows"]])
    rows = [{**row, **entry, "series": place} for place, (row, entry) in enumerate(zip(study["rows"], legend, strict=True))]
    done = [row for row in rows if row["status"] == "done"]
    trained = [row for row in done if row["runs"]]  # a row that only evaluates has no checkpoint of its own
    if not trained:
        raise UsageError("no row of the study was run, so there is nothing to show")
    best = max(trained, key=lambda row: float(row["top1_percent"]["last"]["mean"]))
    models = [_evaluated(row) for row in done]
    lines = [model for model in models if len(model.at) > 1]
    weights = folder / best["runs"][0]["folder"] / f"last{SUFFIX}"
    split, device = study["data"]["evaluated_on"], study["device"]["type"]
    insight = inspect_checkpoint(str(weights), dataset, EvalOptions(split=split, device=device), res=best["network_px"])
    page = render(
        "study.html",
        study=study,
        title=f"The transfer-learning study on {study['data']['name']}",
        made=f"{study['date']} · {measured_on(study)}",
        notes=[*findings(study), *notes(study), _uncertainty(insight, len(study["seeds"]))],
        rows=rows,
        gmacs=drawn(accuracy_against_gmacs(models), "top-1 against multiply-adds"),
        resolution=drawn(accuracy_against_resolution(lines), "top-1 against resolution") if lines else None,
        resolution_legend=[legend[line.series] for line in lines],
        curves=_curves(done, folder),
        explanation=explain(study),
        best=best,
        insight=insight_part(insight),
        certainty=certainty_part(insight),
        versions=", ".join(f"{name} {version}" for name, version in study["versions"].items()),
    )
    write_atomically(folder / PAGE_NAME, page)


def _evaluated(row: Mapping[str, Any]) -> Evaluated:
    return Evaluated(
        label=row["row"],
        series=row["series"],
        gmacs=row["gmacs"],
        top1_percent=row["top1_percent"]["last"]["mean"],
        at=[(one["res"], one["gmacs"], one["top1_percent"]) for one in row["at_resolution"]],
    )


def _curves(done: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """A small figure for each row that trained: its runs in colour, over those of the other rows."""
    of_row: list[tuple[Mapping[str, Any], list[Run]]] = []
    for row in done:
        try:
            runs = read_runs([str(folder / run["folder"]) for run in row["runs"]])
        except TidaliError:  # its folder was removed since then: the table still has its results
            continue
        if runs:
            of_row.append((row, runs))
    out = []
    for row, runs in of_row:
        others = [run for other, found in of_row if other is not row for run in found]
        svg = drawn(runs_among_others(runs, others, row["series"]), f"top-1 of row {row['row']} by epoch")
        out.append({"svg": svg, "title": f"Row {row['row']}", "note": row["title"]})
    return out


def _uncertainty(insight: Insight, seeds: int) -> str:
    error = standard_error_percent(insight.correct, len(insight.labels))
    chance = "Each row ran with one seed: differences below twice that may be chance." if seeds == 1 else ""
    return (
        f"{len(insight.labels):,} samples give the best row's accuracy to ± {error:.1f} points (one standard error). {chance}"
    ).strip()
