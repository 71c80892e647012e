"""How wrong transcripts are: word and character errors, how sure one can be of the rate, and where they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jiwer
import numpy as np

from speechkit.metrics.intervals import draws, inside


@dataclass(frozen=True)
class Errors:
    """Counts of a Levenshtein alignment, of one utterance or of many."""

    hits: int = 0
    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def words(self) -> int:
        """Words of the reference, or its characters where those were compared."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors for each word of the reference; infinite where something was heard in silence."""
        if self.words:
            return self.errors / self.words
        return math.inf if self.errors else 0.0

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
        )


@dataclass(frozen=True)
class Score:
    """The errors of a set of utterances, in their order."""

    utterances: tuple[Errors, ...]

    @cached_property
    def total(self) -> Errors:
        return sum(self.utterances, Errors())

    @property
    def errors(self) -> int:
        return self.total.errors

    @property
    def words(self) -> int:
        return self.total.words

    @property
    def rate(self) -> float:
        """All errors over all words of the references: long utterances weigh more than short ones."""
        return self.total.rate

    def interval(self, *, confidence: float = 0.95, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """A confidence interval of the rate, by drawing utterances anew (Bisani & Ney 2004); see `inside`."""
        counts = np.array([(found.errors, found.words) for found in self.utterances])
        sums = np.array([draw @ counts for draw in draws(len(counts), samples=samples, seed=seed)])
        rates = sums[:, 0] / np.maximum(sums[:, 1], 1)  # a draw of empty references alone counts its insertions
        return inside(rates, confidence=confidence)

    def worst(self, count: int) -> list[int]:
        """The utterances with most errors, most first; of equally many, the one with the higher rate."""
        wrong = [row for row, found in enumerate(self.utterances) if found.errors]
        return sorted(wrong, key=lambda row: (-self.utterances[row].errors, -self.utterances[row].rate))[:count]


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Score:
    """Word errors of hypotheses against references; words are what white space parts, and case counts.

    A reference may be empty, as that of a noise clip is: every word heard there is an insertion.

    Raises:
        ValueError: where there is nothing to compare with, or the two differ in number.
    """
    return _errors("word_errors", jiwer.process_words, references, hypotheses)


def char_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Score:
    """Character errors, one space between words included; otherwise like `word_errors`."""
    return _errors("char_errors", jiwer.process_characters, references, hypotheses)


def _errors(name: str, process: Callable, references: Sequence[str], hypotheses: Sequence[str]) -> Score:
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{name} needs one hypothesis for each reference, but got {len(references)} references and "
            f"{len(hypotheses)} hypotheses; pair them by utterance id."
        )
    references, hypotheses = _spaced(references), _spaced(hypotheses)
    if not any(references):
        raise ValueError(
            f"{name} needs at least one word in the references, but found none in {len(references)} utterances; "
            f"check the transcripts of this set."
        )
    return Score(tuple(_count(chunks) for chunks in process(references, hypotheses).alignments))


def _spaced(texts: Sequence[str]) -> list[str]:
    return [" ".join(text.split()) for text in texts]


def _count(chunks: Sequence[jiwer.AlignmentChunk]) -> Errors:
    counts: Counter[str] = Counter()
    for chunk in chunks:
        heard, said = chunk.hyp_end_idx - chunk.hyp_start_idx, chunk.ref_end_idx - chunk.ref_start_idx
        counts[chunk.type] += max(heard, said)
    return Errors(counts["equal"], counts["substitute"], counts["insert"], counts["delete"])


def alignment(reference: str, hypothesis: str) -> str:
    """Three lines that show the word errors of one utterance.

    >>> print(alignment("one two three", "one too three four"))
    REF: one two three ****
    HYP: one too three four
               S          I
    """
    aligned = jiwer.process_words(_spaced([reference]), _spaced([hypothesis]))
    shown = jiwer.visualize_alignment(aligned, show_measures=False, skip_correct=False)
    lines = [line.rstrip() for line in shown.splitlines() if line.strip() and not line.startswith("===")]
    return "\n".join(lines)
