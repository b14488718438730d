"""Accuracy on photographs: ``tidali train`` by its default recipe beside a plain torchvision loop. A script, not a test:

    python tests/accuracy/photographs.py tidali|plain SOURCE PACKED --res 128 --epochs 12 --seeds 3

SOURCE is a folder of ``train|val/CLASS/*.jpg``, PACKED what ``tidali shard SOURCE PACKED`` made of it. Each seed's accuracy on
val after the last epoch is printed, and then mean, standard deviation and standard error of them.

The plain loop has torchvision's ImageFolder, RandomResizedCrop and RandomHorizontalFlip, and the recipe's optimizer, schedule,
label smoothing and batch size; no averaged weights and no changes of colour.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

import tidali
from tidali.recipes import default_recipe
from tidali.training.schedule import warmup_cosine


def by_tidali(packed: Path, *, res: int, epochs: int, seed: int) -> float:
    """Top-1 % of the last weights on val."""
    sizes = tidali.open_data(str(packed)).split("train").image_sizes
    recipe = tidali.make_recipe(default_recipe(sizes, res), epochs=epochs)
    with tempfile.TemporaryDirectory() as folder:
        settings = tidali.TrainSettings(data=str(packed), out=f"{folder}/run", res=res, recipe=recipe, seed=seed, device="cpu")
        return tidali.train_model(settings).last.top1_percent


def by_plain_loop(source: Path, *, res: int, epochs: int, seed: int) -> float:
    """Top-1 % of the last weights on val."""
    recipe = tidali.make_recipe("photos")
    assert recipe.augment.crop_scale is not None
    torch.manual_seed(seed)
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    crop = transforms.RandomResizedCrop(res, recipe.augment.crop_scale, interpolation=transforms.InterpolationMode.BICUBIC)
    centre = [
        transforms.Resize(round(res / recipe.crop_fraction), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(res),
    ]
    train = datasets.ImageFolder(source / "train", transforms.Compose([crop, transforms.RandomHorizontalFlip(), normalise]))
    val = datasets.ImageFolder(source / "val", transforms.Compose([*centre, normalise]))
    batches = DataLoader(train, recipe.batch_size, shuffle=True, drop_last=True)
    model = models.resnet18(num_classes=len(train.classes))
    schedule = warmup_cosine(recipe.lr, epochs * len(batches), round(recipe.warmup_epochs * len(batches)))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )
    step = 0
    for _ in range(epochs):
        model.train()
        for images, labels in batches:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            loss = functional.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    model.eval()
    with torch.inference_mode():
        hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in DataLoader(val, 64))
    return 100 * hits / len(val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=["tidali", "plain"])
    parser.add_argument("source", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--res", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    found = []
    for seed in range(given.seeds):
        common = dict(res=given.res, epochs=given.epochs, seed=seed)
        found.append(by_tidali(given.packed, **common) if given.loop == "tidali" else by_plain_loop(given.source, **common))
        print(f"{given.loop}, seed {seed}: {found[-1]:.2f} %", flush=True)
    if len(found) > 1:
        mean, deviation = statistics.mean(found), statistics.stdev(found)
        print(f"{given.loop}: mean {mean:.2f}, deviation {deviation:.2f}, standard error {deviation / len(found) ** 0.5:.2f}")


if __name__ == "__main__":
    main()
