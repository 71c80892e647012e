"""Searches that read texts off the attention decoder, token by token, alone or together with CTC."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchaudio.functional import forced_align

from speechkit.search.base import Beam, Whole, best_first, check, head
from speechkit.search.ctc import Followed, Greedy, follow
from speechkit.search.late import Late
from speechkit.search.prefix_scores import PrefixScores
from speechkit.types import BLANK, EncoderOutput, Hypothesis

# Attention alone may end only where ln P(end) is above this many times that of the best token (Hannun et al. 2019,
# arXiv 1904.02619). A decoder trained with label smoothing gives every token, the end too, some 1e-3 everywhere: a
# long text, which pays 0.1 a token, would lose against ending at once.
END_THRESHOLD = 1.5


class _Texts(NamedTuple):
    """The living texts of the utterances not yet finished: A of each, those with a score of -inf do not exist."""

    utterance: Int[Tensor, "B"]
    limit: Int[Tensor, "B"]
    ended: Float[Tensor, "B"]  # the best score of a text that has ended
    tokens: Int[Tensor, "B A L"]  # opened by the boundary
    attention: Float[Tensor, "B A"]  # ln P of the tokens
    score: Float[Tensor, "B A"]
    decoder: Any
    ctc: PrefixScores | None


class _LabelBeam(Late):
    """Beam search over texts, the tokens of all living texts of all utterances in one step of the decoder.

    A text is scored by ``(1 - ctc_weight) * ln P_attention``, plus ``ctc_weight`` times its CTC prefix score while it
    lives and the CTC probability of the whole of it when it ends. Every score can only fall as a text grows. So the
    search of an utterance may stop, and does, once a text has ended that scores no lower than any that lives. Its
    hypotheses are the texts that ended until then, often a single one.
    """

    def __init__(self, objective: nn.Module, *, beam: int, ctc_weight: float, tokens_per_frame: float) -> None:
        check(self, beam=beam, ctc_weight=ctc_weight)
        if not tokens_per_frame > 0:
            raise ValueError(
                f"{type(self).__name__}.tokens_per_frame must be above 0, but is {tokens_per_frame}; 1.0 allows one "
                f"token for every encoder frame."
            )
        self.attention = head(objective, "attention", self)
        self.ctc: Any = objective.ctc
        self.beam, self.ctc_weight, self.tokens_per_frame = beam, ctc_weight, tokens_per_frame

    def decide(self, encoded: EncoderOutput, beams: list[Beam]) -> list[Beam]:
        log_probs = self.ctc.log_probs(encoded.frames) if self.ctc else None
        results: list[Beam] = [[] for _ in beams]
        texts = self._start(encoded, log_probs if self.ctc_weight else None)
        while len(texts.utterance):
            texts = self._step(texts, results)
        if log_probs is not None:
            emissions = [e[:n] for e, n in zip(log_probs.float().cpu(), encoded.lengths.tolist(), strict=True)]
            results = [[align(h, e) for h in beam] for beam, e in zip(results, emissions, strict=True)]
        return [best_first(beam) for beam in results]

    def _start(self, encoded: EncoderOutput, log_probs: Tensor | None) -> _Texts:
        lengths = encoded.lengths
        nothing = torch.zeros(len(lengths), 1, dtype=torch.float64, device=lengths.device)
        return _Texts(
            utterance=torch.arange(len(lengths), device=lengths.device),
            limit=(lengths * self.tokens_per_frame).long().clamp(min=1),
            ended=nothing[:, 0] - torch.inf,
            tokens=torch.full_like(lengths, BLANK)[:, None, None],
            attention=nothing,
            score=nothing,
            decoder=self.attention.init_state(encoded),
            ctc=None if log_probs is None else PrefixScores.start(log_probs, lengths),
        )

    def _step(self, texts: _Texts, results: list[Beam]) -> _Texts:
        """Let every text end or grow by a token, note those that end, and keep the utterances that may improve."""
        log_probs, decoder = self.attention.step(texts.tokens[..., -1].flatten(), texts.decoder)
        log_probs = log_probs.double().unflatten(0, texts.score.shape)  # [B, A, V]
        tokens, attention, scores = self._candidates(texts, log_probs)
        kept = scores.flatten(1).topk(min(self.beam, scores[0].numel()))
        parents = kept.indices // scores.shape[-1]
        new = tokens.flatten(1).gather(1, kept.indices)
        self._note(texts, kept.values, parents, new, results)

        score = kept.values.masked_fill(new == BLANK, -torch.inf)
        ended = torch.maximum(texts.ended, kept.values.masked_fill(new != BLANK, -torch.inf).amax(1))
        rows = (score.amax(1) > ended).nonzero()[:, 0]
        history = texts.tokens.gather(1, parents[..., None].expand(-1, -1, texts.tokens.shape[-1]))
        return _Texts(
            utterance=texts.utterance[rows],
            limit=texts.limit[rows],
            ended=ended[rows],
            tokens=torch.cat([history, new[..., None]], dim=-1)[rows],
            attention=attention.flatten(1).gather(1, kept.indices)[rows],
            score=score[rows],
            decoder=self.attention.select(decoder, rows, (rows[:, None] * scores.shape[1] + parents[rows]).flatten()),
            ctc=texts.ctc and texts.ctc.select(rows).grow(parents[rows], new[rows]),
        )

    def _candidates(
        self, texts: _Texts, log_probs: Float[Tensor, "B A V"]
    ) -> tuple[Tensor, Tensor, Tensor]:  # each [B, A, C+1]
        """The end (first) and the tokens each text may go on with: which, their ln P, their scores."""
        # Attention alone can use no more than the beam of each text; twice that gives CTC a choice.
        best = log_probs[..., BLANK + 1 :].topk(min(2 * self.beam, log_probs.shape[-1] - 1))
        tokens = torch.cat([torch.full_like(best.indices[..., :1], BLANK), best.indices + BLANK + 1], dim=-1)
        attention = texts.attention[..., None] + log_probs.gather(-1, tokens)
        full = (texts.tokens.shape[-1] > texts.limit)[:, None]
        if texts.ctc is None:
            scores = attention.clone()
            may_end = (log_probs[..., BLANK] > END_THRESHOLD * best.values[..., 0]) | full
            scores[..., 0].masked_fill_(~may_end, -torch.inf)
        else:
            ctc = torch.cat([texts.ctc.whole()[..., None], texts.ctc.prefix(tokens[..., 1:])], dim=-1)
            scores = (1 - self.ctc_weight) * attention + self.ctc_weight * ctc
        scores[..., 1:].masked_fill_(full[..., None], -torch.inf)
        return tokens, attention, scores.masked_fill(texts.score[..., None] == -torch.inf, -torch.inf)

    def _note(self, texts: _Texts, scores: Tensor, parents: Tensor, new: Tensor, results: list[Beam]) -> None:
        for row, place in ((new == BLANK) & (scores > -torch.inf)).nonzero().tolist():
            tokens = tuple(texts.tokens[row, parents[row, place], 1:].tolist())
            results[texts.utterance[row]].append(Hypothesis(tokens, scores[row, place].item()))


class AttentionBeam(_LabelBeam):
    """The decoder alone, by beam search at the end of the utterance; while streaming it says nothing.

    The score of a hypothesis is ln P_attention, end included. A text may end only where the end is not much less
    likely than the best token (`END_THRESHOLD`), and has to when it reaches the limit; the search stops once nothing
    that lives can still win. Spans and confidences come from the forced alignment of the text where the objective has
    a CTC head and the text fits the frames; otherwise there are none.

    Args:
        beam: texts kept after every token.
        tokens_per_frame: length limit, in tokens for each encoder frame.

    Raises:
        ValueError: where the objective has no attention decoder, or an argument is out of range.
    """

    def __init__(self, objective: nn.Module, *, beam: int = 8, tokens_per_frame: float = 1.0) -> None:
        super().__init__(objective, beam=beam, ctc_weight=0.0, tokens_per_frame=tokens_per_frame)
        self.first = _Silent()


class JointBeam(_LabelBeam):
    """CTC and attention in one pass (Hori et al. 2017; Watanabe et al. 2017, section IV).

    The score of a hypothesis is ``ctc_weight * ln P_ctc + (1 - ctc_weight) * ln P_attention``. CTC sees to it that
    texts neither end early nor loop, so every text may end anywhere; no text is longer than its frames allow, and the
    search stops once nothing that lives can still win. Spans and confidences come from the forced alignment of the
    text.

    While streaming it says what `Greedy` says, and beside that keeps an empty hypothesis alive, because the end result
    may differ from the first token on.

    Args:
        beam: texts kept after every token.
        ctc_weight: share of the CTC score, above 0 and up to 1.

    Raises:
        ValueError: where the objective lacks one of both heads, or an argument is out of range.
    """

    def __init__(self, objective: nn.Module, *, beam: int = 8, ctc_weight: float = 0.5) -> None:
        if ctc_weight == 0:
            raise ValueError(
                "JointBeam.ctc_weight must be above 0 and up to 1, but is 0; for attention alone use AttentionBeam."
            )
        super().__init__(objective, beam=beam, ctc_weight=ctc_weight, tokens_per_frame=1.0)
        self.first = Greedy(objective)

    def step(self, encoded: EncoderOutput, state: list[Any]) -> tuple[list[Beam], list[Any]]:
        beams, state = super().step(encoded, state)
        return [[*beam, Hypothesis(score=-torch.inf)] for beam in beams], state


class _Silent(Whole):
    """A first pass that says nothing."""

    def init_state(self, batch: int) -> list[None]:
        return [None] * batch

    def step(self, encoded: EncoderOutput, state: list[None]) -> tuple[list[Beam], list[None]]:
        return self.finish(state), state

    def finish(self, state: list[None]) -> list[Beam]:
        return [[] for _ in state]


def align(hypothesis: Hypothesis, log_probs: Float[Tensor, "U V"]) -> Hypothesis:
    """The hypothesis with the spans and confidences of its most likely CTC path, if there is one at all."""
    tokens = hypothesis.tokens
    repeats = sum(a == b for a, b in pairwise(tokens))
    if not tokens or len(tokens) + repeats > len(log_probs):
        return hypothesis
    path, values = forced_align(log_probs[None].contiguous(), torch.tensor([tokens]), blank=BLANK)
    heard = follow(Followed(), path[0].tolist(), values[0].tolist()).reading
    return Hypothesis(tokens, hypothesis.score, heard.spans, heard.confidences)
