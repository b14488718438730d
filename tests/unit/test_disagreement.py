"""Two models' predictions for the same samples, made up, and counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tidali.dataset.contract import iter_records, open_dataset
from tidali.report.disagreement import are_comparable, disagreement_part
from tidali.report.insight import Insight


def predictions(data: Path, wrong: dict[int, float]) -> Insight:
    """Everything right but the samples at these positions, which are taken for the next class, with this loss."""
    dataset = open_dataset(data)
    labels = torch.tensor([record.label for _, record in iter_records(dataset, "val")])
    predicted, losses = labels.clone(), torch.zeros(len(labels))
    for place, loss in wrong.items():
        predicted[place], losses[place] = (labels[place] + 1) % 4, loss
    given = {"labels": labels, "predicted": predicted, "losses": losses, "confidences": torch.ones(len(labels))}
    positions = torch.arange(len(labels))
    return Insight(dataset=dataset, split="val", res=64, class_count=4, positions=positions, **given)


def test_counts_classes_and_pictures(demo_data: Path) -> None:
    first, second = predictions(demo_data, {0: 1.0, 1: 2.0, 2: 3.0}), predictions(demo_data, {2: 1.0, 3: 5.0})
    part = disagreement_part(first, second, ["a", "b"])
    assert (part["samples"], part["both"], part["neither"]) == (32, 28, 1)
    of_a, of_b = part["alone"]
    assert (of_a["samples"], of_b["samples"]) == (1, 2)
    sources = [record.source for _, record in iter_records(first.dataset, "val")]
    assert [one["file"] for one in of_a["pictures"]] == [sources[3]]
    assert [one["file"] for one in of_b["pictures"]] == [sources[1], sources[0]]  # the one with the higher loss first
    names = [one.name for one in first.classes]
    true = int(first.labels[3])
    assert of_a["pictures"][0]["lines"] == [names[true], f"● {names[true]}", f"■ {names[(true + 1) % 4]}"]
    assert of_a["pictures"][0]["alt"].endswith(f"predicted by a: {names[true]}; by b: {names[(true + 1) % 4]}")
    for name, one, other, difference in part["table"]:
        of_class = first.labels == names.index(name)
        expected = [100 * float((model.predicted == model.labels)[of_class].double().mean()) for model in (first, second)]
        assert [one, other, difference] == [f"{expected[0]:.1f}", f"{expected[1]:.1f}", f"{expected[1] - expected[0]:+.1f}"]


def test_other_samples_are_not_compared(demo_data: Path) -> None:
    one = predictions(demo_data, {})
    assert are_comparable(one, one)
    assert not are_comparable(one, replace(one, positions=one.positions + 1))
    assert not are_comparable(one, replace(one, split="heldout"))
