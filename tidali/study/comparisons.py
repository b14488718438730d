"""Rows of the study compared with each other on the same samples, by McNemar's test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidali.dataset.contract import Dataset
from tidali.files import file_digest
from tidali.study.inputs import content_hash, read_json
from tidali.training.evaluation import EvalOptions, evaluate_checkpoints
from tidali.training.run_folder import write_json

COMPARED = (("5", "4"), ("5", "3"), ("4", "3"))
"""The rows on whose difference the study's conclusion rests."""


def compare_rows(
    checkpoints: Mapping[str, Path], dataset: Dataset, options: EvalOptions, cache_file: Path
) -> list[dict[str, Any]]:
    """The differences of the rows in `COMPARED`, each of those that were run.

    Args:
        checkpoints: last weights of each row that was run, by its name; each is evaluated at the resolution it was trained at.
        cache_file: where the result is kept, so that nothing is evaluated again while weights and images are the same.
    """
    pairs = [pair for pair in COMPARED if set(pair) <= checkpoints.keys()]
    names = sorted({name for pair in pairs for name in pair})
    if not pairs:
        return []
    digests = " ".join(f"{name}: {file_digest(checkpoints[name])}" for name in names)
    key = f"{digests} on {options.split} {content_hash(dataset, options.split)}, {options.device}, {options.amp}"
    known = read_json(cache_file)
    if key not in known:
        evaluated = evaluate_checkpoints([str(checkpoints[name]) for name in names], dataset, options)
        predictions = {name: rows[0].predictions for name, (_, rows) in zip(names, evaluated, strict=True)}
        known = {key: [_document(*pair, predictions) for pair in pairs]}
        write_json(cache_file, known)
    found: list[dict[str, Any]] = known[key]
    return found


def _document(row: str, against: str, predictions: Mapping[str, Any]) -> dict[str, Any]:
    test = predictions[against].compare(predictions[row])
    return {
        "row": row,
        "against": against,
        "samples": test.samples,
        "correct_in_row_only": test.second_only,
        "correct_in_against_only": test.first_only,
        "top1_difference_percent": test.difference_percent,
        "standard_error_percent": test.standard_error_percent,
        "p_value": test.p_value,
    }
