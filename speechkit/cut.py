"""Long recordings in clips that a model can hear whole, each from a fresh state.

A cut between words loses none of them, so the place is what counts: the quietest one there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from speechkit.types import Seconds
from speechkit.vad import Piece, Vad

LONGEST: Seconds = 20.0
HOP, PAUSE = 0.01, 40  # seconds of a level; how many of them are averaged: a pause counts, not the stop of a consonant
FLOOR = 1e-10  # -100 dB of full scale


class Clip(NamedTuple):
    """A stretch of a recording."""

    start: int  # samples from its beginning
    samples: Float[Tensor, "N"]


def clips(
    blocks: Iterable[Float[Tensor, "N"]], sample_rate: int, *, longest: Seconds = LONGEST, vad: Vad | None = None
) -> Iterator[Clip]:
    """A recording, given in blocks of any size, in clips of at most ``longest`` seconds; all of it, in order.

    Where it has to be cut, it is between half of ``longest`` and all, where the level over 0.4 s is lowest. Memory does
    not grow with its length, and the clips do not depend on the blocks.

    Args:
        vad: leaves out what is not speech, and cuts there first.
    """
    for region in _regions(blocks, vad):
        yield from _cut(region, sample_rate, round(longest * sample_rate))


def _regions(blocks: Iterable[Tensor], vad: Vad | None) -> Iterator[Iterator[Piece]]:
    """Each stretch that is heard, as its pieces; to be used up one after the other."""
    pieces = _voiced(blocks, vad) if vad else _all(blocks)
    for piece in pieces:
        yield _until_over(piece, pieces)


def _voiced(blocks: Iterable[Tensor], vad: Vad) -> Iterator[Piece]:
    voices = vad.open()
    for block in blocks:
        yield from voices.push(block)
    yield from voices.finish()


def _all(blocks: Iterable[Tensor]) -> Iterator[Piece]:
    start = 0
    for block in blocks:
        yield Piece(start, block, False)
        start += len(block)
    yield Piece(start, torch.zeros(0), True)


def _until_over(piece: Piece, following: Iterator[Piece]) -> Iterator[Piece]:
    yield piece
    while not piece.over:
        piece = next(following)
        yield piece


def _cut(region: Iterable[Piece], sample_rate: int, longest: int) -> Iterator[Clip]:
    held, start = torch.zeros(0), -1
    for piece in region:
        start = piece.start if start < 0 else start
        held = torch.cat([held, piece.samples])
        while len(held) > longest:
            end = _quietest(held[:longest], sample_rate)
            yield Clip(start, held[:end])
            held, start = held[end:], start + end
    if len(held):
        yield Clip(start, held)


def _quietest(samples: Float[Tensor, "N"], sample_rate: int) -> int:
    """Where in the second half the level is lowest. In decibels, so that a click in a pause counts for little."""
    hop = max(1, round(HOP * sample_rate))
    power = samples[: len(samples) // hop * hop].unflatten(0, (-1, hop)).square().mean(1)
    pause = min(PAUSE, len(power) // 2)
    levels = F.avg_pool1d((power + FLOOR).log10()[None], pause, stride=1)[0]  # of the frames from i to i + pause
    first = len(power) // 2
    return (first + int(levels[first:].argmin()) + pause // 2) * hop
