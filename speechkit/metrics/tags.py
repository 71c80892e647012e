"""How good the labels of clips are: accuracy, average precision, area under the curve, and their intervals.

Clips are rows, classes columns. A class that cannot be measured, because no clip has it or every clip does, is NaN by
itself and left out of means; `Tagging.absent` counts those that no clip has, so that a score can be told with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int

from speechkit.metrics.intervals import draws, inside

Measure = Callable[[Int[np.ndarray, "B"] | None], float]


@dataclass(frozen=True)
class Class:
    """One row of a report: shares are 0 to 1, NaN where there is nothing to divide by."""

    label: str
    clips: int
    precision: float
    recall: float
    f1: float
    average_precision: float
    auc: float


@dataclass(frozen=True)
class Tagging:
    """Scores of clips against what is heard in them.

    Args:
        labels: the names of the classes.
        targets: what is heard.
        scores: from 0 to 1; what is above ``threshold`` counts as found, or the highest where classes are exclusive.
        exclusive: whether each clip has just one label.
        threshold: for classes that are not exclusive.

    Raises:
        ValueError: where the sizes differ, a score is no number, there is no clip, or a clip of exclusive classes has
            not one label.
    """

    labels: Sequence[str]
    targets: Bool[np.ndarray, "B C"]
    scores: Float[np.ndarray, "B C"]
    exclusive: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.targets.shape == self.scores.shape == (len(self.scores), len(self.labels)) or not self.scores.size:
            raise ValueError(
                f"Tagging must be given targets and scores of at least one clip and of {len(self.labels)} labels, but "
                f"they are {list(self.targets.shape)} and {list(self.scores.shape)}; pair them clip by clip."
            )
        if not np.isfinite(self.scores).all():
            rows = np.flatnonzero(~np.isfinite(self.scores).all(1))
            raise ValueError(
                f"Tagging.scores must be numbers, but those of {len(rows)} of {len(self.scores)} clips, clip {rows[0]} "
                f"first, are not; look for NaN in the model or its features."
            )
        if self.exclusive and (self.targets.sum(1) != 1).any():
            row = int(np.flatnonzero(self.targets.sum(1) != 1)[0])
            raise ValueError(
                f"A clip of exclusive classes must have one label, but clip {row} has {int(self.targets[row].sum())}; "
                f"measure with exclusive=False."
            )

    @property
    def absent(self) -> int:
        """Classes that no clip has."""
        return int((~self.targets.any(0)).sum())

    def accuracy(self, draw: Int[np.ndarray, "B"] | None = None) -> float:
        """Share of clips whose highest score is that of a label they have; of equal scores the first counts.

        Args:
            draw: how often each clip counts; once unless given. So in all measures.
        """
        right = np.take_along_axis(self.targets, self.scores.argmax(1)[:, None], 1)[:, 0]
        return float(np.average(right, weights=draw))

    def mean_average_precision(self, draw: Int[np.ndarray, "B"] | None = None) -> float:
        """Macro average of `average_precisions`: AudioSet's mAP."""
        return _mean(self.average_precisions(draw))

    def mean_auc(self, draw: Int[np.ndarray, "B"] | None = None) -> float:
        """Macro average of `aucs`: AudioSet's mAUC."""
        return _mean(self.aucs(draw))

    def d_prime(self, draw: Int[np.ndarray, "B"] | None = None) -> float:
        """That of the mean area, as AST's papers have it. (HEAR's is the mean of the d' of the classes.)"""
        return d_prime(self.mean_auc(draw))

    def average_precisions(self, draw: Int[np.ndarray, "B"] | None = None) -> Float[np.ndarray, "C"]:
        """Of each class the sum over thresholds of precision times what recall gains: no interpolation.

        Clips of equal score are on one side of every threshold.
        """
        hits, others = self._ranked.sums(draw)
        precision = hits / np.maximum(hits + others, 1)  # clips not drawn weigh 0 below
        return (self._ranked.weighted(draw) * precision[self._ranked.last]).sum(0) / _nonzero(hits[-1])

    def aucs(self, draw: Int[np.ndarray, "B"] | None = None) -> Float[np.ndarray, "C"]:
        """Of each class the probability that a clip with it scores higher than one without (Mann-Whitney).

        Clips of equal score count half.
        """
        hits, others = self._ranked.sums(draw)
        lower = others[-1] - (others[self._ranked.last] + others[self._ranked.before]) / 2
        return (self._ranked.weighted(draw) * lower).sum(0) / _nonzero(hits[-1] * others[-1])

    def interval(
        self, measure: Measure, *, confidence: float = 0.95, samples: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """A confidence interval of a measure such as ``tagging.accuracy``, by drawing clips anew; see `inside`."""
        return inside(self.drawn(measure, samples=samples, seed=seed), measure(None), confidence=confidence)

    def drawn(self, measure: Measure, *, samples: int = 1000, seed: int = 0) -> Float[np.ndarray, "N"]:
        """A measure of so many draws of as many clips, with replacement."""
        return np.array([measure(draw) for draw in draws(len(self.scores), samples=samples, seed=seed)])

    @cached_property
    def decisions(self) -> Bool[np.ndarray, "B C"]:
        """What was found."""
        if not self.exclusive:
            return self.scores > self.threshold
        return np.eye(len(self.labels), dtype=bool)[self.scores.argmax(1)]

    @cached_property
    def confusion(self) -> Int[np.ndarray, "C C"]:
        """Clips by class (row) and class found (column), for exclusive classes."""
        return self.targets.astype(np.int64).T @ self.decisions.astype(np.int64)

    def report(self) -> tuple[Class, ...]:
        """Every class by itself."""
        there, found = self.targets.sum(0), self.decisions.sum(0)
        right = (self.targets & self.decisions).sum(0)
        columns = (
            there,
            _share(right, found),
            _share(right, there),
            _share(2 * right, there + found),
            self.average_precisions(),
            self.aucs(),
        )
        return tuple(
            Class(label, int(clips), *map(float, shares))
            for label, clips, *shares in zip(self.labels, *columns, strict=True)
        )

    @cached_property
    def _ranked(self) -> _Ranked:
        return _Ranked(self.targets, self.scores)


class _Ranked:
    """The clips of each class from the highest score to the lowest, in groups of equal scores.

    Attributes:
        last, before: where in `sums` the group of each clip ends, and where the one before it does; as indices.
    """

    def __init__(self, targets: Bool[np.ndarray, "B C"], scores: Float[np.ndarray, "B C"]) -> None:
        self.order = np.argsort(-scores, axis=0, kind="stable")
        self.targets = np.take_along_axis(targets, self.order, 0)
        ranked = np.take_along_axis(scores, self.order, 0)
        rows, columns = np.arange(len(scores))[:, None], np.arange(scores.shape[1])
        begins = np.vstack([np.ones_like(ranked[:1], dtype=bool), ranked[1:] != ranked[:-1]])
        ends = np.vstack([begins[1:], np.ones_like(begins[:1])])
        self.before = np.maximum.accumulate(np.where(begins, rows, 0), 0), columns
        last = np.minimum.accumulate(np.where(ends, rows, len(scores))[::-1], 0)[::-1] + 1
        self.last = last, columns

    def weighted(self, draw: Int[np.ndarray, "B"] | None) -> Int[np.ndarray, "B C"]:
        """How often each clip with the class counts, and 0 for the others."""
        return self.targets * self._draw(draw)

    def sums(self, draw: Int[np.ndarray, "B"] | None) -> tuple[Int[np.ndarray, "B1 C"], Int[np.ndarray, "B1 C"]]:
        """How many of the first n = 0 ... B clips have the class, and how many have not."""
        weights, none = self._draw(draw), np.zeros((1, self.targets.shape[1]), dtype=np.int64)
        both = (self.targets * weights, ~self.targets * weights)
        hits, others = (np.vstack([none, part.cumsum(0)]) for part in both)
        return hits, others

    def _draw(self, draw: Int[np.ndarray, "B"] | None) -> Int[np.ndarray, "B C"]:
        return np.ones_like(self.order) if draw is None else draw[self.order]


def tagging(scores: Float[np.ndarray, "B C"], targets: Float[np.ndarray, "B C"], exclusive: bool) -> dict[str, float]:
    """Accuracy where classes exclude each other, else mean average precision over the classes that are there."""
    found = Tagging(range(scores.shape[1]), targets > 0.5, scores, exclusive)  # type: ignore[arg-type]
    return {"accuracy": found.accuracy()} if exclusive else {"mAP": found.mean_average_precision()}


def d_prime(auc: float) -> float:
    """How far apart two normal distributions of deviation 1 are whose curve has this area: sqrt(2) Phi^-1(area).

    Infinite for an area of 1, NaN for that of no class.
    """
    if not 0 < auc < 1:
        return math.inf if auc == 1 else -math.inf if auc == 0 else math.nan
    return math.sqrt(2) * NormalDist().inv_cdf(auc)


def _nonzero(count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, count, np.nan)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / _nonzero(whole)


def _mean(values: Float[np.ndarray, "C"]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan
