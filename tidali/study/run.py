"""The transfer-learning study: its rows trained in order, measured, and put into one table.

The study's folder holds ``runs/ROW-seedN``, each an ordinary run folder, and ``runs/inputs.json``, the hashes of what each was
made from; then ``study.json`` and ``study.md``, which are written anew after each row, and ``study.html``. Run again, it keeps
what is finished and goes on with what was stopped.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tidali.config import AmpChoice, CacheChoice, CompileChoice, DeviceChoice, Recipe, Stem, TrainSettings
from tidali.console import say
from tidali.dataset.contract import Dataset, file_sha256
from tidali.errors import TidaliError, UsageError
from tidali.files import write_atomically
from tidali.hardware.device import cpu_count, plan_device
from tidali.hardware.versions import versions
from tidali.loading.data import dali_is_installed, free_memory_bytes
from tidali.loading.route import choose_route, why_not_streamable
from tidali.loading.sizes import SizePlan
from tidali.model.checkpoint import SUFFIX, load_model
from tidali.model.pretrained import IMAGENET_NAME, file_weights, imagenet_weights, imagenet_weights_path
from tidali.model.resnet import forward_gmacs, resnet18_gmacs
from tidali.model.served import ServedModel
from tidali.study.inputs import content_hash, read_json, record_inputs, refuse_other_inputs, refuse_other_settings
from tidali.study.page import write_study_page
from tidali.study.rows import IMAGENET, ROWS, Row, needed_by, scaled
from tidali.study.table import describe, markdown
from tidali.training.evaluation import evaluate_checkpoint, evaluate_served
from tidali.training.resume import STATE_NAME
from tidali.training.run import train
from tidali.training.run_folder import write_json
from tidali.training.setup import selection_split

DOCUMENT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """One study."""

    data: str
    """Folder of a packed data set."""
    out: str
    """Folder of the study."""
    rows: tuple[str, ...] = ()
    """Names of the rows to run, with those they start from; none for all."""
    seeds: int = 1
    """Runs of each row, with seeds 0, 1, ...; a row takes its starting weights from the run of its own seed."""
    epochs_scale: float = 1.0
    """All epochs times this, for a quick look."""
    imagenet_weights: str | None = None
    """A file in the place of torchvision's ImageNet weights."""
    device: DeviceChoice = "auto"
    amp: AmpChoice = "auto"
    compile: CompileChoice = "auto"
    cache: CacheChoice = "auto"

    def __post_init__(self) -> None:
        known = [row.name for row in ROWS]
        for name in self.rows:
            if name not in known:
                raise UsageError(f"--rows {name}: choose from {', '.join(known)}")
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}: at least 1")
        if not 0 < self.epochs_scale < float("inf"):
            raise UsageError(f"--epochs-scale {self.epochs_scale}: must be above 0 and finite")


def run_study(settings: StudySettings, dataset: Dataset, *, command: str) -> dict[str, Any]:
    """Train and measure the chosen rows; write study.json, study.md and study.html.

    Args:
        command: how it was started, for the record.

    Returns:
        The content of study.json.

    Raises:
        UsageError, TidaliError: the settings, the data or the device do not allow it, or a finished row in the folder was made
            with other settings, or from other images or weights.
        Interrupted: it was asked to stop; run again, it goes on.
    """
    study = Study(settings, dataset)
    document = study.describe_all(command)
    for row in needed_by(settings.rows):
        document["rows"].append(study.row(row))
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
            self.find_weights()
        self.not_run: dict[str, str] = {}
        self.obstacles = self.find_obstacles()

    def find_weights(self) -> None:
        """Look for the ImageNet weights before any row is trained; rows that need them are left out where there are none."""
        given = self.settings.imagenet_weights
        if given is not None:
            try:
                path = file_weights(given)[2]
            except UsageError as error:
                raise UsageError(str(error).replace("--init", "--imagenet-weights")) from None
            self.weights = {"name": given, "path": path, "sha256": file_sha256(Path(path))}
            return
        try:
            imagenet_weights()
        except TidaliError as error:
            self.why_no_weights = f"needs ImageNet weights, or --imagenet-weights PATH ({error})"
            say(f"rows that start from ImageNet are left out: {error}; or give --imagenet-weights PATH")
            return
        self.weights = {"name": IMAGENET_NAME, "path": IMAGENET, "sha256": file_sha256(imagenet_weights_path())}

    def find_obstacles(self) -> dict[str, str]:
        """Why rows cannot be trained, before hours go into those that they start from or follow."""
        splits = [self.dataset.split(name) for name in ("train", self.split)]
        free_bytes, obstacles = free_memory_bytes(self.plan.device), {}
        for row in needed_by(self.settings.rows):
            if row.recipe is None or all((self.folder(row.name, seed) / "summary.json").exists() for seed in self.seeds):
                continue
            sides = SizePlan.of(row.res, row.recipe.train_sizes).sides
            route = choose_route(
                self.settings.cache, splits, max_res=max(row.res, *sides), free_bytes=free_bytes, has_dali=dali_is_installed()
            )
            how: dict[str, Any] = dict(kernel=row.recipe.kernel, sides=sides, augment=row.recipe.augment)
            obstacle = None if route.cached else why_not_streamable(splits[0], self.plan.device, **how)
            if obstacle is not None:
                obstacles[row.name] = f"{obstacle}; the cache is off: {route.reason}"
                say(f"row {row.name} is left out: {obstacles[row.name]}")
        return obstacles

    @property
    def stored_px(self) -> int | None:
        """Side of the stored images where they all are squares of one size."""
        size = self.dataset.split(self.split).single_image_size
        return size[0] if size is not None and size[0] == size[1] else None

    def describe_all(self, command: str) -> dict[str, Any]:
        """The document without its rows."""
        manifest = self.dataset.manifest
        return {
            "version": DOCUMENT_VERSION,
            "command": command,
            "date": date.today().isoformat(),
            "data": {
                "name": self.dataset.root.name,
                "classes": len(manifest.classes),
                "train_samples": self.dataset.split("train").samples,
                "evaluated_on": self.split,
                "eval_samples": self.dataset.split(self.split).samples,
            },
            "epochs_scale": self.settings.epochs_scale,
            "seeds": list(self.seeds),
            "initial_weights": self.weights and {name: self.weights[name] for name in ("name", "sha256")},
            "device": {
                "type": self.plan.device.type,
                "name": self.plan.name,
                "cores": cpu_count(),
                "dtype": self.plan.dtype_name,
            },
            "versions": versions(),
            "rows": [],
        }

    def row(self, row: Row) -> dict[str, Any]:
        """Train or evaluate a row, and say what came of it."""
        recipe = scaled(row.recipe, self.settings.epochs_scale) if row.recipe is not None else None
        found: dict[str, Any] = {
            **describe(row, recipe, stored_px=self.stored_px),
            "gmacs": self.gmacs(row.stem, row.res),
            "status": "not run",
            "reason": self.reason_against(row),
            "top1_percent": None,
            "images_per_s": None,
            "minutes": None,
            "epochs": recipe.epochs if recipe is not None else None,
            "at_resolution": [],
            "runs": [],
        }
        if found["reason"] is not None:
            self.not_run[row.name] = found["reason"]
            return found
        say(f"row {row.name}: {row.title}")
        found["status"] = "done"
        if recipe is None:
            found["top1_percent"] = {
                **{name: _spread([self.evaluate_only(row, seed, name) for seed in self.seeds]) for name in ("last", "best")},
                "flip": None,
            }
            if row.served:
                found["gmacs"] = self.served_gmacs(row)
            return found

        runs = [self.trained(row, recipe, seed) for seed in self.seeds]
        found["runs"] = [
            {
                "seed": seed,
                "folder": str(self.folder(row.name, seed).relative_to(self.out)),
                "last_top1_percent": run["last"]["top1_percent"],
                "best_top1_percent": run["best"]["top1_percent"],
                "best_epoch": run["best_epoch"],
            }
            for seed, run in zip(self.seeds, runs, strict=True)
        ]
        found["top1_percent"] = {
            "last": _spread([run["last"]["top1_percent"] for run in runs]),
            "best": _spread([run["best"]["top1_percent"] for run in runs]),
            "flip": _spread([run["last_flip"]["top1_percent"] for run in runs]) if recipe.eval_flip else None,
        }
        found["images_per_s"] = statistics.median(run["images_per_s"] for run in runs)
        found["minutes"] = statistics.median(run["minutes"] for run in runs)
        found["at_resolution"] = [
            {
                "res": res,
                "gmacs": self.gmacs(row.stem, res),
                "top1_percent": statistics.mean(
                    self.measured(self.folder(row.name, seed) / f"last{SUFFIX}", res) for seed in self.seeds
                ),
            }
            for res in row.eval_sizes
        ]
        return found

    def reason_against(self, row: Row) -> str | None:
        """Why a row cannot be run, if it cannot."""
        if row.start == IMAGENET and self.weights is None:
            return self.why_no_weights
        if row.start in self.not_run:
            return f"starts from row {row.start}, which was not run"
        if row.name in self.obstacles:
            return self.obstacles[row.name]
        if row.served and self.dataset.split(self.split).single_image_size is None:
            return "the images are of several sizes, and a served network takes one"
        return None

    def folder(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{name}-seed{seed}"

    def trained(self, row: Row, recipe: Recipe, seed: int) -> dict[str, Any]:
        """The summary of a row's run: of the one that is there, of one that goes on, or of a new one."""
        folder = self.folder(row.name, seed)
        start, start_sha256 = row.start, None
        if start == IMAGENET:
            assert self.weights is not None
            start, start_sha256 = self.weights["path"], self.weights["sha256"]
        elif start != "none":
            best = self.folder(start, seed) / f"best{SUFFIX}"
            start, start_sha256 = str(best), file_sha256(best)
        wanted = TrainSettings(
            data=self.settings.data,
            out=str(folder),
            res=row.res,
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
        # The names that people know them by.
        images = {f"{name} images": content_hash(self.dataset, name) for name in ("train", self.split)}
        inputs = {"starting weights": start_sha256, **images}
        summary = folder / "summary.json"
        if summary.exists() or (folder / STATE_NAME).exists():
            refuse_other_settings(folder, wanted)
            refuse_other_inputs(folder, inputs)
        else:
            if folder.exists():
                shutil.rmtree(folder)  # killed before its first state was whole
            record_inputs(folder, inputs)
        if summary.exists():
            say(f"row {row.name}, seed {seed}: kept, finished before ({folder})")
        else:
            train(wanted, self.dataset, resume=folder.exists())
        return dict(json.loads(summary.read_text(encoding="utf-8")))

    def evaluate_only(self, row: Row, seed: int, which: str) -> float:
        """Top-1 % of the last or the best weights of the row that this one starts from."""
        checkpoint = self.folder(row.start, seed) / f"{which}{SUFFIX}"
        return self.measured(checkpoint, row.res, served=row.served)

    def measured(self, checkpoint: Path, res: int, *, served: bool = False) -> float:
        """Top-1 % of a checkpoint, kept beside it so that it is measured once."""
        kept = checkpoint.parent / "evaluations.json"
        known = read_json(kept)
        how = "served" if served else self.plan.dtype_name
        key = f"{file_sha256(checkpoint)} {self.split} {content_hash(self.dataset, self.split)} at {res} {how}"
        if key not in known:
            options: dict[str, Any] = dict(split=self.split, device=self.settings.device)
            if served:
                score = evaluate_served(str(checkpoint), self.dataset, **options)
            else:
                options |= dict(resolutions=[res], amp=self.settings.amp, cache=self.settings.cache)
                score = evaluate_checkpoint(str(checkpoint), self.dataset, **options)[1][0].score
            known[key] = score.top1_percent
            write_json(kept, known)
        return float(known[key])

    def gmacs(self, stem: Stem, res: int) -> float:
        return resnet18_gmacs(len(self.dataset.manifest.classes), stem, res)

    def served_gmacs(self, row: Row) -> float:
        """Of the network and of the resize inside it."""
        model, card = load_model(self.folder(row.start, 0) / f"best{SUFFIX}")
        size = self.dataset.split(self.split).single_image_size
        assert size is not None
        return forward_gmacs(ServedModel(model, card, size), (1, *size, 3), torch.uint8)

    def write(self, document: Mapping[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "study.json", document)
        write_atomically(self.out / "study.md", markdown(document).encode())


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and standard deviation of the sample where there are several."""
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}
