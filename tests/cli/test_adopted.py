"""An adopted data set in the commands that read data sets, and in DALI's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

import tidali as library

pytestmark = pytest.mark.slow

Pairs = list[tuple[bytes, int]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Pairs]]:
    """Tars of PNGs of unequal size, each class of a colour of its own, by webdataset.ShardWriter."""
    root, pairs = tmp_path_factory.mktemp("adopted") / "tars", {}
    generator = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for split, count in (("train", 24), ("val", 9)):
        (root / split).mkdir()
        pairs[split] = []
        with webdataset.ShardWriter(f"{root}/{split}/%06d.tar", maxcount=10, verbose=0) as writer:
            for n in range(count):
                colour = np.eye(3)[n % 3] * 120 + generator.normal(60, 20, (40, 48 + 2 * n, 3))
                Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8)).save(root / "images" / "x.png")
                pairs[split].append(((root / "images" / "x.png").read_bytes(), n % 3))
                writer.write({"__key__": f"{n:04d}", "png": pairs[split][-1][0], "json": {"label": n % 3}})
    return root, pairs


@pytest.fixture(scope="module")
def adopted(tidali: Any, written: tuple[Path, dict[str, Pairs]]) -> Path:
    names = written[0] / "names.txt"
    names.write_text("red\ngreen\nblue\n")
    ended = tidali("adopt", written[0], "--class-names", names)
    assert ended.code == 0, ended.stderr
    return written[0]


@pytest.mark.parametrize("cache", ["device", "off"])
def test_both_routes_deliver_the_images_and_labels(adopted: Path, written: tuple[Path, dict[str, Pairs]], cache: Any) -> None:
    if cache == "off":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    loader = library.make_loader(
        library.open_data(str(adopted)), "val", train=False, res=32, batch_size=4, cache=cache, device="cpu"
    )
    batches = [(images.clone(), labels.clone()) for images, labels in loader]
    assert torch.cat([labels for _, labels in batches]).tolist() == [label for _, label in written[1]["val"]]
    images = torch.cat([images for images, _ in batches])
    assert images.mean((2, 3)).argmax(1).tolist() == [label for _, label in written[1]["val"]]


@pytest.mark.parametrize(("cache", "recipe"), [("off", "photos"), ("device", "modern")])
def test_train_eval_predict(tidali: Any, adopted: Path, tmp_path: Path, cache: str, recipe: str) -> None:
    run = tmp_path / "run"
    options = ["--res", "32", "--epochs", "1", "--batch-size", "12", "--device", "cpu", "--cache", cache, "--recipe", recipe]
    ended = tidali("train", "--data", adopted, *options, "--out", run)
    assert ended.code == 0, ended.stderr
    if cache == "off":
        return
    ended = tidali("eval", run, "--data", adopted, "--device", "cpu", "--json")
    assert json.loads(ended.stdout)["scores"][0]["samples"] == 9
    ended = tidali("predict", run, adopted / "images" / "x.png", "--device", "cpu", "--json")
    assert {one["id"] for one in json.loads(ended.stdout)["images"][0]["classes"]} == {"0", "1", "2"}
    ended = tidali("info", adopted, "--sheet", tmp_path / "sheet.png")
    assert "(adopted)" in ended.stdout
    assert "red" in ended.stdout


def test_dalis_reader_reads_the_tars_by_their_indexes(adopted: Path, written: tuple[Path, dict[str, Pairs]]) -> None:
    fn = pytest.importorskip("nvidia.dali.fn", reason="NVIDIA DALI is not installed")
    from nvidia.dali import pipeline_def

    tars = [str(path) for path in sorted((adopted / "train").glob("*.tar"))]

    @pipeline_def(batch_size=24, num_threads=1, device_id=None)
    def read() -> Any:
        indexes = [path.replace(".tar", ".idx") for path in tars]
        images, labels = fn.readers.webdataset(
            paths=tars, index_paths=indexes, ext=["png", "json"], missing_component_behavior="error"
        )
        return images, labels

    pipe = read()
    pipe.build()
    images, labels = pipe.run()
    found = [(images.at(n).tobytes(), json.loads(labels.at(n).tobytes())["label"]) for n in range(24)]
    assert found == written[1]["train"]
