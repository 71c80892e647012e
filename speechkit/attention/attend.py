"""One function, three ways: softmax attention over the keys that a `Context` shows.

``reference`` is the definition, dense and explicit, and what the tests believe. ``sdpa`` is the same through torch's
fused operator with a dense mask. ``windowed`` is exact too, and does only the work the context leaves: queries are cut
into chunks, and each chunk meets its own window of ``left + chunk`` keys. On 60 s of audio that is many times less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speechkit.attention.positions import ScoreTerm
from speechkit.stream import Span

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
    are real (``0 <= position < start + length``) and that ``pattern`` keeps. A query that sees nothing gives 0.

    Args:
        q, k, v: queries, keys, values; H is a multiple of the G key heads (1 is multi-query attention).
        span: where the frames stand. ``windowed`` relies on ``span.start`` being whole chunks, as a stream's is.
        term: positions, see `ScoreTerm`; ``q`` and ``k`` are already placed.
        dropout: share of the attention weights dropped.
        kernel: ``auto`` takes ``windowed`` where it does less work, else ``sdpa``.

    Raises:
        ValueError: for a kernel that cannot serve this context, or heads that do not divide.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attend: heads must be a multiple of the key heads, {k.shape[2]}, but are {q.shape[2]}.")
    if kernel == "auto":
        kernel = "windowed" if _windows_pay(q, k, span) else "sdpa"
    if kernel == "windowed":
        return _windowed(q, k, v, span, term, pattern, dropout)
    before = k.shape[1] - q.shape[1]
    query, key = span.positions(q.shape[1]), span.positions(q.shape[1], before)
    visible = span.context.visible(query, key) & (key < (span.start + span.lengths)[:, None])[:, None]
    dense = {"reference": _reference, "sdpa": _sdpa}[kernel]
    return dense(q, k, v, query, key, visible, term, pattern, dropout)


def _scores_to_add(
    q: Query, query: Tensor, key: Tensor, visible: Tensor, term: ScoreTerm | None, pattern: Pattern | None
) -> tuple[Tensor, Tensor | None]:
    """The bias with hidden pairs at the lowest finite score, and which queries see anything (None: all that matter).

    The lowest finite score rather than minus infinity, because a padded query may see nothing, and a softmax over
    minus infinities is NaN.
    """
    seeing = None
    if pattern is not None:
        visible = visible & pattern(query[:, :, None], key[:, None, :])
        seeing = visible.any(-1)[:, :, None, None]  # [B, U, 1, 1]
    bias = None if term is None else term.bias(q, query, key)
    bias = q.new_zeros(()) if bias is None else bias
    return torch.where(visible[:, None], bias, torch.finfo(q.dtype).min), seeing


def _sdpa(
    q: Query,
    k: Tensor,
    v: Tensor,
    query: Int[Tensor, "B U"],
    key: Int[Tensor, "B S"],
    visible: Bool[Tensor, "B U S"],
    term: ScoreTerm | None,
    pattern: Pattern | None,
    dropout: float,
) -> Values:
    bias, seeing = _scores_to_add(q, query, key, visible, term, pattern)
    q, k, v = q.transpose(1, 2), _share(k, q.shape[2]), _share(v, q.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).transpose(1, 2)
    return out if seeing is None else out * seeing


def _reference(
    q: Query,
    k: Tensor,
    v: Tensor,
    query: Int[Tensor, "B U"],
    key: Int[Tensor, "B S"],
    visible: Bool[Tensor, "B U S"],
    term: ScoreTerm | None,
    pattern: Pattern | None,
    dropout: float,
) -> Values:
    if pattern is not None:
        visible = visible & pattern(query[:, :, None], key[:, None, :])
    scores = torch.einsum("buhk,bhsk->bhus", q, _share(k, q.shape[2])) * q.shape[-1] ** -0.5
    bias = None if term is None else term.bias(q, query, key)
    scores = (scores if bias is None else scores + bias).masked_fill(~visible[:, None], -torch.inf)
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))  # no visible key: weights 0
    weights = F.dropout(weights, dropout)
    return torch.einsum("bhus,bhsv->buhv", weights, _share(v, q.shape[2]))


def _share(x: Float[Tensor, "B S G K"], heads: int) -> Float[Tensor, "B H S K"]:
    """Each of the G key heads serves ``heads / G`` neighbouring queries' heads."""
    x = x.transpose(1, 2)
    group = heads // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _windows_pay(q: Tensor, k: Tensor, span: Span) -> bool:
    chunk, left = span.context.chunk, span.context.left
    if chunk is None or left is None or q.shape[1] <= chunk:
        return False
    remembered = k.shape[1] - q.shape[1]
    return remembered in (0, left) and 2 * (left + chunk) <= k.shape[1]


def _windowed(
    q: Query,
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    span: Span,
    term: ScoreTerm | None,
    pattern: Pattern | None,
    dropout: float,
) -> Values:
    """Queries as ``[B N, chunk]`` against keys as ``[B N, left + chunk]``: N chunks become rows of a batch."""
    chunk, left = span.context.chunk, span.context.left
    U, remembered = q.shape[1], k.shape[1] - q.shape[1]
    if chunk is None or left is None or remembered not in (0, left):
        raise ValueError(
            f"attend(kernel='windowed') needs a context with finite left and chunk and either no or all {left} "
            f"remembered keys, but has {span.context} and {remembered}; use kernel='auto'."
        )
    N = -(-U // chunk)
    short = N * chunk - U
    query = span.positions(N * chunk)
    key = span.positions(N * chunk, left)
    real = (key >= (span.start - remembered)[:, None]) & (key >= 0) & (key < (span.start + span.lengths)[:, None])
    k, v = (F.pad(x, (0, 0, 0, 0, left - remembered, short)) for x in (k, v))
    q = F.pad(q, (0, 0, 0, 0, 0, short)).unflatten(1, (N, chunk)).flatten(0, 1)
    k, v, key, real = (_windows(x, left + chunk, chunk) for x in (k, v, key, real))
    query = query.unflatten(1, (N, chunk)).flatten(0, 1)
    visible = real[:, None].expand(-1, chunk, -1)  # a window holds just what its chunk may see
    out = _sdpa(q, k, v, query, key, visible, term, pattern, dropout)
    return out.unflatten(0, (-1, N)).flatten(1, 2)[:, :U]


def _windows(x: Tensor, size: int, step: int) -> Tensor:
    """``[B, S, ...] -> [B N, size, ...]``, overlapping."""
    return x.unfold(1, size, step).movedim(-1, 2).flatten(0, 1)
