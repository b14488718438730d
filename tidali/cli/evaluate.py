"""``tidali eval``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidali.cli.options import (
    AmpOption,
    CacheOption,
    CheckpointArgument,
    DataOption,
    DeviceOption,
    FlipOption,
    JsonOption,
    MaxBadOption,
    parse_resolutions,
)
from tidali.training.judgement import Figures, Finding, judge, loss_text, shows_top5

if TYPE_CHECKING:
    from tidali.dataset.contract import Dataset
    from tidali.report.insight import Insight
    from tidali.training.evaluation import ResolutionScore
    from tidali.training.metrics import Score
    from tidali.training.uncertainty import McNemar

_LOWEST_CLASSES, _MISTAKES = 10, 10


def eval_(
    checkpoint: CheckpointArgument,
    data: DataOption,
    against: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="Another checkpoint: compare the two on the same samples (McNemar's test)."),
    ] = None,
    res: Annotated[
        str | None, typer.Option(metavar="PX,PX", help="Input sides in pixels, such as 64,128,224.", show_default="as trained")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to evaluate on.")] = "val",
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    cache: CacheOption = "auto",
    max_bad: MaxBadOption = None,
    flip: FlipOption = False,
    json_: JsonOption = False,
) -> None:
    """Evaluate a checkpoint on a split at one or several resolutions; every sample is counted exactly once.

    Accuracies have their standard error. For one checkpoint at one resolution it also prints the classes with the lowest
    accuracy, the accuracy by confidence and the most confident mistakes; --json always has them, for every class.
    """
    resolutions = parse_resolutions(res) if res is not None else []

    from tidali.console import is_main_rank
    from tidali.dataset.source import open_data
    from tidali.hardware.cpu_memory import keep_freed_memory
    from tidali.report.insight import insight_of
    from tidali.training.evaluation import EvalOptions, evaluate_checkpoints

    keep_freed_memory()
    dataset = open_data(data)
    options = EvalOptions(
        split=split, resolutions=tuple(resolutions), device=device, amp=amp, cache=cache, max_bad=max_bad, flip=flip
    )
    names = [checkpoint, *([against] if against is not None else [])]
    evaluated = [rows for _, rows in evaluate_checkpoints(names, dataset, options)]
    if not is_main_rank():
        return
    tests = [other.predictions.compare(own.predictions) for own, other in zip(*evaluated, strict=True)] if against else []
    insights = [[insight_of(row, dataset, split) for row in rows] for rows in evaluated]
    findings = [[_findings(row, dataset, split) for row in rows] for rows in evaluated]
    if json_:
        scores = [list(map(_score_document, *every)) for every in zip(evaluated, insights, findings, strict=True)]
        document = {"checkpoint": checkpoint, "data": data, "split": split, "flip": flip, "scores": scores[0]}
        if against is not None:
            differences = [
                {"res": own.res, "against_res": other.res, **_difference_document(test)}
                for own, other, test in zip(*evaluated, tests, strict=True)
            ]
            document["against"] = {"checkpoint": against, "scores": scores[1], "differences": differences}
        print(json.dumps(document))
        return
    where = f"on {split} of {data}" + (", with flip TTA" if flip else "")
    for name, rows, seen, found in zip(names, evaluated, insights, findings, strict=True):
        _print_scores(f"{name} {where}", rows, len(dataset.manifest.classes))
        _print_findings([(row.res, one) for row, one in zip(rows, found, strict=True)])
        if len(seen) == 1 and against is None:
            _print_insight(seen[0])
    if against is not None:
        _print_differences(names, evaluated, tests)


def _accuracies(score: Score, classes: int) -> tuple[str, ...]:
    """Top-1 and, where it can be wrong, top-5."""
    from tidali.training.uncertainty import with_error

    top1 = with_error(score.top1_percent, score.top1_standard_error_percent)
    top5 = with_error(score.top5_percent, score.top5_standard_error_percent)
    return (top1, top5) if shows_top5(classes) else (top1,)


def _print_scores(title: str, rows: Sequence[ResolutionScore], classes: int) -> None:
    from tidali.console import print_table

    cells = []
    for row in rows:
        ece = f"{row.predictions.calibration_error_percent:.1f}"
        cells.append((row.res, *_accuracies(row.score, classes), loss_text(row.score.loss), ece, f"{row.score.samples:,}"))
    accuracies = ("top-1 %", "top-5 %") if shows_top5(classes) else ("top-1 %",)
    print_table(f"{title} (± one standard error)", ("res", *accuracies, "loss", "ECE %", "samples"), cells)


def _print_findings(found: Sequence[tuple[int, Sequence[Finding]]]) -> None:
    """Once where they are the same at all resolutions."""
    from tidali.console import show

    at_res: dict[str, list[str]] = {}
    for res, findings in found:
        for finding in findings:
            at_res.setdefault(str(finding), []).append(str(res))
    for text, sides in at_res.items():
        show(text if len(sides) == len(found) else f"at {', '.join(sides)} px: {text}")


def _findings(row: ResolutionScore, dataset: Dataset, split: str) -> list[Finding]:
    figures = Figures(
        split=split,
        samples=row.score.samples,
        classes=len(dataset.manifest.classes),
        top1_percent=row.score.top1_percent,
        loss=row.score.loss,
        largest_class_percent=dataset.split(split).largest_class_percent,
    )
    return judge(figures)


def _print_insight(insight: Insight) -> None:
    from tidali.console import print_table
    from tidali.dataset.file_names import printable_path
    from tidali.training.uncertainty import interval_text

    names, classes = [one.name for one in insight.classes], insight.lowest_classes()
    print_table(
        f"Lowest of {len(classes):,} classes" if len(classes) > _LOWEST_CLASSES else "Classes",
        ("class", "top-1 %", "95 % interval", "correct", "samples"),
        [
            (name, f"{one.top1_percent:.1f}", interval_text(one.correct, one.samples), one.correct, one.samples)
            for name, one in classes[:_LOWEST_CLASSES]
        ],
    )
    print_table(
        f"Accuracy by confidence: expected calibration error (ECE) {insight.calibration_error_percent:.1f} %",
        ("confidence %", "mean", "top-1 %", "95 % interval", "samples"),
        [
            (
                f"{one.low_percent:.0f} to {one.high_percent:.0f}",
                f"{one.mean_confidence_percent:.1f}",
                f"{one.top1_percent:.1f}",
                interval_text(one.correct, one.samples),
                one.samples,
            )
            for one in insight.reliability()
        ],
    )
    mistakes = insight.confident_mistakes(_MISTAKES)
    if mistakes:
        print_table(
            "Most confident mistakes",
            ("file", "class", "predicted", "confidence %"),
            [
                (
                    printable_path(insight.sample(index)[1].source),
                    names[int(insight.labels[index])],
                    names[int(insight.predicted[index])],
                    f"{100 * float(insight.confidences[index]):.1f}",
                )
                for index in mistakes
            ],
            left=3,
        )


def _print_differences(names: Sequence[str], evaluated: Sequence[Sequence[ResolutionScore]], tests: Sequence[McNemar]) -> None:
    from tidali.console import print_table

    print_table(
        f"{names[0]} against {names[1]}, on the same samples",
        ("res", "difference, points", "correct in first only", "in second only", "p (McNemar)"),
        [
            (
                own.res if own.res == other.res else f"{own.res} against {other.res}",
                f"{test.difference_percent:+.1f} ± {test.standard_error_percent:.1f}",
                test.second_only,
                test.first_only,
                f"{test.p_value:.2g}{', exact' if test.exact else ''}",
            )
            for own, other, test in zip(*evaluated, tests, strict=True)
        ],
    )


def _score_document(row: ResolutionScore, insight: Insight, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "res": row.res,
        **row.score.to_dict(),
        "top1_standard_error_percent": row.score.top1_standard_error_percent,
        "top5_standard_error_percent": row.score.top5_standard_error_percent,
        "classes": [
            {**asdict(class_), **asdict(one), "top1_percent": one.top1_percent, "interval_percent": one.interval_percent}
            for class_, one in zip(insight.classes, insight.by_class(), strict=True)
        ],
        "calibration_error_percent": insight.calibration_error_percent,
        "reliability": [{**asdict(one), "top1_percent": one.top1_percent} for one in insight.reliability()],
        "confident_mistakes": list(_mistake_documents(insight)),
        "findings": [str(finding) for finding in findings],
    }


def _mistake_documents(insight: Insight) -> Iterator[dict[str, Any]]:
    for index in insight.confident_mistakes(_MISTAKES):
        record = insight.sample(index)[1]
        yield {
            "source": record.source,
            "key": record.key,
            "label": int(insight.labels[index]),
            "predicted": int(insight.predicted[index]),
            "confidence_percent": 100 * float(insight.confidences[index]),
            "loss": float(insight.losses[index]),
        }


def _difference_document(test: McNemar) -> dict[str, Any]:
    """The difference is the checkpoint's accuracy minus that of the one that it is compared with."""
    return {
        "samples": test.samples,
        "correct_here_only": test.second_only,
        "correct_there_only": test.first_only,
        "top1_difference_percent": test.difference_percent,
        "standard_error_percent": test.standard_error_percent,
        "p_value": test.p_value,
        "exact": test.exact,
    }
