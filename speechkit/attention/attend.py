"""One function, three ways: softmax attention over the keys that a `Context` shows.

``reference`` is the definition, dense and explicit, and what the tests believe. ``sdpa`` is the same through torch's
fused operator with a dense mask. ``windowed`` is exact too, and does only the work the context leaves: queries are cut
into blocks, and each block meets its own window of keys. On 60 s of audio that is many times less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from speechkit.attention.positions import ScoreTerm
from speechkit.stream import Context, Everything, Span, keep_valid, valid

Pattern = Callable[[Tensor, Tensor], Tensor]
"""``pattern(query [B, U, 1], key [B, 1, S]) -> bool``: which pairs to keep. It can only narrow the context."""

Kernel = Literal["auto", "reference", "sdpa", "windowed"]
Query = Float[Tensor, "B U H K"]
Values = Float[Tensor, "B U H V"]


def attend(
    q: Query,
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    span: Span,
    *,
    term: ScoreTerm | None = None,
    pattern: Pattern | None = None,
    dropout: float = 0.0,
    kernel: Kernel = "auto",
) -> Values:
    """Attention of the U frames of this call over S keys: those remembered and the same U frames.

    ``out[i] = sum_j softmax_j(q_i . k_j / sqrt(K) + bias_ij) v_j`` over the keys j that ``span.context`` shows, that
    are real (``0 <= position < start + length``) and that ``pattern`` keeps. A query that sees nothing, and one past
    the length, gives 0 and has no gradient. What nobody sees may hold anything, NaN included.

    Args:
        q, k, v: queries, keys, values; H is a multiple of the G key heads (1 is multi-query attention).
        span: where the frames stand. ``windowed`` relies on ``span.start`` being whole chunks, as a stream's is.
        term: positions, see `ScoreTerm`; ``q`` and ``k`` are already placed. Another scale is a ``place`` that
            multiplies the queries.
        dropout: share of the attention weights dropped.
        kernel: ``auto`` takes ``windowed`` where it does less work, else ``sdpa``.

    Raises:
        ValueError: for a kernel that cannot serve this context, or heads that do not divide.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attend: heads must be a multiple of the key heads, {k.shape[2]}, but are {q.shape[2]}.")
    if kernel == "reference":
        return _reference(q, k, v, span, term, pattern, dropout)
    if kernel != "windowed" and q.shape[1] == k.shape[1] and pattern is None and _is_whole(span.context, term):
        return _whole(q, k, v, span, dropout)
    blocks = None if kernel == "sdpa" else _blocks(span.context)
    if kernel == "windowed" and blocks is None:
        raise ValueError(
            f"attend(kernel='windowed') needs a context with finite left, chunk and right, but has {span.context}; "
            f"use kernel='auto'."
        )
    U, S = q.shape[1], k.shape[1]
    if blocks is None or (kernel == "auto" and not blocks.pay(U, S)):
        blocks = Blocks(size=max(1, U), before=S - U, after=0)
    return _fused(q, k, v, span, blocks, term, pattern, dropout)


def _reference(
    q: Query,
    k: Tensor,
    v: Tensor,
    span: Span,
    term: ScoreTerm | None,
    pattern: Pattern | None,
    dropout: float,
) -> Values:
    U, S = q.shape[1], k.shape[1]
    query, key = span.positions(U), span.positions(U, S - U)
    end = (span.start + span.lengths)[:, None]
    visible = span.context.visible(query, key) & (key < end)[:, None] & (query < end)[:, :, None]  # [B, U, S]
    if pattern is not None:
        visible = visible & pattern(query[:, :, None], key[:, None, :])
    q = torch.where(visible.any(2)[:, :, None, None], q, 0)
    k, v = (torch.where(visible.any(1)[:, :, None, None], x, 0) for x in (k, v))
    scores = torch.einsum("buhk,bhsk->bhus", q, _share(k, q.shape[2])) * q.shape[-1] ** -0.5
    bias = None if term is None else term.bias(q, query, key)
    scores = (scores if bias is None else scores + bias).masked_fill(~visible[:, None], -torch.inf)
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))  # no visible key: weights 0
    weights = F.dropout(weights, dropout)
    return torch.einsum("bhus,bhsv->buhv", weights, _share(v, q.shape[2]))


def _is_whole(context: Context, term: ScoreTerm | None) -> bool:
    """Whether all queries see the same keys and score them by themselves."""
    unbiased = term is None or type(term).bias is ScoreTerm.bias
    return unbiased and type(context) in (Context, Everything) and context.chunk is None


def _whole(q: Query, k: Float[Tensor, "B U G K"], v: Float[Tensor, "B U G V"], span: Span, dropout: float) -> Values:
    """Every frame sees every real one: one mask over keys serves all queries."""
    mask = None
    if not isinstance(span.context, Everything):
        q, k, v = (keep_valid(x, span.lengths) for x in (q, k, v))
        hidden = ~valid(span.lengths, q.shape[1])[:, None, None]  # [B, 1, 1, S]
        mask = q.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(q.dtype).min)
    heads = q.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), _share(k, heads), _share(v, heads), attn_mask=mask, dropout_p=dropout
    ).transpose(1, 2)
    return out if mask is None else keep_valid(out, span.lengths)


class Blocks(NamedTuple):
    """Queries in blocks of ``size``; each meets the keys from ``before`` frames before it to ``after`` behind it."""

    size: int
    before: int
    after: int

    def pay(self, queries: int, keys: int) -> bool:
        """Whether that is so much less than all pairs that it is worth cutting windows out of the keys."""
        return queries > self.size and 2 * sum(self) <= keys


def _blocks(context: Context) -> Blocks | None:
    """Blocks of whole chunks; none where a side of the context has no end.

    Small blocks waste copies of keys, large ones products that are masked: 32 frames were within a tenth of the best
    of 8 to 128 for every context that was timed, from 16 to 128 frames wide.
    """
    chunk, left, right = context.chunk, context.left, context.right
    if chunk is None or left is None or right is None:
        return None
    return Blocks(chunk * max(1, 32 // chunk), left, right)


def _fused(
    q: Query,
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    span: Span,
    blocks: Blocks,
    term: ScoreTerm | None,
    pattern: Pattern | None,
    dropout: float,
) -> Values:
    """Queries as ``[B N, size]`` against keys as ``[B N, before + size + after]``: N blocks become rows of a batch."""
    size, before, after = blocks
    U, remembered = q.shape[1], k.shape[1] - q.shape[1]
    N = max(1, -(-U // size))
    short = N * size - U
    key = span.positions(N * size + after, before)
    query = key[:, before : before + N * size]
    end = (span.start + span.lengths)[:, None]
    real = (key >= 0) & (key < end)
    k, v = (torch.where(real[:, :, None, None], _pad(x, before - remembered, short + after), 0) for x in (k, v))
    lo, hi = span.context.bounds(query[:, :U])
    lo = lo.maximum((span.start - remembered)[:, None])
    hi = torch.where(query[:, :U] < end, hi.minimum(end), 0)
    q, lo, hi = (_pad(x, 0, short) for x in (keep_valid(q, span.lengths), lo, hi))  # added queries see 0 <= key < 0
    q, query, lo, hi = (_windows(x, size, size) for x in (q, query, lo, hi))
    k, v, key = (_windows(x, sum(blocks), size) for x in (k, v, key))
    out = _sdpa(q, k, v, query, key, (lo, hi), after, term, pattern, dropout)
    return out.unflatten(0, (-1, N)).flatten(1, 2)[:, :U]


def _sdpa(
    q: Query,
    k: Tensor,
    v: Tensor,
    query: Int[Tensor, "B U"],
    key: Int[Tensor, "B S"],
    bounds: tuple[Int[Tensor, "B U"], Int[Tensor, "B U"]],
    ahead: int,
    term: ScoreTerm | None,
    pattern: Pattern | None,
    dropout: float,
) -> Values:
    """Torch's operator over keys that are all finite."""
    lo, hi = bounds
    visible = (key[:, None] >= lo[:, :, None]) & (key[:, None] < hi[:, :, None])  # [B, U, S]
    sees = lo < hi
    if pattern is not None:
        visible = visible & pattern(query[:, :, None], key[:, None, :])
        sees = visible.any(-1)
    bias = None if term is None else term.bias(q, query, key, ahead)
    bias = q.new_zeros(()) if bias is None else bias
    # the lowest finite score, because a query may see nothing and a softmax over minus infinities is NaN
    bias = torch.where(visible[:, None], bias, torch.finfo(q.dtype).min)
    q, k, v = q.transpose(1, 2), _share(k, q.shape[2]), _share(v, q.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).transpose(1, 2)
    return out * sees[:, :, None, None]


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    """Zeros before and after axis 1; negative numbers cut."""
    return x if before == after == 0 else F.pad(x, (0, 0) * (x.dim() - 2) + (before, after))


def _windows(x: Tensor, size: int, step: int) -> Tensor:
    """``[B, S, ...] -> [B N, size, ...]``, overlapping."""
    return x if x.shape[1] == size else x.unfold(1, size, step).movedim(-1, 2).flatten(0, 1)


def _share(x: Float[Tensor, "B S G K"], heads: int) -> Float[Tensor, "B H S K"]:
    """Each of the G key heads serves ``heads / G`` neighbouring queries' heads."""
    x = x.transpose(1, 2)
    group = heads // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)
