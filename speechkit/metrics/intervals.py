"""How sure one can be of a measure: it is taken anew of draws of what was heard (the bootstrap, Efron 1979).

Clips, utterances or recordings are taken to be independent: with few speakers, or several clips of one recording,
intervals are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int


def draws(clips: int, *, samples: int = 1000, seed: int = 0) -> Iterator[Int[np.ndarray, "B"]]:
    """How often each clip is in each of so many draws of as many clips, with replacement."""
    dice = np.random.default_rng(seed)
    return (np.bincount(dice.integers(clips, size=clips), minlength=clips) for _ in range(samples))


def inside(drawn: Float[np.ndarray, "N"], *, confidence: float = 0.95) -> tuple[float, float]:
    """The interval between percentiles of draws; those that are no number do not count.

    Args:
        confidence: that the measure of other clips like these falls inside, above 0 and below 1.

    Raises:
        ValueError: where ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"interval.confidence must be above 0 and below 1, but is {confidence}; 0.95 is customary.")
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mirrored(drawn: Float[np.ndarray, "N"], value: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share that draws overrate: as far below ``value`` as draws are above it, and the reverse.

    A draw has clips twice, and average precision likes that as much as it likes few clips of a class, so that its
    percentiles lie too high. Distances are those of the arcsine of the root, which make a share equally sure anywhere.
    (Basic intervals of a transformed measure; Davison and Hinkley, Bootstrap Methods, 1997, section 5.2.)

    Raises:
        ValueError: as `inside`.
    """
    low, high = inside(np.arcsin(np.sqrt(drawn)), confidence=confidence)
    middle = np.arcsin(np.sqrt(value))
    below, above = np.sin(np.clip([2 * middle - high, 2 * middle - low], 0, np.pi / 2)) ** 2
    return float(below), float(above)
