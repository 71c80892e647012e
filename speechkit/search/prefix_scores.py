"""How likely CTC finds it that a transcript begins with a text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from speechkit.stream import keep_valid, take, valid
from speechkit.types import BLANK


class PrefixScores(NamedTuple):
    """CTC prefix scores (Watanabe et al. 2017, algorithm 2) of A texts for each of B utterances, in float64.

    ``token[b, a, t]`` and ``blank[b, a, t]`` are ln of the summed probability of all paths over the first t frames that
    read as text a, ending in its last token and in a blank. The paper fills them frame by frame. Here each is one
    cumulative sum: with x the log probabilities of the token a text grows by, and p(t) the paths it grows from,

        token(t) = x(t) + ln(e^token(t-1) + e^p(t-1))   and so, with X the cumulative sum of x,
        token(t) = X(t) + ln sum over s <= t of e^(p(s-1) - X(s-1)).

    X reaches thousands while the sum is wanted to 1e-6 and better, hence float64.
    """

    log_probs: Float[Tensor, "B U V"]
    lengths: Int[Tensor, "B"]
    last: Int[Tensor, "B A"]
    token: Float[Tensor, "B A U+1"]
    blank: Float[Tensor, "B A U+1"]

    @classmethod
    def start(cls, log_probs: Float[Tensor, "B U V"], lengths: Int[Tensor, "B"]) -> PrefixScores:
        """The empty text of every utterance; frames beyond ``lengths`` may hold anything."""
        log_probs = keep_valid(log_probs, lengths)
        last = torch.full_like(lengths, BLANK)[:, None]
        blank = pad(log_probs[:, None, :, BLANK].double().cumsum(-1), (1, 0))
        return cls(log_probs, lengths, last, torch.full_like(blank, -torch.inf), blank)

    def prefix(self, tokens: Int[Tensor, "B A C"]) -> Float[Tensor, "B A C"]:
        """ln P(the transcript begins with text a and then token c)."""
        x = self._of(tokens.flatten(1)).unflatten(1, tokens.shape[1:])  # [B, A, C, U]
        x = x.masked_fill(~valid(self.lengths, x.shape[-1])[:, None, None], -torch.inf)
        repeat = (tokens == self.last[..., None])[..., None]
        before = torch.where(repeat, self.blank[:, :, None], self._all()[:, :, None])
        return (before[..., :-1] + x).logsumexp(-1)

    def whole(self) -> Float[Tensor, "B A"]:
        """ln P(the transcript is text a): the negative CTC loss."""
        end = self.lengths[:, None, None].expand(-1, self.last.shape[1], 1)
        return self._all().gather(-1, end)[..., 0]

    def select(self, rows: Int[Tensor, "R"]) -> PrefixScores:
        """The scores of some utterances, in their order."""
        return self if len(rows) == len(self.lengths) else take(self, rows.tolist())

    def grow(self, parents: Int[Tensor, "B a"], tokens: Int[Tensor, "B a"]) -> PrefixScores:
        """The texts ``parents``, each longer by its token; parents may repeat or be left out."""
        rows = parents[..., None].expand(-1, -1, self.blank.shape[-1])
        repeat = (tokens == self.last.gather(1, parents))[..., None]
        before = torch.where(repeat, self.blank.gather(1, rows), self._all().gather(1, rows))
        token = _accumulate(before, self._of(tokens))
        blank = _accumulate(token, self._of(torch.full_like(tokens, BLANK)))
        return self._replace(last=tokens, token=token, blank=blank)

    def _all(self) -> Float[Tensor, "B A U+1"]:
        return torch.logaddexp(self.token, self.blank)

    def _of(self, tokens: Int[Tensor, "B n"]) -> Float[Tensor, "B n U"]:
        """The log probabilities of some tokens over time, in float64."""
        index = tokens[:, None].expand(-1, self.log_probs.shape[1], -1)
        return self.log_probs.gather(2, index).double().transpose(1, 2)


def _accumulate(before: Float[Tensor, "B a U+1"], x: Float[Tensor, "B a U"]) -> Float[Tensor, "B a U+1"]:
    """``out(t) = x(t) + ln(e^out(t-1) + e^before(t-1))`` from ``out(0) = -inf``."""
    X = pad(x.cumsum(-1), (1, 0))
    out = X[..., 1:] + (before - X)[..., :-1].logcumsumexp(-1)
    return pad(out, (1, 0), value=-torch.inf)
