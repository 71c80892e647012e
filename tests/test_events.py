"""Events: from scores of frames by rules a person can check, and in recordings at the times they were put there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ast_cases import tiny
from torch import Tensor, nn

from speechkit import events
from speechkit.features import FrontEnd, LogMel
from speechkit.heads import LinearSoftmax
from speechkit.tagger import Tagger
from speechkit.types import EncoderOutput, Event

RATE, HOP = 16000, 0.010


def one(*scores: float) -> Tensor:
    return torch.tensor(scores)[:, None]


def test_an_event_is_each_stretch_of_frames_above_the_threshold() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.6], [0.2, 0.7], [0.6, 0.4]])
    assert events.found(scores, ["a", "b"], 0.5) == (
        Event("a", 0.0, 1.0, pytest.approx(0.85)),
        Event("b", 0.5, 1.5, pytest.approx(0.65)),
        Event("a", 1.5, 2.0, pytest.approx(0.6)),
    )
    assert events.found(scores, ["a", "b"], 0.5, total=1.8)[-1].end == 1.8
    assert events.found(scores[:0], ["a", "b"], 0.5) == ()


def test_with_a_low_threshold_an_event_begins_and_ends_there_but_must_reach_the_high_one() -> None:
    scores = one(0.1, 0.3, 0.8, 0.4, 0.3, 0.1, 0.4, 0.4, 0.1)
    assert events.found(scores, ["a"], 1.0, threshold=0.7, low=0.25) == (Event("a", 1.0, 5.0, pytest.approx(0.45)),)
    assert events.found(scores, ["a"], 1.0, threshold=0.7) == (Event("a", 2.0, 3.0, pytest.approx(0.8)),)


@pytest.mark.parametrize("width", [1, 3, 5, 9])
def test_the_median_is_that_of_scipy(width: int) -> None:
    from scipy.ndimage import median_filter

    scores = torch.rand(21, 3)
    wanted = median_filter(scores.numpy(), size=(width, 1), mode="nearest")
    assert np.array_equal(events.median(scores, width).numpy(), wanted)


def test_a_median_closes_a_gap_and_drops_a_click() -> None:
    scores = one(0.1, 0.9, 0.1, 0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.1)
    assert len(events.found(scores, ["a"], 1.0)) == 3
    (left,) = events.found(scores, ["a"], 1.0, width=3)
    assert (left.start, left.end) == (4.0, 9.0)


def test_frames_of_overlapping_pieces_are_averaged_and_gaps_are_filled() -> None:
    first, second, third = torch.full((4, 1), 0.2), torch.full((3, 1), 0.4), torch.full((4, 1), 0.8)
    joined = events.joined([(0, first), (5, second), (7, third)], 10)
    assert joined[:, 0].tolist() == pytest.approx([0.2] * 4 + [0.2] + [0.4] * 2 + [0.6] + [0.8] * 2)


def test_events_are_the_same_as_counting_frame_by_frame() -> None:
    scores = torch.rand(200, 2)
    for event in (found := events.found(scores, ["a", "b"], 0.1, threshold=0.6, low=0.4)):
        row, first, last = "ab".index(event.label), round(event.start * 10), round(event.end * 10)
        assert (scores[first:last, row] > 0.4).all() and scores[first:last, row].max() > 0.6
        assert first == 0 or scores[first - 1, row] <= 0.4
        assert last == 200 or scores[last, row] <= 0.4
    inside = {(e.label, n) for e in found for n in range(round(e.start * 10), round(e.end * 10))}
    assert all(("ab"[row], frame) in inside for frame, row in torch.argwhere(scores > 0.6).tolist())


class Loudness(nn.Module):
    """Two frames of features become one: how loud the low and the high bands are."""

    dim, stride = 2, 2

    def forward(self, features: Tensor, lengths: Tensor | None) -> EncoderOutput:
        pairs = features[:, : features.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)
        loud = torch.stack([half.max(-1).values for half in pairs.chunk(2, dim=-1)], dim=-1)
        full = torch.full((len(features),), loud.shape[1]) if lengths is None else lengths // 2
        return EncoderOutput(loud, full)


def by_loudness(**options: object) -> Tagger:
    """Hears a low and a high tone by their loudness."""
    features = FrontEnd(mel=LogMel(bands=16))
    tagger = Tagger(
        features=features, encoder=Loudness(), labels=("low", "high"), frames=300, head=LinearSoftmax, **options
    )
    tagger.head.norm, tagger.head.linear = nn.Identity(), nn.Linear(2, 2)
    with torch.no_grad():
        tagger.head.linear.weight.copy_(torch.eye(2))
        tagger.head.linear.bias.fill_(-22.0)
    return tagger.eval()


THERE = (("low", 0.5, 1.2), ("high", 1.0, 3.5), ("low", 2.9, 3.1), ("low", 7.3, 9.0), ("high", 8.0, 10.0))


def recording(seconds: float = 10.0) -> Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    sound = 1e-4 * torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    for label, start, end in THERE:
        tone = torch.sin(2 * math.pi * (300 if label == "low" else 4000) * time)
        sound += 0.3 * tone * ((time >= start) & (time < end))
    return sound


def test_events_of_a_recording_longer_than_the_window_have_its_times() -> None:
    found = by_loudness().events(recording(), median=0.0)
    assert [event.label for event in found] == [label for label, *_ in sorted(THERE, key=lambda e: e[1])]
    for event, (_, start, end) in zip(found, sorted(THERE, key=lambda e: e[1]), strict=True):
        assert event.start == pytest.approx(start, abs=0.03) and event.end == pytest.approx(end, abs=0.03)
        assert 0.5 < event.score <= 1


def test_an_event_ends_with_the_recording_although_the_model_hears_it_filled_up() -> None:
    tagger = by_loudness(filled=True)
    short = recording()[: round(1.15 * RATE)]
    assert max(event.end for event in tagger.events(short, median=0.0)) <= 1.15 + 1e-6
    scores, seconds, total = tagger.frame_scores(tagger.pieces(short))
    assert len(scores) == math.ceil(total / seconds - 1e-9) and total == pytest.approx(1.15, abs=0.02)


def test_frame_scores_of_a_transformer_are_those_of_its_windows() -> None:
    torch.manual_seed(0)
    features = FrontEnd(mel=LogMel(bands=40))
    tagger = Tagger(features=features, encoder=tiny(stride=8), labels=("a", "b", "c"), frames=96, head=LinearSoftmax)
    scores, seconds, total = tagger.frame_scores(tagger.eval().pieces(recording(2.0)))
    assert seconds == pytest.approx(0.08) and total == pytest.approx(2.0, abs=0.02)
    pieces = list(tagger.pieces(recording(2.0)))
    assert [piece.start for piece in pieces] == [0, 96, round(100 * total) - 96]
    first = tagger.head.frames(pieces[0].encoded)[0].sigmoid()
    torch.testing.assert_close(scores[: len(first)], first.detach())
    assert len(scores) == 25 and torch.isfinite(scores).all()


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("frames", [400, 150])
def test_clips_that_are_heard_together_have_the_scores_and_events_they_have_alone(filled: bool, frames: int) -> None:
    torch.manual_seed(1)
    tagger = Tagger(
        features=FrontEnd(mel=LogMel(bands=40)),
        encoder=tiny(stride=8, frames=400),
        labels=("a", "b", "c"),
        frames=frames,
        head=LinearSoftmax,
        filled=filled,
    ).eval()
    tagger.head.linear.weight.data *= 4.0  # so that there are events
    clips = [recording()[round(start * RATE) : round(end * RATE)] for start, end in ((0, 3.4), (2, 3.3), (7, 9.71))]
    lengths = torch.tensor([len(clip) for clip in clips])
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=torch.nan)
    together = [tagger.scores_and_events(pieces) for pieces in tagger.clips(padded, lengths)]
    assert sum(len(found) for _, found in together) >= 3
    for clip, (scores, found) in zip(clips, together, strict=True):
        torch.testing.assert_close(scores, tagger.scores(clip))
        alone = tagger.events(clip)
        assert [(e.label, e.start, e.end) for e in found] == [(e.label, e.start, e.end) for e in alone]
        assert [e.score for e in found] == pytest.approx([e.score for e in alone], abs=1e-5)


def test_a_long_clip_among_others_is_never_a_spectrogram_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tagger, sizes, stream = by_loudness(), [], LogMel.stream
    monkeypatch.setattr(LogMel, "stream", lambda mel, x, *rest: sizes.append(x.shape[1]) or stream(mel, x, *rest))
    both = tagger.clips(recording(30.0).expand(2, -1), torch.tensor([30 * RATE, RATE // 2]))
    counts = [len(list(pieces)) for pieces in both]
    assert counts[0] > counts[1] == 1 and max(sizes) <= 10 * RATE


def test_a_threshold_that_is_none_is_refused() -> None:
    for wrong in ({"threshold": 0.0}, {"threshold": 1.0}, {"threshold": 0.4, "low": 0.5}):
        with pytest.raises(ValueError, match="must be above 0 and below 1, and low no higher"):
            events.found(one(0.5), ["a"], 1.0, **wrong)
