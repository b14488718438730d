"""Fine-tuning on few photographs: all of the network, the head alone, and the recipe ``finetune``. A script, not a test:

    python tests/accuracy/finetuning.py WEIGHTS SOURCE --per-class 10 --res 64 --epochs 30 --seeds 3

WEIGHTS is what ``--init`` takes, SOURCE a folder of ``train|val/CLASS/*.jpg``: the first images of each class are packed.
Each seed's accuracy on val after the last epoch is printed for each way, then mean and standard deviation, and steps a second
of processor time.
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

import tidali
from tidali.config import Recipe, with_crops


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
    """Of the same length: ``modern`` on all of the network, ``finetune``, and ``finetune`` on the head alone."""
    common = dict(epochs=epochs, batch_size=batch_size)
    return {
        "full": with_crops(tidali.make_recipe("modern", **common)),
        "head only": with_crops(tidali.make_recipe("finetune", freeze="body", **common)),
        "finetune": with_crops(tidali.make_recipe("finetune", **common)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("source", type=Path)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--res", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packed = few_images(given.source, Path(folder), given.per_class)
        for way, recipe in ways(given.epochs, given.batch_size).items():
            found, steps, began_s = [], 0, time.process_time()
            for seed in range(given.seeds):
                out = f"{folder}/{way}-{seed}".replace(" ", "-")
                settings = tidali.TrainSettings(
                    data=str(packed), out=out, res=given.res, init=given.weights, recipe=recipe, seed=seed, device="cpu"
                )
                found.append(tidali.train_model(settings).last.top1_percent)
                steps += given.epochs * (tidali.open_data(str(packed)).split("train").samples // given.batch_size)
                print(f"{way}, seed {seed}: {found[-1]:.2f} %", flush=True)
            deviation = statistics.stdev(found) if len(found) > 1 else 0.0
            rate = steps / (time.process_time() - began_s)
            print(f"{way}: mean {statistics.mean(found):.2f}, deviation {deviation:.2f}; {rate:.2f} steps per processor second")


if __name__ == "__main__":
    main()
