"""Conformer: convolution-augmented Transformer (2005.08100), whole or streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from speechkit.encoders.chunked import ChunkedEncoder
from speechkit.layers import Convolution, FeedForward, Subsampling
from speechkit.stream import Context, Span, State, split

Frames = Float[Tensor, "B U D"]


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm (section 2.4, the "macaron")."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expansion: int,
        attention: Callable,
        convolution: Callable,
        feed_forward: Callable,
        dropout: float,
    ) -> None:
        super().__init__()
        self.feed_in = feed_forward(dim=dim, hidden=expansion * dim, dropout=dropout)
        self.attention = attention(dim=dim, heads=heads)
        self.convolution = convolution(dim=dim, dropout=dropout)
        self.feed_out = feed_forward(dim=dim, hidden=expansion * dim, dropout=dropout)
        self.norm_in, self.norm_attention, self.norm_convolution, self.norm_out, self.norm = (
            nn.LayerNorm(dim) for _ in range(5)
        )
        self.dropout = nn.Dropout(dropout)

    def init_state(self, batch: int, context: Context) -> State:
        return self.attention.init_state(batch, context), self.convolution.init_state(batch)

    def forward(self, x: Frames, span: Span, state: State | None = None) -> tuple[Frames, State | None]:
        attention, convolution = split(state, 2)
        x = x + 0.5 * self.feed_in(self.norm_in(x))
        y, attention = self.attention(self.norm_attention(x), span, attention)
        x = x + self.dropout(y)
        y, convolution = self.convolution(self.norm_convolution(x), span.lengths, convolution)
        x = x + y
        x = x + 0.5 * self.feed_out(self.norm_out(x))
        return self.norm(x), None if state is None else (attention, convolution)


class Conformer(ChunkedEncoder):
    """Conformer encoder.

    Args:
        features: mel bands of a feature frame.
        dim, heads, layers: the paper's S / M / L are 144, 4, 16 / 256, 4, 16 / 512, 8, 17.
        attention: one mechanism a layer, called as ``attention(dim=, heads=)``.
        subsampling: called as ``subsampling(features=, dim=, dropout=)``.
        convolution: called as ``convolution(dim=, dropout=)``.
        feed_forward: called as ``feed_forward(dim=, hidden=, dropout=)``.
        expansion: width of a feed-forward in units of ``dim``.
        dropout: share dropped after every module and sublayer.
        context: which frames see each other where a call does not say; the whole utterance unless given.
    """

    def __init__(
        self,
        *,
        features: int,
        dim: int,
        heads: int,
        layers: int,
        attention: Callable,
        subsampling: Callable = Subsampling,
        convolution: Callable = Convolution,
        feed_forward: Callable = FeedForward,
        expansion: int = 4,
        dropout: float = 0.1,
        context: Context = Context(),  # noqa: B008 - a frozen value
    ) -> None:
        super().__init__(subsampling=subsampling(features=features, dim=dim, dropout=dropout), dim=dim, context=context)
        self.blocks: Any = nn.ModuleList(
            ConformerBlock(
                dim=dim,
                heads=heads,
                expansion=expansion,
                attention=attention,
                convolution=convolution,
                feed_forward=feed_forward,
                dropout=dropout,
            )
            for _ in range(layers)
        )

    def init_body(self, batch: int, context: Context) -> State:
        return tuple(block.init_state(batch, context) for block in self.blocks)

    def body(self, x: Frames, span: Span, state: State | None) -> tuple[Frames, State | None]:
        after = []
        for block, before in zip(self.blocks, split(state, len(self.blocks)), strict=True):
            x, memory = block(x, span, before)
            after.append(memory)
        return x, None if state is None else tuple(after)
