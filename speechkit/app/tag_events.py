"""``speechkit evaluate`` of events: how well taggers find them in time, and a picture of the recordings found worst."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from speechkit import pictures
from speechkit.data.corpora import Cut, events_of
from speechkit.data.loading import load as load_samples
from speechkit.features import LogMel
from speechkit.metrics import Found, event_hits, inside, segment_hits
from speechkit.metrics.events import Recordings
from speechkit.tagger import Piece, Tagger
from speechkit.types import Event, Seconds

SHOWN: Seconds = 30.0  # of a recording, in the picture
Interval = tuple[float, float]


@dataclass(frozen=True)
class Finder:
    """How events are found: frames above ``threshold``, their scores being medians over ``median`` seconds."""

    threshold: float
    median: Seconds

    def __call__(self, tagger: Tagger, pieces: Iterable[Piece]) -> tuple[torch.Tensor, tuple[Event, ...]]:
        """The scores and the events of a recording."""
        return tagger.scores_and_events(pieces, threshold=self.threshold, median=self.median)


@dataclass(frozen=True)
class Timed:
    """The recordings of which it is known when what is heard, and what was found in them."""

    labels: tuple[str, ...]
    cuts: tuple[Cut, ...]
    found: tuple[tuple[Event, ...], ...]
    finder: Finder

    @cached_property
    def there(self) -> tuple[tuple[Event, ...], ...]:
        return tuple(events_of(cut) or () for cut in self.cuts)

    @property
    def by_id(self) -> dict[str, tuple[Event, ...]]:
        """What was found in each recording."""
        return {cut.id: events for cut, events in zip(self.cuts, self.found, strict=True)}

    @cached_property
    def segments(self) -> Found:
        return segment_hits(self.there, self.found, self.labels)

    @cached_property
    def events(self) -> Found:
        return event_hits(self.there, self.found, self.labels)

    def worst(self, count: int) -> list[int]:
        """The recordings of lowest event F1; of equal ones, those with more misses and false alarms."""
        wrong, hits = _wrong(self.events), self.events.counts[..., 0].sum(1)
        f1 = np.where(wrong > 0, 2 * hits / np.maximum(2 * hits + wrong, 1), 1.0)
        return np.lexsort((-wrong, f1))[:count].tolist()


@dataclass(frozen=True)
class InTime:
    """F1 by segment of 1 s, and by event; shares, with the 95 % interval of drawing recordings anew."""

    recordings: int
    threshold: float
    median: Seconds
    segment_micro: float
    segment_micro_interval: Interval
    segment_macro: float
    segment_macro_interval: Interval
    event_micro: float
    event_micro_interval: Interval
    event_macro: float
    event_macro_interval: Interval

    @classmethod
    def of(cls, parts: Sequence[Timed]) -> InTime:
        """The measures of one, or their means over several."""
        measured: dict[str, Any] = {}
        for kind in ("segment", "event"):
            found = [getattr(part, f"{kind}s") for part in parts]
            drawn = [list(one.drawn(seed=seed)) for seed, one in enumerate(found)]
            for mean in ("micro", "macro"):
                value = float(np.mean([getattr(one, mean) for one in found]))
                draws = np.mean([[getattr(one, mean) for one in row] for row in drawn], axis=0)
                measured |= {f"{kind}_{mean}": value, f"{kind}_{mean}_interval": inside(draws, value)}
        finder = parts[0].finder
        return cls(sum(len(part.cuts) for part in parts), finder.threshold, finder.median, **measured)


def picture(sample_rate: int, timed: Timed, rows: Sequence[int], title: str) -> pictures.Figure:
    """The spectrograms of some recordings, with what is there and what was found; of long ones the worst stretch."""
    mel = LogMel(sample_rate=sample_rate, bands=64)  # whatever the tagger hears, perhaps samples
    return pictures.scenes([_scene(mel, timed, row) for row in rows], title)


def _scene(mel: LogMel, timed: Timed, row: int) -> pictures.Scene:
    cut, start = timed.cuts[row], _worst_start(timed, row)
    end = min(cut.duration, start + SHOWN)
    samples = torch.from_numpy(load_samples(cut, mel.sample_rate, start=start, duration=end - start))
    samples = F.pad(samples, (0, max(0, mel.window - len(samples))))[None]
    frames = mel(samples, torch.tensor([samples.shape[1]])).frames[0].numpy()
    hits, there, found = timed.events.counts[row].sum(0).tolist()
    name = f"{cut.id}: {hits} of {there} events found, {found - hits} false"
    return pictures.Scene(name, frames, (start, end), timed.there[row], timed.found[row])


def _worst_start(timed: Timed, row: int) -> Seconds:
    """Where that stretch of a recording begins which has most misses and false alarms."""
    last = max(0.0, timed.cuts[row].duration - SHOWN)
    starts = np.arange(0.0, last + SHOWN / 2, SHOWN / 2).clip(max=last)

    def stretches(side: Recordings) -> Recordings:
        return [[e for e in side[row] if e.end > start and e.start < start + SHOWN] for start in starts]

    wrong = _wrong(event_hits(stretches(timed.there), stretches(timed.found), timed.labels))
    return float(starts[wrong.argmax()])


def _wrong(found: Found) -> np.ndarray:
    """Misses and false alarms of each recording."""
    hits, there, said = found.counts.sum(1).T
    return there + said - 2 * hits
