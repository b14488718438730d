"""How a rate is measured, with a clock that the test controls. No test asserts a rate of the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.measure import Case, CaseFailed, Rates
from tidali.hardware.timing import WaitTimer


class Bed:
    """A clock that cases advance: `case` makes a case whose steps take the given seconds."""

    def __init__(self, monkeypatch) -> None:
        self.now_s = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr("tidali.hardware.timing.now_s", lambda: self.now_s)

    def case(self, name: str, images: int, *step_s: float, **fields: Any) -> Case:
        left = list(step_s)

        def step() -> int:
            self.calls.append(name)
            self.now_s += left.pop(0) if len(left) > 1 else left[0]
            return images

        return Case(step=step, **fields)


def test_cases_take_turns_and_warm_up_uncounted(monkeypatch) -> None:
    bed = Bed(monkeypatch)
    # The first two steps of `a` are slow: they fill queues, or compile, and must not count.
    cases = {"a": bed.case("a", 10, 50.0, 50.0, 0.5, min_seconds=2.0), "b": bed.case("b", 3, 0.25, min_seconds=2.0)}
    rates = measure.measure(cases, repeats=3)
    first, later = [*"aa", *"aaaa"], [*"aaaa", *"aaaa"]  # at least two steps and two seconds to warm up, then two seconds
    assert bed.calls == [*first, *16 * "b", *later, *16 * "b", *later, *16 * "b"]
    assert rates["a"].per_s == (20.0, 20.0, 20.0)
    assert rates["b"].per_s == (12.0, 12.0, 12.0)


def test_a_case_that_fails_is_left_out_and_the_others_continue(monkeypatch) -> None:
    class Failing:
        left = 1

        def measure(self) -> Rates:
            self.left -= 1
            if self.left < 0:
                raise CaseFailed("a reason")
            return Rates(per_s=(1.0,))

    bed, failed = Bed(monkeypatch), []
    cases = {"a": Failing(), "b": bed.case("b", 1, 1.0)}
    rates = measure.measure(cases, repeats=3, on_failed=lambda name, error: failed.append((name, str(error))))
    assert failed == [("a", "a reason")]
    assert (list(rates), len(rates["b"].per_s)) == (["b"], 3)
    with pytest.raises(CaseFailed, match="a reason"):
        measure.measure(cases, repeats=1)


def test_a_slow_case_takes_no_fewer_than_three_steps(monkeypatch) -> None:
    bed = Bed(monkeypatch)
    rates = measure.measure({"a": bed.case("a", 4, 8.0)}, repeats=1)
    assert len(bed.calls) == measure.WARMUP_STEPS + measure.MIN_STEPS == 5
    assert rates["a"].per_s == (0.5,)


def test_the_device_is_drained_before_the_clock_is_read(monkeypatch) -> None:
    """Steps only queue work here; what they queue takes its time when the device is waited for."""
    bed, queued = Bed(monkeypatch), []

    def drain(device: object) -> None:
        bed.now_s += sum(queued)
        queued.clear()

    def step() -> int:
        queued.append(1.0)
        return 5

    monkeypatch.setattr("tidali.hardware.timing.synchronize", drain)
    rates = measure.measure({"a": Case(step=step, min_seconds=0.0)}, repeats=2)
    assert rates["a"].per_s == (5.0, 5.0)


def test_a_measurement_holds_whole_epochs(monkeypatch) -> None:
    """Of eight steps, the first of which takes a second more: the rate of a long run, wherever a measurement begins."""
    bed = Bed(monkeypatch)
    step_s = [2.0, *[1.0] * 7] * 40
    case = bed.case("a", 9, *step_s, cycle_steps=8, min_seconds=5.0)
    rates = measure.measure({"a": case}, repeats=3)["a"]  # five to warm up, so each begins elsewhere
    assert rates.per_s == (8.0, 8.0, 8.0)
    assert rates.steps == 24


def test_an_epoch_that_is_too_long_is_cut(monkeypatch) -> None:
    bed = Bed(monkeypatch)
    case = bed.case("a", 1, 1.0, cycle_steps=1000)
    assert case.measure().seconds == measure.MAX_CYCLE_SECONDS


def test_measurements_made_one_at_a_time_are_combined() -> None:
    parts = [
        Rates(per_s=(float(n),), first_step_s=n, warmup_steps=1, warmup_s=0.5, steps=n, seconds=n, wait_share=share)
        for n, share in ((3, 0.5), (1, 0.0), (2, 0.25))
    ]
    combined = Rates.combined(parts)
    assert (combined.per_s, combined.median) == ((3.0, 1.0, 2.0), 2.0)
    assert combined.measured() == {"first_step_s": 3, "warmup_steps": 3, "warmup_s": 1.5, "steps": 6, "seconds": 6}
    assert (combined.wait_share, combined.idle_share) == (2.0 / 6, None)  # 1.5 s, none and 0.5 s of 6 s


def test_median_and_spread() -> None:
    rates = Rates(per_s=(90.0, 130.0, 100.0, 110.0))
    assert rates.median == 105.0
    # By hand, with linear interpolation: of 90, 100, 110, 130 a quarter lies at 97.5 and three quarters at 115.
    assert rates.to_dict() == {"median": 105.0, "min": 90.0, "max": 130.0, "q1": 97.5, "q3": 115.0}
    assert Rates(per_s=(7.0,)).to_dict() == dict.fromkeys(("median", "min", "max", "q1", "q3"), 7.0)


def test_what_is_kept_out_of_the_rate_is_reported(monkeypatch) -> None:
    bed = Bed(monkeypatch)
    rates = measure.measure({"a": bed.case("a", 10, 50.0, 0.5, min_seconds=0.0)}, repeats=2)["a"]
    assert rates.per_s == (20.0, 20.0)
    assert rates.measured() == {"first_step_s": 50.0, "warmup_steps": 4, "warmup_s": 51.5, "steps": 6, "seconds": 3.0}


def test_share_of_waiting_is_of_the_measured_time_alone(monkeypatch) -> None:
    bed = Bed(monkeypatch)
    wait = WaitTimer()
    waits_s = [100.0, *[0.25] * 10]

    def step() -> int:
        with wait:
            bed.now_s += waits_s.pop(0)
        bed.now_s += 0.75
        return 1

    rates = measure.measure({"a": Case(step=step, wait=wait, min_seconds=0.0)}, repeats=2)["a"]
    assert rates.wait_share == 0.25
    assert bed.case("b", 1, 1.0).measure().wait_share is None


def test_idle_time_is_that_of_this_process_cores(monkeypatch, tmp_path: Path) -> None:
    stat, ticks_per_s = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(measure, "_STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 12})

    def write(one_s: int, two_s: int, twelve_s: int) -> None:  # user nice system idle iowait irq
        cores = ((1, one_s), (2, two_s), (12, twelve_s))
        lines = [f"cpu{core} 5 5 5 {seconds * ticks_per_s} {3 * ticks_per_s} 1" for core, seconds in cores]
        stat.write_text("\n".join(["cpu  9 9 9 99999 9 9", *lines, "intr 1 2", ""]))

    write(10, 0, 20)
    before_s = measure.idle_s()
    assert before_s is not None
    write(11, 500, 22)
    after_s = measure.idle_s()
    assert after_s is not None
    assert after_s - before_s == 3.0
    stat.unlink()
    assert measure.idle_s() is None
