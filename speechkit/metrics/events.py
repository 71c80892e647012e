"""How well sound events are found in time: by segment and by event (Mesaros et al., Metrics for Polyphonic Sound Event
Detection, Applied Sciences 6, 2016, sections 3.2 and 3.3).

Recordings are given as sequences of events, in the same order on both sides. A class that is neither there nor found
has no F1, NaN, and is left out of the macro average. (sed_eval counts it as found without fault, 1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from speechkit.metrics.intervals import draws
from speechkit.types import Event, Seconds

Recordings = Sequence[Sequence[Event]]


@dataclass(frozen=True)
class Found:
    """What was found of what is there.

    Args:
        labels: the names of the classes.
        counts: of each recording and class: hits, how many there are, and how many were found.
    """

    labels: tuple[str, ...]
    counts: Int[np.ndarray, "R C 3"]

    @property
    def hits(self) -> Int[np.ndarray, "C"]:
        """Of each class, over all recordings; so `there` and `found`."""
        return self.counts[..., 0].sum(0)

    @property
    def there(self) -> Int[np.ndarray, "C"]:
        return self.counts[..., 1].sum(0)

    @property
    def found(self) -> Int[np.ndarray, "C"]:
        return self.counts[..., 2].sum(0)

    def drawn(self, *, samples: int = 1000, seed: int = 0) -> Iterator[Found]:
        """The sums of so many draws of as many recordings, with replacement."""
        count, *shape = self.counts.shape
        # Counts are exact in float64, and numpy has no BLAS for matrices of integers.
        drawn = np.array(list(draws(count, samples=samples, seed=seed)), dtype=np.float64)
        sums = drawn @ self.counts.reshape(count, -1).astype(np.float64)
        yield from (Found(self.labels, row.reshape(1, *shape)) for row in sums.astype(np.int64))

    @property
    def f1(self) -> Float[np.ndarray, "C"]:
        """Of each class, 0 to 1."""
        both = self.there + self.found
        return 2 * self.hits / np.where(both > 0, both, np.nan)

    @property
    def macro(self) -> float:
        """The mean over classes."""
        return float(np.nanmean(self.f1)) if (self.there + self.found).any() else math.nan

    @property
    def micro(self) -> float:
        """Of all classes together."""
        both = int((self.there + self.found).sum())
        return 2 * int(self.hits.sum()) / both if both else math.nan


def segment_hits(there: Recordings, found: Recordings, labels: Sequence[str], *, segment: Seconds = 1.0) -> Found:
    """Compare in segments of equal length, in which a class is heard where an event of it touches them.

    Raises:
        ValueError: for another number of recordings, another label, or an event that ends before it begins.
    """

    def segments(events: Sequence[Event]) -> set[int]:
        return {n for e in events for n in range(math.floor(e.start / segment), math.ceil(e.end / segment))}

    def hits(a: Sequence[Event], b: Sequence[Event]) -> tuple[int, int, int]:
        these, those = segments(a), segments(b)
        return len(these & those), len(these), len(those)

    return _summed(there, found, labels, hits)


def event_hits(
    there: Recordings, found: Recordings, labels: Sequence[str], *, collar: Seconds = 0.2, share: float = 0.2
) -> Found:
    """Compare event by event, each matched with one at most, and as many matched as can be.

    Args:
        collar: how far beginnings may be apart, and ends.
        share: of an event's length that ends may also be apart.

    Raises:
        ValueError: as `segment_hits`.
    """

    def near(a: Event, b: Event) -> bool:
        late = max(collar, share * (a.end - a.start))
        return abs(a.start - b.start) <= collar and abs(a.end - b.end) <= late

    def hits(a: Sequence[Event], b: Sequence[Event]) -> tuple[int, int, int]:
        return matched([[j for j, other in enumerate(b) if near(event, other)] for event in a]), len(a), len(b)

    return _summed(there, found, labels, hits)


def matched(near: Sequence[Sequence[int]]) -> int:
    """How many pairs there are in the largest matching of a bipartite graph (augmenting paths, Berge 1957).

    Args:
        near: for each node of one side those of the other side it may be paired with.
    """
    partner: dict[int, int] = {}  # of the other side
    return sum(_augment(near, partner, node) for node in range(len(near)))


def _augment(near: Sequence[Sequence[int]], partner: dict[int, int], start: int) -> bool:
    """Pair one more node, giving others another partner where that makes room."""
    came_from: dict[int, int] = {}
    queue, paired = [start], {mine: theirs for theirs, mine in partner.items()}
    for node in queue:
        for other in near[node]:
            if other not in came_from:
                came_from[other] = node
                if other not in partner:
                    step: int | None = other
                    while step is not None:
                        partner[step] = came_from[step]
                        step = paired.get(came_from[step])
                    return True
                queue.append(partner[other])
    return False


def _summed(
    there: Recordings, found: Recordings, labels: Sequence[str], hits: Callable[..., tuple[int, int, int]]
) -> Found:
    if len(there) != len(found):
        raise ValueError(
            f"Events must be of the same recordings, but there are {len(there)} of what is there and {len(found)} of "
            f"what was found; give an empty list for a recording without events."
        )
    for recording in (*there, *found):
        for event in recording:
            _check(event, labels)
    counts = np.zeros((len(there), len(labels), 3), dtype=np.int64)
    for row, pair in enumerate(zip(there, found, strict=True)):
        for label in {event.label for side in pair for event in side}:
            counts[row, labels.index(label)] = hits(*([e for e in side if e.label == label] for side in pair))
    return Found(tuple(labels), counts)


def _check(event: Event, labels: Sequence[str]) -> None:
    if event.label not in labels:
        raise ValueError(
            f"The label of an event must be one of {len(labels)}, {', '.join(labels[:5])} among them, but is "
            f"{event.label!r}; leave such events out, or measure with their label too."
        )
    if not 0 <= event.start <= event.end:
        raise ValueError(
            f"An event must begin at 0 s or later and not after its end, but {event.label} lasts from {event.start} to "
            f"{event.end} s; correct its times."
        )
