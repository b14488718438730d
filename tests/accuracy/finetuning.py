"""Fine-tuning on few photographs: all of the network, the head alone, and the recipe ``finetune``. A script, not a test:

    python tests/accuracy/finetuning.py WEIGHTS SOURCE --per-class 10 --res 64 --epochs 10 --seeds 3

WEIGHTS is what ``--init`` takes, SOURCE a folder of ``train|val/CLASS/*.jpg``: the first images of each class are packed. Each
seed's accuracy on val after the last epoch is printed for each way, then mean and standard deviation. Before that, steps per
second of processor time, with one thread: of the training step alone, on random pixels.

docs/models.md has what was found.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import tidali
from tidali.config import Recipe
from tidali.hardware.device import plan_device
from tidali.model.parts import set_training
from tidali.model.resnet import build_resnet18
from tidali.recipes import with_crops
from tidali.training.engine import make_train_state, train_step

MEASURED_STEPS = 20


def few_images(source: Path, folder: Path, per_class: int) -> Path:
    """The first training images of each class and all of val, packed."""
    for split in ("train", "val"):
        for of_class in sorted((source / split).iterdir()):
            chosen = sorted(of_class.iterdir())
            (folder / "few" / split / of_class.name).mkdir(parents=True)
            for image in chosen[:per_class] if split == "train" else chosen:
                shutil.copy(image, folder / "few" / split / of_class.name)
    packed = folder / "packed"
    subprocess.run([sys.executable, "-m", "tidali", "--quiet", "shard", folder / "few", packed], check=True)
    return packed


def ways(epochs: int, batch_size: int) -> dict[str, Recipe]:
    """Of the same length: ``modern`` on all of the network, ``finetune`` on the head alone, and ``finetune``."""
    common = dict(epochs=epochs, batch_size=batch_size)
    return {
        "full": with_crops(tidali.make_recipe("modern", **common)),
        "head only": with_crops(tidali.make_recipe("finetune", freeze="body", **common)),
        "finetune": with_crops(tidali.make_recipe("finetune", **common)),
    }


def steps_per_processor_s(recipe: Recipe, res: int) -> float:
    """Training steps of a ResNet-18 per second of processor time."""
    state = make_train_state(build_resnet18(12, "imagenet"), plan_device("cpu", "off", "off"), lambda step: 0.0, recipe)
    set_training(state.model, state.frozen)
    images = torch.randn(recipe.batch_size, 3, res, res).to(memory_format=torch.channels_last)
    labels = torch.randint(12, (recipe.batch_size,))
    for step in range(MEASURED_STEPS + 3):
        if step == 3:
            began_s = time.process_time()
        train_step(state, images, labels)
    return MEASURED_STEPS / (time.process_time() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("source", type=Path)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--res", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipes = ways(given.epochs, given.batch_size)
    for way, recipe in recipes.items():
        print(f"{way}: {steps_per_processor_s(recipe, given.res):.2f} steps per processor second", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        packed = few_images(given.source, Path(folder), given.per_class)
        for way, recipe in recipes.items():
            found = []
            for seed in range(given.seeds):
                out = f"{folder}/{way}-{seed}".replace(" ", "-")
                settings = tidali.TrainSettings(
                    data=str(packed), out=out, res=given.res, init=given.weights, recipe=recipe, seed=seed, device="cpu"
                )
                found.append(tidali.train_model(settings).last.top1_percent)
                print(f"{way}, seed {seed}: {found[-1]:.2f} %", flush=True)
            deviation = statistics.stdev(found) if len(found) > 1 else 0.0
            print(f"{way}: mean {statistics.mean(found):.2f}, deviation {deviation:.2f}", flush=True)


if __name__ == "__main__":
    main()
