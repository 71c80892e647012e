"""How sure one can be of a measure: it is taken anew of draws of what was heard (the bootstrap, Efron 1979).

Clips, utterances or recordings are taken to be independent: with few speakers, or several clips of one recording,
intervals are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int


def draws(clips: int, *, samples: int = 1000, seed: int = 0) -> Iterator[Int[np.ndarray, "B"]]:
    """How often each clip is in each of so many draws of as many clips, with replacement."""
    dice = np.random.default_rng(seed)
    return (np.bincount(dice.integers(clips, size=clips), minlength=clips) for _ in range(samples))


def inside(
    drawn: Float[np.ndarray, "N"], value: float | None = None, *, confidence: float = 0.95
) -> tuple[float, float]:
    """The interval that the measures of draws give; those that are no number do not count.

    Args:
        value: the measure itself, to correct the bias of draws (BC percentiles, Efron 1981, equation 3). A draw has
            clips twice, and average precision likes that: uncorrected, intervals of few clips lie too high.
        confidence: that the measure of other clips like these falls inside, above 0 and below 1.

    Raises:
        ValueError: where ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"interval.confidence must be above 0 and below 1, but is {confidence}; 0.95 is customary.")
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return math.nan, math.nan
    normal, shift = NormalDist(), 0.0
    if value is not None:
        least = 0.5 / len(drawn)
        below = np.clip((np.mean(drawn < value) + np.mean(drawn <= value)) / 2, least, 1 - least)
        shift = 2 * normal.inv_cdf(float(below))
    width = normal.inv_cdf((1 + confidence) / 2)
    low, high = np.quantile(drawn, [normal.cdf(shift - width), normal.cdf(shift + width)])
    return float(low), float(high)
