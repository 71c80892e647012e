"""Sound events from the scores of frames."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from speechkit.types import Event, Seconds


def found(
    scores: Float[Tensor, "U C"],
    labels: Sequence[str],
    seconds: Seconds,
    *,
    total: Seconds = math.inf,
    threshold: float = 0.5,
    low: float | None = None,
    width: int = 1,
) -> tuple[Event, ...]:
    """Each stretch of frames in which a class is heard, by its beginning.

    Args:
        scores: of each class in each frame, 0 to 1.
        seconds: how long a frame is.
        total: where the last event ends at the latest.
        threshold: a score that at least one frame of an event is above.
        low: a score that all frames of it are above; ``threshold`` unless given.
        width: frames over whose median scores are taken, itself and as many before as after it.

    Raises:
        ValueError: for a threshold outside 0 to 1, or a ``low`` above it.
    """
    low = threshold if low is None else low
    if not 0 < low <= threshold < 1:
        raise ValueError(
            f"The threshold of events must be above 0 and below 1, and low no higher, but they are {threshold} and "
            f"{low}; 0.5 is customary."
        )
    smooth = median(scores, width).numpy()
    heard = [
        Event(label, first * seconds, min(last * seconds, total), float(scores[first:last, row].mean()))
        for row, label in enumerate(labels)
        for first, last in _stretches(smooth[:, row] > low)
        if smooth[first:last, row].max() > threshold
    ]
    return tuple(sorted(heard, key=lambda event: (event.start, event.end, event.label)))


def median(scores: Float[Tensor, "U C"], width: int) -> Float[Tensor, "U C"]:
    """The median over ``width`` frames, one more where that is even; beyond the ends as the first and last."""
    half = width // 2
    if not half or not len(scores):
        return scores
    padded = F.pad(scores.T[None], (half, half), mode="replicate")[0]
    return padded.unfold(1, 2 * half + 1, 1).median(-1).values.T


def joined(pieces: Sequence[tuple[int, Float[Tensor, "U C"]]], frames: int) -> Float[Tensor, "U C"]:
    """The scores of a recording of so many frames from those of its pieces, each with the frame it begins at.

    The mean where pieces overlap. A frame of which there is none has the scores of the one before it.
    """
    sums, counts = torch.zeros(frames, pieces[0][1].shape[1]), torch.zeros(frames, 1)
    for start, scores in pieces:
        inside = scores[: frames - start]
        sums[start : start + len(inside)] += inside
        counts[start : start + len(inside)] += 1
    means = sums / counts.clamp(min=1)
    known = torch.where(counts[:, 0] > 0, torch.arange(frames), 0).cummax(0).values
    return means[known]


def _stretches(heard: Bool[np.ndarray, "U"]) -> list[tuple[int, int]]:
    """First frame, and first frame after, of each run of heard ones."""
    borders = np.flatnonzero(np.diff(np.r_[False, heard, False]))
    return list(zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True))
