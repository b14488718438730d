"""Photographs of unequal size through the commands: the recipe that is chosen, evaluation, prediction, and corrupt ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tidali.dataset.contract import open_dataset, read_record
from tidali.recipes import default_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(write_photos: Callable[..., Path], tidali: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 train and 12 val images of three sizes, packed."""
    folder = tmp_path_factory.mktemp("photos")
    source = folder / "source"
    for number, size in enumerate([(96, 64), (64, 96), (80, 120)]):
        part = write_photos(folder / str(number), {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2}, size=size)
        for path in sorted(part.rglob("*.jpg")):
            to = source / path.parent.relative_to(part) / f"{number}-{path.name}"
            to.parent.mkdir(parents=True, exist_ok=True)
            path.rename(to)
    assert tidali("shard", source, folder / "packed", "--workers", 1).code == 0
    return folder / "packed"


@pytest.fixture(scope="module")
def run(photos: Path, tidali: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of the default recipe, and what it said."""
    out = tmp_path_factory.mktemp("run") / "run"
    ended = tidali("train", "--data", photos, "--res", 32, "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--out", out)
    assert ended.code == 0, ended.stderr
    return out, ended.stderr


def test_photographs_get_their_recipe_and_are_streamed(run: tuple[Path, str]) -> None:
    out, said = run
    assert "recipe photos with random crops" in said
    assert "--recipe modern" in said
    assert "pixels  train: streamed" in said
    settings = json.loads((out / "config.json").read_text())
    assert (settings["recipe"]["name"], settings["recipe"]["crop_fraction"]) == ("photos", 0.875)
    assert settings["recipe"]["augment"]["crop_scale"] == [0.25, 1.0]


def test_a_resolution_has_one_figure(run: tuple[Path, str], photos: Path, tidali: Any) -> None:
    """Whatever is asked beside it, and on either route."""

    def score(*options: object) -> dict[str, float]:
        ended = tidali("eval", run[0], "--data", photos, "--device", "cpu", "--json", *options)
        assert ended.code == 0, ended.stderr
        scores = json.loads(ended.stdout)["scores"]
        return next(row for row in scores if row["res"] == 32)

    alone = score("--res", 32)
    assert score("--res", "64,32") == alone
    assert score("--res", "32", "--cache", "off") == alone
    assert score("--res", "32,48", "--cache", "off") == alone


def test_a_cache_that_would_blur_the_crops_is_refused(photos: Path, tidali: Any, tmp_path: Path) -> None:
    ended = tidali(
        "train",
        "--data",
        photos,
        "--res",
        32,
        "--batch-size",
        8,
        "--cache",
        "device",
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
    )
    assert (ended.code, len(ended.stderr.strip().splitlines()[-1:])) == (2, 1)
    assert "--cache auto" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_corrupt_images_are_named_once_and_counted(photos: Path, cache: str, tidali: Any, tmp_path: Path) -> None:
    """One of train and one of val, over two epochs and their evaluations."""
    import shutil

    packed = Path(shutil.copytree(photos, tmp_path / "packed"))
    keys = []
    for split in ("train", "val"):
        shard = open_dataset(packed).split(split).shards[0]
        record = read_record(packed, shard)[3]
        keys.append(record.key)
        with (packed / shard.name).open("r+b") as file:
            file.seek(record.offset + record.size_bytes // 2)
            file.write(b"\0\0\0\0")
    base = ("train", "--data", packed, "--res", 32, "--epochs", 2, "--batch-size", 8, "--device", "cpu", "--cache", cache)
    ended = tidali(*base, "--max-bad", 1, "--out", tmp_path / "run")
    assert ended.code == 0, ended.stderr
    for key in keys:
        assert ended.stderr.count(key) == 1
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_samples"] for line in metrics] == [11, 11]
    refused = tidali(*base, "--max-bad", 0, "--out", tmp_path / "none")
    assert refused.code == 1
    assert "--max-bad is 0" in refused.stderr


@pytest.mark.parametrize(
    ("sizes", "res", "recipe"),
    [
        ({"64x64": 10}, 32, "modern"),
        ({"300x400": 6, "400x300": 4}, 224, "photos"),
        ({"300x400": 4, "60x60": 6}, 224, "modern"),
        ({"300x400": 6, "400x300": 4}, 300, "modern"),
    ],
)
def test_the_default_recipe_follows_from_the_sizes(sizes: dict[str, int], res: int, recipe: str) -> None:
    assert default_recipe(sizes, res) == recipe
