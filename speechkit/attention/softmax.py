"""Multi-head softmax attention with remembered keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from speechkit import kernels
from speechkit.attention.attend import Kernel, Pattern, attend
from speechkit.attention.positions import ScoreTerm
from speechkit.attention.ring import Ring
from speechkit.layers import Linear
from speechkit.stream import Context, Span


class Softmax(nn.Module):
    """Multi-head attention (1706.03762) over the keys a `Context` shows; a stream remembers ``context.left`` of them.

    Args:
        dim: width of a frame.
        heads: heads of the queries.
        kv_heads: heads of keys and values, a divisor of ``heads`` (grouped, 2305.13245); 1 is multi-query.
        position: how positions score, called as ``position(dim=, heads=)``; none unless given.
        pattern: which of the visible keys to look at.
        bias: whether the four linear maps add one.
        dropout: share of the attention weights dropped in training.
        kernel: ``auto`` streams through the fused operator where one serves (see `speechkit.kernels.explain`), and else
            does as `attend`; ``fused`` insists on it; the others are those of `attend`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        position: Callable[..., ScoreTerm] = ScoreTerm,
        pattern: Pattern | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        kernel: Kernel | Literal["fused"] = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if dim % heads:
            raise ValueError(f"Softmax.dim must be a multiple of heads, {heads}, but is {dim}.")
        if heads % kv_heads:
            raise ValueError(f"Softmax.kv_heads must divide heads, {heads}, but is {kv_heads}.")
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.query = Linear(dim, dim, bias=bias)
        self.key = Linear(dim, kv_heads * self.width, bias=bias)
        self.value = Linear(dim, kv_heads * self.width, bias=bias)
        self.out = Linear(dim, dim, bias=bias)
        self.position = position(dim=dim, heads=heads)
        self.pattern, self.dropout, self.kernel = pattern, dropout, kernel

    def init_state(self, batch: int, context: Context) -> Ring:
        """Room for the frames a chunk may see and for the chunk itself. No key is remembered yet."""
        size = context.memory() + context.latency()
        cache = self.out.new_zeros(batch, 2, self.kv_heads, size, self.width)
        return Ring(cache, self.position.init_scores(batch, size, cache))

    def forward(
        self, x: Float[Tensor, "B U D"], span: Span, state: Ring | None = None
    ) -> tuple[Float[Tensor, "B U D"], Ring | None]:
        q, k, v = self._project(x)
        position = span.positions(x.shape[1])
        q, k = self.position.place(q, k, position)
        if state is not None and self._fuses(x):
            y = self._fused(q, k, v, position, span, state)
        else:
            y, state = self._attend(q, k, v, position, span, state)
        return self.out(y.flatten(2)), state

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, span: Span, state: Ring | None
    ) -> tuple[Tensor, Ring | None]:
        keys, values = k, v
        if state is not None:
            past = state.recall(span.start, span.context.memory())
            keys, values = (torch.cat([old, new], dim=1) for old, new in zip(past, (k, v), strict=True))
            state = state.remember(k, v, self.position.key_scores(position), span.start, span.lengths)
        dropout = self.dropout if self.training else 0.0
        kernel: Kernel = "auto" if self.kernel == "fused" else self.kernel
        y = attend(q, keys, values, span, term=self.position, pattern=self.pattern, dropout=dropout, kernel=kernel)
        return y, state

    def _fuses(self, x: Tensor) -> bool:
        if self.kernel not in ("auto", "fused") or torch.is_grad_enabled():
            return False
        if self.pattern is None and self.position.fusable and kernels.serves("stream_attn", x):
            return True
        if self.kernel == "fused":
            kernels.require("stream_attn", x)
            part = type(self.pattern or self.position).__name__
            raise ValueError(f"Softmax(kernel='fused') has no kernel for {part}; use kernel='auto'.")
        return False

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, span: Span, state: Ring) -> Tensor:
        """Calls longer than the ring has room for are taken a chunk at a time; keys are written in place."""
        left, chunk = span.context.memory(), span.context.latency()
        room = state.cache.shape[3] - left
        scores, slots = self.position.key_scores(position), kernels.rows(len(q), q.device)
        options: dict[str, Any] = dict(chunk=chunk, left=left, scale=self.width**-0.5)
        options |= self.position.fused(span.context, q)
        pieces = []
        for first in range(0, q.shape[1], room):
            now = slice(first, first + room)
            start, lengths = span.start, span.lengths
            if q.shape[1] > room:
                start, lengths = start + first, (lengths - first).clamp(0, room)
            if scores is not None:
                options |= dict(cache_bias=state.scores, key_bias=scores[:, now])
            pieces.append(
                torch.ops.speechkit.stream_attn(
                    q[:, now], k[:, now], v[:, now], state.cache, slots, start, lengths, **options
                )
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _project(self, x: Float[Tensor, "B U D"]) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.query(x).unflatten(-1, (self.heads, self.width)),  # [B, U, H, K]
            self.key(x).unflatten(-1, (self.kv_heads, self.width)),
            self.value(x).unflatten(-1, (self.kv_heads, self.width)),
        )
