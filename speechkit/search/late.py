"""Searches that decide at the end of an utterance: what they share, and the one that decides by two passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from speechkit.search.base import Beam, Search, Whole, best_first, check, head
from speechkit.search.ctc import PrefixBeam
from speechkit.stream import keep_valid
from speechkit.types import BLANK, EncoderOutput, Hypothesis


class _Kept(NamedTuple):
    """A stream: what the first pass remembers, and the frames so far."""

    first: Any
    frames: tuple[Tensor, ...]


class Late(Whole):
    """A search that listens along with a first pass, and decides at the end what was said.

    The frames it keeps are the memory a long utterance costs: 4 D bytes each, 1 kB at a width of 256 or 90 MB an hour.
    A session ends utterances by `Endpoint` long before.
    """

    first: Search

    def decide(self, encoded: EncoderOutput, beams: list[Beam]) -> list[Beam]:
        """The hypotheses of whole utterances, given those of the first pass."""
        raise NotImplementedError

    def init_state(self, batch: int) -> list[_Kept]:
        return [_Kept(item, ()) for item in self.first.init_state(batch)]

    @torch.no_grad()
    def step(self, encoded: EncoderOutput, state: list[_Kept]) -> tuple[list[Beam], list[_Kept]]:
        beams, items = self.first.step(encoded, [kept.first for kept in state])
        streams = zip(items, state, encoded.frames, encoded.lengths.tolist(), strict=True)
        # Copied, because a slice would keep the frames of the whole batch alive.
        return beams, [
            _Kept(item, (*old.frames, new[:n].clone()) if n else old.frames) for item, old, new, n in streams
        ]

    @torch.no_grad()
    def finish(self, state: list[_Kept]) -> list[Beam]:
        beams = self.first.finish([kept.first for kept in state])
        heard = [row for row, kept in enumerate(state) if kept.frames]
        results = [[Hypothesis()] for _ in state]
        if heard:
            frames = [torch.cat(state[row].frames) for row in heard]
            lengths = torch.tensor([len(f) for f in frames], device=frames[0].device)
            encoded = EncoderOutput(pad_sequence(frames, batch_first=True), lengths)
            for row, beam in zip(heard, self.decide(encoded, [beams[row] for row in heard]), strict=True):
                results[row] = beam
        return results


class Rescored(Late):
    """Two passes (U2, arXiv 2012.05481): CTC prefix beam as the sound comes, at the end the decoder weighs its n best.

    While streaming it says what `PrefixBeam` says; the final result is one of those texts, so `stable_prefix` holds.
    The score is ``ctc_weight * ln P_ctc + (1 - ctc_weight) * ln P_attention``; the paper's lambda, which adds the CTC
    score to a whole attention score, is a weight of lambda / (1 + lambda). Spans and confidences are those of CTC.

    Args:
        beam: hypotheses of the first pass.
        ctc_weight: share of the CTC score, 0 to 1.

    Raises:
        ValueError: where the objective lacks one of both heads, or an argument is out of range.
    """

    def __init__(self, objective: nn.Module, *, beam: int = 8, ctc_weight: float = 0.5) -> None:
        check(self, beam=beam, ctc_weight=ctc_weight)
        self.attention = head(objective, "attention", self)
        self.first = PrefixBeam(objective, beam=beam)
        self.ctc_weight = ctc_weight

    def decide(self, encoded: EncoderOutput, beams: list[Beam]) -> list[Beam]:
        width = max(len(beam) for beam in beams)
        beams = [beam + beam[:1] * (width - len(beam)) for beam in beams]  # as many for each, as the decoder wants them
        texts = [torch.tensor(h.tokens, dtype=torch.int64) for beam in beams for h in beam]
        lengths = torch.tensor([len(text) for text in texts], device=encoded.frames.device)
        tokens = pad_sequence(texts, batch_first=True, padding_value=BLANK).to(lengths.device)
        log_probs = self.attention.log_probs(encoded, tokens, lengths).gather(2, pad(tokens, (0, 1))[..., None])[..., 0]
        scores = keep_valid(log_probs.double(), lengths + 1).sum(1).unflatten(0, (-1, width)).tolist()
        return [self._weigh(beam, attention) for beam, attention in zip(beams, scores, strict=True)]

    def _weigh(self, beam: Beam, attention: list[float]) -> Beam:
        w = self.ctc_weight
        both = {h.tokens: replace(h, score=w * h.score + (1 - w) * a) for h, a in zip(beam, attention, strict=True)}
        return best_first(both.values())
