"""Heads of a tagger: what an encoder gave of a clip becomes a logit for each class.

A head is called with an `EncoderOutput` and gives the logits of whole clips; `Head.frames` gives those of each encoder
frame, by the same classifier. Frames past a length change nothing. In configs a head is a factory, called as
``head(dim=encoder.dim, classes=len(labels))``.
"""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from speechkit.stream import keep_valid
from speechkit.types import EncoderOutput


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
