"""``tidali predict`` and `tidali.load_model`: what evaluation finds, from files."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet

from tidali import load_model
from tidali.dataset.contract import Dataset, iter_records, open_dataset
from tidali.loading.data import Data
from tidali.model.checkpoint import load_checkpoint, save_checkpoint
from tidali.model.image_files import ImageError
from tidali.model.predict import Classifier

LOGIT_TOLERANCE = 1e-3
"""float32, where batches of other sizes may add up in another order; logits here reach 180, so 50 of their last places."""


@pytest.fixture(scope="module")
def model(trained: tuple[Path, Any]) -> Classifier:
    return load_model(trained[0], device="cpu", amp="off")


@pytest.fixture(scope="module")
def val_files(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[int]]:
    """The val images as files in a folder, by path in stored order, and their labels."""
    return _unpack(open_dataset(demo_data), tmp_path_factory.mktemp("val"))


def _unpack(dataset: Dataset, folder: Path) -> tuple[Path, list[Path], list[int]]:
    paths, labels = [], []
    for number, (shard, record) in enumerate(iter_records(dataset, "val")):
        with (dataset.root / shard.name).open("rb") as file:
            file.seek(record.offset)
            paths.append(folder / f"{number:04d}.{record.extension}")
            paths[-1].write_bytes(file.read(record.size_bytes))
        labels.append(record.label)
    return folder, paths, labels


def _evaluated_logits(model: Classifier, dataset: Dataset) -> torch.Tensor:
    """As `tidali.training.evaluation.evaluate_checkpoint` gets them, without its sums."""
    batches = Data(dataset, torch.device("cpu")).batches("val", model.card.preprocess(), 256)
    with torch.inference_mode():
        return torch.cat([model.model(images) for images, _ in batches])


def test_top1_and_top5_are_what_eval_counts(tidali, trained, demo_data: Path, val_files) -> None:
    folder, paths, labels = val_files
    ended = tidali("predict", trained[0], folder, "--json", "--device", "cpu")
    assert (ended.code, ended.stderr) == (0, "")
    document = json.loads(ended.stdout)
    assert [one["image"] for one in document["images"]] == [str(path) for path in paths]
    assert document["skipped"] == []
    classes = open_dataset(demo_data).manifest.classes
    for one in document["images"]:
        for score in one["classes"]:
            assert (score["id"], score["name"]) == (classes[score["label"]].id, classes[score["label"]].name)
        shares = [score["probability"] for score in one["classes"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)  # all four classes of the five asked for

    evaluated = json.loads(tidali("eval", trained[0], "--data", demo_data, "--json", "--device", "cpu").stdout)["scores"][0]
    right = sum(one["classes"][0]["label"] == label for one, label in zip(document["images"], labels, strict=True))
    assert 100 * right / len(labels) == evaluated["top1_percent"]


def test_logits_are_evaluations(model: Classifier, demo_data: Path, val_files) -> None:
    logits = model.logits(val_files[1], batch_size=7)
    assert (logits - _evaluated_logits(model, open_dataset(demo_data))).abs().max() < LOGIT_TOLERANCE


def test_kernel_and_mirrored_scoring_are_evaluations(tidali, trained, demo_data: Path, val_files, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    card, _ = load_checkpoint(trained[0] / "best.safetensors")
    save_checkpoint(path, load_model(trained[0], device="cpu", amp="off").model, replace(card, kernel="opencv"))
    other = load_model(path, device="cpu", amp="off")
    logits, pil = other.logits(val_files[1]), load_model(trained[0], device="cpu", amp="off").logits(val_files[1])
    assert (logits - _evaluated_logits(other, open_dataset(demo_data))).abs().max() < LOGIT_TOLERANCE
    assert (logits - pil).abs().max() > 100 * LOGIT_TOLERANCE

    document = json.loads(tidali("predict", path, val_files[0], "--flip", "--json", "--device", "cpu").stdout)
    scores = json.loads(tidali("eval", path, "--data", demo_data, "--flip", "--json", "--device", "cpu").stdout)["scores"]
    labels = [one["classes"][0]["label"] for one in document["images"]]
    right = sum(a == b for a, b in zip(labels, val_files[2], strict=True))
    assert 100 * right / len(labels) == scores[0]["top1_percent"]
    mirrored = load_model(path, device="cpu", flip=True).logits(val_files[1])
    loss = torch.nn.functional.cross_entropy(mirrored, torch.tensor(val_files[2])).item()
    assert loss == pytest.approx(scores[0]["loss"], rel=1e-4)  # unlike the count, it would show a mirror that is left out
    assert loss != pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(val_files[2])).item(), rel=1e-3)


def test_images_of_several_sizes_become_evaluations(model: Classifier, write_photos, tmp_path: Path) -> None:
    from shards.pack import pack
    from shards.scan import FileSource

    for number, size in enumerate([(64, 64), (97, 40), (33, 150), (300, 200)]):
        write_photos(tmp_path / "source", {f"{split}/{number}": 2 for split in ("train", "val")}, size=size)
    pack(FileSource(tmp_path / "source"), tmp_path / "packed", workers=1)
    dataset = open_dataset(tmp_path / "packed")
    _, paths, _ = _unpack(dataset, tmp_path)
    seen: list[torch.Tensor] = []
    hook = model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    _evaluated_logits(model, dataset)
    model.logits(paths)
    hook.remove()
    evaluated, predicted = seen
    std = torch.tensor(model.card.std).reshape(3, 1, 1)
    # Evaluation rounds resized pixels to whole grey levels; 0.01 is float32's, of 255.
    assert (255 * std * (predicted - evaluated)).abs().max() < 0.51


def test_paths_images_and_arrays_are_one(model: Classifier, val_files) -> None:
    paths = val_files[1][:5]
    images = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in images]
    expected = model.logits(paths)
    assert expected.shape == (5, 4)
    for given in (map(str, paths), images, arrays, np.stack(arrays), torch.from_numpy(np.stack(arrays))):
        assert torch.equal(model.logits(given), expected)
    for alone in (paths[0], str(paths[0]), images[0], arrays[0]):
        assert len(model.predict(alone)) == 1
    assert torch.allclose(model.logits(paths, batch_size=2), expected, atol=LOGIT_TOLERANCE)
    (scores, *_) = model.predict(paths, top=2)
    assert [score.label for score in scores] == expected[0].topk(2).indices.tolist()
    assert model.classes[scores[0].label] == scores[0].name
    assert model.predict([]) == []
    assert model.logits([]).shape == (0, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (31, 700)])
def test_any_size(model: Classifier, size: tuple[int, int]) -> None:
    grey = np.full((*size, 3), 77, np.uint8)
    assert torch.allclose(model.logits(grey), model.logits(np.full((32, 32, 3), 77, np.uint8)), atol=1e-3)


def test_stream_is_lazy_and_goes_on_after_bad_images(model: Classifier, val_files) -> None:
    taken = 0

    def images():
        nonlocal taken
        while True:
            taken += 1
            yield val_files[1][0] if taken % 2 else "nowhere.jpg"

    bad: list[ImageError] = []
    stream = model.stream(images(), batch_size=2, on_bad=bad.append)
    first = [next(stream) for _ in range(3)]
    stream.close()
    assert [source for source, _ in first] == [val_files[1][0]] * 3
    assert taken < 100
    assert {str(error) for error in bad} == {"nowhere.jpg: No such file or directory"}
    with pytest.raises(ImageError, match=r"^nowhere\.jpg: No such file"):
        model.predict([val_files[1][0], "nowhere.jpg"])


def test_bad_images_are_named_and_skipped(tidali, trained, val_files, tmp_path: Path) -> None:
    good = tmp_path / "good.jpg"
    good.write_bytes(val_files[1][0].read_bytes())
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "text.png").write_text("text")
    ended = tidali("predict", trained[0], tmp_path, "--csv", "--top", 1, "--device", "cpu")
    assert ended.code == 1
    assert [line["image"] for line in csv.DictReader(io.StringIO(ended.stdout))] == [str(good)]
    lines = ended.stderr.splitlines()
    assert len(lines) == 3
    for line, name, reason in zip(lines, ("cut.jpg", "text.png"), ("damaged JPEG: .+", "text"), strict=False):
        assert re.match(rf"warning: skipped: {re.escape(str(tmp_path / name))}: .*{reason}", line), line
    assert lines[2] == "tidali: 2 of 3 images could not be read"
    document = json.loads(tidali("predict", trained[0], tmp_path, "--json", "--device", "cpu").stdout)
    assert [Path(one["image"]).name for one in document["skipped"]] == ["cut.jpg", "text.png"]
    ended = tidali("predict", trained[0], tmp_path / "text.png", "--device", "cpu")
    assert (ended.code, ended.stdout) == (1, "")


def test_memory_that_runs_out_names_the_batch(
    tidali, trained, demo_data: Path, val_files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nOf the allocated memory ...")

    monkeypatch.setattr(ResNet, "forward", fail)
    for command in (("predict", trained[0], val_files[0]), ("eval", trained[0], "--data", demo_data)):
        ended = tidali("--quiet", *command, "--device", "cpu")
        assert (ended.code, ended.stdout) == (1, "")
        assert ended.stderr.startswith("tidali: batches of 32 images of 32 px do not fit the GPU's memory; ")
        assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--csv",), ("--json",)])
def test_names_that_are_no_utf8_are_escaped(tidali, trained, val_files, tmp_path: Path, options: tuple[str, ...]) -> None:
    shutil.copy(val_files[1][0], tmp_path / os.fsdecode(b"caf\xe9.jpg"))
    (tmp_path / os.fsdecode(b"bad\xff.jpg")).write_bytes(b"no image")
    for name in ("notes.txt", "raw.CR2", "raw2.cr2"):
        (tmp_path / name).touch()
    ended = tidali("predict", trained[0], tmp_path, "--device", "cpu", *options)
    assert ended.code == 1
    assert r"caf\udce9.jpg" in (json.loads(ended.stdout)["images"][0]["image"] if options == ("--json",) else ended.stdout)
    assert "left out: 2 .cr2 files, 1 .txt file\n" in ended.stderr
    ended.stdout.encode("utf-8")  # as a terminal or a file takes it
    if options == ("--json",):
        assert json.loads(ended.stdout)["skipped"][0]["image"].endswith(r"bad\udcff.jpg")


def test_table_and_csv(tidali, trained, val_files) -> None:
    files = val_files[1][:2]
    table = tidali("predict", trained[0], *files, "--top", 2, "--device", "cpu").stdout
    lines = list(csv.DictReader(io.StringIO(tidali("predict", trained[0], *files, "--csv", "--device", "cpu").stdout)))
    assert [(line["image"], line["rank"]) for line in lines] == [(str(f), str(r)) for f in files for r in (1, 2, 3, 4)]
    for line in lines:
        if int(line["rank"]) <= 2:
            assert line["name"] in table
    assert table.count(str(files[0])) == 1


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["{empty}"], "no images found"),
        (["{empty}/*.jpg"], "no images found"),
        (["nowhere.jpg"], "nowhere.jpg: no such file"),
        (["{file}", "--json", "--csv"], "--json and --csv"),
        (["{file}", "--top", "0"], "--top"),
        ([], "IMAGE"),
    ],
)
def test_wrong_use(tidali, trained, val_files, tmp_path: Path, argv: list[str], complaint: str) -> None:
    ended = tidali("predict", trained[0], *(text.format(empty=tmp_path, file=val_files[1][0]) for text in argv))
    assert (ended.code, ended.stdout) == (2, "")
    assert complaint in ended.stderr
    assert ended.stderr.count("\n") == 1
