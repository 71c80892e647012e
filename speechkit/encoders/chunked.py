"""What chunked encoders share: subsampling, the clock, and one body for both ways of running."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.layers import Subsampling
from speechkit.stream import Context, Span, State, split
from speechkit.types import EncoderOutput


class ChunkedEncoder(nn.Module):
    """One body for both ways: ``forward`` is ``stream`` from a fresh state that nobody keeps.

    A subclass gives ``body`` and ``init_body``; subsampling and the clock are here. The state is
    ``(clock [B], subsampling, body)``: the clock counts the encoder frames each stream has had.
    """

    def __init__(self, *, subsampling: Subsampling, dim: int, context: Context) -> None:
        super().__init__()
        self.subsampling, self.dim, self.context = subsampling, dim, context
        self.stride = subsampling.stride

    @abstractmethod
    def body(
        self, x: Float[Tensor, "B U D"], span: Span, state: State | None
    ) -> tuple[Float[Tensor, "B U D"], State | None]: ...

    @abstractmethod
    def init_body(self, batch: int, context: Context) -> State: ...

    def forward(
        self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"], *, context: Context | None = None
    ) -> EncoderOutput:
        """Encode whole utterances.

        Args:
            features: ``[B, T, F]``; frames past a length may hold anything, NaN included.
            lengths: real feature frames of each.
            context: which frames see each other; the encoder's own unless given.
        """
        return self.stream(features, lengths, None, context=context)[0]

    def init_state(self, batch: int, *, context: Context | None = None) -> State:
        """The state of ``batch`` streams that have heard nothing.

        Raises:
            ValueError: where the context or a part of the encoder needs the whole utterance.
        """
        context = (context or self.context).streamable()
        clock = torch.zeros(batch, dtype=torch.long, device=self.subsampling.linear.weight.device)
        return clock, self.subsampling.init_state(batch), self.init_body(batch, context)

    def stream(
        self,
        chunk: Float[Tensor, "B T F"],
        lengths: Int[Tensor, "B"],
        state: State | None,
        *,
        context: Context | None = None,
    ) -> tuple[EncoderOutput, State | None]:
        """Encode the next features of each stream. A length of 0 is a paused stream, a short one a last chunk."""
        clock, front, body = split(state, 3)
        x, lengths, front = self.subsampling(chunk, lengths, front)
        span = Span(torch.zeros_like(lengths) if clock is None else clock, lengths, context or self.context)
        x, body = self.body(x, span, body)
        return EncoderOutput(x, lengths), None if state is None else (span.start + lengths, front, body)
