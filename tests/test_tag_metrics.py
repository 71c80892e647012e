"""Measures of labels and events against scikit-learn, torchmetrics, sed_eval and counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from speechkit.metrics import Errors, Score, Tagging, d_prime, draws, event_hits, inside, segment_hits, tagging
from speechkit.metrics.events import matched
from speechkit.types import Event

LABELS = ("dog", "rain", "siren", "clock")


def some(clips: int = 60, *, ties: bool = False, exclusive: bool = False, seed: int = 0) -> Tagging:
    dice = np.random.default_rng(seed)
    targets = dice.random((clips, len(LABELS))) < 0.3
    if exclusive:
        targets = np.eye(len(LABELS), dtype=bool)[dice.integers(len(LABELS), size=clips)]
    scores = np.clip(0.3 * targets + 0.7 * dice.random(targets.shape), 0, 1)
    return Tagging(LABELS, targets, np.round(scores, 1) if ties else scores, exclusive)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_and_area_are_those_of_sklearn_with_equal_scores_too(ties: bool) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    found = some(ties=ties)
    assert found.average_precisions() == pytest.approx(
        average_precision_score(found.targets, found.scores, average=None), abs=1e-12
    )
    assert found.aucs() == pytest.approx(roc_auc_score(found.targets, found.scores, average=None), abs=1e-12)
    assert found.mean_average_precision() == pytest.approx(average_precision_score(found.targets, found.scores))


@pytest.mark.parametrize("ties", [False, True])
def test_measures_of_a_draw_are_those_of_the_clips_repeated(ties: bool) -> None:
    found, draw = some(ties=ties), np.random.default_rng(1).integers(0, 3, size=60)
    repeated = Tagging(LABELS, *(np.repeat(part, draw, axis=0) for part in (found.targets, found.scores)))
    for measure in ("accuracy", "mean_average_precision", "mean_auc", "d_prime"):
        assert getattr(found, measure)(draw) == pytest.approx(getattr(repeated, measure)(), abs=1e-12)


def test_a_class_without_clips_is_left_out_of_means_and_counted() -> None:
    from torchmetrics.functional.classification import multilabel_average_precision

    found = some()
    targets = found.targets.copy()
    targets[:, 1] = False
    less = Tagging(LABELS, targets, found.scores)
    assert less.absent == 1 and np.isnan(less.average_precisions()[1]) and np.isnan(less.aucs()[1])
    assert less.mean_average_precision() == pytest.approx(np.delete(found.average_precisions(), 1).mean())
    theirs = multilabel_average_precision(
        torch.from_numpy(found.scores), torch.from_numpy(targets).int(), 4, average=None
    )
    assert less.mean_average_precision() == pytest.approx(float(theirs[[0, 2, 3]].mean()), abs=1e-6)
    assert less.report()[1].clips == 0 and math.isnan(less.report()[1].recall)


def test_a_class_of_every_clip_has_an_average_precision_and_no_area() -> None:
    found = Tagging(("a",), np.ones((5, 1), dtype=bool), np.random.default_rng(0).random((5, 1)))
    assert found.mean_average_precision() == 1 and math.isnan(found.mean_auc()) and math.isnan(found.d_prime())


def test_equal_scores_everywhere_are_worth_as_much_as_chance() -> None:
    found = Tagging(LABELS, some().targets, np.full((60, 4), 0.5))
    assert found.average_precisions() == pytest.approx(found.targets.mean(0))
    assert found.aucs() == pytest.approx([0.5] * 4) and found.d_prime() == pytest.approx(0)


def test_d_prime_is_that_of_the_mean_area_and_the_distance_of_two_normals() -> None:
    from scipy.special import ndtri

    found = some()
    assert found.d_prime() == pytest.approx(math.sqrt(2) * ndtri(found.aucs().mean()))
    assert d_prime(1.0) == math.inf and d_prime(0.0) == -math.inf and math.isnan(d_prime(math.nan))
    dice = np.random.default_rng(0)
    with_it, without = dice.normal(1.5, 1, 4000), dice.normal(0, 1, 4000)
    one = Tagging(("a",), np.arange(8000)[:, None] < 4000, np.concatenate([with_it, without])[:, None])
    assert one.d_prime() == pytest.approx(1.5, abs=0.07)


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_report_of_each_class_is_that_of_sklearn(exclusive: bool) -> None:
    from sklearn.metrics import precision_recall_fscore_support

    found = some(exclusive=exclusive)
    theirs = np.array(precision_recall_fscore_support(found.targets, found.decisions))
    ours = np.array([(row.precision, row.recall, row.f1, row.clips) for row in found.report()]).T
    assert ours == pytest.approx(theirs) and [row.label for row in found.report()] == list(LABELS)


def test_accuracy_and_confusion_are_those_of_sklearn() -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix

    found = some(exclusive=True)
    truth, best = found.targets.argmax(1), found.scores.argmax(1)
    assert found.accuracy() == pytest.approx(accuracy_score(truth, best))
    assert (found.confusion == confusion_matrix(truth, best, labels=range(4))).all()
    assert found.confusion.sum() == 60


def test_the_interval_of_accuracy_is_that_of_the_binomial() -> None:
    targets = np.eye(2, dtype=bool)[np.zeros(400, dtype=int)]
    scores = np.where(np.arange(400)[:, None] < 320, [1.0, 0.0], [0.0, 1.0])
    found = Tagging(("a", "b"), targets, scores, exclusive=True)
    low, high = found.interval(found.accuracy)
    assert (low, high) == found.interval(found.accuracy)
    deviation = math.sqrt(0.8 * 0.2 / 400)
    assert low == pytest.approx(0.8 - 1.96 * deviation, abs=0.008)
    assert high == pytest.approx(0.8 + 1.96 * deviation, abs=0.008)


def test_the_interval_of_mean_average_precision_holds_it_and_narrows_with_clips() -> None:
    few, many = some(40), some(400)
    widths = []
    for found in (few, many):
        low, high = found.interval(found.mean_average_precision, samples=200)
        assert low < found.mean_average_precision() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_intervals_of_average_precision_cover_the_truth_although_draws_overrate_it() -> None:
    """Scores of two normal distributions a distance of 1.5 apart; the truth is measured on very many clips."""
    dice = np.random.default_rng(0)

    def of(clips: int) -> Tagging:
        targets = np.arange(clips)[:, None] % 5 == 0
        return Tagging(("a",), targets, dice.normal(1.5 * targets, 1.0))

    truth = of(200_000).mean_average_precision()
    covered = [low <= truth <= high for low, high in (_interval(of(60)) for _ in range(150))]
    assert 0.86 < np.mean(covered) <= 1


def _interval(found: Tagging) -> tuple[float, float]:
    return found.interval(found.mean_average_precision, samples=200)


def test_a_measure_without_doubt_has_an_interval_without_width() -> None:
    found = Tagging(("a", "b"), np.eye(2, dtype=bool)[[0, 1, 0, 1]], np.eye(2)[[0, 1, 0, 1]], exclusive=True)
    assert found.interval(found.accuracy) == (1.0, 1.0)
    none = Tagging(("a",), np.zeros((3, 1), dtype=bool), np.ones((3, 1)))
    assert all(math.isnan(value) for value in none.interval(none.mean_average_precision))


def test_errors_labels_and_events_that_say_the_same_have_the_same_doubt() -> None:
    """Thirty clips with one word, label or event each, of which some were heard."""
    right = np.random.default_rng(5).random(30) < 0.7
    words = Score(tuple(Errors(hits=int(hit), substitutions=int(not hit)) for hit in right))
    labels = Tagging(("a", "b"), np.eye(2, dtype=bool)[[0] * 30], np.eye(2)[np.where(right, 0, 1)], exclusive=True)
    there = [[Event("a", 0.0, 1.0)]] * 30
    events = event_hits(there, [[Event("a", 0.0 if hit else 5.0, 1.0 if hit else 6.0)] for hit in right], ("a",))
    drawn = labels.drawn(labels.accuracy, seed=2)
    assert drawn == pytest.approx([draw @ right / 30 for draw in draws(30, seed=2)])
    assert [found.micro for found in events.drawn(seed=2)] == pytest.approx(drawn)
    low, high = words.interval(seed=2)
    assert (1 - high, 1 - low) == pytest.approx(inside(drawn))


def test_an_interval_is_that_of_scipy() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(6).exponential(size=50)
    drawn = np.array([draw @ values / 50 for draw in draws(50, samples=20_000)])
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0))
    assert inside(drawn) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
    assert inside(drawn, float(np.median(drawn))) == pytest.approx(inside(drawn), abs=1e-3)


def test_one_number_chooses_a_model() -> None:
    found, multi = some(exclusive=True), some()
    assert tagging(found.scores, found.targets.astype(np.float32), True) == {"accuracy": found.accuracy()}
    assert tagging(multi.scores, multi.targets.astype(np.float32), False) == {"mAP": multi.mean_average_precision()}


def test_scores_that_cannot_be_measured_are_refused() -> None:
    targets, scores = np.eye(4, dtype=bool), np.random.default_rng(0).random((4, 4))
    with pytest.raises(ValueError, match=r"at least one clip and of 4 labels, but they are \[4, 4\] and \[3, 4\]"):
        Tagging(LABELS, targets, scores[:3])
    with pytest.raises(ValueError, match="at least one clip"):
        Tagging(LABELS, targets[:0], scores[:0])
    with pytest.raises(ValueError, match="1 of 4 clips, clip 2 first"):
        Tagging(LABELS, targets, np.where(np.arange(4)[:, None] == 2, np.nan, scores))
    with pytest.raises(ValueError, match="must have one label, but clip 0 has 2"):
        Tagging(LABELS, targets | np.roll(targets, 1, 1), scores, exclusive=True)
    with pytest.raises(ValueError, match="confidence must be above 0 and below 1, but is 95"):
        Tagging(LABELS, targets, scores).interval(lambda draw: 0.0, confidence=95)


def recordings(seed: int, *, shifted: float = 0.0) -> list[list[Event]]:
    """Three recordings with events of three of the four labels, many close together; then the same moved about."""
    dice = np.random.default_rng(seed)
    starts = [sorted(dice.uniform(0, 8, size=12)) for _ in range(3)]
    names = [dice.integers(3, size=12) for _ in range(3)]
    lengths = [dice.uniform(0.1, 2, size=12) for _ in range(3)]
    moved = np.random.default_rng(seed + 100)
    events = []
    for rows in zip(starts, names, lengths, strict=True):
        one = []
        for start, name, length in zip(*rows, strict=True):
            begin = max(0.0, start + moved.normal(0, shifted) if shifted else start)
            one.append(Event(LABELS[name], begin, begin + length + (moved.normal(0, shifted / 9) if shifted else 0)))
        events.append(one)
    return [[event for event in one if event.end > event.start] for one in events]


def theirs(kind: str, there: list[list[Event]], found: list[list[Event]]) -> tuple[float, float, list[float]]:
    """Micro, macro and each class of sed_eval, over the classes that are there or found."""
    sed_eval = pytest.importorskip("sed_eval").sound_event
    labels = [label for label in LABELS if any(event.label == label for one in there + found for event in one)]
    measured = (
        sed_eval.SegmentBasedMetrics(labels, time_resolution=1.0)
        if kind == "segment"
        else sed_eval.EventBasedMetrics(labels, t_collar=0.2, percentage_of_length=0.2)
    )
    for pair in zip(there, found, strict=True):
        sides = [[{"event_label": e.label, "onset": e.start, "offset": e.end} for e in side] for side in pair]
        measured.evaluate(reference_event_list=sides[0], estimated_event_list=sides[1])
    every = measured.results_class_wise_metrics()
    return (
        measured.results_overall_metrics()["f_measure"]["f_measure"],
        measured.results_class_wise_average_metrics()["f_measure"]["f_measure"],
        [every[label]["f_measure"]["f_measure"] for label in labels],
    )


@pytest.mark.parametrize("kind", ["segment", "event"])
@pytest.mark.parametrize("seed", range(4))
def test_f1_in_time_is_that_of_sed_eval(kind: str, seed: int) -> None:
    there, found = recordings(seed), recordings(seed, shifted=0.15)
    found[1] = [] if seed == 3 else found[1][:-3]
    ours = {"segment": segment_hits, "event": event_hits}[kind](there, found, LABELS)
    micro, macro, classes = theirs(kind, there, found)
    assert 0.1 < micro < 0.99
    assert ours.micro == pytest.approx(micro) and ours.macro == pytest.approx(macro)
    assert ours.f1[~np.isnan(ours.f1)] == pytest.approx(classes) and np.isnan(ours.f1[3])


def test_events_are_matched_in_the_way_that_matches_most() -> None:
    dice = np.random.default_rng(5)
    for _ in range(40):
        near = dice.random((5, 5)) < 0.35
        most = max(
            sum(near[row, column] for row, column in enumerate(order)) for order in itertools.permutations(range(5))
        )
        assert matched([list(np.flatnonzero(row)) for row in near]) == most


def test_matching_a_chain_of_thousands_of_events_needs_no_deep_recursion() -> None:
    links = 1500
    near = [*([n, n + 1] for n in reversed(range(links))), [0]]
    assert matched(near) == links + 1


def test_nothing_there_and_nothing_found_is_no_measure_and_what_is_found_in_silence_is_wrong() -> None:
    for measure in (segment_hits, event_hits):
        nothing = measure([[], []], [[], []], LABELS)
        assert math.isnan(nothing.micro) and math.isnan(nothing.macro) and np.isnan(nothing.f1).all()
        false = measure([[]], [[Event("dog", 1.0, 2.0)]], LABELS)
        assert false.micro == 0 and false.macro == 0 and false.found.tolist() == [1, 0, 0, 0]
        missed = measure([[Event("dog", 1.0, 2.0)]], [[]], LABELS)
        assert missed.micro == 0 and missed.there.tolist() == [1, 0, 0, 0]


def test_an_end_may_be_late_by_a_fifth_of_the_event_and_a_beginning_may_not() -> None:
    there = [[Event("dog", 1.0, 11.0)]]
    assert event_hits(there, [[Event("dog", 1.2, 12.9)]], LABELS).micro == 1
    assert event_hits(there, [[Event("dog", 1.0, 13.1)]], LABELS).micro == 0
    assert event_hits(there, [[Event("dog", 1.3, 11.0)]], LABELS).micro == 0
    assert event_hits(there, [[Event("rain", 1.0, 11.0)]], LABELS).micro == 0


def test_events_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 1 of what is there and 2 of what was found"):
        event_hits([[]], [[], []], LABELS)
    with pytest.raises(ValueError, match="must be one of 4, dog, rain, siren, clock among them, but is 'cat'"):
        segment_hits([[Event("cat", 0.0, 1.0)]], [[]], LABELS)
    with pytest.raises(ValueError, match=r"dog lasts from 2\.0 to 1\.0 s"):
        segment_hits([[]], [[Event("dog", 2.0, 1.0)]], LABELS)
