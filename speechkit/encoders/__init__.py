"""Encoders: features in, frames out, whole or streamed by the same lines."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from speechkit.encoders.ast import AST
from speechkit.encoders.chunked import ChunkedEncoder
from speechkit.encoders.conformer import Conformer
from speechkit.encoders.squeezeformer import Squeezeformer
from speechkit.encoders.wav2vec2 import Wav2Vec2
from speechkit.stream import Context, State
from speechkit.types import EncoderOutput


@runtime_checkable
class AudioEncoder(Protocol):
    """Anything that turns features into frames of width ``dim``, one for every ``stride`` feature frames."""

    dim: int
    stride: int

    def forward(self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"]) -> EncoderOutput: ...


@runtime_checkable
class StreamingEncoder(Protocol):
    """An `AudioEncoder` that can also be fed chunk by chunk, with equal results (`speechkit.testing.verify_stream`).

    ``context`` is in encoder frames; the default may be overridden at each call. A chunk that is not the last of its
    stream must be a multiple of ``context.chunk * stride`` feature frames.
    """

    dim: int
    stride: int
    context: Context

    def forward(
        self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"], *, context: Context | None = None
    ) -> EncoderOutput: ...

    def init_state(self, batch: int, *, context: Context | None = None) -> State: ...

    def stream(
        self,
        chunk: Float[Tensor, "B T F"],
        lengths: Int[Tensor, "B"],
        state: State,
        *,
        context: Context | None = None,
    ) -> tuple[EncoderOutput, State]: ...


__all__ = ["AST", "AudioEncoder", "ChunkedEncoder", "Conformer", "Squeezeformer", "StreamingEncoder", "Wav2Vec2"]
