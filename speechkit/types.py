"""The values that cross floors, and the legend of every shape in the package.

====== ===========================  ====== ============================
letter axis                         letter axis
====== ===========================  ====== ============================
B      streams (the batch)          H      heads
N      samples                      K      width of a head
T      feature frames               V      vocabulary, blank included
U      encoder frames               L      labels
F      features (mel bands)         C      classes
D      model width                  S      keys: remembered + new
====== ===========================  ====== ============================

Lengths are integers on the clock of the tensor beside them. Token 0 is the blank of CTC and, because the blank never
occurs inside a label sequence, also the boundary (start and end of sentence) of the attention decoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

Seconds = float
BLANK = 0


class Batch(NamedTuple):
    """Utterances padded to one length, with their transcripts as tokens."""

    samples: Float[Tensor, "B N"]
    sample_lengths: Int[Tensor, "B"]
    tokens: Int[Tensor, "B L"]
    token_lengths: Int[Tensor, "B"]
    ids: tuple[str, ...]
    texts: tuple[str, ...]


class Timing(NamedTuple):
    """When classes are heard in the clips of a batch: E events, of the clips of which that is known."""

    known: Bool[Tensor, "B"]
    clips: Int[Tensor, "E"]
    classes: Int[Tensor, "E"]
    times: Float[Tensor, "E 2"]  # beginning and end, in seconds of the clip


class TagBatch(NamedTuple):
    """Clips padded to one length, with how much each class is heard in them, 0 to 1."""

    samples: Float[Tensor, "B N"]
    sample_lengths: Int[Tensor, "B"]
    targets: Float[Tensor, "B C"]
    ids: tuple[str, ...]
    texts: tuple[str, ...]  # the labels, as people read them
    events: Timing | None = None


class FeatureOutput(NamedTuple):
    """What a front end gives: frames and how many of them are real."""

    frames: Float[Tensor, "B T F"]
    lengths: Int[Tensor, "B"]


class EncoderOutput(NamedTuple):
    """What an encoder gives: frames, how many of them are real, and a summary if the architecture has one."""

    frames: Float[Tensor, "B U D"]
    lengths: Int[Tensor, "B"]
    summary: Float[Tensor, "B D"] | None = None


@dataclass(frozen=True)
class Hypothesis:
    """One reading of an utterance.

    ``spans`` holds for each token the half-open range of encoder frames it was heard in, counted from the start of
    the stream; ``confidences`` its posterior probability, 0 to 1. ``score`` is a natural logarithm.
    """

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    spans: tuple[tuple[int, int], ...] = ()
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True)
class Word:
    """A word with the time it was said and the posterior probability of its least certain token."""

    word: str
    start: Seconds
    end: Seconds
    confidence: float


class Event(NamedTuple):
    """A sound with the time it was heard, and how sure one is of it, 0 to 1."""

    label: str
    start: Seconds
    end: Seconds
    score: float = 1.0


@dataclass(frozen=True)
class Transcript:
    """The text of a recording, its words, and how long the recording is."""

    text: str
    words: tuple[Word, ...]
    seconds: Seconds

    def later(self, by: Seconds) -> Transcript:
        """The same, heard after ``by`` seconds of something else."""
        words = (
            tuple(replace(word, start=word.start + by, end=word.end + by) for word in self.words) if by else self.words
        )
        return Transcript(self.text, words, self.seconds + by)

    @classmethod
    def joined(cls, parts: Iterable[Transcript], seconds: Seconds) -> Transcript:
        """What was heard one after the other, of ``seconds`` altogether."""
        parts = list(parts)
        text = " ".join(part.text for part in parts if part.text)
        return cls(text, tuple(word for part in parts for word in part.words), seconds)
