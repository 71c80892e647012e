"""Heads of a tagger: what an encoder gave of a clip becomes a logit for each class.

A head is called with an `EncoderOutput` and gives the logits of whole clips; `Head.frames` gives those of each encoder
frame, by the same classifier: those of a clip that is this frame alone (but for `Summary`). Frames past a length change
nothing. In configs a head is a factory, called as ``head(dim=encoder.dim, classes=len(labels))``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.stream import keep_valid, valid
from speechkit.types import EncoderOutput

Loss = Callable[[Float[Tensor, "B C"]], Float[Tensor, ""]]


class Head(nn.Module):
    """Layer norm and a linear map of what a subclass makes of a clip, a vector.

    Args:
        dim: width of the encoder's frames.
        classes: how many there are.
        eps: of the layer norm.
        dropout: of the vector, in training.
    """

    def __init__(self, *, dim: int, classes: int, eps: float = 1e-5, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.dropout, self.linear = nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout), nn.Linear(dim, classes)

    @abstractmethod
    def pooled(self, encoded: EncoderOutput) -> Float[Tensor, "B D"]:
        """One vector of each clip."""

    def forward(self, encoded: EncoderOutput) -> Float[Tensor, "B C"]:
        """A logit of each class for each clip."""
        return self.classified(self.pooled(encoded))

    def frames(self, encoded: EncoderOutput) -> Float[Tensor, "B U C"]:
        """A logit of each class for each encoder frame; those past a length mean nothing."""
        return self.classified(encoded.frames)

    def learn(self, encoded: EncoderOutput, loss: Loss) -> dict[str, Float[Tensor, ""]]:
        """``loss`` of a batch in training, and its named parts where it has several.

        Args:
            loss: of the logits of the batch.
        """
        return {"loss": loss(self(encoded))}

    def classified(self, x: Float[Tensor, "*_ D"]) -> Float[Tensor, "*_ C"]:
        return self.linear(self.dropout(self.norm(x)))


class Summary(Head):
    """The encoder's own summary, AST's class token (2104.01778)."""

    def pooled(self, encoded: EncoderOutput) -> Float[Tensor, "B D"]:
        """The summary.

        Raises:
            ValueError: where the encoder gives none.
        """
        if encoded.summary is None:
            raise ValueError(
                "heads.Summary must be given an encoder with a summary, as AST has, but this one gives frames alone; "
                "choose head=mean."
            )
        return encoded.summary


class Mean(Head):
    """The mean of all real frames."""

    def pooled(self, encoded: EncoderOutput) -> Float[Tensor, "B D"]:
        count = encoded.lengths.clamp(min=1)[:, None]
        return keep_valid(encoded.frames, encoded.lengths).sum(1) / count


class Statistics(Head):
    """Mean and standard deviation of all real frames, side by side (x-vectors, Snyder et al. 2018, section 2.1)."""

    def __init__(self, *, dim: int, classes: int, eps: float = 1e-5, dropout: float = 0.0) -> None:
        super().__init__(dim=2 * dim, classes=classes, eps=eps, dropout=dropout)

    def pooled(self, encoded: EncoderOutput) -> Float[Tensor, "B D2"]:
        x, count = keep_valid(encoded.frames, encoded.lengths), encoded.lengths.clamp(min=1)[:, None]
        mean = x.sum(1) / count
        variance = keep_valid((x - mean[:, None]).square(), encoded.lengths).sum(1) / count
        return torch.cat([mean, _deviation(variance)], dim=-1)

    def frames(self, encoded: EncoderOutput) -> Float[Tensor, "B U C"]:
        return self.classified(torch.cat([encoded.frames, _deviation(torch.zeros_like(encoded.frames))], dim=-1))


class LinearSoftmax(Head):
    """For events: a clip has the probability ``sum p^2 / sum p`` of its frames' p (1810.09050, table 1).

    A frame weighs as much as it is sure, so that clips with labels teach when their sounds are. Probabilities are
    sigmoids, and pooled by themselves for each class.
    """

    def forward(self, encoded: EncoderOutput) -> Float[Tensor, "B C"]:
        logits = self.frames(encoded._replace(frames=keep_valid(encoded.frames, encoded.lengths)))
        return _pooled_logits(logits, F.logsigmoid(logits), encoded.lengths)


class Attention(Head):
    """For events too: a clip has the mean of its frames' probabilities, weighed by learned attention.

    The weights are a softmax over time, for each class by itself (1711.00927, equation 8, as in PSLA, 2102.01243).
    """

    def __init__(self, *, dim: int, classes: int, eps: float = 1e-5, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, classes=classes, eps=eps, dropout=dropout)
        self.attention = nn.Linear(dim, classes)

    def forward(self, encoded: EncoderOutput) -> Float[Tensor, "B C"]:
        x = self.dropout(self.norm(keep_valid(encoded.frames, encoded.lengths)))
        return _pooled_logits(self.linear(x), self.attention(x), encoded.lengths)


class Gated(Head):
    """The mean of frames weighed by gated attention (1802.04712, equation 9); with ``entropy``, AEM (2406.15303).

    AEM adds ``entropy * sum a log a`` of the weights a to the loss, so that attention does not stick to few frames.

    Args:
        hidden: width of the attention's two maps.
        entropy: weight of AEM's term, 0.1 in its paper's code; 0 is without.
    """

    def __init__(
        self,
        *,
        dim: int,
        classes: int,
        hidden: int = 128,
        entropy: float = 0.0,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim=dim, classes=classes, eps=eps, dropout=dropout)
        self.attention, self.entropy = GatedAttention(dim=dim, hidden=hidden, branches=1), entropy

    def pooled(self, encoded: EncoderOutput) -> Float[Tensor, "B D"]:
        return self._attended(encoded)[0]

    def learn(self, encoded: EncoderOutput, loss: Loss) -> dict[str, Float[Tensor, ""]]:
        vector, weights = self._attended(encoded)
        fit = loss(self.classified(vector))
        if not self.entropy:
            return {"loss": fit}
        entropy = -(weights * weights.clamp(min=1e-12).log()).sum((1, 2)).mean()
        return {"loss": fit - self.entropy * entropy, "fit": fit, "entropy": entropy}

    def _attended(self, encoded: EncoderOutput) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B U 1"]]:
        x = keep_valid(encoded.frames, encoded.lengths)
        weights = _weights(self.attention(x), encoded.lengths)
        return (weights * x).sum(1), weights


class Branches(Head):
    """Several gated attentions that learn to look at different frames, none of them at few (ACMIL, 2311.07125).

    A clip is classified from the mean of the branches' weights. In training each branch also has a classifier and a
    loss of its own (semantic regularisation), the cosines of their weights are added (diversity), and of the frames
    with most weight some are hidden at random (stochastic top-k masking). The paper's settings are the defaults.

    Args:
        branches: how many.
        hidden: width of each attention's two maps.
        top: frames of most weight that may be hidden, of each branch; never all of a clip.
        masked: the probability that such a frame is.

    Raises:
        ValueError: where ``branches`` is less than 2.
    """

    def __init__(
        self,
        *,
        dim: int,
        classes: int,
        branches: int = 5,
        hidden: int = 128,
        top: int = 10,
        masked: float = 0.6,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim=dim, classes=classes, eps=eps, dropout=dropout)
        if branches < 2:
            raise ValueError(f"Branches.branches must be at least 2, but is {branches}; a single one is heads.Gated.")
        self.attention = GatedAttention(dim=dim, hidden=hidden, branches=branches)
        self.own = nn.ModuleList(nn.Linear(dim, classes) for _ in range(branches))
        self.top, self.masked = top, masked

    def pooled(self, encoded: EncoderOutput) -> Float[Tensor, "B D"]:
        vectors, _ = self._attended(encoded)
        return vectors.mean(1)

    def learn(self, encoded: EncoderOutput, loss: Loss) -> dict[str, Float[Tensor, ""]]:
        vectors, weights = self._attended(encoded)
        fit = loss(self.classified(vectors.mean(1)))
        each = self.dropout(self.norm(vectors)).unbind(1)
        own = [loss(linear(vector)) for linear, vector in zip(self.own, each, strict=True)]
        pairs = [F.cosine_similarity(a, b, dim=1) for a, b in combinations(weights.unbind(2), 2)]
        branches, likeness = torch.stack(own).mean(), torch.stack(pairs).mean()
        return {"loss": fit + branches + likeness, "fit": fit, "branches": branches, "likeness": likeness}

    def _attended(self, encoded: EncoderOutput) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B U M"]]:
        x, lengths = keep_valid(encoded.frames, encoded.lengths), encoded.lengths
        scores = self.attention(x)
        if self.training:
            scores = scores.masked_fill(self._hidden(scores, lengths), -torch.inf)
        weights = _weights(scores, lengths)
        return weights.mT @ x, weights

    def _hidden(self, scores: Float[Tensor, "B U M"], lengths: Int[Tensor, "B"]) -> Tensor:
        """Which frames are not seen: of each branch, some of those with most weight."""
        known = scores.masked_fill(~valid(lengths, scores.shape[1])[..., None], -torch.inf)
        rank = known.argsort(dim=1, descending=True).argsort(dim=1)
        most = (lengths - 1).clamp(max=self.top)[:, None, None]
        return (rank < most) & (torch.rand_like(scores) < self.masked)


class GatedAttention(nn.Module):
    """A score for each frame and branch: ``w (tanh(V x) * sigmoid(U x))`` (1802.04712, equation 9)."""

    def __init__(self, *, dim: int, hidden: int, branches: int) -> None:
        super().__init__()
        self.norm, self.value, self.gate = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, branches)

    def forward(self, x: Float[Tensor, "B U D"]) -> Float[Tensor, "B U M"]:
        x = self.norm(x)
        return self.score(self.value(x).tanh() * self.gate(x).sigmoid())


def _weights(scores: Float[Tensor, "B U M"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B U M"]:
    """A softmax over the real frames; over the first one where there is none."""
    real = valid(lengths.clamp(min=1), scores.shape[1])[..., None]
    return scores.masked_fill(~real, -torch.inf).softmax(1)


def _pooled_logits(
    logits: Float[Tensor, "B U C"], scores: Float[Tensor, "B U C"], lengths: Int[Tensor, "B"]
) -> Float[Tensor, "B C"]:
    """The logit of the probability ``sum a sigmoid(logit)`` whose weights a are a softmax of scores over real frames.

    As the difference of ``log sum a p`` and ``log sum a (1 - p)``: finite where p is nearly 0 or 1.
    """
    real = valid(lengths.clamp(min=1), logits.shape[1])[..., None]
    scores = scores.float().masked_fill(~real, -torch.inf)
    p, rest = (F.logsigmoid(sign * logits.float()) for sign in (1, -1))
    return (scores + p).logsumexp(1) - (scores + rest).logsumexp(1)


def _deviation(variance: Tensor) -> Tensor:
    return variance.clamp(min=1e-10).sqrt()  # the gradient of a root is infinite at 0
