"""``tidali bench``: how a rate is measured, and what is written down of it. No test asserts a rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import measure
from bench.measure import Case, Rates
from bench.stages import DECODE, END_TO_END, LOADER, STEP

REQUIRED = {
    "schema_version",
    "benchmark",
    "date",
    "commit",
    "versions",
    "device",
    "cores",
    "dtype",
    "compile",
    "data",
    "stem",
    "batch_size",
    "repeats",
    "rows",
}


def check_document(document: dict, resolutions: list[int], repeats: int) -> None:
    assert document.keys() >= REQUIRED
    assert (document["schema_version"], document["benchmark"]) == (1, "stages")
    assert document["device"].keys() >= {"type", "name"}
    assert document["versions"].keys() >= {"tidali", "python", "torch", "torchvision", "nvidia-dali-cuda120", "numpy"}
    assert document["repeats"] == repeats
    cases = [(row["res"], row["case"]) for row in document["rows"]]
    assert cases == [(res, case) for res in resolutions for case in (DECODE, LOADER, STEP, END_TO_END)]
    for row in document["rows"]:
        rate = row["images_per_s"]
        assert rate.keys() == {"median", "min", "max"}
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]


@pytest.fixture
def quick(monkeypatch) -> None:
    """One step a measurement, after none to warm up."""
    monkeypatch.setattr(measure, "WARMUP_STEPS", 0)
    monkeypatch.setattr(measure, "MIN_STEPS", 1)
    monkeypatch.setattr(measure.measure, "__kwdefaults__", {**measure.measure.__kwdefaults__, "min_seconds": 0.0})


def test_table_and_file(tidali, quick, demo_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ended = tidali(
        "bench", "--data", demo_data, "--res", 32, "--repeats", 1, "--batch-size", 8, "--device", "cpu", "--json", out
    )
    assert ended.code == 0, ended.stderr
    document = json.loads(out.read_text())
    check_document(document, [32], repeats=1)
    assert (document["batch_size"], document["data"]["train_samples"]) == (8, 160)
    for row in document["rows"]:
        line = next(line for line in ended.stdout.splitlines() if row["case"] in line)
        assert f"{row['images_per_s']['median']:,.0f}" in line
    assert "32 px: end to end runs at" in ended.stderr


def test_json_alone_on_standard_output(tidali, quick, demo_data: Path) -> None:
    ended = tidali(
        "bench", "--data", demo_data, "--res", "32,64", "--repeats", 2, "--batch-size", 4, "--device", "cpu", "--json", "-"
    )
    assert ended.code == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1
    check_document(json.loads(ended.stdout), [32, 64], repeats=2)


# ------------------------------------------------------------------------------------------------------------------- measure()


class Bed:
    """A clock that cases turn: `case` makes one whose steps take the given seconds."""

    def __init__(self, monkeypatch) -> None:
        self.now_s = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr("tidali.timing.now_s", lambda: self.now_s)

    def case(self, name: str, images: int, *step_s: float) -> Case:
        left = list(step_s)

        def step() -> int:
            self.calls.append(name)
            self.now_s += left.pop(0) if len(left) > 1 else left[0]
            return images

        return Case(name=name, step=step)


def test_cases_take_turns_and_warm_up_uncounted(monkeypatch) -> None:
    bed, done = Bed(monkeypatch), []
    # The first two steps of `a` are slow: they fill queues, or compile, and must not count.
    cases = [bed.case("a", 10, 50.0, 50.0, 0.5), bed.case("b", 3, 0.25)]
    rates = measure.measure(cases, repeats=3, on_done=done.append, min_seconds=2.0)
    assert done == ["a", "b"] * 3
    first, later = [*"aa", *"aaaa"], [*"aaaa", *"aaaa"]  # at least two steps and two seconds to warm up, then two seconds
    assert bed.calls == [*first, *16 * "b", *later, *16 * "b", *later, *16 * "b"]
    assert rates["a"].images_per_s == (20.0, 20.0, 20.0)
    assert rates["b"].images_per_s == (12.0, 12.0, 12.0)


def test_a_slow_case_takes_no_fewer_than_three_steps(monkeypatch) -> None:
    bed = Bed(monkeypatch)
    rates = measure.measure([bed.case("a", 4, 8.0)], repeats=1, min_seconds=1.0)
    assert len(bed.calls) == measure.WARMUP_STEPS + measure.MIN_STEPS == 5
    assert rates["a"].images_per_s == (0.5,)


def test_the_device_is_drained_before_the_clock_is_read(monkeypatch) -> None:
    """Steps only queue work here; what they queue takes its time when the device is waited for."""
    bed, queued = Bed(monkeypatch), []

    def drain(device: object) -> None:
        bed.now_s += sum(queued)
        queued.clear()

    def step() -> int:
        queued.append(1.0)
        return 5

    monkeypatch.setattr("tidali.timing.synchronize", drain)
    rates = measure.measure([Case(name="a", step=step)], repeats=2, min_seconds=0.0)
    assert rates["a"].images_per_s == (5.0, 5.0)


def test_median_and_spread() -> None:
    rates = Rates(images_per_s=(90.0, 130.0, 100.0, 110.0))
    assert rates.median == 105.0
    assert rates.spread_percent == pytest.approx(100 * 40 / 105)
    assert rates.to_dict() == {"median": 105.0, "min": 90.0, "max": 130.0}
