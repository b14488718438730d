"""What a network predicts for each sample of a split: right and wrong by class, confusions, confidence, the hardest samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tidali.errors import TidaliError
from tidali.hardware.ranks import Ranks
from tidali.loading.batches import Batches
from tidali.training.calibration import ConfidenceBin, calibration_error_percent, reliability
from tidali.training.uncertainty import McNemar, wilson_interval_percent


class Confusion(NamedTuple):
    """How many samples of one class were predicted as another."""

    true: int
    predicted: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """The accuracy on the samples of one class."""

    samples: int
    correct: int

    @property
    def top1_percent(self) -> float | None:
        """None where the split has no sample of the class."""
        return 100 * self.correct / self.samples if self.samples else None

    @property
    def interval_percent(self) -> tuple[float, float] | None:
        """Its 95 % confidence interval (`tidali.training.uncertainty.wilson_interval_percent`)."""
        return wilson_interval_percent(self.correct, self.samples) if self.samples else None


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions for every sample of a split, in stored order, without corrupt ones. Tensors are on the CPU."""

    class_count: int
    positions: Tensor
    """(N,) int64: of each sample in the split's stored order, increasing."""
    labels: Tensor
    """(N,) int64."""
    predicted: Tensor
    """(N,) int64: the most probable class."""
    losses: Tensor
    """(N,) float32: cross entropy in nats, which is minus the logarithm of the true class's probability."""
    confidences: Tensor
    """(N,) float32: probability of the predicted class, 0..1."""

    @property
    def hits(self) -> Tensor:
        """(N,) bool: whether the prediction is correct."""
        return self.predicted == self.labels

    @property
    def correct(self) -> int:
        return int(self.hits.sum())

    @property
    def top1_percent(self) -> float:
        return 100 * self.correct / len(self.labels)

    def confusion(self) -> Tensor:
        """(C, C) int64: samples by true class (rows) and predicted class (columns)."""
        count = self.class_count
        return torch.bincount(self.labels * count + self.predicted, minlength=count * count).reshape(count, count)

    def by_class(self) -> list[ClassAccuracy]:
        """The accuracy of each class, in class order."""
        samples = torch.bincount(self.labels, minlength=self.class_count).tolist()
        correct = torch.bincount(self.labels[self.hits], minlength=self.class_count).tolist()
        return [ClassAccuracy(samples=all_, correct=right) for all_, right in zip(samples, correct, strict=True)]

    def most_confused(self, count: int) -> list[Confusion]:
        """The most frequent pairs of true and predicted class, most frequent first, at most ``count``; ties in class order."""
        wrong = self.confusion()
        wrong.fill_diagonal_(0)
        rows = [Confusion(true, other, int(wrong[true, other])) for true, other in wrong.nonzero().tolist()]
        return sorted(rows, key=lambda row: -row.samples)[:count]

    def hardest(self, count: int) -> list[int]:
        """Indices of the samples with the highest loss, highest first."""
        return largest(self.losses, count)

    def confident_mistakes(self, count: int) -> list[int]:
        """Indices of the wrong predictions with the highest confidence, highest first."""
        wrong = (~self.hits).nonzero()[:, 0]
        return wrong[largest(self.confidences[wrong], count)].tolist()

    def examples(self, pair: Confusion, count: int) -> list[int]:
        """Indices of samples of a confused pair, those with the highest loss first."""
        found = ((self.labels == pair.true) & (self.predicted == pair.predicted)).nonzero()[:, 0]
        return found[largest(self.losses[found], count)].tolist()

    def reliability(self) -> list[ConfidenceBin]:
        """Accuracy by confidence."""
        return reliability(self.confidences, self.hits)

    @property
    def calibration_error_percent(self) -> float:
        """Expected calibration error, in percentage points."""
        return calibration_error_percent(self.reliability())

    def compare(self, other: Predictions) -> McNemar:
        """McNemar's test of these predictions and another network's for the same split.

        Compared are the samples that both have: one that was found corrupt for either is left out of both.

        Raises:
            TidaliError: they have no sample in common.
        """
        mine, theirs = torch.isin(self.positions, other.positions), torch.isin(other.positions, self.positions)
        first, second = self.hits[mine], other.hits[theirs]
        if not len(first):
            raise TidaliError("the two evaluations have no sample in common, so they cannot be compared")
        return McNemar(samples=len(first), first_only=int((first & ~second).sum()), second_only=int((~first & second).sum()))


class PredictionLog:
    """Keeps what a network predicts, batch by batch, on the device: the host does not wait for it."""

    def __init__(self, on_batch: Callable[[int], None] | None = None) -> None:
        """
        Args:
            on_batch: called with the samples of each batch, to show progress.
        """
        self._parts: list[tuple[Tensor, ...]] = []
        self._on_batch = on_batch

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """
        Args:
            logits: (N, C) float32.
            labels: (N,) int64.
        """
        # The first of the top five, as `tidali.training.metrics.Meter` counts: equal bf16 logits are ordered alike.
        predicted = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0]
        losses = functional.cross_entropy(logits, labels, reduction="none")
        self._parts.append((labels, predicted, losses, logits.softmax(1).amax(1)))
        if self._on_batch is not None:
            self._on_batch(len(labels))

    def read(self, batches: Batches, ranks: Ranks, class_count: int) -> Predictions:
        """The predictions of all ranks. Each rank has to ask, after the last batch.

        Args:
            batches: those that were evaluated.

        Raises:
            TidaliError: the batches were not read in their stored order.
        """
        positions = batches.evaluated_positions()
        mine = [torch.cat(column).cpu() for column in zip(*self._parts, strict=True)] if self._parts else [positions] * 4
        if not torch.equal(mine[0], batches.source.labels.cpu()[positions]):
            raise TidaliError("the split was not read in its stored order; 'tidali verify' checks its labels")
        columns = list(zip(*ranks.gather([positions, *mine]), strict=True))
        order = torch.argsort(torch.cat(columns[0]))
        positions, labels, predicted, losses, confidences = (torch.cat(column)[order] for column in columns)
        return Predictions(
            class_count=class_count,
            positions=positions,
            labels=labels,
            predicted=predicted,
            losses=losses,
            confidences=confidences,
        )


def largest(values: Tensor, count: int) -> list[int]:
    """Indices of the largest values, largest first; ties in order."""
    found: list[int] = torch.sort(values, descending=True, stable=True).indices[:count].tolist()
    return found
