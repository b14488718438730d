"""What ``tidali eval`` shows beyond scores, against plain counts of what ``tidali predict`` gives for the same images."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tidali.dataset.contract import iter_records, open_dataset


@pytest.fixture(scope="module")
def documents(tidali, trained, demo_data: Path) -> dict[str, Any]:
    """The best epoch's weights compared with the last's at another resolution, so that they differ."""
    command = ("eval", trained[0], "--against", trained[0] / "last", "--data", demo_data, "--split", "train", "--device", "cpu")
    ended = tidali(*command, "--res", "32,64", "--json")
    assert ended.code == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def predicted(trained, demo_data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and probabilities (N, 4) of train by `tidali.load_model`, from the files' bytes."""
    import io

    from PIL import Image

    from tidali import load_model

    dataset = open_dataset(demo_data)
    found = list(iter_records(dataset, "train"))
    pixels = [np.asarray(Image.open(io.BytesIO(dataset.stored_bytes(*one))).convert("RGB")) for one in found]
    logits = load_model(str(trained[0]), device="cpu").logits(pixels).double().numpy()
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return np.array([record.label for _, record in found]), exponentials / exponentials.sum(1, keepdims=True)


def test_the_figures_are_those_of_a_plain_count(documents, predicted, demo_data: Path) -> None:
    labels, probabilities = predicted
    guessed, confidences = probabilities.argmax(1), probabilities.max(1)
    score = documents["scores"][0]
    right = guessed == labels
    assert 0 < right.sum() < 160  # else the comparison says little
    assert score["top1_percent"] == 100 * right.mean()
    assert score["top1_standard_error_percent"] == pytest.approx(100 * math.sqrt(right.mean() * (1 - right.mean()) / 160))
    for label, one in enumerate(score["classes"]):
        assert (one["samples"], one["correct"]) == ((labels == label).sum(), (right & (labels == label)).sum())
        assert one["top1_percent"] == pytest.approx(100 * one["correct"] / one["samples"])
        low, high = one["interval_percent"]
        assert low <= one["top1_percent"] <= high
        assert high - low > 5  # of 40 samples
    wrong = np.flatnonzero(~right)
    highest = sorted(100 * confidences[wrong], reverse=True)[:10]
    records = [record for _, record in iter_records(open_dataset(demo_data), "train")]
    mistakes = score["confident_mistakes"]
    # Evaluation and prediction put the images together in batches of another size, and sum in another order.
    assert [one["confidence_percent"] for one in mistakes] == pytest.approx(highest, abs=0.01)
    for one in mistakes:
        index = next(place for place, record in enumerate(records) if record.key == one["key"])
        assert one["source"] == records[index].source
        assert (one["label"], one["predicted"]) == (labels[index], guessed[index])
        assert one["confidence_percent"] == pytest.approx(100 * confidences[index], abs=0.01)
    inside = [(confidences > place / 15) & (confidences <= (place + 1) / 15) for place in range(15)]
    error = sum(one.sum() / 160 * abs(right[one].mean() - confidences[one].mean()) for one in inside if one.any())
    assert score["calibration_error_percent"] == pytest.approx(100 * error, abs=0.01)


def test_two_checkpoints_are_compared_at_each_resolution(documents) -> None:
    own, other = documents["scores"], documents["against"]["scores"]
    differences = documents["against"]["differences"]
    assert [(one["res"], one["against_res"], one["samples"]) for one in differences] == [(32, 32, 160), (64, 64, 160)]
    for one, mine, theirs in zip(differences, own, other, strict=True):
        assert one["top1_difference_percent"] == pytest.approx(mine["top1_percent"] - theirs["top1_percent"])
        assert one["correct_here_only"] - one["correct_there_only"] == round(1.6 * one["top1_difference_percent"])
        assert 0 <= one["p_value"] <= 1


def test_what_it_prints(tidali, trained, demo_data: Path) -> None:
    out = trained[0]
    ended = tidali("eval", out, "--against", out / "last", "--data", demo_data, "--device", "cpu")
    assert (ended.code, ended.stderr) == (0, "")
    assert "p (McNemar)" in ended.stdout
    assert "Classes" not in ended.stdout
    ended = tidali("eval", out, "--data", demo_data, "--device", "cpu")
    for words in ("± one standard error", "Classes", "95 % interval", "expected calibration error (ECE)"):
        assert words in ended.stdout
    assert "val/" in ended.stdout  # a mistake's file in the source
    several = tidali("eval", out, "--data", demo_data, "--device", "cpu", "--res", "32,64")
    assert "Classes" not in several.stdout
    assert several.stdout.count(" ± ") == 3  # an accuracy at each of two resolutions, and what so few images can show


def test_a_corrupt_image_is_missing_from_both(tidali, trained, demo_copy: Path) -> None:
    """Of the same samples: the second image of val is damaged, and all that follow keep their own labels and names."""
    dataset = open_dataset(demo_copy)
    (_, first), (shard, record) = list(iter_records(dataset, "val"))[:2]
    with open(demo_copy / shard.name, "r+b") as file:
        file.seek(record.offset + record.size_bytes // 2)
        file.write(b"\0" * 16)
    command = ("eval", trained[0], "--against", trained[0] / "last", "--data", demo_copy, "--device", "cpu", "--json")
    ended = tidali(*command, "--max-bad", 1)
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("left out, corrupt") == 1
    document = json.loads(ended.stdout)
    assert document["scores"][0]["samples"] == document["against"]["differences"][0]["samples"] == 31
    sources = {entry.key: entry.source for _, entry in iter_records(dataset, "val") if entry.key != record.key}
    assert first.key in sources
    for one in document["scores"][0]["confident_mistakes"]:
        assert sources[one["key"]] == one["source"]


def test_a_checkpoint_that_is_not_there_is_found_before_any_is_evaluated(tidali, trained, demo_data: Path) -> None:
    ended = tidali("eval", trained[0], "--against", "nowhere", "--data", demo_data)
    assert ended.code == 2
    assert ended.stderr.startswith("tidali: nowhere: no such checkpoint")


def test_a_checkpoint_for_other_classes_cannot_be_compared(tidali, trained, demo_data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tidali.model.checkpoint import METADATA_KEY, load_checkpoint

    shutil.copy(trained[0] / "last.safetensors", tmp_path / "other.safetensors")
    weights = load_file(tmp_path / "other.safetensors")
    from dataclasses import asdict

    card = asdict(load_checkpoint(tmp_path / "other.safetensors")[0])
    card["classes"][0]["id"] = "another"
    save_file(weights, tmp_path / "other.safetensors", {METADATA_KEY: json.dumps(card)})
    ended = tidali("eval", trained[0], "--against", tmp_path / "other.safetensors", "--data", demo_data)
    assert ended.code == 2
    assert "class 0 is 'another'" in ended.stderr
