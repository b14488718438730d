"""Where two models differ: class by class, and the images that only one of them predicts correctly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tidali.errors import counted
from tidali.report.class_figures import class_differences
from tidali.report.drawing import legend_entries
from tidali.report.insight import Insight
from tidali.report.page import drawn
from tidali.training.predictions import largest

_PICTURES = 8
"""At most so many images are shown of those that one model alone predicts correctly."""


def are_comparable(first: Insight, second: Insight) -> bool:
    """Whether both are predictions for the same samples under the same classes."""
    return first.dataset == second.dataset and first.split == second.split and first.positions.equal(second.positions)


def disagreement_part(first: Insight, second: Insight, names: Sequence[str]) -> dict[str, Any]:
    """The values of the template's ``disagreement`` macro.

    Args:
        first: predictions of a model.
        second: another model's, for the same samples.
        names: of the two models.

    Raises:
        DatasetError: a picture cannot be read.
    """
    both = (first, second)
    classes = [one.name for one in first.classes]
    right = [insight.hits for insight in both]
    accuracies = [[one.top1_percent for one in insight.by_class()] for insight in both]
    alone = [right[0] & ~right[1], right[1] & ~right[0]]
    return {
        "test": first.compare(second),
        "names": names,
        "samples": len(first.labels),
        "both": int((right[0] & right[1]).sum()),
        "neither": int((~right[0] & ~right[1]).sum()),
        "differences": drawn(class_differences(classes, *accuracies), f"top-1 of each class: {' and '.join(names)}"),
        "table": [
            (name, f"{one:.1f}", f"{other:.1f}", f"{other - one:+.1f}")
            for name, one, other in zip(classes, *accuracies, strict=True)
            if one is not None and other is not None
        ],
        "alone": [
            {
                "name": names[place],
                "samples": int(which.sum()),
                "counted": counted(int(which.sum()), "sample"),
                "pictures": [_picture(index, both, names) for index in _hardest(which, both[1 - place])],
            }
            for place, which in enumerate(alone)
        ],
    }


def _hardest(which: Tensor, wrong: Insight) -> list[int]:
    """Of these samples the ones that the model which is wrong about them finds hardest."""
    found = which.nonzero()[:, 0]
    return found[largest(wrong.losses[found], _PICTURES)].tolist()


def _picture(index: int, both: Sequence[Insight], names: Sequence[str]) -> dict[str, Any]:
    classes = both[0].classes
    true = classes[int(both[0].labels[index])].name
    predicted = [classes[int(insight.predicted[index])].name for insight in both]
    said = [f"{name}: {one}" for name, one in zip(names, predicted, strict=True)]
    marks = [entry["mark"] for entry in legend_entries(list(names))]  # names of runs are too long for a caption
    file = both[0].sample(index)[1].source
    return {
        "src": both[0].picture(index),
        "file": file,
        "lines": [true, *(f"{mark} {one}" for mark, one in zip(marks, predicted, strict=True))],
        "alt": f"{file}: true class {true}; predicted by {'; by '.join(said)}",
    }
