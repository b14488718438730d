"""Why row 5 of the study is above row 4, or is not: both are compared with row 3, whose weights they start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Any

from tidali.study.rows import ROWS
from tidali.training.judgement import RUNNING_AVERAGES_STEPS
from tidali.training.uncertainty import standard_error_percent

_STUDY_TRAIN_SAMPLES = 100_000
"""Tiny-ImageNet's."""
_MECHANISM = (
    "Rows 4 and 5 start from the weights of row 3, which was trained on images enlarged to 224 px, and take 64 px. Row 4 keeps "
    "row 3's stem. It makes feature maps of 16 px from 64 px, where it made 56 px from 224: the layers after it see everything "
    "at a scale that they were not trained at. Row 5 has a fresh first convolution without stride, and no pooling. Its maps "
    "have 64 px, so the layers after it can be used nearly as they are."
)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a page says of rows 4 and 5."""

    paragraphs: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """A table: rows 3@64, 4 and 5 beside row 3, published and here."""

    def markdown(self) -> list[str]:
        """Its lines."""
        lines = [line for paragraph in self.paragraphs for line in (paragraph, "")]
        table = [self.columns, tuple(["---"] + ["---:"] * (len(self.columns) - 1)), *self.rows]
        return [*lines, *(f"| {' | '.join(cells)} |" for cells in table)]


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """The accuracy of one row minus another's, last epoch, in percentage points."""

    published: float
    here: float
    standard_error: float
    test: str = ""
    """How McNemar's test judges it; empty where it is not recorded."""

    @property
    def is_certain(self) -> bool:
        return abs(self.here) > 2 * self.standard_error

    def __str__(self) -> str:
        return f"{abs(self.here):.1f} ± {self.standard_error:.1f} points {'above' if self.here > 0 else 'below'}"


def explain(study: Mapping[str, Any]) -> Explanation | None:
    """The explanation, from the content of study.json; None where one of the rows 3, 3@64, 4 and 5 was not run."""
    rows = {row["row"]: row for row in study["rows"] if row["status"] == "done"}
    if not {"3", "3@64", "4", "5"} <= rows.keys():
        return None
    fifth_to_fourth, fourth, fifth, small = (
        _difference(study, rows, *pair) for pair in (("5", "4"), ("4", "3"), ("5", "3"), ("3@64", "3"))
    )
    order = (
        f"Row 5 is {fifth_to_fourth} row 4{fifth_to_fourth.test}; the study's was {fifth_to_fourth.published:.1f} points above."
    )
    if not fifth_to_fourth.is_certain:
        order += " Fewer than two standard errors may be chance."
    because = _of_fourth(fourth, rows.get("1"))
    if fifth_to_fourth.here < 0 and not (fifth.is_certain and fifth.here < 0):
        because += " So the order differs from the study's because of row 4, not because of row 5."
    return Explanation(
        paragraphs=(order, _MECHANISM, _of_fifth(fifth), because, *_steps(study, rows["5"])),
        columns=("row", "published", "to row 3", "here", "to row 3"),
        rows=(
            ("3", _published("3"), "", _percent(_last(rows["3"])), ""),
            *(
                (name, _published(name), f"{found.published:+.1f}", _percent(_last(rows[name])), f"{found.here:+.1f}")
                for name, found in (("3@64", small), ("4", fourth), ("5", fifth))
            ),
        ),
    )


def _of_fifth(fifth: _Difference) -> str:
    text = "So row 5 can be expected to come back to row 3's accuracy, and not above it. "
    published = f"The study's came within {-fifth.published:.1f} points of it"
    if not fifth.is_certain:
        return f"{text}{published}, and so it does here: it is {fifth} row 3."
    return f"{text}{published}; here it is {fifth} row 3."


def _of_fourth(fourth: _Difference, first: Mapping[str, Any] | None) -> str:
    lost = f"The study's row 4 lost {-fourth.published:.1f} points to row 3"
    if fourth.is_certain and fourth.here < 0:
        return f"{lost}; here it is {fourth} row 3."
    text = f"{lost}. Here it loses none: it is {fourth} row 3."
    if first is not None:
        text += (
            f" These classes are told apart at 64 px by the stock stem: row 1, from random weights, reaches "
            f"{_last(first):.1f} %, against the study's {_published('1')} %."
        )
    return text


def _steps(study: Mapping[str, Any], fifth: Mapping[str, Any]) -> tuple[str, ...]:
    recipe = next(row.recipe for row in ROWS if row.name == "5")
    assert recipe is not None
    per_epoch = max(study["data"]["train_samples"] // recipe.batch_size, 1)
    steps, of_study = fifth["epochs"] * per_epoch, recipe.epochs * _STUDY_TRAIN_SAMPLES // recipe.batch_size
    if steps >= of_study / 2:
        return ()
    text = (
        f"Rows 4 and 5 had {steps:,} steps here ({fifth['epochs']} epochs of {per_epoch:,}), and {of_study:,} in the study. "
        f"Row 5's first convolution is learnt from random weights in these steps, at a learning rate of {recipe.lr:g}."
    )
    if steps < RUNNING_AVERAGES_STEPS:
        text += (
            " As in the study, batch norm is evaluated with running averages. They move by a tenth a step, so after so few "
            "steps they lag behind the weights, most of all behind those of a new first convolution."
        )
    return (text,)


def _difference(study: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], row: str, other: str) -> _Difference:
    """With the standard error of the means over several seeds; of one seed with McNemar's where the study recorded it, else
    that of two independent accuracies, which is larger."""
    published = float(_published(row)) - float(_published(other))
    here = _last(rows[row]) - _last(rows[other])
    seeds = len(study.get("seeds", (0,)))
    deviations = [rows[name]["top1_percent"]["last"].get("deviation") for name in (row, other)]
    if None not in deviations:
        error = hypot(*deviations) / sqrt(seeds)
        return _Difference(published=published, here=here, standard_error=error, test=f" (over {seeds} seeds)")
    for one in study.get("comparisons", ()):
        if (one["row"], one["against"]) == (row, other):
            test = f" (McNemar's test: p = {one['p_value']:.2g})"
            return _Difference(published=published, here=here, standard_error=one["standard_error_percent"], test=test)
    samples = study["data"]["eval_samples"]
    errors = (standard_error_percent(round(samples * _last(rows[name]) / 100), samples) for name in (row, other))
    return _Difference(published=published, here=here, standard_error=hypot(*errors))


def _last(row: Mapping[str, Any]) -> float:
    return float(row["top1_percent"]["last"]["mean"])


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _published(name: str) -> str:
    return _percent(next(row.published_top1_percent for row in ROWS if row.name == name) or 0.0)
