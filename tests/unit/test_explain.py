"""Why row 5 of the study is above row 4, or is not: what is said of made-up figures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tidali.study.explain import explain

PUBLISHED = {"1": 25.9, "3": 73.1, "3@64": 15.3, "4": 54.5, "5": 72.3}


def study(samples: int = 10_000, train: int = 100_000, epochs: int = 7, **top1_percent: float) -> dict[str, Any]:
    figures = {**PUBLISHED, **{name.removeprefix("row"): value for name, value in top1_percent.items()}}
    return {
        "data": {"eval_samples": samples, "train_samples": train},
        "rows": [
            {"row": name, "status": "done", "epochs": epochs, "top1_percent": {"last": {"mean": value}}}
            for name, value in figures.items()
        ],
    }


def test_the_studys_own_figures_are_explained_as_published() -> None:
    found = explain(study())
    assert found is not None
    text = " ".join(found.paragraphs)
    # Two independent accuracies: sqrt(0.723 * 0.277 / 10,000 + 0.545 * 0.455 / 10,000).
    assert 100 * math.sqrt((0.723 * 0.277 + 0.545 * 0.455) / 10_000) == pytest.approx(0.6695, abs=5e-5)
    assert text.startswith("Row 5 is 17.8 ± 0.7 points above row 4; the study's was 17.8 points above.")
    assert "within 0.8 points of it, and so it does here: it is 0.8 ± 0.6 points below row 3" in text
    assert "lost 18.6 points to row 3; here it is 18.6 ± 0.7 points below row 3" in text
    assert "steps" not in text  # as many as the study's
    assert found.rows == (
        ("3", "73.1", "", "73.1", ""),
        ("3@64", "15.3", "-57.8", "15.3", "-57.8"),
        ("4", "54.5", "-18.6", "54.5", "-18.6"),
        ("5", "72.3", "-0.8", "72.3", "-0.8"),
    )


def test_the_other_order_is_row_4s_doing_where_row_5_reaches_row_3() -> None:
    found = explain(study(600, 4800, 2, row1=67.5, row3=75.0, row4=79.0, row5=73.5))
    assert found is not None
    text = " ".join(found.paragraphs)
    assert "Row 5 is 5.5 ± 2.5 points below row 4" in text
    assert "Here it loses none: it is 4.0 ± 2.4 points above row 3" in text
    assert "row 1, from random weights, reaches 67.5 %, against the study's 25.9 %" in text
    assert "So the order differs from the study's because of row 4, not because of row 5." in text
    assert "had 96 steps here (2 epochs of 48), and 7,000 in the study" in text


def test_where_row_5_falls_behind_row_3_row_4_is_not_to_blame() -> None:
    found = explain(study(600, row3=75.0, row4=79.0, row5=40.0))
    assert found is not None
    text = " ".join(found.paragraphs)
    assert "here it is 35.0 ± 2.7 points below row 3" in text
    assert "So it is row 4" not in text


def test_paired_figures_are_used_where_they_are_recorded() -> None:
    pair = {"row": "5", "against": "4", "p_value": 0.0312, "standard_error_percent": 1.25}
    found = explain({**study(600, row4=71.0), "comparisons": [pair]})
    assert found is not None
    assert found.paragraphs[0].startswith("Row 5 is 1.3 ± 1.2 points above row 4 (McNemar's test: p = 0.031)")
    assert found.paragraphs[0].endswith("Fewer than two standard errors may be chance.")


def test_of_several_seeds_it_is_the_means_that_are_compared() -> None:
    several = study(240, 408, 7, row4=81.0, row5=27.0)
    for row, deviation in zip(several["rows"], (4.3, 3.3, 11.5, 4.5, 14.4), strict=True):
        row["top1_percent"]["last"]["deviation"] = deviation
    pair = {"row": "5", "against": "4", "p_value": 0.0312, "standard_error_percent": 1.25}  # of the first seed alone
    found = explain({**several, "seeds": [0, 1, 2], "comparisons": [pair]})
    assert found is not None
    assert math.hypot(4.5, 14.4) / math.sqrt(3) == pytest.approx(8.71, abs=5e-3)
    assert found.paragraphs[0].startswith("Row 5 is 54.0 ± 8.7 points below row 4 (over 3 seeds); the study's")
    assert "had 28 steps here (7 epochs of 4)" in found.paragraphs[-1]
    assert "running averages" in found.paragraphs[-1]


def test_nothing_is_explained_without_the_rows() -> None:
    without = study()
    without["rows"][2]["status"] = "not run"
    assert explain(without) is None


def test_it_is_a_table_in_markdown_too() -> None:
    found = explain(study())
    assert found is not None
    assert found.markdown()[-6:-3] == [
        "| row | published | to row 3 | here | to row 3 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 3 | 73.1 |  | 73.1 |  |",
    ]
