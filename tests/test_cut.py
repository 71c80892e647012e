"""Long recordings in clips: all of them, in order, cut where it is quiet."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from test_session import pieces
from test_vad import LOUD, regions_of, strings, with_rests
from tiny import sound

from speechkit.cut import Clip, clips


def joined(found: list[Clip]) -> torch.Tensor:
    """The samples of clips that follow each other without gaps."""
    ends = [clip.start + len(clip.samples) for clip in found]
    assert [clip.start for clip in found] == [0, *ends[:-1]]
    return torch.cat([clip.samples for clip in found])


@pytest.mark.parametrize("seconds", [0.5, 1.9, 2.0, 2.1, 7.3])
def test_clips_are_the_recording_in_order_whatever_its_blocks(seconds: float) -> None:
    whole = sound(seconds)
    wanted = list(clips([whole], 16000, longest=2.0))
    assert torch.equal(joined(wanted), whole)
    assert all(len(clip.samples) <= 32000 for clip in wanted)
    assert all(len(clip.samples) >= 16000 for clip in wanted[:-1])
    for seed in range(3):
        found = list(clips(whole.split([*pieces(len(whole), seed), 0]), 16000, longest=2.0))
        assert [clip.start for clip in found] == [clip.start for clip in wanted]
        assert torch.equal(joined(found), whole)


def test_nothing_has_no_clips() -> None:
    assert list(clips([], 16000)) == list(clips([torch.zeros(0)], 16000)) == []
    assert list(clips([torch.zeros(80000)], 16000, vad=LOUD)) == []


def quietest(clip: torch.Tensor) -> float:
    """The mean level of the quietest 0.4 s in the second half, sample by sample: slow and obvious."""
    power = clip.unflatten(0, (-1, 160)).square().mean(1)
    levels = [float(10 * (part + 1e-10).log10().mean()) for part in power.unfold(0, 40, 1)[len(power) // 2 :]]
    return min(levels)


def test_a_cut_is_in_the_middle_of_the_quietest_place() -> None:
    for seed in range(5):
        whole = sound(9.0, seed)
        first, *_ = clips([whole], 16000, longest=8.0)
        around = whole[len(first.samples) - 3200 : len(first.samples) + 3200]
        level = float(10 * (around.unflatten(0, (-1, 160)).square().mean(1) + 1e-10).log10().mean())
        assert level == pytest.approx(quietest(whole[:128000]), abs=1e-3)


def test_a_click_does_not_spoil_a_pause() -> None:
    whole = 0.1 + sound(3.0)
    whole[24000:32000] = 0.0
    whole[28000] = 1.0
    first, _ = clips([whole], 16000, longest=2.5)
    assert 24000 <= len(first.samples) <= 32000


@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_real_recordings_with_pauses_are_never_cut_inside(recordings: Path, noise: float) -> None:
    whole, places = strings(recordings, "fsdd", 60, 0.6, noise)
    found = list(clips([whole], 16000, longest=8.0))
    assert len(found) > 5 and torch.equal(joined(found), whole)
    for clip in found[1:]:
        assert not any(first <= clip.start < end for first, end in places)


@pytest.mark.parametrize("seed", range(3))
def test_behind_voice_activity_clips_are_its_regions_and_long_ones_are_cut(seed: int) -> None:
    whole, dice = with_rests(seed, bursts=4), random.Random(seed)
    regions = regions_of(whole)
    wanted = [clip for start, end in regions for clip in shifted(start, clips([whole[start:end]], 16000, longest=2.0))]
    assert len(wanted) > len(regions) >= 2
    blocks = whole.split(dice.randrange(100, 50000))
    found = list(clips(blocks, 16000, longest=2.0, vad=LOUD))
    assert [clip.start for clip in found] == [clip.start for clip in wanted]
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(found, wanted, strict=True))


def shifted(by: int, found: object) -> list[Clip]:
    return [clip._replace(start=by + clip.start) for clip in found]
