"""How the gate judges what was measured. No test measures."""

from __future__ import annotations

from typing import Any

import pytest

from bench.gate import Minimum, judge, main, recorded
from bench.step import ORIGINAL, TIDALI
from tidali.errors import UsageError


def row(case: str, median: float, **where: Any) -> dict[str, Any]:
    return {"case": case, "res": 64, "images_per_s": {"median": median, "min": 1, "max": 1e6}, **where}


MINIMUM = Minimum(benchmark="step", res=64, stem="small", case="tidali", peer="original", ratio=2.5, needs="avx512_bf16")


@pytest.mark.parametrize(("ours", "passed"), [(249.0, False), (250.0, True), (1000.0, True)])
def test_the_ratio_decides(ours: float, passed: bool) -> None:
    rows = [row("original", 1.0, stem="imagenet"), row("original", 100.0, stem="small"), row("tidali", ours, stem="small")]
    (verdict,) = judge([MINIMUM], {"step": {"rows": rows}}, ["avx512_bf16"])
    assert verdict.passed == passed
    assert verdict.line.startswith("passed" if passed else "TOO SLOW")
    assert f"step at 64 px, small stem: tidali to original: {ours / 100:.2f}, minimum 2.5" in verdict.line


def test_a_case_that_did_not_run_fails() -> None:
    rows = [row("tidali", 9.0, stem="small"), {"case": "original", "res": 64, "stem": "small", "not_run": "no wheel"}]
    (verdict,) = judge([MINIMUM], {"step": {"rows": rows}}, ["avx512_bf16"])
    assert (verdict.passed, verdict.line[:7]) == (False, "NOT RUN")


def test_what_this_cpu_cannot_reach_is_skipped() -> None:
    (verdict,) = judge([MINIMUM], {}, ["avx2"])
    assert verdict.passed
    assert "this CPU has no avx512_bf16" in verdict.line


def test_the_recorded_minima_are_of_cases_that_are_measured() -> None:
    steps = {(one.res, one.stem) for one in recorded() if one.benchmark == "step"}
    assert steps == {(64, "imagenet"), (224, "imagenet"), (64, "small")}
    assert {(one.case, one.peer) for one in recorded() if one.benchmark == "step"} == {(TIDALI, ORIGINAL)}
    assert all(one.ratio > 1 for one in recorded())


def test_without_data_it_shows_the_usage() -> None:
    with pytest.raises(UsageError, match=r"python -m bench\.gate DATA"):
        main([])
