"""The input size of each training step."""

from __future__ import annotations

from collections import Counter

import pytest

from tidali.loading.sizes import SizePlan


def test_without_a_list_every_step_has_the_resolution() -> None:
    plan = SizePlan.of(64)
    assert {plan.at(epoch, step) for epoch in range(3) for step in range(50)} == {64}


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (6, [64, 64, 128, 128, 224, 224]),
        (7, [64, 64, 64, 128, 128, 224, 224]),
        (3, [64, 128, 224]),
        (2, [64, 128]),  # fewer epochs than sizes: the last ones are left out
        (1, [64]),
    ],
)
def test_progressive_sizes_epoch_by_epoch(epochs: int, expected: list[int]) -> None:
    plan = SizePlan.of(224, (64, 128, 224), epochs=epochs)
    assert [plan.at(epoch, 7) for epoch in range(epochs)] == expected


def test_mixed_sizes_are_drawn_evenly_by_seed_epoch_and_step() -> None:
    plan = SizePlan.of(224, (64, 128, 224), "mixed", epochs=2, seed=1)
    drawn = [plan.at(epoch, step) for epoch in range(2) for step in range(600)]
    counts = Counter(drawn)
    # 1,200 draws of three: 400 each, and five standard deviations are 82.
    assert counts.keys() == {64, 128, 224}
    assert all(abs(count - 400) < 82 for count in counts.values())
    assert drawn == [SizePlan.of(224, (64, 128, 224), "mixed", epochs=2, seed=1).at(e, s) for e in range(2) for s in range(600)]
    assert drawn[:600] != drawn[600:]
    assert drawn != [SizePlan.of(224, (64, 128, 224), "mixed", seed=2).at(e, s) for e in range(2) for s in range(600)]
