"""Checks of whole training runs and of what is made of them, as `tidali.doctor.checks`: on any device, by whatever a user of it
gets by default."""

from __future__ import annotations

import hashlib
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from tidali.config import Augment, CacheChoice, CompileChoice, DecoderChoice, Preprocess, TrainSettings
from tidali.console import silenced
from tidali.dataset.contract import Dataset
from tidali.doctor.checks import require
from tidali.errors import Interrupted, TidaliError
from tidali.loading.batches import Training
from tidali.loading.data import Data
from tidali.model.checkpoint import load_checkpoint
from tidali.model.export import compare, open_pt2, to_pt2
from tidali.model.predict import Classifier, load_model
from tidali.model.served import ServedModel
from tidali.recipes import make_recipe
from tidali.training.evaluation import evaluate_checkpoint
from tidali.training.interrupt import StopRequest
from tidali.training.run import train

_HELD = 50
_SERVED_DIFFERENCE = 1e-3
"""Of probabilities in float32 between two devices: their convolutions sum in other orders, over 18 layers."""
_SAME_PREDICTIONS = 0.9
"""Of images, at least: a CPU resizes them for prediction in float32, a GPU for evaluation in half precision, and a network that
was trained for an epoch is sure of few."""


def _settings(
    dataset: Dataset, device: torch.device, cache: CacheChoice, folder: Path, compile: CompileChoice, *, epochs: int
) -> TrainSettings:
    """A run with two input sizes, two pieces a batch, averaged weights, clipping and every augmentation but mixing."""
    augment = Augment(flip="alternating", shift_px=2, crop_scale=(0.5, 1.0), brightness=0.2, hue=0.1, erase=0.25)
    changes = dict(train_sizes=(32, 48), size_order="mixed", accumulate=2, grad_clip_norm=5.0, augment=augment)
    return TrainSettings(
        data=str(dataset.root),
        out=str(folder),
        res=32,
        recipe=make_recipe("modern", epochs=epochs, batch_size=40, **changes),
        device="cpu" if device.type == "cpu" else "cuda",
        compile=compile,
        cache=cache,
        deterministic=epochs > 1,
    )


def eval_matches_training(
    dataset: Dataset, device: torch.device, cache: CacheChoice, folder: Path, compile: CompileChoice = "auto"
) -> str:
    """``tidali eval`` reports for the weights of a run the same accuracy as ``tidali train`` did, and ``tidali predict`` the
    same classes; one epoch at 32 and 48 px.

    Args:
        folder: for the run; empty or not there yet.

    Raises:
        TidaliError: names both accuracies, or the share of images with the same class.
    """
    settings = _settings(dataset, device, cache, folder, compile, epochs=1)
    with silenced():
        best = train(settings, dataset).best
        _, (row,) = evaluate_checkpoint(settings.out, dataset, device=settings.device, cache=cache)
        classifier = load_model(settings.out, device=settings.device)
        pixels, labels = _val_pixels(dataset)
        hits = int((classifier.logits(pixels).argmax(1) == labels).sum())
    trained, scored = best.top1_percent, row.score.top1_percent
    require(trained == scored, f"training reports {trained:.2f} % top-1, evaluation {scored:.2f} %")
    off = abs(hits - best.correct1)
    require(
        off <= (1 - _SAME_PREDICTIONS) * len(pixels),
        f"evaluation finds {best.correct1} of {len(pixels)} images right, prediction {hits}",
    )
    return f"one {_route(cache)} epoch: training and evaluation both report {scored:.0f} % top-1"


def _val_pixels(dataset: Dataset) -> tuple[np.ndarray, torch.Tensor]:
    """(N, H, W, 3) uint8 and (N,) int64, decoded on the CPU."""
    data = Data(dataset, torch.device("cpu"))
    pixels, labels = zip(*data.decoded("val", Preprocess(res=32), 64), strict=True)
    return torch.cat(pixels).numpy(), torch.cat(labels)


def runs_repeat(dataset: Dataset, device: torch.device, cache: CacheChoice, folder: Path) -> str:
    """With ``--deterministic`` a second run, stopped after its first step and resumed, ends with the first one's weights, to
    the bit; two epochs.

    Args:
        folder: for both runs; empty or not there yet.

    Raises:
        TidaliError: the weights differ.
    """
    hashes = []
    for name in ("whole", "resumed"):
        settings = _settings(dataset, device, cache, folder / name, "auto", epochs=2)
        with silenced():
            if name == "resumed":
                stop = StopRequest()
                stop.signal_number = signal.SIGTERM
                try:
                    train(settings, dataset, stop=stop)
                    raise TidaliError("a run that is asked to stop goes on")
                except Interrupted:
                    pass
            train(settings, dataset, resume=name == "resumed")
        _, weights = load_checkpoint(folder / name / "last.safetensors")
        content = b"".join(weights[one].numpy().tobytes() for one in sorted(weights))
        hashes.append(hashlib.sha256(content).hexdigest())
    require(hashes[0] == hashes[1], f"the weights of two deterministic runs, {cache=}, differ")
    return f"two deterministic runs, one of them stopped and resumed, end with the same weights, {_route(cache)}"


def _route(cache: CacheChoice) -> str:
    return "cached" if cache == "device" else "streamed"


def held_batches_stay(dataset: Dataset, device: torch.device, decoder: DecoderChoice) -> str:
    """Batches of a stream that are held while others are made, and while the device is busy, keep their values.

    Raises:
        TidaliError: one was written over.
    """
    with silenced():
        batches = Data(dataset, device, cache="off", decoder=decoder).batches(
            "train", Preprocess(res=64), 4, training=Training(augment=Augment(flip="random"))
        )
        held: list[tuple[torch.Tensor, ...]] = []
        side = 64 if device.type == "cpu" else 4096
        load = torch.randn(side, side, device=device)
        while len(held) < _HELD:
            for images, labels in islice(batches, _HELD - len(held)):
                held.append((images, images.clone(), labels, labels.clone()))
                load = torch.tanh(load @ load)  # keeps the stream that reads them busy
    changed = sum(not (images.equal(copy) and labels.equal(same)) for images, copy, labels, same in held)
    require(changed == 0, f"{changed} of {len(held)} streamed batches changed while they were held, --decoder {decoder}")
    return f"{len(held)} streamed batches that were held kept their values, --decoder {decoder}"


def exported_runs_on(dataset: Dataset, device: torch.device, run: Path) -> str:
    """The exported program returns on the device what the model returns on the CPU.

    Args:
        run: of `eval_matches_training`.

    Raises:
        TidaliError: names the difference.
    """
    model: Classifier = load_model(str(run), device="cpu", amp="off")
    pixels, _ = _val_pixels(dataset)
    size = pixels.shape[1], pixels.shape[2]
    program, _ = open_pt2(to_pt2(ServedModel(model.model, model.card, size), size, "{}"), device)
    found = compare(program, model, pixels)
    require(
        found.largest_difference <= _SERVED_DIFFERENCE,
        f"the exported program's probabilities on {device} differ from the model's by {found.largest_difference:.1e}",
    )
    return f"the exported program on {device} is {found.largest_difference:.0e} from the model"
