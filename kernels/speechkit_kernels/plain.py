"""The operators in plain PyTorch: vectorised, any device and dtype, what runs where no compiled kernel does.

Meaning of `stream_attn`, for row b, head h (key head ``g = h // (H / G)``), new frame i at time ``t = pos[b] + i``:

    S[i, j] = scale * ((q_i + u) . k_j + (qp_i + v) . rel[h, rel_zero + t_j - t]) + key_bias_j - slope * |t - t_j|
    visible  <=>  i < qlen[b],  first - left <= t_j < first + size,  0 <= t_j < pos[b] + qlen[b]
    out_i = sum_j softmax_j(S[i, :]) v_j           a frame that sees nothing, and one past qlen, gives 0

where ``first, size`` are the chunk t stands in: ``t - t % chunk, chunk``, or the call itself (``pos, qlen``) when
``chunk`` is 0. Keys before ``pos`` come from the ring, where the frame of time t lies at index ``t % W``; the others
are this call's. At the end the first ``keep[b]`` of them are written into the ring. ``pos`` is advanced by the caller,
once for all layers. Nothing outside ``[max(0, pos - reach), pos)`` is ever read, so a stream is reset by ``pos = 0``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Expected = tuple[Tensor | None, tuple[int | None, ...] | None, torch.dtype | None]


def stream_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    slots: Tensor,
    pos: Tensor,
    qlen: Tensor,
    *,
    keep: Tensor | None = None,
    q_pos: Tensor | None = None,
    bias_u: Tensor | None = None,
    bias_v: Tensor | None = None,
    rel: Tensor | None = None,
    rel_zero: int = 0,
    cache_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    slopes: Tensor | None = None,
    chunk: int = 0,
    left: int,
    scale: float,
) -> Tensor:
    """Attention of C new frames a row over a ring cache, which then holds them too.

    Args:
        q, k, v: new frames, ``[B, C, H, D]``, ``[B, C, G, D]``, ``[B, C, G, D]``; H is a multiple of G.
        cache: ``[S, 2, G, W, D]``, keys and values, changed in place; ``W >= left + C``.
        slots, pos, qlen, keep: ``[B]`` int32 or int64 on the device of ``q``: row of the cache, frames already
            committed, new frames (0 to C), how many of them to commit (all, unless given). No slot may be named twice.
            With a ``chunk``, ``pos`` stands at the border of one.
        q_pos, bias_u, bias_v: the query of the position product ``[B, C, H, D]`` (q unless given); what is added to the
            query of either product, ``[H, D]``.
        rel, rel_zero: table of relative positions ``[H, P, D]``, and its row of distance 0; rows ascend with the key.
        cache_bias, key_bias: a score for each key, remembered ``[S, H, W]`` (changed in place) and new ``[B, C, H]``.
        slopes: ALiBi, ``[H]``.
        chunk, left: which keys a frame sees, see above. ``left >= 0``.

    Returns:
        ``[B, C, H, D]``.
    """
    check_attention(q, k, v, cache, slots, pos, qlen, keep, q_pos, rel, rel_zero, cache_bias, key_bias, chunk, left)
    B, C, H = q.shape[:3]
    G, W = cache.shape[2:4]
    slots, pos, qlen = slots.long(), pos.long(), qlen.long()
    frame = torch.arange(C, device=q.device)
    reach = W - C  # frames of the past that the ring is sure to hold
    past = torch.arange(-reach, 0, device=q.device)
    time = pos[:, None] + torch.cat([past, frame])  # [B, S], S = reach + C
    query = time[:, reach:]
    index = time[:, :reach] % W
    row = slots[:, None]

    first, size = (query - query % chunk, chunk) if chunk else (pos[:, None].expand_as(query), qlen[:, None, None])
    distance = time[:, None, :] - query[:, :, None]  # [B, C, S]
    from_first = time[:, None, :] - first[:, :, None]
    visible = (time >= 0)[:, None] & (from_first >= -left) & (from_first < size)
    visible = visible & (time < (pos + qlen)[:, None])[:, None] & (frame < qlen[:, None])[:, :, None]
    seen = visible.any(1)  # [B, S]: what nobody sees may hold anything, NaN included
    keys, values = (
        torch.where(seen[:, :, None, None], torch.cat([cache[row, n, :, index], new], dim=1), 0)
        for n, new in enumerate((k, v))
    )  # [B, S, G, D]

    group = H // G
    qu = q if bias_u is None else q + bias_u.to(q.dtype)
    scores = torch.einsum("bcgnd,bsgd->bgncs", qu.unflatten(2, (G, group)), keys).flatten(1, 2)
    if rel is not None:
        qp = q if q_pos is None else q_pos
        qp = qp if bias_v is None else qp + bias_v.to(q.dtype)
        band = torch.einsum("bchd,hpd->bhcp", qp, rel)
        row_of = (rel_zero + distance[:1]).clamp(0, rel.shape[1] - 1)  # the same for every row b
        scores = scores + band.gather(3, row_of[:, None].expand(B, H, -1, -1))
    scores = scores * scale
    if cache_bias is not None and key_bias is not None:
        remembered = cache_bias[row, :, index]  # [B, reach, H]
        each = torch.where(seen[:, :, None], torch.cat([remembered, key_bias.to(cache_bias.dtype)], dim=1), 0)
        scores = scores + each.transpose(1, 2)[:, :, None].to(scores.dtype)
    if slopes is not None:
        scores = scores - (slopes.to(scores.dtype)[:, None, None] * distance[:, None].abs())
    weights = torch.softmax(scores.masked_fill(~visible[:, None], -torch.inf), dim=-1)
    weights = torch.where(visible.any(-1)[:, None, :, None], weights, 0)
    out = torch.einsum("bgncs,bsgd->bcgnd", weights.unflatten(1, (G, group)).to(values.dtype), values).flatten(2, 3)

    commit = frame < (qlen if keep is None else qlen.minimum(keep.long()))[:, None]  # [B, C]
    spot = query % W
    for n, new in enumerate((k, v)):
        cache[row, n, :, spot] = torch.where(commit[:, :, None, None], new.to(cache.dtype), cache[row, n, :, spot])
    if cache_bias is not None and key_bias is not None:
        new = key_bias.to(cache_bias.dtype)
        cache_bias[row, :, spot] = torch.where(commit[:, :, None], new, cache_bias[row, :, spot])
    return out


def conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor,
    slots: Tensor,
    qlen: Tensor,
    *,
    gated: bool,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The inside of a Conformer's convolution module: ``silu(norm(depthwise(gate(x))))`` over remembered frames.

    Args:
        x: new frames; ``[B, C, 2 D]`` when ``gated`` (the first half times the sigmoid of the second), else
            ``[B, C, D]``, which SiLU is applied to.
        weight, bias: one causal filter a channel, ``[D, K]``, ``[D]``; a batch norm is folded into them by the caller.
        cache: ``[S, K - 1, D]``, the last ``K - 1`` gated frames of each stream, zeros at its start; changed in place.
        slots, qlen: ``[B]`` int32 or int64: row of the cache, new frames (0 to C). No slot may be named twice.
        norm_weight, norm_bias, eps: layer norm over the D channels, ``[D]``; no norm unless given.

    Returns:
        ``[B, C, D]``; frames past ``qlen`` are 0.
    """
    check_convolution(x, weight, bias, cache, slots, qlen, gated, norm_weight, norm_bias)
    row, qlen = slots.long(), qlen.long()
    frame = torch.arange(x.shape[1], device=x.device)
    real = (frame < qlen[:, None])[:, :, None]
    new = torch.where(real, F.glu(x, dim=-1) if gated else F.silu(x), 0)
    seen = torch.cat([cache[row], new], dim=1)  # [B, K - 1 + C, D]
    last = qlen[:, None] + torch.arange(cache.shape[1], device=x.device)
    cache[row] = seen.gather(1, last[:, :, None].expand(-1, -1, seen.shape[2]))
    y = F.conv1d(seen.transpose(1, 2), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    if norm_weight is not None:
        y = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps)
    return torch.where(real, F.silu(y), 0)


def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: Tensor | None = None,
    silu: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    add: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """``add + factor * act(norm(x) W^T + bias)``, computed in float32 whatever the weight is kept in.

    Only the weight loses accuracy when it is kept in fewer bits: x is never rounded. In compiled kernels a row's result
    is the same, bit for bit, whatever other rows it comes with: a stream does not depend on who else is connected.

    Args:
        x: ``[..., K]``, float32, strided in any way.
        weight: ``[N, K]``, the numbers of a row side by side: float32, bfloat16, or int8, which `scale` multiplies. Or
            such a weight as `linear_pack` lays it out, ``[P, K, 16]``: N is then the length of ``bias``, and 16 P
            where there is none.
        bias, scale: ``[N]`` float32; a scale comes with int8 and with nothing else.
        silu: act is SiLU; nothing unless given.
        norm_weight, norm_bias, eps: layer norm of x over its K numbers, ``[K]`` float32; no norm unless given.
        add: ``[..., N]`` float32, strided in any way, for example what a residual connection goes around.
        factor: of what is added to it.

    Returns:
        ``[..., N]``, float32.
    """
    check_linear(x, weight, bias, scale, norm_weight, norm_bias, add)
    if weight.dim() == 3:
        weight = linear_unpack(weight, linear_outputs(weight, bias))
    if norm_weight is not None:
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    wide = weight.to(x.dtype)
    y = F.linear(x, wide if scale is None else wide * scale[:, None], bias)
    y = (F.silu(y) if silu else y) * factor
    return y if add is None else add + y


COLUMNS = 16
"""Rows of a weight that a panel of a packed one holds."""


def linear_pack(weight: Tensor) -> Tensor:
    """The weight of `linear_step` as compiled kernels read it fastest; for whoever calls with the same one many times.

    Numbers of 16 rows lie side by side, so that 16 results are summed in the lanes of a vector and nothing is added up
    across lanes. Rows of zeros fill the last panel.

    Args:
        weight: ``[N, K]``, of any type.

    Returns:
        ``[P, K, 16]`` with P = N / 16 rounded up; ``[p, k, n]`` is ``weight[16 p + n, k]``.

    Raises:
        ValueError: for another shape.
    """
    if weight.dim() != 2:
        raise ValueError(f"linear_pack: weight must be [any, any], but has the shape {list(weight.shape)}.")
    N, K = weight.shape
    panels = -(-N // COLUMNS)
    filled = F.pad(weight, (0, 0, 0, panels * COLUMNS - N))
    return filled.reshape(panels, COLUMNS, K).transpose(1, 2).contiguous()


def linear_unpack(weight: Tensor, rows: int) -> Tensor:
    """The first ``rows`` rows of what `linear_pack` was given, ``[rows, K]``."""
    panels, K, _ = weight.shape
    return weight.transpose(1, 2).reshape(panels * COLUMNS, K)[:rows]


def linear_outputs(weight: Tensor, bias: Tensor | None) -> int:
    """Numbers of a row of the result of `linear_step`."""
    if weight.dim() == 2:
        return weight.shape[0]
    return weight.shape[0] * COLUMNS if bias is None else bias.numel()


def subsample_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    lengths: Tensor,
    *,
    relu: bool = False,
    depthwise: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    depthwise_tail: Tensor | None = None,
) -> Tensor:
    """A stage of subsampling, or two: half the frames and half the bands, by a convolution of 3x3 with stride 2.

    Output frame u is made of the frames ``2 u - S`` to ``2 u - S + 2``, counted from the first new one, and output band
    g of the bands ``2 g - S`` to ``2 g - S + 2``; frames past ``lengths`` and bands that do not exist are zeros.

    Args:
        x: new frames, ``[B, T, F, C]``, channels last. C is 1, which each filter hears, or D, each for its own filter.
        weight, bias: ``[D, 3, 3]`` (filter, frame, band), ``[D]``.
        tail: ``[B, S, F, C]``, the last S frames of each stream, zeros at its start, S 1 or 2; changed in place.
        lengths: ``[B]`` int32 or int64: new frames (0 to T).
        relu: whether ReLU follows.
        depthwise, depthwise_bias, depthwise_tail: filters of a second stage without ReLU, ``[D, 3, 3]``, ``[D]``, each
            for its own channel of what the first gives; and the last S frames of that, ``[B, S, F', D]``, as ``tail``.

    Returns:
        ``[B, ceil(T / 2), F' = (F + S) // 2, D]``; frames from ``ceil(lengths / 2)`` on are 0. Of a second stage, the
        same once more.
    """
    check_subsampling(x, weight, bias, tail, lengths, depthwise, depthwise_bias, depthwise_tail)
    lengths = lengths.long()
    y = _halve(x, weight, bias, tail, lengths)
    y = F.relu(y) if relu else y
    if depthwise is None or depthwise_tail is None:
        return y
    return _halve(y, depthwise, depthwise_bias, depthwise_tail, (lengths + 1) // 2)


def _halve(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, lengths: Tensor) -> Tensor:
    """The convolution; it moves ``tail`` on."""
    T, bands, S = x.shape[1], x.shape[2], tail.shape[1]
    seen = torch.cat([tail, torch.where(_before(lengths, T), x, 0)], dim=1)  # [B, S + T, F, C]
    last = lengths[:, None] + torch.arange(S, device=x.device)
    tail.copy_(seen.gather(1, last[:, :, None, None].expand_as(tail)))
    seen = F.pad(seen, (0, 0, S, 2, 0, 2)).permute(0, 3, 1, 2)  # as much as the last output needs, or more
    y = F.conv2d(seen, weight[:, None], bias, 2, groups=x.shape[3]).permute(0, 2, 3, 1)
    y = y[:, : (T + 1) // 2, : (bands + S) // 2]
    return torch.where(_before((lengths + 1) // 2, y.shape[1]), y, 0)


def _before(lengths: Tensor, frames: int) -> Tensor:
    """Which of ``frames`` frames are real, ``[B, frames, 1, 1]``."""
    return (torch.arange(frames, device=lengths.device) < lengths[:, None])[:, :, None, None]


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    slots: Tensor,
    pos: Tensor,
    qlen: Tensor,
    keep: Tensor | None,
    q_pos: Tensor | None,
    rel: Tensor | None,
    rel_zero: int,
    cache_bias: Tensor | None,
    key_bias: Tensor | None,
    chunk: int,
    left: int,
) -> None:
    """What shapes and types alone can tell; nothing is read from a device.

    Raises:
        ValueError: naming the argument, what it must be and what it is.
    """
    if q.dim() != 4:
        raise ValueError(f"stream_attn: q must be [batch, frames, heads, width], but has the shape {list(q.shape)}.")
    B, C, H, D = q.shape
    if k.dim() != 4 or k.shape[:2] != (B, C) or k.shape[3] != D or k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(
            f"stream_attn: k must be [{B}, {C}, key heads that divide {H}, {D}], but has the shape {list(k.shape)}."
        )
    G = k.shape[2]
    if cache.dim() != 5 or cache.shape[1:3] != (2, G) or cache.shape[4] != D:
        raise ValueError(f"stream_attn: cache must be [slots, 2, {G}, W, {D}], but has the shape {list(cache.shape)}.")
    S, W = cache.shape[0], cache.shape[3]
    if chunk < 0 or left < 0:
        raise ValueError(f"stream_attn: chunk and left must be 0 or more, but are {chunk} and {left}.")
    if left + C > W:
        raise ValueError(
            f"stream_attn: cache must remember at least left + frames = {left + C}, but W is {W}; make it longer, or "
            f"feed fewer frames a call."
        )
    back = left + (chunk or C) - 1
    if rel is not None and (rel_zero < back or rel_zero + C > rel.shape[-2]):
        raise ValueError(
            f"stream_attn: rel must have rows for the distances -{back} to {C - 1} around rel_zero, {rel_zero}, but "
            f"has the shape {list(rel.shape)}."
        )
    if (cache_bias is None) != (key_bias is None):
        raise ValueError("stream_attn: cache_bias and key_bias must be given together, but one is None.")
    expected: dict[str, Expected] = {
        "v": (v, (B, C, G, D), q.dtype),
        "q_pos": (q_pos, (B, C, H, D), q.dtype),
        "rel": (rel, (H, None if rel is None else rel.shape[-2], D), q.dtype),
        "cache_bias": (cache_bias, (S, H, W), torch.float32 if q.dtype != torch.float64 else q.dtype),
        "key_bias": (key_bias, (B, C, H), None),
    }
    _expect("stream_attn", q, {"k": (k, (B, C, G, D), q.dtype), "cache": (cache, None, q.dtype), **expected})
    _expect_rows("stream_attn", q, {"slots": slots, "pos": pos, "qlen": qlen, "keep": keep})


def check_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor,
    slots: Tensor,
    qlen: Tensor,
    gated: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    """As `check_attention`."""
    if weight.dim() != 2:
        raise ValueError(f"conv_step: weight must be [channels, taps], but has the shape {list(weight.shape)}.")
    D, K = weight.shape
    width = 2 * D if gated else D
    if x.dim() != 3 or x.shape[2] != width:
        raise ValueError(f"conv_step: x must be [batch, frames, {width}], but has the shape {list(x.shape)}.")
    if cache.dim() != 3 or cache.shape[1:] != (K - 1, D):
        raise ValueError(f"conv_step: cache must be [slots, {K - 1}, {D}], but has the shape {list(cache.shape)}.")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("conv_step: norm_weight and norm_bias must be given together, but one is None.")
    expected: dict[str, Expected] = {"bias": (bias, (D,), x.dtype), "norm_weight": (norm_weight, (D,), x.dtype)}
    expected |= {"norm_bias": (norm_bias, (D,), x.dtype), "weight": (weight, None, x.dtype)}
    _expect("conv_step", x, {"cache": (cache, None, x.dtype), **expected})
    _expect_rows("conv_step", x, {"slots": slots, "qlen": qlen})


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    add: Tensor | None,
) -> None:
    """As `check_attention`."""
    packed = weight.dim() == 3
    if weight.dim() != 2 and weight.shape[2:] != (COLUMNS,):
        shape = "[any, any, 16]" if packed else "[any, any]"
        raise ValueError(f"linear_step: weight must be {shape}, but has the shape {list(weight.shape)}.")
    N, K, most = linear_outputs(weight, bias), weight.shape[1], weight.shape[0] * COLUMNS
    if packed and not most - COLUMNS < N <= most:
        raise ValueError(
            f"linear_step: bias must have {most - COLUMNS + 1} to {most} numbers with a packed weight of the shape "
            f"{list(weight.shape)}, or be None, but has {N}."
        )
    if x.dtype != torch.float32:
        raise ValueError(f"linear_step: x must be torch.float32, but is {x.dtype}.")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"linear_step: x must be [..., {K}], but has the shape {list(x.shape)}.")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(
            f"linear_step: weight must be torch.float32, torch.bfloat16 or torch.int8, but is {weight.dtype}."
        )
    if (weight.dtype == torch.int8) != (scale is not None):
        raise ValueError(
            f"linear_step: scale must be given with a weight of torch.int8 and with no other, but "
            f"{'is None' if scale is None else 'is given'}."
        )
    if packed and not weight.is_contiguous():
        raise ValueError("linear_step: weight must be contiguous where it is packed; make it so, once.")
    if not packed and K > 1 and weight.stride(1) != 1:
        raise ValueError(
            f"linear_step: weight must have the numbers of a row side by side, but their stride is {weight.stride(1)}; "
            f"make it contiguous, once."
        )
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("linear_step: norm_weight and norm_bias must be given together, but one is None.")
    expected: dict[str, Expected] = {"bias": (bias, (N,), x.dtype), "scale": (scale, (N,), x.dtype)}
    expected |= {"norm_weight": (norm_weight, (K,), x.dtype), "norm_bias": (norm_bias, (K,), x.dtype)}
    expected |= {"add": (add, (*x.shape[:-1], N), x.dtype)}
    _expect("linear_step", x, {"weight": (weight, None, None), **expected})


def check_subsampling(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    lengths: Tensor,
    depthwise: Tensor | None,
    depthwise_bias: Tensor | None,
    depthwise_tail: Tensor | None,
) -> None:
    """As `check_attention`."""
    if weight.dim() != 3 or weight.shape[1:] != (3, 3):
        raise ValueError(f"subsample_step: weight must be [any, 3, 3], but has the shape {list(weight.shape)}.")
    D = weight.shape[0]
    if x.dim() != 4:
        raise ValueError(f"subsample_step: x must be [any, any, any, any], but has the shape {list(x.shape)}.")
    B, _, bands, C = x.shape
    if C not in (1, D):
        raise ValueError(f"subsample_step: x must have 1 channel or the {D} of weight, but has {C}.")
    if tail.dim() != 4 or (tail.shape[0], *tail.shape[2:]) != (B, bands, C):
        raise ValueError(
            f"subsample_step: tail must be [{B}, any, {bands}, {C}], but has the shape {list(tail.shape)}."
        )
    S = tail.shape[1]
    if S not in (1, 2):
        raise ValueError(f"subsample_step: tail must hold 1 or 2 frames, but holds {S}.")
    if (depthwise is None) != (depthwise_tail is None) or (depthwise is None and depthwise_bias is not None):
        raise ValueError(
            "subsample_step: depthwise and depthwise_tail must be given together, and depthwise_bias only with them, "
            "but one is None."
        )
    expected: dict[str, Expected] = {"bias": (bias, (D,), x.dtype), "tail": (tail, None, x.dtype)}
    expected |= {"depthwise": (depthwise, (D, 3, 3), x.dtype), "depthwise_bias": (depthwise_bias, (D,), x.dtype)}
    expected |= {"depthwise_tail": (depthwise_tail, (B, S, (bands + S) // 2, D), x.dtype)}
    _expect("subsample_step", x, {"weight": (weight, None, x.dtype), **expected})
    _expect_rows("subsample_step", x, {"lengths": lengths})


def _expect(operator: str, like: Tensor, expected: dict[str, Expected]) -> None:
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{operator}: {name} must be {list(shape)}, but has the shape {list(tensor.shape)}.")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{operator}: {name} must be {dtype}, but is {tensor.dtype}.")
        if tensor.device != like.device:
            raise ValueError(f"{operator}: {name} must be on {like.device}, but is on {tensor.device}.")


def _expect_rows(operator: str, like: Tensor, rows: dict[str, Tensor | None]) -> None:
    for name, tensor in rows.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != (like.shape[0],):
            raise ValueError(f"{operator}: {name} must be [{like.shape[0]}], but has the shape {list(tensor.shape)}.")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{operator}: {name} must be int32 or int64, but is {tensor.dtype}.")
        if tensor.device != like.device:
            raise ValueError(f"{operator}: {name} must be on {like.device}, but is on {tensor.device}.")
