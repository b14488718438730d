"""Run the transfer-learning study: train its rows in order, evaluate them, and write one table.

The folder of a study has the run folders ``runs/ROW-seedN``, the hashes of what they were made from in ``runs/inputs.json``,
the table in ``study.json`` and ``study.md``, both rewritten after each row, and the page ``study.html``. When a study is run
again, it keeps the finished runs and resumes the stopped ones.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tidali.config import Recipe, Stem, TrainSettings
from tidali.console import say, warn
from tidali.dataset.contract import Dataset
from tidali.errors import Diverged, TidaliError, UsageError
from tidali.files import file_digest, write_atomically
from tidali.hardware.device import plan_device
from tidali.hardware.versions import versions
from tidali.model.checkpoint import SUFFIX, load_model
from tidali.model.resnet import forward_gmacs, resnet_gmacs
from tidali.model.served import ServedModel
from tidali.study.comparisons import compare_rows
from tidali.study.inputs import content_hash, find_imagenet_weights, read_json, record_inputs, refuse_other_inputs
from tidali.study.page import write_study_page
from tidali.study.rows import IMAGENET, Row, needed_by, scaled
from tidali.study.settings import StudySettings
from tidali.study.table import describe, markdown
from tidali.training.evaluation import EvalOptions, evaluate_checkpoint, evaluate_served
from tidali.training.history import read_runs
from tidali.training.resume import STATE_NAME
from tidali.training.run import train
from tidali.training.run_folder import write_json
from tidali.training.setup import selection_split

DOCUMENT_VERSION = 1


def run_study(settings: StudySettings, dataset: Dataset, *, command: str) -> dict[str, Any]:
    """Train and measure the chosen rows; write study.json, study.md and study.html.

    Args:
        command: the command line that started it, for the record.

    Returns:
        The content of study.json.

    Raises:
        UsageError, TidaliError: the settings, the data or the device do not allow it, or a finished row in the folder was made
            with other settings, or from other images or weights.
        Interrupted: it was asked to stop. When run again, it continues.
    """
    study = Study(settings, dataset)
    document = study.document(command)
    for row in needed_by(settings.rows):
        document["rows"].append(study.row(row))
        study.write(document)
    document["comparisons"] = study.comparisons([row["row"] for row in document["rows"] if row["runs"]])
    study.write(document)
    if any(row["runs"] for row in document["rows"]):
        write_study_page(document, study.out, dataset)
    return document


class Study:
    """A study in progress."""

    def __init__(self, settings: StudySettings, dataset: Dataset) -> None:
        self.settings, self.dataset = settings, dataset
        self.out = Path(settings.out)
        self.seeds = range(settings.seeds)
        self.plan = plan_device(settings.device, settings.amp, settings.compile)
        self.split = selection_split(dataset)
        self.weights: Mapping[str, str] | None = None
        self.why_no_weights = ""
        if any(row.start == IMAGENET for row in needed_by(settings.rows)):
            try:
                self.weights = find_imagenet_weights(settings.imagenet_weights, settings.arch)
            except UsageError:  # of a file that was given
                raise
            except TidaliError as error:
                self.why_no_weights = f"it needs {error}"
                say(f"{error}; the rows that start from them are skipped")
        self.without_result: dict[str, str] = {}  # name of a row -> what became of it

    def document(self, command: str) -> dict[str, Any]:
        """The content of study.json, without rows."""
        return {
            "version": DOCUMENT_VERSION,
            "command": command,
            "date": date.today().isoformat(),
            "data": {
                "name": self.dataset.root.name,
                "classes": len(self.dataset.manifest.classes),
                "train_samples": self.dataset.split("train").samples,
                "evaluated_on": self.split,
                "eval_samples": self.dataset.split(self.split).samples,
            },
            "arch": self.settings.arch,
            "epochs_scale": self.settings.epochs_scale,
            "seeds": list(self.seeds),
            "initial_weights": self.weights and {name: self.weights[name] for name in ("name", "sha256")},
            "device": self.plan.describe(),
            "versions": versions(),
            "rows": [],
            "comparisons": [],
        }

    def row(self, row: Row) -> dict[str, Any]:
        """Train or evaluate a row. Returns its entry in study.json."""
        recipe = scaled(row.recipe, self.settings.epochs_scale) if row.recipe is not None else None
        size = self.dataset.split(self.split).single_image_size
        entry: dict[str, Any] = {
            **describe(row, recipe, stored_px=size[0] if size is not None and size[0] == size[1] else None),
            "gmacs": self.gmacs(row.stem, row.res),
            "status": "not run",
            "reason": self.why_not_run(row),
            "top1_percent": None,
            "images_per_s": None,
            "minutes": None,
            "epochs": recipe.epochs if recipe is not None else None,
            "at_resolution": [],
            "runs": [],
        }
        if entry["reason"] is not None:
            self.without_result[row.name] = "was not run"
            return entry
        say(f"row {row.name}: {row.title}")
        try:
            return {**entry, "status": "done", **(self.trained(row, recipe) if recipe is not None else self.evaluated(row))}
        except Diverged as error:
            warn(f"row {row.name} diverged: {error}")
            self.without_result[row.name] = "diverged"
            return {**entry, "status": "diverged", "reason": str(error)}

    def why_not_run(self, row: Row) -> str | None:
        """Why a row cannot be run; None if it can."""
        if row.start == IMAGENET and self.weights is None:
            return self.why_no_weights
        if row.start in self.without_result:
            return f"starts from row {row.start}, which {self.without_result[row.start]}"
        if row.served and self.dataset.split(self.split).single_image_size is None:
            return "the images have several sizes, but a network with the resize inside takes one"
        return None

    def evaluated(self, row: Row) -> dict[str, Any]:
        """The results of a row that evaluates the weights of the row it starts from."""
        top1 = {
            which: _spread([self.measured(self.weights_of(row.start, seed, which), row.res, row.served) for seed in self.seeds])
            for which in ("last", "best")
        }
        return {"top1_percent": {**top1, "flip": None}, **({"gmacs": self.served_gmacs(row)} if row.served else {})}

    def trained(self, row: Row, recipe: Recipe) -> dict[str, Any]:
        """Train a row with every seed. Returns its results."""
        runs = [self.run(row, recipe, seed) for seed in self.seeds]

        def top1(which: str) -> dict[str, float | None]:
            return _spread([run[which]["top1_percent"] for run in runs])

        return {
            "top1_percent": {
                "last": top1("last"),
                "best": top1("best"),
                "flip": top1("last_flip") if recipe.eval_flip else None,
            },
            "images_per_s": statistics.median(run["images_per_s"] for run in runs),
            "minutes": statistics.median(run["minutes"] for run in runs),
            "at_resolution": [
                {
                    "res": res,
                    "gmacs": self.gmacs(row.stem, res),
                    "top1_percent": statistics.mean(
                        self.measured(self.weights_of(row.name, seed, "last"), res) for seed in self.seeds
                    ),
                }
                for res in row.eval_sizes
            ],
            "findings": list(
                dict.fromkeys(
                    f"{finding.kind}: {finding.text}."
                    for run in read_runs([str(self.folder(row.name, seed)) for seed in self.seeds])
                    for finding in run.findings
                )
            ),
            "runs": [
                {
                    "seed": seed,
                    "folder": str(self.folder(row.name, seed).relative_to(self.out)),
                    "last_top1_percent": run["last"]["top1_percent"],
                    "best_top1_percent": run["best"]["top1_percent"],
                    "best_epoch": run["best_epoch"],
                }
                for seed, run in zip(self.seeds, runs, strict=True)
            ],
        }

    def folder(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{name}-seed{seed}"

    def weights_of(self, name: str, seed: int, which: str) -> Path:
        """The last or the best checkpoint of a row's run."""
        return self.folder(name, seed) / f"{which}{SUFFIX}"

    def run(self, row: Row, recipe: Recipe, seed: int) -> dict[str, Any]:
        """The summary of a row's run, which is kept if it is finished, resumed if it was stopped, and else trained."""
        folder = self.folder(row.name, seed)
        start, start_sha256 = row.start, None
        if start == IMAGENET:
            assert self.weights is not None
            start, start_sha256 = self.weights["path"], self.weights["sha256"]
        elif start != "none":
            best = self.weights_of(start, seed, "best")
            start, start_sha256 = str(best), file_digest(best)
        wanted = TrainSettings(
            data=self.settings.data,
            out=str(folder),
            res=row.res,
            arch=self.settings.arch,
            stem=row.stem,
            init=start,
            stem_init=row.stem_init,
            recipe=recipe,
            seed=seed,
            device=self.settings.device,
            amp=self.settings.amp,
            compile=self.settings.compile,
            cache=self.settings.cache,
        )
        # Named as a user would call them: messages say which of them differ.
        images = {f"{name} images": content_hash(self.dataset, name) for name in ("train", self.split)}
        inputs = {"starting weights": start_sha256, **images}
        summary = folder / "summary.json"
        if summary.exists() or (folder / STATE_NAME).exists():
            refuse_other_inputs(folder, wanted, inputs)
        else:
            if folder.exists():
                shutil.rmtree(folder)  # killed before its first complete state was written
            record_inputs(folder, inputs)
        if summary.exists():
            say(f"row {row.name}, seed {seed}: kept, finished before ({folder})")
        else:
            train(wanted, self.dataset, resume=folder.exists())
        return dict(json.loads(summary.read_text(encoding="utf-8")))

    def measured(self, checkpoint: Path, res: int, served: bool = False) -> float:
        """Top-1 % of a checkpoint. It is stored beside the checkpoint, so that it is measured once."""
        file = checkpoint.parent / "evaluations.json"
        known = read_json(file)
        how = "served" if served else self.plan.dtype_name
        key = f"{file_digest(checkpoint)} {self.split} {content_hash(self.dataset, self.split)} at {res} {how}"
        if key not in known:
            options: dict[str, Any] = dict(split=self.split, device=self.settings.device)
            if served:
                score = evaluate_served(str(checkpoint), self.dataset, **options)
            else:
                options |= dict(resolutions=[res], amp=self.settings.amp, cache=self.settings.cache)
                score = evaluate_checkpoint(str(checkpoint), self.dataset, **options)[1][0].score
            known[key] = score.top1_percent
            write_json(file, known)
        return float(known[key])

    def comparisons(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of these rows' runs with the first seed."""
        settings, first = self.settings, self.seeds[0]
        options = EvalOptions(split=self.split, device=settings.device, amp=settings.amp, cache=settings.cache)
        checkpoints = {name: self.weights_of(name, first, "last") for name in names}
        return compare_rows(checkpoints, self.dataset, options, self.out / "comparisons.json")

    def gmacs(self, stem: Stem, res: int) -> float:
        return resnet_gmacs(self.settings.arch, len(self.dataset.manifest.classes), stem, res)

    def served_gmacs(self, row: Row) -> float:
        """Of the network and of the resize inside it."""
        model, card = load_model(self.weights_of(row.start, 0, "best"))
        size = self.dataset.split(self.split).single_image_size
        assert size is not None
        return forward_gmacs(ServedModel(model, card, size), (1, *size, 3), torch.uint8)

    def write(self, document: Mapping[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "study.json", document)
        write_atomically(self.out / "study.md", markdown(document).encode())


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """The mean, and the standard deviation of the sample if there are several values."""
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}
