"""Error rates against cases counted by hand."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from speechkit import metrics
from speechkit.metrics import Errors, Score, alignment, char_errors, word_errors


def test_word_errors_are_counted_as_by_hand() -> None:
    score = word_errors(["one two three", "four five", "six"], ["one too three four", "five", "six"])
    assert score.utterances == (Errors(2, 1, 1, 0), Errors(1, 0, 0, 1), Errors(1, 0, 0, 0))
    assert score.total == Errors(hits=4, substitutions=1, insertions=1, deletions=1)
    assert (score.errors, score.words) == (3, 6)
    assert score.rate == 3 / 6


def test_the_rate_is_of_the_corpus_and_no_mean_of_rates() -> None:
    assert word_errors(["a", "b c d e f g h i j"], ["x", "b c d e f g h i j"]).rate == 1 / 10


def test_char_errors_count_one_space_between_words() -> None:
    assert char_errors(["ab c"], ["abc"]).total == Errors(hits=3, deletions=1)
    assert char_errors([" ab   c "], ["ab c"]).total == Errors(hits=4)
    assert char_errors(["kitten"], ["sitting"]).total == Errors(hits=4, substitutions=2, insertions=1)


def test_spacing_is_no_error() -> None:
    assert word_errors([" one\ttwo  three\n"], ["one two three"]).rate == 0


def test_words_heard_in_silence_are_insertions() -> None:
    score = word_errors(["one two", "", ""], ["one two", "noise", ""])
    assert score.utterances[1] == Errors(insertions=1)
    assert score.utterances[1].rate == math.inf
    assert score.utterances[2].rate == 0
    assert score.rate == 1 / 2
    assert char_errors(["a", ""], ["a", "xy"]).total == Errors(hits=1, insertions=2)


def test_nothing_heard_is_all_deletions() -> None:
    assert word_errors(["one two", "three"], ["", ""]).total == Errors(deletions=3)


def test_the_worst_utterances_come_first_and_right_ones_never() -> None:
    score = word_errors(["a b c", "d", "e f", "g"], ["x y z", "d", "e x", "x"])
    assert score.worst(10) == [0, 3, 2]
    assert score.worst(1) == [0]


def score_of(errors: list[int], words: int) -> Score:
    return Score(tuple(Errors(hits=words - e, substitutions=e) for e in errors))


def test_the_interval_of_a_bootstrap_is_that_of_the_binomial_where_utterances_are_words() -> None:
    """One word an utterance, 20 % wrong, 1000 of them: the standard error is sqrt(0.2 * 0.8 / 1000)."""
    low, high = score_of([1] * 200 + [0] * 800, 1).interval(samples=4000)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 1000)
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.002)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    dice, inside = np.random.default_rng(1), 0
    for seed in range(200):
        low, high = score_of(list(dice.binomial(10, 0.3, size=60)), 10).interval(confidence=0.8, samples=200, seed=seed)
        inside += low <= 0.3 <= high
    assert 0.7 < inside / 200 < 0.9


def test_the_interval_is_seeded_and_grows_with_confidence() -> None:
    score = score_of([0, 3, 1, 5, 2] * 8, 6)
    assert score.interval(seed=3) == score.interval(seed=3)
    assert score.interval(seed=3) != score.interval(seed=4)
    (low, high), (lower, higher) = score.interval(confidence=0.5), score.interval(confidence=0.99)
    assert lower < low < score.rate < high < higher


def test_utterances_that_are_all_alike_leave_no_doubt() -> None:
    assert score_of([1] * 20, 4).interval() == (0.25, 0.25)


def test_an_interval_stands_empty_references() -> None:
    low, high = word_errors(["one", ""], ["one", "noise"]).interval()
    assert 0 <= low <= high < math.inf


def test_the_alignment_shows_each_kind_of_error() -> None:
    assert alignment("one two three five", "one too  four five six").splitlines() == [
        "REF: one two three five ***",
        "HYP: one too  four five six",
        "           S     S        I",
    ]
    assert alignment("one two", "one").splitlines() == ["REF: one two", "HYP: one ***", "           D"]


def test_an_alignment_without_errors_has_no_marks() -> None:
    assert alignment("one", "one") == "REF: one\nHYP: one"
    assert alignment("", "one").splitlines()[0] == "REF: ***"


def test_the_example_in_the_documentation_is_true() -> None:
    assert doctest.testmod(metrics.words).failed == 0


@pytest.mark.parametrize("count", [word_errors, char_errors])
@pytest.mark.parametrize("references", [[], [""], ["", "  "]])
def test_a_set_without_words_is_refused(count, references: list[str]) -> None:
    said = rf"{count.__name__} needs at least one word in the references, .* in {len(references)} utterances; check"
    with pytest.raises(ValueError, match=said):
        count(references, references)


def test_unpaired_hypotheses_are_refused() -> None:
    with pytest.raises(ValueError, match=r"word_errors needs one hypothesis .* 2 references and 1 hypotheses; pair"):
        word_errors(["one", "two"], ["one"])


def test_a_certain_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"interval.confidence must be above 0 and below 1, but is 1.0; 0.95"):
        score_of([1], 2).interval(confidence=1.0)
