"""Squeezeformer (2206.00888): a Conformer whose middle runs at half the frame rate, whole or streamed.

Two clocks. The outer blocks see one frame for every ``stride`` features, the middle ones (from ``reduce`` up to
``recover``) one for every two of those; on the way back each slow frame is repeated twice and the outer frames from
before the reduction are added (section 3.1, "temporal U-Net"). A context of 16 outer frames is one of 8 slow frames,
so what a frame may see is the same stretch of sound on both clocks, and a chunk that is even on the outer clock ends
on a whole slow frame: this is all that streaming asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from speechkit.encoders.chunked import ChunkedEncoder
from speechkit.layers import BatchNorm, Convolution, DepthwiseConv, FeedForward, Linear, Scale, Subsampling
from speechkit.stream import Context, Span, State, split

Frames = Float[Tensor, "B U D"]
HALF = 2  # the middle's clock
PUBLISHED_SUBSAMPLING = partial(Subsampling, separable=True)
PUBLISHED_CONVOLUTION = partial(Convolution, gated=False, norm=BatchNorm)


class SqueezeformerBlock(nn.Module):
    """Attention, feed-forward, convolution, feed-forward; a scale before each and a norm after (section 3.2)."""

    def __init__(
        self, *, dim: int, heads: int, expansion: int, attention: Callable, convolution: Callable, dropout: float
    ) -> None:
        super().__init__()
        self.attention = attention(dim=dim, heads=heads)
        self.convolution = convolution(dim=dim, dropout=dropout)
        self.feed_a, self.feed_b = (FeedForward(dim=dim, hidden=expansion * dim, dropout=dropout) for _ in range(2))
        self.scales = nn.ModuleList(Scale(dim) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def init_state(self, batch: int, context: Context) -> State:
        return self.attention.init_state(batch, context), self.convolution.init_state(batch)

    def forward(self, x: Frames, span: Span, state: State | None = None) -> tuple[Frames, State | None]:
        attention, convolution = split(state, 2)
        y, attention = self.attention(self.scales[0](x), span, attention)
        x = self.norms[0](x + self.dropout(y))
        x = self.norms[1](x + self.feed_a(self.scales[1](x)))
        y, convolution = self.convolution(self.scales[2](x), span.lengths, convolution)
        x = self.norms[2](x + y)
        x = self.norms[3](x + self.feed_b(self.scales[3](x)))
        return x, None if state is None else (attention, convolution)


class Squeezeformer(ChunkedEncoder):
    """Squeezeformer encoder.

    Args:
        features: mel bands of a feature frame.
        dim, heads, layers: the published XS / S / SM / M / ML / L are 144, 4, 16 / 196, 4, 18 / 256, 4, 16 /
            324, 4, 20 / 512, 8, 18 / 640, 8, 22.
        reduce: block before which the clock is halved; the one before the middle unless given.
        recover: block before which it is restored; the last unless given.
        attention, subsampling, convolution, expansion, dropout, context: as for `Conformer`.
    """

    def __init__(
        self,
        *,
        features: int,
        dim: int,
        heads: int,
        layers: int,
        attention: Callable,
        reduce: int | None = None,
        recover: int | None = None,
        subsampling: Callable = PUBLISHED_SUBSAMPLING,
        convolution: Callable = PUBLISHED_CONVOLUTION,
        expansion: int = 4,
        dropout: float = 0.1,
        context: Context = Context(),  # noqa: B008 - a frozen value
    ) -> None:
        super().__init__(subsampling=subsampling(features=features, dim=dim, dropout=dropout), dim=dim, context=context)
        self.reduce = layers // 2 - 1 if reduce is None else reduce
        self.recover = layers - 1 if recover is None else recover
        if not 0 <= self.reduce < self.recover < layers:
            raise ValueError(
                f"Squeezeformer must have 0 <= reduce < recover < layers = {layers}, but reduce is {self.reduce} and "
                f"recover is {self.recover}."
            )
        self.norm = nn.LayerNorm(dim)
        self.blocks: Any = nn.ModuleList(
            SqueezeformerBlock(
                dim=dim,
                heads=heads,
                expansion=expansion,
                attention=attention,
                convolution=convolution,
                dropout=dropout,
            )
            for _ in range(layers)
        )
        self.shrink = DepthwiseConv(dim=dim, kernel=5, stride=HALF)
        self.shrink_out = Linear(dim, dim)
        self.grow = Linear(dim, dim)

    def init_body(self, batch: int, context: Context) -> State:
        slow = context.slower(HALF)
        blocks = (
            block.init_state(batch, slow if self.reduce <= i < self.recover else context)
            for i, block in enumerate(self.blocks)
        )
        return (self.shrink.init_state(batch), *blocks)

    def body(self, x: Frames, span: Span, state: State | None) -> tuple[Frames, State | None]:
        tail, *before = split(state, 1 + len(self.blocks))
        x = self.norm(x)
        x, first = self._run(x, span, before, 0, self.reduce)
        slow, tail = self.shrink(x, span.lengths, tail)
        slow, middle = self._run(self.shrink_out(slow), span.slower(HALF), before, self.reduce, self.recover)
        x = x + self.grow(torch.repeat_interleave(slow, HALF, dim=1)[:, : x.shape[1]])
        x, last = self._run(x, span, before, self.recover, len(self.blocks))
        return x, None if state is None else (tail, *first, *middle, *last)

    def _run(self, x: Frames, span: Span, states: list[State], start: int, stop: int) -> tuple[Frames, list[State]]:
        after = []
        for block, state in zip(self.blocks[start:stop], states[start:stop], strict=True):
            x, state = block(x, span, state)
            after.append(state)
        return x, after
