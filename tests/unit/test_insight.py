"""Per-sample predictions against a plain loop: torchvision's ResNet-18, PIL's pixels, numpy's counts."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.models import resnet18

from tidali.dataset.contract import Dataset, iter_records, open_dataset
from tidali.errors import UsageError
from tidali.loading.stream import dali_is_installed
from tidali.model.checkpoint import ModelCard, save_checkpoint
from tidali.report.insight import PICTURE_SIDE_PX, Insight, inspect_checkpoint
from tidali.training.evaluation import EvalOptions


def stored(dataset: Dataset, split: str) -> list[tuple[bytes, int, str]]:
    """Image bytes, label and key of every sample, read from the tars by their records."""
    out = []
    for shard, record in iter_records(dataset, split):
        with open(dataset.root / shard.name, "rb") as file:
            file.seek(record.offset)
            out.append((file.read(record.size_bytes), int(record.label), record.key))
    return out


@pytest.fixture(scope="module")
def checkpoint(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that were moved off torch's initial ones, so that classes get different numbers of samples."""
    manifest = open_dataset(demo_data).manifest
    card = ModelCard(classes=manifest.classes, stem="imagenet", stem_bias=False, res=64, mean=manifest.mean, std=manifest.std)
    torch.manual_seed(5)
    model = card.build_model()
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_checkpoint(path, model, card)
    return path


@pytest.fixture(scope="module")
def insight(demo_data: Path, checkpoint: Path) -> Insight:
    return inspect_checkpoint(str(checkpoint), open_dataset(demo_data), EvalOptions(split="train", device="cpu", amp="off"))


def plain_predictions(checkpoint: Path, demo_data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Labels, predictions, losses and keys by torchvision and PIL alone. The images are 64 x 64, so nothing is resized."""
    model = resnet18(num_classes=4)
    with safe_open(checkpoint, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        card = json.loads(file.metadata()["tidali"])
    model.eval()
    labels, predicted, losses, keys = [], [], [], []
    for content, label, key in stored(open_dataset(demo_data), "train"):
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.float32) / 255
        image = torch.tensor((pixels - np.float32(card["mean"])) / np.float32(card["std"])).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits = model(image)[0].double().numpy()
        labels.append(label)
        predicted.append(int(np.argmax(logits)))
        losses.append(float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]))
        keys.append(key)
    return np.array(labels), np.array(predicted), np.array(losses), keys


def test_everything_agrees_with_a_plain_loop(insight: Insight, checkpoint: Path, demo_data: Path) -> None:
    labels, predicted, losses, keys = plain_predictions(checkpoint, demo_data)
    assert [insight.sample(index)[1].key for index in range(len(insight.labels))] == keys
    assert insight.labels.tolist() == labels.tolist()
    assert len(set(predicted.tolist())) > 1  # else the comparison says little
    assert insight.predicted.tolist() == predicted.tolist()
    # Pixels agree within a grey level (DALI's JPEG decoder and PIL's round differently), which is 0.02 after normalisation.
    np.testing.assert_allclose(insight.losses.numpy(), losses, atol=5e-3)

    confusion = np.zeros((4, 4), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    assert insight.confusion().tolist() == confusion.tolist()
    per_class = [100 * confusion[one, one] / confusion[one].sum() for one in range(4)]
    assert [one.top1_percent for one in insight.by_class()] == pytest.approx(per_class)
    assert insight.correct == int((labels == predicted).sum())
    pairs = sorted(((int(confusion[t, p]), t, p) for t in range(4) for p in range(4) if t != p), key=lambda x: -x[0])
    assert [(pair.samples, pair.true, pair.predicted) for pair in insight.most_confused(3)] == pairs[:3]
    worst = insight.hardest(10)
    assert sorted(losses)[-10] == pytest.approx(float(insight.losses[worst[-1]]), abs=5e-3)
    assert insight.losses[worst].tolist() == sorted(insight.losses.tolist(), reverse=True)[:10]


def test_examples_are_of_the_pair(insight: Insight) -> None:
    pair = insight.most_confused(1)[0]
    found = insight.examples(pair, 10_000)
    assert len(found) == pair.samples
    assert {(int(insight.labels[one]), int(insight.predicted[one])) for one in found} == {(pair.true, pair.predicted)}
    assert insight.losses[found].tolist() == sorted(insight.losses[found].tolist(), reverse=True)


def test_pictures_are_the_stored_bytes(insight: Insight, demo_data: Path) -> None:
    contents = [content for content, _, _ in stored(open_dataset(demo_data), "train")]
    for index in (0, 77, 159):
        head, _, body = insight.picture(index).partition(",")
        assert head == "data:image/jpeg;base64"
        assert base64.b64decode(body) == contents[index]


def test_streaming_gives_the_same_order(checkpoint: Path, demo_data: Path, insight: Insight) -> None:
    if not dali_is_installed():
        pytest.skip("DALI is not installed")
    streamed = inspect_checkpoint(
        str(checkpoint), open_dataset(demo_data), EvalOptions(split="train", device="cpu", amp="off", cache="off")
    )
    assert streamed.labels.tolist() == insight.labels.tolist()
    assert streamed.predicted.tolist() == insight.predicted.tolist()


def test_damaged_images_are_left_out_of_the_samples_too(checkpoint: Path, demo_copy: Path) -> None:
    dataset = open_dataset(demo_copy)
    shard, record = list(iter_records(dataset, "train"))[3]
    with open(demo_copy / shard.name, "r+b") as file:
        file.seek(record.offset + record.size_bytes // 2)
        file.write(b"\0" * 16)
    seen = inspect_checkpoint(str(checkpoint), dataset, EvalOptions(split="train", device="cpu", amp="off", max_bad=1))
    kept = [entry.key for _, entry in iter_records(dataset, "train") if entry.key != record.key]
    assert [seen.sample(index)[1].key for index in range(len(seen.labels))] == kept
    assert len(seen.labels) == 159


def test_a_large_photograph_is_reduced_and_upright(write_photos, tidali, tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", {"train/a": 2, "train/b": 2, "val/a": 2, "val/b": 2}, size=(900, 600))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # turned by a quarter: shown 600 wide and 900 high
    for path in (source / "val").rglob("*.jpg"):
        Image.open(path).save(path, exif=rotated)
    assert tidali("shard", source, tmp_path / "packed").code == 0
    dataset = open_dataset(tmp_path / "packed")
    mean_std = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    card = ModelCard(
        classes=dataset.manifest.classes, stem="imagenet", stem_bias=False, res=32, mean=mean_std[0], std=mean_std[1]
    )
    save_checkpoint(tmp_path / "x.safetensors", card.build_model(), card)
    insight = inspect_checkpoint(str(tmp_path / "x"), dataset, EvalOptions(device="cpu", amp="off"))
    assert insight.res == 32
    picture = Image.open(io.BytesIO(base64.b64decode(insight.picture(0).partition(",")[2])))
    assert (picture.format, max(picture.size)) == ("JPEG", PICTURE_SIDE_PX)
    assert picture.height > picture.width


def test_other_classes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from shards.demo import pack_demo

    pack_demo(tmp_path / "other", classes=3, per_class=2, workers=1)
    with pytest.raises(UsageError, match="a head of 4 classes"):
        inspect_checkpoint(str(checkpoint), open_dataset(tmp_path / "other"), EvalOptions())
