"""One self-contained page about a run, or about several side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tidali import __version__
from tidali.console import warn
from tidali.dataset.source import open_data
from tidali.errors import TidaliError, UsageError, counted
from tidali.files import write_atomically
from tidali.model.checkpoint import SUFFIX
from tidali.model.resnet import title_of
from tidali.report.certainty import certainty_part
from tidali.report.disagreement import are_comparable, disagreement_part
from tidali.report.drawing import legend_entries
from tidali.report.figures import accuracy, by_epoch, loss, loss_is_logarithmic, throughput, waiting
from tidali.report.insight import Insight, inspect_checkpoint
from tidali.report.page import BEST_IS_BIASED, drawn, insight_part, render
from tidali.training.evaluation import EvalOptions
from tidali.training.history import Run, differing_settings, labels
from tidali.training.judgement import loss_text, shows_top5
from tidali.training.uncertainty import standard_error_percent, with_error

_PERCENT = "\N{NO-BREAK SPACE}%"
_DIVERGED = {"diverged", "diverging"}
_FAR_OFF = 4
"""An evaluated loss this many times that of training is explained."""


def write_report(runs: Sequence[Run], out: Path, *, data: str | None = None) -> None:
    """Predict the evaluated split with each run's last weights, and write the page. It appears whole or not at all.

    If the data set of a run cannot be opened, the page says so, and has no classes, pictures or predictions of that run.

    Args:
        runs: at least one.
        data: a packed data set to evaluate all runs on; by default the one that each was trained on.

    Raises:
        TidaliError, UsageError: ``data`` was given and cannot be used, or the page cannot be written.
    """
    runs = [replace(run, name=label) for run, label in zip(runs, labels(runs), strict=True)]
    insights, notes = [], notes_of(runs)
    for run in runs:
        try:
            insights.append((run, _insight(run, data)))
        except TidaliError as error:
            if data is not None:
                raise
            note = f"{run.name}: no pictures and no accuracy by class: {error}."
            warn(note)
            notes.append(note)
    differing = differing_settings(runs)
    first, names = runs[0], [run.name for run in runs]
    chance_percent = dict.fromkeys(100 / run.classes for run in runs if run.classes is not None)
    found = [insight for _, insight in insights]
    disagreement = None
    if len(runs) == len(found) == 2 and are_comparable(*found):
        disagreement = disagreement_part(found[0], found[1], names)
    page = render(
        "report.html",
        title=first.name if len(runs) == 1 else f"{len(runs)} runs side by side",
        made=_made_of(first) if len(runs) == 1 else ", ".join(names),
        notes=notes,
        legend=legend_entries(names),
        summaries=[_summary(run) for run in runs],
        epochs=[_epochs(run) for run in runs],
        headline=_headline(runs),
        differing=differing,
        shared={name: value for name, value in first.settings.items() if name not in differing and name != "out"},
        accuracy=drawn(by_epoch(partial(accuracy, chance_percent=chance_percent), runs), "top-1 by epoch"),
        chance_note="dotted: what guessing reaches" if chance_percent else "",
        logarithmic=loss_is_logarithmic(runs),
        far_off=why_far_off(runs),
        loss=drawn(by_epoch(loss, runs), "cross entropy by epoch"),
        throughput=drawn(by_epoch(throughput, runs), "images per second by epoch"),
        waiting=drawn(by_epoch(waiting, runs), "percentage of the time spent waiting for data, by epoch"),
        parts=[
            {"name": run.name, "insight": insight_part(insight), "certainty": certainty_part(insight)}
            for run, insight in insights
        ],
        disagreement=disagreement,
        versions=_versions(runs),
    )
    write_atomically(out, page)


def _insight(run: Run, data: str | None) -> Insight:
    location, weights = data if data is not None else run.settings.get("data"), run.folder / f"last{SUFFIX}"
    if location is None:
        raise UsageError("config.json does not name a data set")
    if not weights.exists():
        raise UsageError(f"{weights}: no such file; a run writes it when it is first saved after an epoch")
    try:
        dataset = open_data(location)
    except TidaliError as error:
        raise UsageError(f"{error}; if the data set has moved, give --data") from None
    return inspect_checkpoint(str(weights), dataset, EvalOptions(split=run.split))


def notes_of(runs: Sequence[Run]) -> list[str]:
    """What a reader must know to understand the figures."""
    notes = [
        f"{run.name}: not finished, {len(run.epochs)} of {run.settings.get('epochs', '?')} epochs."
        for run in runs
        if run.summary is None
    ]
    found: dict[str, list[str]] = {}  # to the names of the runs that have them
    for run in runs:
        for finding in run.findings:
            found.setdefault(str(finding), []).append(run.name)
    for text, names in found.items():
        notes.append(f"{', '.join(names)}: {text}" if len(names) < len(runs) else text)
    if any(run.split == "val" for run in runs):
        notes.append(BEST_IS_BIASED)
    notes.append("± is one standard error: how far an accuracy counted on so many samples is usually from the true one.")
    if len({run.split for run in runs}) > 1:
        notes.append("These runs were evaluated on different splits.")
    return notes


def _summary(run: Run) -> dict[str, dict[str, str]]:
    """What a reader wants to know first: title -> a value and a note of it."""
    best, last, summary, classes = run.best_epoch, run.epochs[-1], run.summary or {}, run.classes
    minutes = summary.get("minutes", sum(_numbers(run, "epoch_s")) / 60)
    top1, samples = f"{run.split}_top1_percent", last.get(f"{run.split}_samples")
    about = [f"{samples:,} of {run.split}" if samples is not None else run.split]
    about += [counted(classes, "class")] if classes is not None else []
    finished = f"{len(run.epochs)} of {run.settings.get('epochs', '?')} epochs"
    return {
        "best top-1": {"value": f"{_accuracy(best, top1, samples)}{_PERCENT}", "note": f"epoch {best['epoch']}"},
        "last top-1": {
            "value": f"{_accuracy(last, top1, samples)}{_PERCENT}",
            "note": f"chance {100 / classes:.1f}{_PERCENT}" if classes is not None else f"epoch {last['epoch']}",
        },
        "data": {"value": Path(run.settings.get("data", "?")).name, "note": ", ".join(about)},
        "time": {"value": f"{minutes:.1f} min", "note": finished},
        "throughput": {"value": f"{_rate(run)} images/s", "note": "in training"},
    }


def _epochs(run: Run) -> dict[str, Any]:
    """A table of every epoch's values."""
    fields = {
        f"{run.split} top-1, %": (f"{run.split}_top1_percent", "{:.1f}".format, 1),
        "train top-1, %": ("train_top1_percent", "{:.1f}".format, 1),
        f"{run.split} loss": (f"{run.split}_loss", loss_text, 1),
        "train loss": ("train_loss", loss_text, 1),
        "images/s": ("images_per_s", "{:,.1f}".format, 1),
        "waiting for data, %": ("data_wait_share", "{:.1f}".format, 100),
    }
    rows = [
        [epoch["epoch"], *(text(scale * epoch[name]) if name in epoch else "-" for name, text, scale in fields.values())]
        for epoch in run.epochs
    ]
    return {"columns": ["epoch", *fields], "rows": rows}


def why_far_off(runs: Sequence[Run]) -> str:
    """An explanation of evaluated losses that begin far above those of training; empty if none does."""
    found = [run for run in runs if _starts_far_off(run) and not _DIVERGED & {finding.kind for finding in run.findings}]
    lagging = []
    if any(run.settings.get("norm_images", "0") == "0" for run in found):
        lagging.append("batch norm's running statistics")
    if any(run.settings.get("ema_decay", "0") != "0" for run in found):
        lagging.append("the moving average of the weights (ema_decay)")
    if not lagging:
        return ""
    return (
        "In the first epochs the evaluated loss is many times that of training. Evaluation uses "
        f"{' and '.join(lagging)}. Averages over past steps lag behind while the weights change fast."
    )


def _starts_far_off(run: Run) -> bool:
    """Whether the evaluated loss is far above that of training in an epoch of the first half."""
    early = run.epochs[: -(-len(run.epochs) // 2)]
    return any(epoch.get(f"{run.split}_loss", 0) > _FAR_OFF * epoch.get("train_loss", math.inf) for epoch in early)


def _headline(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Name of a result -> its value in each run, as text. Results that no run has are left out."""
    columns = [_measures(run) for run in runs]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    return {name: values for name, values in rows.items() if set(values) != {"-"}}


def _measures(run: Run) -> dict[str, str]:
    last, best, summary = run.epochs[-1], run.best_epoch, run.summary or {}
    top1, samples = f"{run.split}_top1_percent", last.get(f"{run.split}_samples")
    compile_s = [float(epoch.get("compile_s", 0)) for epoch in run.epochs]
    device: Mapping[str, Any] = summary.get("device", {})
    return {
        "last: top-1, %": _accuracy(last, top1, samples),
        "last: top-5, %": _accuracy(last, f"{run.split}_top5_percent", samples) if shows_top5(run.classes) else "-",
        "last: loss": loss_text(last[f"{run.split}_loss"]) if f"{run.split}_loss" in last else "-",
        "last, with flip TTA: top-1, %": _accuracy(summary.get("last_flip") or {}, "top1_percent", samples),
        "best: top-1, %": _accuracy(best, top1, samples),
        "best: epoch": f"{best['epoch']}",
        "evaluated on": f"{run.split}, {last.get(f'{run.split}_samples', '?')} samples",
        "epochs": f"{len(run.epochs)}",
        "images/s in training": _rate(run),
        "minutes": f"{summary['minutes']:.1f}" if "minutes" in summary else "-",
        "compilation, s": f"{sum(compile_s):.1f}" if any(compile_s) else "-",
        "device": f"{device['name']}, {device['cores']} cores" if device else "-",
        "precision": f"{device['dtype']}" if device else "-",
    }


def _accuracy(epoch: Mapping[str, Any], field: str, samples: int | None) -> str:
    """In percent with its standard error, where it is known on how many samples it was counted."""
    if field not in epoch or samples is None:
        return _figure(epoch, field)
    return with_error(epoch[field], standard_error_percent(round(epoch[field] * samples / 100), samples))


def _rate(run: Run) -> str:
    """Images/s in training, with three digits at least."""
    rates = _numbers(run, "images_per_s")
    rate = (run.summary or {}).get("images_per_s", statistics.median(rates) if rates else math.nan)
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _numbers(run: Run, field: str) -> list[float]:
    return [value for value in run.column(field) if math.isfinite(value)]


def _figure(epoch: Mapping[str, Any], field: str) -> str:
    return f"{epoch[field]:.1f}" if field in epoch else "-"


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
