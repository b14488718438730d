"""One self-contained page about a run, or about several side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tidali import __version__
from tidali.console import warn
from tidali.dataset.source import open_data
from tidali.errors import TidaliError, UsageError
from tidali.files import write_atomically
from tidali.model.checkpoint import SUFFIX
from tidali.model.resnet import title_of
from tidali.report.drawing import legend_entries
from tidali.report.figures import accuracy, by_epoch, loss, throughput, waiting
from tidali.report.insight import inspect_checkpoint
from tidali.report.page import BEST_IS_BIASED, drawn, insight_part, render
from tidali.training.evaluation import EvalOptions
from tidali.training.history import Run, differing_settings


def write_report(runs: Sequence[Run], out: Path, *, data: str | None = None) -> None:
    """Predict the evaluated split with each run's last weights, and write the page. It appears whole or not at all.

    If the data set of a run cannot be opened, the page says so, and has no classes, pictures or predictions of that run.

    Args:
        runs: at least one.
        data: a packed data set to evaluate all runs on; by default the one that each was trained on.

    Raises:
        TidaliError, UsageError: ``data`` was given and cannot be used, or the page cannot be written.
    """
    parts, notes = [], _notes(runs)
    for run in runs:
        try:
            parts.append({"name": run.name, "insight": _insight(run, data)})
        except TidaliError as error:
            if data is not None:
                raise
            note = f"{run.name}: no pictures and no accuracy by class: {error}. If the data set has moved, give --data."
            warn(note)
            notes.append(note)
    differing = differing_settings(runs)
    first = runs[0]
    page = render(
        "report.html",
        title=first.name if len(runs) == 1 else f"{len(runs)} runs side by side",
        made=_made_of(first) if len(runs) == 1 else ", ".join(run.name for run in runs),
        notes=notes,
        legend=legend_entries([run.name for run in runs]),
        headline=_headline(runs),
        differing=differing,
        shared={name: value for name, value in first.settings.items() if name not in differing and name != "out"},
        accuracy=drawn(by_epoch(accuracy, runs), "top-1 by epoch"),
        loss=drawn(by_epoch(loss, runs), "cross entropy by epoch"),
        throughput=drawn(by_epoch(throughput, runs), "images per second by epoch"),
        waiting=drawn(by_epoch(waiting, runs), "percentage of the time spent waiting for data, by epoch"),
        parts=parts,
        versions=_versions(runs),
    )
    write_atomically(out, page)


def _insight(run: Run, data: str | None) -> dict[str, Any]:
    location = data if data is not None else run.settings.get("data")
    if location is None:
        raise UsageError("config.json does not name a data set")
    dataset = open_data(location)
    return insight_part(inspect_checkpoint(str(run.folder / f"last{SUFFIX}"), dataset, EvalOptions(split=run.split)))


def _notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know to understand the figures."""
    notes = [
        f"{run.name}: not finished, {len(run.epochs)} of {run.settings.get('epochs', '?')} epochs."
        for run in runs
        if run.summary is None
    ]
    if any(run.split == "val" for run in runs):
        notes.append(BEST_IS_BIASED)
    if len({run.split for run in runs}) > 1:
        notes.append("These runs were evaluated on different splits.")
    return notes


def _headline(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Name of a result -> its value in each run, as text. Results that no run has are left out."""
    columns = [_measures(run) for run in runs]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    return {name: values for name, values in rows.items() if set(values) != {"-"}}


def _measures(run: Run) -> dict[str, str]:
    last, best, summary = run.epochs[-1], run.best_epoch, run.summary or {}
    rates, compile_s = run.column("images_per_s"), [float(epoch.get("compile_s", 0)) for epoch in run.epochs]
    device: Mapping[str, Any] = summary.get("device", {})
    return {
        "last: top-1, %": _figure(last, f"{run.split}_top1_percent"),
        "last: top-5, %": _figure(last, f"{run.split}_top5_percent"),
        "last: loss": _figure(last, f"{run.split}_loss", 4),
        "last: top-1 with flip TTA, %": _figure(summary.get("last_flip") or {}, "top1_percent"),
        "best: top-1, %": _figure(best, f"{run.split}_top1_percent"),
        "best: epoch": f"{best['epoch']}",
        "evaluated on": f"{run.split}, {last.get(f'{run.split}_samples', '?')} samples",
        "epochs": f"{len(run.epochs)}",
        "images/s in training": f"{summary.get('images_per_s', statistics.median(rates)):.0f}",
        "minutes": f"{summary['minutes']:.1f}" if "minutes" in summary else "-",
        "compilation, s": f"{sum(compile_s):.1f}" if any(compile_s) else "-",
        "device": f"{device['name']}, {device['cores']} cores" if device else "-",
        "precision": f"{device['dtype']}" if device else "-",
    }


def _figure(epoch: Mapping[str, Any], field: str, digits: int = 2) -> str:
    return f"{epoch[field]:.{digits}f}" if field in epoch else "-"


def _made_of(run: Run) -> str:
    stem, init, res, recipe, data = (run.settings.get(name, "?") for name in ("stem", "init", "res", "recipe", "data"))
    start = "random weights" if init == "none" else init
    arch = title_of(run.settings.get("arch", "resnet18"))  # settings before there was a choice
    return f"{arch}, {stem} stem, from {start}, {res} px, recipe {recipe}, on {data}"


def _versions(runs: Sequence[Run]) -> str:
    trained_with = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in run.summary["versions"].items()) for run in runs if run.summary
    )
    return " · ".join([f"Written by tidali {__version__}", *(f"trained with {one}" for one in trained_with)])
